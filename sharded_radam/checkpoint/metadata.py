"""``.metadata`` of torch.distributed.checkpoint: a pickle that is written opcode by opcode, and read as data.

How a class is pickled depends on the release of Python and of torch: enum members, ``TensorProperties``, paths. So the
bytes are not made by pickling torch's objects. :func:`pack` writes one form, which every torch from 2.6 on reads.
:func:`unpack` reads every form that they write, and imports nothing that the file names.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sharded_radam.checkpoint.errors import DamagedError, ForbiddenError
from sharded_radam.checkpoint.files import Extent
from sharded_radam.checkpoint.pickles import Instance, Name, Pairs, ordered_dict, parse

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_MEMORY_FORMAT = f"{_METADATA}._MEM_FORMAT_ENCODING"
_MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")


@dataclass(frozen=True, slots=True)
class Box:
    """The elements of a tensor at ``offsets``, ``sizes`` of them, and where they are stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and the boxes it was saved in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Content(NamedTuple):
    """What ``.metadata`` says: tensors, other values, and the keys that nest each name (None if it has none)."""

    tensors: dict[str, SavedTensor]
    objects: dict[str, Extent]
    paths: dict[str, tuple[str | int, ...]] | None


# Writing


def pack(
    tensors: Mapping[str, SavedTensor], objects: Mapping[str, Extent], paths: Mapping[str, tuple[str | int, ...]]
) -> bytes:
    """Return the bytes of ``.metadata``: the same for the same arguments, whatever Python and torch run this."""
    writer = _Writer()
    entries = {key: writer.instance("BytesStorageMetadata", {}) for key in objects}
    stored = [(writer.index(key, None, None), writer.extent(extent)) for key, extent in objects.items()]
    for key, tensor in tensors.items():
        chunks = [
            writer.instance(
                "ChunkStorageMetadata", {"offsets": writer.size(box.offsets), "sizes": writer.size(box.sizes)}
            )
            for box in tensor.boxes
        ]
        described = {"properties": writer.properties(tensor.dtype), "size": writer.size(tensor.shape)}
        entries[key] = writer.instance("TensorStorageMetadata", {**described, "chunks": writer.make_list(chunks)})
        for number, box in enumerate(tensor.boxes):
            stored.append((writer.index(key, box.offsets, number), writer.extent(box.extent)))
    nested = [(writer.text(key), writer.make_tuple(map(writer.key, path))) for key, path in paths.items()]
    fields = {
        "state_dict_metadata": writer.make_dict((writer.text(key), entry) for key, entry in entries.items()),
        "planner_data": writer.make_dict(nested),
        "storage_data": writer.make_dict(stored),
        "storage_meta": pickle.NONE,
    }
    return writer.finish(writer.instance("Metadata", fields))


