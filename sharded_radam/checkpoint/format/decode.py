"""Values in the bytes that torch.save made of them, without running any code of the file, and without torch.load.

What ``torch.load(weights_only=True)`` allows takes as much memory as a file asks for, and nests and hashes whatever it
is given. Here a pickle is parsed as data (``pickles.py``). Then plain values are made of it, in memory that
its bytes account for: numbers, texts, bytes, lists, tuples, sets, dicts, counters, sizes, dtypes,
devices, and dense tensors with the sharing of memory that they were saved with.
"""

from __future__ import annotations

import math
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_radam.checkpoint.format.errors import DamagedError, ForbiddenError
from sharded_radam.checkpoint.format.makers import MAKERS, SCALARS, check_keys, set_attributes
from sharded_radam.checkpoint.format.pickles import Instance, Name, Ordered, Pairs, parse
from sharded_radam.checkpoint.format.records import Ends, Record, find_records
from sharded_radam.checkpoint.format.tensors import (
    DTYPE,
    STORAGES,
    TENSOR,
    TENSOR_OF_DTYPE,
    UNTYPED,
    Layout,
    describe,
    dtype_of,
)

_DEEPEST = 100
"""Levels of containers in each other."""

_LONGEST_KEY = 100
"""Parts of a key of a dict."""

_LEAST_PARTS, _MOST_SHARING = 1000, 100
"""So many parts a value may have in any case, and so many more for each byte of its pickle."""

_SMALL = 2**20
"""Bytes that a tensor may have whatever its chunk has: an expanded one, say."""

_LONGEST_KEPT, _MOST_KEPT = 1000, 500
"""Bytes of a pickle, and how many pickles, of which the layout is remembered."""

_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_NAMES = {*MAKERS, *STORAGES, UNTYPED, TENSOR, TENSOR_OF_DTYPE, _WITH_ATTRIBUTES}
_NAMES |= {"torch.Tensor", "collections.OrderedDict"}


def decode(content: memoryview) -> Any:
    """Return the value that was saved, in memory of its own.

    Raises:
        ForbiddenError: it is made of something else than plain values.
        DamagedError: these bytes are no such value, or one that would take more memory or time than they account for.
    """
    with _refusing():
        chunk = _Chunk(content)
        return _Values(chunk, own=True).make(chunk.tree, 0).value


def decode_tensor(content: memoryview) -> Tensor:
    """Return the tensor that was saved, as a view of ``content`` if that has the byte order of this machine.

    Raises:
        ForbiddenError: it is made of something else than plain values.
        DamagedError: these bytes are no dense tensor.
    """
    with _refusing():
        chunk = _Chunk(content)
        if (layout := chunk.layout()) is not None:
            start = chunk.start(layout)
            view = torch.frombuffer(content, dtype=layout.dtype, count=layout.numel, offset=start)
            return view.as_strided(layout.size, layout.stride, layout.offset)
        value = _Values(chunk, own=False).make(chunk.tree, 0).value
    if not isinstance(value, Tensor):
        raise DamagedError(f"a {type(value).__name__}, expected a tensor")
    if value.nbytes > len(content):
        raise DamagedError("more elements than are saved")
    return value


def locate_tensor(content: Ends) -> tuple[Layout, int] | None:
    """Where the elements of a large tensor are, of whose chunk there are the ends.

    Returns:
        The tensor's layout, and its first element's byte. None if that is not so simple; :func:`decode_tensor` says
        what it is.
    """
    try:
        with _refusing():
            chunk = _Chunk(content)
            layout = chunk.layout()
            return None if layout is None else (layout, chunk.start(layout) + layout.offset * layout.dtype.itemsize)
    except ValueError:
        return None


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (DamagedError, ForbiddenError):
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, struct.error) as error:
        why = str(error).partition("\n")[0]
        raise DamagedError(f"cannot be read as a plain value: {type(error).__name__}: {why:.200}") from error


def _check_name(name: str) -> None:
    if name not in _NAMES and not DTYPE.fullmatch(name):
        raise ForbiddenError(
            f"it needs {name}, which is no plain value, so it was not read. Expected numbers, texts, dense tensors, "
            "and dicts, lists, tuples and sets of these"
        )


class _Chunk:
    """The records of a chunk, and its pickle."""

    def __init__(self, content: memoryview | Ends) -> None:
        self.content = content
        self.records = find_records(content)
        self._pickled = self._read("data.pkl")
        self.most_parts = _LEAST_PARTS + _MOST_SHARING * len(self._pickled)
        order = self._read("byteorder") if "byteorder" in self.records else b"little"
        self.is_foreign = order.decode() != sys.byteorder

    @property
    def tree(self) -> Any:
        return _tree(self._pickled)

    def layout(self) -> Layout | None:
        """Of a tensor that is as the bytes are; None of any other value."""
        is_short = len(self._pickled) <= _LONGEST_KEPT
        layout = None if self.is_foreign or not is_short else _layout(self._pickled)
        if layout is not None and math.prod(layout.size) * layout.dtype.itemsize > len(self.content):
            raise ValueError("more elements than are saved")
        return layout

    def start(self, layout: Layout) -> int:
        """The first byte of a storage."""
        record = self.records[f"data/{layout.key}"]
        if record.length != layout.numel * layout.dtype.itemsize:
            raise ValueError("a storage of another size")
        return record.start(self.content)

    def bytes_of(self, record: Record) -> Tensor:
        """A record as a view."""
        if not record.length:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        start = record.start(self.content)
        return torch.frombuffer(self.content, dtype=torch.uint8, count=record.length, offset=start)

    def _read(self, name: str) -> bytes:
        return self.records[name].read(self.content)


