"""Tensors in the pickles of torch.save: which storage they are of, and how they lie in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from sharded_radam.checkpoint.format.pickles import PERSISTENT, Instance, Name

DTYPE = re.compile(r"torch\.(b?float|complex|u?int|bool|half|double|short|long)\w*")
"""Names that may be those of a dtype."""

UNTYPED = "torch.storage.UntypedStorage"
STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
}
TENSOR, TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
"""The functions that a pickle calls for a tensor, with a storage of its dtype, or of bytes."""


class Layout(NamedTuple):
    """A dense tensor in a storage of ``numel`` elements, which has the number ``key``; and nothing else."""

    key: str
    numel: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def describe(
    name: Name, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *others: Any
) -> tuple[Layout, bool, Mapping[str, Any]]:
    """What torch's functions make of their arguments: a layout, whether it requires grad, and what it is a view by."""
    kind, key, numel = _take_storage(storage)
    if name == TENSOR:
        dtype = STORAGES[kind]
    else:
        dtype, *others = others  # type: ignore[assignment]
        if kind != UNTYPED or not isinstance(dtype, torch.dtype):
            raise TypeError("a tensor without a dtype")
        numel, rest = divmod(numel, dtype.itemsize)
        if rest:
            raise ValueError("a storage of another size")
    (views,) = others or (None,)
    if hooks or not isinstance(views, (dict, type(None))):
        raise TypeError("a tensor with hooks, or of another kind than dense")
    _check_layout(offset, size, stride, numel)
    return Layout(key, numel, dtype, size, stride, offset), requires_grad is True, views or {}


def _take_storage(storage: Any) -> tuple[str, str, int]:
    """Class, key and size of a storage, which torch.save keeps beside the pickle."""
    if type(storage) is not Instance or storage.name != PERSISTENT or type(storage.args[0]) is not tuple:
        raise TypeError("a tensor without a storage")
    kind, name, key, location, numel = storage.args[0]
    if kind != "storage" or type(name) is not Name or type(key) is not str or type(numel) is not int or numel < 0:
        raise TypeError("a storage of another kind")
    if location == "meta":
        raise TypeError("a tensor without data, on the device meta")
    return name, key, numel


def _check_layout(offset: Any, size: Any, stride: Any, numel: int) -> None:
    """Raise unless a tensor lies within a storage of so many elements."""
    if type(offset) is not int or type(size) is not tuple or type(stride) is not tuple:
        raise TypeError("a tensor without a shape")
    if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
        raise TypeError("a shape that is not made of integers")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if (0 not in size and last >= numel) or offset > numel:
        raise ValueError("a tensor that is larger than its storage")


def dtype_of(name: Name) -> torch.dtype:
    """The dtype of a name; TypeError if it is another thing's."""
    dtype = getattr(torch, name.removeprefix("torch."), None) if DTYPE.fullmatch(name) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} in the place of a value")
    return dtype