class _Writer:
    """Values as opcodes of pickle protocol 4.

    Names of classes, texts and sizes come once, in the beginning, and then by their number. So a value has the same
    opcodes wherever it stands.
    """

    def __init__(self) -> None:
        self._beginning = [pickle.PROTO, b"\x04"]
        self._numbers: dict[str | tuple[str, str] | tuple[int, ...], bytes] = {}

    def finish(self, value: bytes) -> bytes:
        return b"".join([*self._beginning, value, pickle.STOP])

    def _numbered(self, what: str | tuple[str, str] | tuple[int, ...], opcodes: bytes) -> bytes:
        """Opcodes that get what was put into the memo under this name; ``opcodes`` make it."""
        if what not in self._numbers:
            number = len(self._numbers)
            self._beginning += [opcodes, pickle.MEMOIZE, pickle.POP]
            self._numbers[what] = (
                pickle.BINGET + bytes([number]) if number < 256 else pickle.LONG_BINGET + number.to_bytes(4, "little")
            )
        return self._numbers[what]

    def text(self, text: str) -> bytes:
        return self._numbers.get(text) or self._numbered(text, _text(text))

    def name(self, module: str, name: str) -> bytes:
        """A global: a class, function or dtype."""
        return self._numbers.get((module, name)) or self._numbered(
            (module, name), _text(module) + _text(name) + pickle.STACK_GLOBAL
        )

    def key(self, key: str | int) -> bytes:
        return self.text(key) if isinstance(key, str) else _integer(key)

    def make_tuple(self, items: Iterable[bytes]) -> bytes:
        return pickle.MARK + b"".join(items) + pickle.TUPLE

    def make_list(self, items: Iterable[bytes]) -> bytes:
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(items) + pickle.APPENDS

    def make_dict(self, items: Iterable[tuple[bytes, bytes]]) -> bytes:
        return pickle.EMPTY_DICT + pickle.MARK + b"".join(key + value for key, value in items) + pickle.SETITEMS

    def call(self, function: bytes, *args: bytes) -> bytes:
        return function + self.make_tuple(args) + pickle.REDUCE

    def instance(self, name: str, fields: Mapping[str, bytes], module: str = _METADATA) -> bytes:
        """An object made without its constructor, with these attributes."""
        state = self.make_dict((self.text(field), value) for field, value in fields.items())
        return self.name(module, name) + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state + pickle.BUILD

    def size(self, numbers: Sequence[int]) -> bytes:
        key = tuple(numbers)
        return self._numbers.get(key) or self._numbered(
            key, self.call(self.name("torch", "Size"), self.make_tuple(map(_integer, numbers)))
        )

    def extent(self, extent: Extent) -> bytes:
        fields = {"offset": _integer(extent.start), "length": _integer(extent.length)}
        return self.instance("_StorageInfo", {"relative_path": self.text(extent.file), **fields}, _FILESYSTEM)

    def index(self, key: str, offsets: Sequence[int] | None, number: int | None) -> bytes:
        return self.instance(
            "MetadataIndex",
            {
                "fqn": self.text(key),
                "offset": pickle.NONE if offsets is None else self.size(offsets),
                "index": pickle.NONE if number is None else _integer(number),
            },
        )

    def properties(self, dtype: torch.dtype) -> bytes:
        """dtype, layout, requires_grad, memory format, pin_memory: torch 2.15 reads these five, and adds a sixth."""
        state = self.make_tuple(
            [
                self.name("torch", str(dtype).removeprefix("torch.")),
                self.call(self.name("torch.serialization", "_get_layout"), self.text("torch.strided")),
                pickle.NEWFALSE,
                self.call(self.name(_METADATA, "_MEM_FORMAT_ENCODING"), _integer(0)),
                pickle.NEWFALSE,
            ]
        )
        made = self.name(_METADATA, "TensorProperties") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
        return made + state + pickle.BUILD


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    if len(encoded) < 256:
        return pickle.SHORT_BINUNICODE + bytes([len(encoded)]) + encoded
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _integer(number: int) -> bytes:
    if 0 <= number < 256:
        return pickle.BININT1 + bytes([number])
    if -(2**31) <= number < 2**31:
        return pickle.BININT + number.to_bytes(4, "little", signed=True)
    encoded = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


# Reading

_NAMES = {
    *(f"{_METADATA}.{name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta")),
    *(f"{_METADATA}.{name}" for name in ("ChunkStorageMetadata", "MetadataIndex", "TensorProperties")),
    *(_MEMORY_FORMAT, f"{_FILESYSTEM}._StorageInfo", "torch.serialization._get_layout"),
    # Python 3.13 has pathlib._local.
    *(f"{module}.{flavour}Path" for module in ("pathlib", "pathlib._local") for flavour in ("", "Posix", "PurePosix")),
    *(f"{module}.{flavour}Path" for module in ("pathlib", "pathlib._local") for flavour in ("Windows", "PureWindows")),
}
_DTYPE = re.compile(r"torch\.(b?float|complex|q?u?int|bool|bits|half|double|short|long)\w*")
_FILE = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\ud800-\udfff]{1,255}")
_MOST_DIMENSIONS = 64  # of a tensor in torch
_DEEPEST = 100  # nesting of a state dict


class _Size(tuple[int, ...]):
    """Not negative, and not too many."""

    __slots__ = ()


def _size(numbers: Any) -> _Size:
    """What torch.Size is called with."""
    if type(numbers) is not tuple or len(numbers) > _MOST_DIMENSIONS:
        raise TypeError("a size that is no tuple")
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError("a size that is not made of integers")
    return _Size(numbers)


def _member(cls: Any, name: Any) -> Instance:
    """What getattr is called with: Python 3.11.0 to 3.11.3 pickle a member of an enum by it."""
    if cls != _MEMORY_FORMAT or type(cls) is not Name or name not in _MEMORY_FORMATS:
        raise ForbiddenError("it asks for getattr of something else than a memory format, which no checkpoint needs")
    return Instance(cls, (_MEMORY_FORMATS.index(name),))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch.Size": _size,
    "collections.OrderedDict": ordered_dict,
    "builtins.getattr": _member,
    "__builtin__.getattr": _member,  # as protocol 2 calls it
}


def _allows(name: str) -> bool:
    return name in _NAMES or name in _FUNCTIONS or _DTYPE.fullmatch(name) is not None


