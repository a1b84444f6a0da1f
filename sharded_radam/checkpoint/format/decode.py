"""Values in the bytes that torch.save made of them, without running any code of the file, and without torch.load.

What ``torch.load(weights_only=True)`` allows takes as much memory as a file asks for, and nests and hashes whatever it
is given. Here a pickle is parsed as data (``pickles.py``). Then plain values are made of it, in memory that
its bytes account for: numbers, texts, bytes, lists, tuples, sets, dicts, counters, sizes, dtypes,
devices, and dense tensors with the sharing of memory that they were saved with.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sharded_radam.checkpoint.format.errors import DamagedError, ForbiddenError
from sharded_radam.checkpoint.format.pickles import PERSISTENT, Instance, Name, Ordered, Pairs, parse
from sharded_radam.checkpoint.format.records import Ends, Record, find_records

_DTYPE = re.compile(r"torch\.(b?float|complex|u?int|bool|half|double|short|long)\w*")
_DEEPEST = 100
_LONGEST_KEY = 100
_MOST_COLLISIONS = 100
_MOST_SHARING = 100
_SMALL = 2**20
_LONGEST_KEPT, _MOST_KEPT = 1000, 500

_UNTYPED = "torch.storage.UntypedStorage"
_STORAGES = {
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
_TENSOR, _TENSOR_OF_DTYPE = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"


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
        found = _Values(chunk, own=False).make(chunk.tree, 0).value
    if not isinstance(found, Tensor):
        raise DamagedError(f"a {type(found).__name__}, expected a tensor")
    if found.nbytes > len(content):
        raise DamagedError("more elements than are saved")
    return found


class Layout(NamedTuple):
    """A dense tensor in a storage of ``numel`` elements, which has the number ``key``; and nothing else."""

    key: str
    numel: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


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
    if name not in _NAMES and not _DTYPE.fullmatch(name):
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
        self.most_parts = 1000 + _MOST_SHARING * len(self._pickled)
        order = self._read("byteorder") if "byteorder" in self.records else b"little"
        self.is_foreign = order.decode() != sys.byteorder

    @property
    def tree(self) -> Any:
        return _tree(self._pickled)

    def layout(self) -> Layout | None:
        """Of a tensor that is as the bytes are; None of any other value."""
        is_short = len(self._pickled) <= _LONGEST_KEPT
        found = None if self.is_foreign or not is_short else _layout(self._pickled)
        if found is not None and math.prod(found.size) * found.dtype.itemsize > len(self.content):
            raise ValueError("more elements than are saved")
        return found

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
    if type(tree) is not Instance or tree.name not in (_TENSOR, _TENSOR_OF_DTYPE) or tree.state is not None:
        return None
    storage, *args = (_dtype(arg) if type(arg) is Name else arg for arg in tree.args)
    if any(type(arg) is Pairs for arg in args):  # what it is a view by
        return None
    layout, requires_grad, _ = _described(tree.name, storage, *args)
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

    def make(self, found: Any, depth: int) -> _Made:
        """The value of a part that is so deep in the tree."""
        if type(found) in _SCALARS:
            return _Made(found, 0, 1)
        if type(found) is Name:
            return _Made(_dtype(found), 0, 1)
        made = self._made.get(id(found))
        if depth + (made.height if made else 1) > _DEEPEST:
            raise ValueError(f"it is nested in itself, or deeper than {_DEEPEST} levels")
        if made is None:
            made = self._made[id(found)] = self._new(found, depth + 1)
        if made.size > self._chunk.most_parts:
            raise ValueError("too many parts that are there many times")
        return made

    def _new(self, found: Any, depth: int) -> _Made:
        if type(found) in (tuple, list):
            values, height, size = self._all(found, depth)
            return _Made(type(found)(values), height, size)
        if type(found) in (Pairs, Ordered):
            return self._dict(found, depth)
        return self._instance(found, depth)

    def _all(self, items: Iterable[Any], depth: int) -> tuple[list[Any], int, int]:
        """Values of several parts; the height and size of what has them."""
        values, height, size = [], 0, 1
        for item in items:
            made = self.make(item, depth)
            values.append(made.value)
            height, size = max(height, made.height), size + made.size
        return values, height + 1, size

    def _dict(self, found: Pairs, depth: int) -> _Made:
        for key, _ in found:
            if self.make(key, depth).size > _LONGEST_KEY:
                raise ValueError("a key of too many parts")
        keys, key_height, key_size = self._all((key for key, _ in found), depth)
        values, height, size = self._all((value for _, value in found), depth)
        _check_keys(keys)
        made: Any = (OrderedDict if type(found) is Ordered else dict)(zip(keys, values, strict=True))
        if type(found) is Ordered and found.state is not None:
            attributes = self.make(found.state, depth)
            height, size = max(height, attributes.height + 1), size + attributes.size
            _set_attributes(made, attributes.value)
        return _Made(made, max(key_height, height), key_size + size)

    def _instance(self, found: Instance, depth: int) -> _Made:
        if found.state is not None:
            raise TypeError(f"a state for {found.name}")
        if found.name in (_TENSOR, _TENSOR_OF_DTYPE):
            values, height, size = self._all(found.args[1:], depth)
            return _Made(self._tensor(*_described(found.name, found.args[0], *values)), height, size)
        if found.name == _WITH_ATTRIBUTES:
            function, kind, args, state = found.args
            if kind != "torch.Tensor" or function not in (_TENSOR, _TENSOR_OF_DTYPE) or type(args) is not tuple:
                raise TypeError(f"a subclass of Tensor: {kind!r:.200}")
            tensor, attributes = self._instance(Instance(function, args), depth), self.make(state, depth)
            _set_attributes(tensor.value, attributes.value)
            return _Made(tensor.value, max(tensor.height, attributes.height + 1), tensor.size + attributes.size)
        values, height, size = self._all(found.args, depth)
        return _Made(_MAKERS[found.name](*values), height, size)

    def _tensor(self, layout: Layout, requires_grad: bool, views: Mapping[str, Any]) -> Tensor:
        if math.prod(layout.size) * layout.dtype.itemsize > max(len(self._chunk.content), _SMALL):
            raise ValueError("more elements than are saved")
        storage = self._storage(layout.key, layout.numel, layout.dtype)
        found = storage.view(layout.dtype).as_strided(layout.size, layout.stride, layout.offset)
        for view, function in {"conj": torch.conj, "neg": torch._neg_view}.items():
            if views.get(view):
                found = function(found)
        return found.requires_grad_() if requires_grad else found

    def _storage(self, key: str, numel: int, dtype: torch.dtype) -> Tensor:
        """A storage as bytes."""
        record = self._chunk.records[f"data/{key}"]
        if record.length != numel * dtype.itemsize:
            raise ValueError("a storage of another size")
        if key not in self._storages:
            found = self._chunk.bytes_of(record)
            if self._own:
                self._left -= record.length  # records may lie over each other
                if self._left < 0:
                    raise ValueError("more elements than are saved")
                found = found.clone()
            if self._chunk.is_foreign:
                found.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call]
            self._storages[key] = found
        return self._storages[key]


def _described(
    name: Name, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any, *others: Any
) -> tuple[Layout, bool, Mapping[str, Any]]:
    """What torch's functions make of their arguments: a layout, whether it requires grad, and what it is a view by."""
    kind, key, numel = _parts_of(storage)
    if name == _TENSOR:
        dtype = _STORAGES[kind]
    else:
        dtype, *others = others  # type: ignore[assignment]
        if kind != _UNTYPED or not isinstance(dtype, torch.dtype):
            raise TypeError("a tensor without a dtype")
        numel, rest = divmod(numel, dtype.itemsize)
        if rest:
            raise ValueError("a storage of another size")
    (views,) = others or (None,)
    if hooks or not isinstance(views, (dict, type(None))):
        raise TypeError("a tensor with hooks, or of another kind than dense")
    _check_layout(offset, size, stride, numel)
    return Layout(key, numel, dtype, size, stride, offset), requires_grad is True, views or {}


