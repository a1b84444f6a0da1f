"""Values that users keep beside the moments: which can be saved, and the types in which they come back.

numpy's numbers become Python's, its arrays tensors. numpy is never imported: whoever has a value of it has done so.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

_DEEPEST = 90
_PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.Size}


def plain(value: Any, name: str) -> Any:
    """A value as ``torch.load(weights_only=True)`` gives it back; containers are new, tensors on CPU and detached.

    Args:
        value: tensors, numbers, text, bytes, None, and dicts, lists, tuples and sets of these.
        name: of the value, for errors.

    Raises:
        ValueError: it has something else in it, which could be saved but not be loaded; the text says where.
    """
    return _rebuild(value, _savable, name)


def without_numpy(value: Any, name: str) -> Any:
    """The same value with Python's numbers and torch's tensors in the place of numpy's; everything else stays."""
    return _rebuild(value, lambda leaf, _: _from_numpy(leaf), name)


def copied(value: Any, device: torch.device) -> Any:
    """A copy of a loaded value with its tensors on a device."""
    return _rebuild(
        value, lambda leaf, _: leaf.to(device, copy=True) if is_dense_tensor(leaf) else deepcopy(leaf), "value"
    )


def equal(one: Any, other: Any) -> bool:
    """Whether two values have the same content: tensors by their elements, a tensor of one as a number."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        tensor, value = (one, other) if isinstance(one, Tensor) else (other, one)
        return isinstance(value, (int, float, complex)) and tensor.dim() == 0 and bool(tensor.item() == value)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def _rebuild(value: Any, change: Callable[[Any, str], Any], name: str, depth: int = 0) -> Any:
    """The containers of a value anew, and in them what ``change(leaf, name)`` makes of each leaf."""
    if depth > _DEEPEST:
        raise ValueError(f"{name:.100}... is nested more than {_DEEPEST} deep, or contains itself")

    def within(item: Any, at: object) -> Any:
        return item if type(item) in _PLAIN else _rebuild(item, change, f"{name}[{at!r:.50}]", depth + 1)

    kind = type(value)
    if kind in (dict, OrderedDict, Counter):
        if keys := [key for key in value if isinstance(key, Tensor)]:
            raise ValueError(f"{name} has the tensor {keys[0]} as a key: use a number or text")
        return kind({within(key, key): within(item, key) for key, item in value.items()})
    if kind in (list, tuple, set):
        return kind(within(item, at) for at, item in enumerate(value))
    return change(value, name)


def _savable(leaf: Any, name: str) -> Any:
    found = _from_numpy(leaf)
    if is_dense_tensor(found):
        return _alone(found.detach().cpu())
    if type(found) in _PLAIN:
        return found
    raise ValueError(
        f"{name} is a {type(leaf).__module__}.{type(leaf).__qualname__}, which cannot be saved. Expected dense "
        "tensors, numbers, text, bytes, None, and dicts, lists, tuples and sets of these"
    )


def is_dense_tensor(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a tensor that has memory, and is of no special kind."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def _alone(tensor: Tensor) -> Tensor:
    """With no more memory than it needs: torch.save writes all that a view is a part of."""
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


def _from_numpy(leaf: Any) -> Any:
    numpy: Any = sys.modules.get("numpy")
    if numpy is None or not isinstance(leaf, (numpy.generic, numpy.ndarray)):
        return leaf
    if isinstance(leaf, numpy.generic):
        number = leaf.item()
        if isinstance(number, numpy.generic):  # a long double, which Python has no type for
            return complex(number) if isinstance(number, numpy.complexfloating) else float(number)
        return number
    if type(leaf) not in (numpy.ndarray, numpy.memmap) or leaf.dtype.kind not in "biufc":
        return leaf  # a masked one would lose its mask
    if leaf.dtype.itemsize > (16 if leaf.dtype.kind == "c" else 8):  # of long doubles
        return leaf
    return torch.from_numpy(numpy.array(leaf, dtype=leaf.dtype.newbyteorder("="), order="C"))