def _tree(pickled: bytes) -> Any:
    return parse(pickled, _check_name, {"collections.OrderedDict": Ordered})


@lru_cache(_MOST_KEPT)
def _layout(pickled: bytes) -> Layout | None:
    """Of most chunks the pickle is one that was there before: it says a shape, and nothing of the values."""
    tree = _tree(pickled)
    if type(tree) is not Instance or tree.name not in (TENSOR, TENSOR_OF_DTYPE) or tree.state is not None:
        return None
    storage, *args = (dtype_of(arg) if type(arg) is Name else arg for arg in tree.args)
    if any(type(arg) is Pairs for arg in args):  # what it is a view by
        return None
    layout, requires_grad, _ = describe(tree.name, storage, *args)
    return None if requires_grad or not layout.numel else layout


class _Made(NamedTuple):
    """A value, how deep it is nested, and how many parts it has where each place of a part counts."""

    value: Any
    height: int
    size: int


class _Values:
    """Makes values of the tree of a pickle: each part once, so that what was one object is one object again.

    Args:
        chunk: whose tree that is.
        own: whether tensors are to have memory of their own, rather than be views.
    """

    def __init__(self, chunk: _Chunk, own: bool) -> None:
        self._chunk = chunk
        self._own = own or chunk.is_foreign
        self._made: dict[int, _Made] = {}
        self._storages: dict[str, Tensor] = {}
        self._left = len(chunk.content)

    def make(self, node: Any, depth: int) -> _Made:
        """The value of a part that is so deep in the tree."""
        if type(node) in SCALARS:
            return _Made(node, 0, 1)
        if type(node) is Name:
            return _Made(dtype_of(node), 0, 1)
        made = self._made.get(id(node))
        if depth + (made.height if made else 1) > _DEEPEST:
            raise ValueError(f"it is nested in itself, or deeper than {_DEEPEST} levels")
        if made is None:
            made = self._made[id(node)] = self._new(node, depth + 1)
        if made.size > self._chunk.most_parts:
            raise ValueError("too many parts that are there many times")
        return made

    def _new(self, node: Any, depth: int) -> _Made:
        if type(node) in (tuple, list):
            values, height, size = self._all(node, depth)
            return _Made(type(node)(values), height, size)
        if type(node) in (Pairs, Ordered):
            return self._dict(node, depth)
        return self._instance(node, depth)

    def _all(self, items: Iterable[Any], depth: int) -> tuple[list[Any], int, int]:
        """Values of several parts; the height and size of what has them."""
        values, height, size = [], 0, 1
        for item in items:
            made = self.make(item, depth)
            values.append(made.value)
            height, size = max(height, made.height), size + made.size
        return values, height + 1, size

    def _dict(self, node: Pairs, depth: int) -> _Made:
        for key, _ in node:
            if self.make(key, depth).size > _LONGEST_KEY:
                raise ValueError("a key of too many parts")
        keys, key_height, key_size = self._all((key for key, _ in node), depth)
        values, height, size = self._all((value for _, value in node), depth)
        check_keys(keys)
        made: Any = (OrderedDict if type(node) is Ordered else dict)(zip(keys, values, strict=True))
        if type(node) is Ordered and node.state is not None:
            attributes = self.make(node.state, depth)
            height, size = max(height, attributes.height + 1), size + attributes.size
            set_attributes(made, attributes.value)
        return _Made(made, max(key_height, height), key_size + size)

    def _instance(self, node: Instance, depth: int) -> _Made:
        if node.state is not None:
            raise TypeError(f"a state for {node.name}")
        if node.name in (TENSOR, TENSOR_OF_DTYPE):
            values, height, size = self._all(node.args[1:], depth)
            return _Made(self._tensor(*describe(node.name, node.args[0], *values)), height, size)
        if node.name == _WITH_ATTRIBUTES:
            function, kind, args, state = node.args
            if kind != "torch.Tensor" or function not in (TENSOR, TENSOR_OF_DTYPE) or type(args) is not tuple:
                raise TypeError(f"a subclass of Tensor: {kind!r:.200}")
            tensor, attributes = self._instance(Instance(function, args), depth), self.make(state, depth)
            set_attributes(tensor.value, attributes.value)
            return _Made(tensor.value, max(tensor.height, attributes.height + 1), tensor.size + attributes.size)
        values, height, size = self._all(node.args, depth)
        return _Made(MAKERS[node.name](*values), height, size)

    def _tensor(self, layout: Layout, requires_grad: bool, views: Mapping[str, Any]) -> Tensor:
        if math.prod(layout.size) * layout.dtype.itemsize > max(len(self._chunk.content), _SMALL):
            raise ValueError("more elements than are saved")
        storage = self._storage(layout.key, layout.numel, layout.dtype)
        tensor = storage.view(layout.dtype).as_strided(layout.size, layout.stride, layout.offset)
        for view, function in {"conj": torch.conj, "neg": torch._neg_view}.items():
            if views.get(view):
                tensor = function(tensor)
        return tensor.requires_grad_() if requires_grad else tensor

    def _storage(self, key: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A storage as bytes."""
        record = self._chunk.records[f"data/{key}"]
        if record.length != numel * dtype.itemsize:
            raise ValueError("a storage of another size")
        if key not in self._storages:
            storage = self._chunk.bytes_of(record)
            if self._own:
                self._left -= record.length  # records may lie over each other
                if self._left < 0:
                    raise ValueError("more elements than are saved")
                storage = storage.clone()
            if self._chunk.is_foreign:
                storage.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call]
            self._storages[key] = storage
        return self._storages[key]