def _parts_of(storage: Any) -> tuple[str, str, int]:
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


def _dtype(name: Name) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None) if _DTYPE.fullmatch(name) else None
    if not isinstance(found, torch.dtype):
        raise TypeError(f"{name} in the place of a value")
    return found


def _check_keys(keys: list[Any]) -> None:
    """Raise for keys that take long to find."""
    if not all(map(_is_key, keys)):
        raise TypeError("a key that is no number, text or tuple of these")
    if len(keys) - len({*map(hash, keys)}) > _MOST_COLLISIONS:
        raise ValueError("keys that were made to have the same hash")


def _is_key(value: Any) -> bool:
    return type(value) in _KEYS or (type(value) in (tuple, torch.Size) and all(map(_is_key, value)))


def _set_attributes(value: Any, attributes: Any) -> None:
    """What users put on a tensor or an OrderedDict; nothing that these have themselves."""
    if type(attributes) is not dict:
        raise TypeError("attributes that are no dict")
    for name, attribute in attributes.items():
        if type(name) is not str or hasattr(type(value), name):
            raise TypeError(f"an attribute {name!r:.100}")
        vars(value)[name] = attribute


def _only(kind: type[Any], value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _encoded(text: Any, encoding: Any) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise TypeError("bytes in another encoding")
    return _only(str, text).encode("latin-1")  # type: ignore[no-any-return]


def _bytearray(value: Any = b"", *encoding: Any) -> bytearray:
    return bytearray(_encoded(value, *encoding) if encoding else _only(bytes, value))


def _set(kind: type[Any]) -> Callable[[Any], Any]:
    def make(values: Any) -> Any:
        _check_keys(_only(list, values))
        return kind(values)

    return make


def _size(numbers: Any) -> torch.Size:
    if not all(type(number) is int for number in _only(tuple, numbers)):
        raise TypeError("a size that is not made of integers")
    return torch.Size(numbers)


def _device(kind: Any, *index: Any) -> torch.device:
    return torch.device(_only(str, kind), *(_only(int, number) for number in index))


def _parameter(data: Any, requires_grad: Any, hooks: Any, attributes: Any = None) -> nn.Parameter:
    if hooks:
        raise TypeError("a parameter with hooks")
    found = nn.Parameter(_only(Tensor, data), _only(bool, requires_grad))
    if attributes is not None:
        _set_attributes(found, attributes)
    return found


_SCALARS = {type(None), bool, int, float, str}
_KEYS = {*_SCALARS, bytes, complex, torch.dtype, torch.device}
_BUILTINS: Mapping[str, Callable[..., Any]] = {
    "bytes": lambda: b"",  # others are encoded texts
    "bytearray": _bytearray,
    "set": _set(set),
    "frozenset": _set(frozenset),
    "complex": lambda real, imaginary: complex(_only(float, real), _only(float, imaginary)),
}
_MAKERS: Mapping[str, Callable[..., Any]] = {
    **{f"builtins.{name}": make for name, make in _BUILTINS.items()},
    **{f"__builtin__.{name}": make for name, make in _BUILTINS.items()},  # as protocol 2 calls it
    "_codecs.encode": _encoded,
    "collections.Counter": lambda *counts: Counter(*(_only(dict, count) for count in counts)),
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_NAMES = {
    *(*_MAKERS, *_STORAGES, _UNTYPED, _TENSOR, _TENSOR_OF_DTYPE, _WITH_ATTRIBUTES),
    *("torch.Tensor", "collections.OrderedDict"),
}