def unpack(content: bytes) -> Content:
    """Return what ``.metadata`` says, whichever Python and torch wrote it. Checksums of extents are None.

    Raises:
        ForbiddenError: it names something that no checkpoint needs.
        DamagedError: it is no pickle, or not one of a checkpoint.
        ValueError: what it describes cannot be read here.
    """
    found = parse(content, _allows, _FUNCTIONS)
    try:
        return _content(found)
    except (LookupError, TypeError) as error:
        raise DamagedError(f"it does not describe a checkpoint: {type(error).__name__}: {error}") from error


def _content(found: Any) -> Content:
    metadata = _fields(found, f"{_METADATA}.Metadata")
    stored: dict[tuple[str, tuple[int, ...] | None], Extent] = {}
    for key, value in _pairs(metadata["storage_data"]):
        index = _fields(key, f"{_METADATA}.MetadataIndex")
        at = index.get("offset")
        where = _extent(_fields(value, f"{_FILESYSTEM}._StorageInfo"))
        stored[_text_of(index["fqn"]), None if at is None else _checked(at)] = where
    tensors, objects = {}, {}
    for name, entry in _pairs(metadata["state_dict_metadata"]):
        key = _text_of(name)
        if _is(entry, f"{_METADATA}.BytesStorageMetadata"):
            objects[key] = stored.pop((key, None))
            continue
        described = _fields(entry, f"{_METADATA}.TensorStorageMetadata")
        shape = _checked(described["size"])
        boxes = []
        for chunk in _list(described["chunks"]):
            box = _fields(chunk, f"{_METADATA}.ChunkStorageMetadata")
            offsets, sizes = _checked(box["offsets"]), _checked(box["sizes"])
            if not len(offsets) == len(sizes) == len(shape):
                raise TypeError("boxes of another number of dimensions than their tensor")
            boxes.append(Box(offsets, sizes, stored.pop((key, offsets))))  # each is one tensor's
        tensors[key] = SavedTensor(_dtype(described["properties"]), shape, tuple(boxes))
    nested = metadata.get("planner_data")
    paths = {_text_of(name): _path(path) for name, path in _pairs(nested)} if nested else None
    return Content(tensors, objects, paths)


def _checked(found: Any) -> _Size:
    if type(found) is not _Size:
        raise TypeError(f"a {type(found).__name__} in the place of a torch.Size")
    return found


def _is(found: Any, name: str) -> bool:
    return type(found) is Instance and found.name == name


def _fields(found: Any, name: str) -> dict[str, Any]:
    """The attributes of an instance."""
    if not _is(found, name) or type(found.state) is not Pairs:
        what = found.name if type(found) is Instance else type(found).__name__
        raise TypeError(f"a {what} in the place of a {name}")
    for field, _ in found.state:
        if type(field) is not str:  # others may take forever to hash
            raise TypeError(f"a {type(field).__name__} in the place of an attribute")
    return dict(found.state)


def _pairs(found: Any) -> Pairs:
    if type(found) is not Pairs:
        raise TypeError(f"a {type(found).__name__} in the place of a dict")
    return found


def _list(found: Any) -> list[Any]:
    if type(found) is not list:
        raise TypeError(f"a {type(found).__name__} in the place of a list")
    return found


def _text_of(found: Any) -> str:
    if type(found) is not str:
        raise TypeError(f"a {type(found).__name__} in the place of a text")
    return found


def _path(path: Any) -> tuple[str | int, ...]:
    if type(path) is not tuple or not 0 < len(path) <= _DEEPEST or any(type(key) not in (str, int) for key in path):
        raise TypeError("a name that is not nested by texts and integers")
    return path


def _extent(fields: dict[str, Any]) -> Extent:
    file = _text_of(fields["relative_path"])
    if not _FILE.fullmatch(file) or len(file.encode()) > 255:
        raise DamagedError(f"it names the file {file!r:.300}, which is not in its directory")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{file} is compressed or encrypted, which cannot be read here")
    start, length = _size((fields["offset"], fields["length"]))
    return Extent(file, start, length, None)


def _dtype(properties: Any) -> torch.dtype:
    if not _is(properties, f"{_METADATA}.TensorProperties") or type(properties.state) is not tuple:
        raise TypeError("a tensor without properties")
    dtype, *_ = properties.state
    if type(dtype) is not Name or not _DTYPE.fullmatch(dtype):
        raise TypeError("a tensor without a dtype")
    found = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"it has tensors of {dtype}, which torch {torch.__version__} does not know")
    return found
