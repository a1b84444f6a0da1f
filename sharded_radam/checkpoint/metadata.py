"""``.metadata`` of torch.distributed.checkpoint: a pickle that is written opcode by opcode, and read into stand-ins.

How a class is pickled depends on the release of Python and of torch: enum members, ``TensorProperties``, paths. So the
bytes are not made by pickling torch's objects. :func:`pack` writes one form, which every torch from 2.6 on reads.
:func:`unpack` reads every form that they write, and imports nothing that the file names.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sharded_radam.checkpoint.closed import ClosedDict, ClosedTuple, ForbiddenError, Record
from sharded_radam.checkpoint.files import DamagedError, Extent

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"


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

    Names of classes and texts come once, in the beginning, and then by their number, so that a value has the same
    opcodes wherever it stands.
    """

    def __init__(self) -> None:
        self._beginning = [pickle.PROTO, b"\x04"]
        self._numbers: dict[str | tuple[str, str], bytes] = {}

    def finish(self, value: bytes) -> bytes:
        return b"".join([*self._beginning, value, pickle.STOP])

    def _numbered(self, what: str | tuple[str, str], opcodes: bytes) -> bytes:
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
        return self.call(self.name("torch", "Size"), self.make_tuple(map(_integer, numbers)))

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
    encoded = text.encode()
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


class _Metadata(Record):
    __slots__ = ()


class _Tensor(Record):
    __slots__ = ()


class _Value(Record):
    __slots__ = ()


class _Chunk(Record):
    __slots__ = ()


class _Index(Record):
    __slots__ = ()


class _Stored(Record):
    __slots__ = ()


class _Properties(Record):
    __slots__ = ()


class _DType(Record):
    __slots__ = ()


class _MemoryFormat(Record):
    __slots__ = ()


class _GetMember(Record):
    """Stands for ``getattr``, by which Python 3.11.0 to 3.11.3 pickle a member of an enum."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Any:
        """Return the member; nothing else is got by name."""
        if len(args) == 2 and args[0] is _MemoryFormat and args[1] in _MEMORY_FORMATS:
            return _MemoryFormat(args[1])
        raise ForbiddenError("the pickle asks for getattr of something else than a memory format")


_MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")
_PATHS = ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_STAND_INS: dict[tuple[str, str], type] = {
    (_METADATA, "Metadata"): _Metadata,
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    (_METADATA, "BytesStorageMetadata"): _Value,
    (_METADATA, "ChunkStorageMetadata"): _Chunk,
    (_METADATA, "MetadataIndex"): _Index,
    (_METADATA, "TensorProperties"): _Properties,
    (_METADATA, "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    (_METADATA, "StorageMeta"): Record,
    (_FILESYSTEM, "_StorageInfo"): _Stored,
    ("torch.serialization", "_get_layout"): Record,
    ("torch", "Size"): ClosedTuple,
    ("collections", "OrderedDict"): ClosedDict,
    ("builtins", "getattr"): _GetMember,
    ("__builtin__", "getattr"): _GetMember,  # as protocols 0 to 2 call it
    **{(module, name): Record for module in ("pathlib", "pathlib._local") for name in _PATHS},  # 3.13 has _local
}
_DTYPE = re.compile(r"(b?float|complex|q?u?int|bool|bits|half|double|short|long)\w*")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and _DTYPE.fullmatch(name):
            return _DType(name)
        if (module, name) not in _STAND_INS:
            raise ForbiddenError(
                f"it asks for {module}.{name}, which no checkpoint needs: it was not read, since loading it could run "
                "code of whoever wrote it"
            )
        return _STAND_INS[module, name]


def unpack(content: bytes) -> Content:
    """Return what ``.metadata`` says, whichever Python and torch wrote it. Checksums of extents are None.

    Raises:
        ForbiddenError: it names something that no checkpoint needs.
        DamagedError: it is no pickle, or not one of a checkpoint.
        ValueError: what it describes cannot be read here.
    """
    try:
        found = _Unpickler(io.BytesIO(content)).load()
    except ForbiddenError:
        raise
    except Exception as error:  # a pickle of which bits were flipped raises whatever it likes
        raise DamagedError(f"it cannot be read: {error!r}") from error
    try:
        return _content(found)
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"it does not describe a checkpoint: {error!r}") from error


def _content(found: Any) -> Content:
    metadata = _state(found, _Metadata)
    stored = {}
    for key, value in metadata["storage_data"].items():
        index = _state(key, _Index)
        at = index.get("offset")
        stored[_name(index["fqn"]), None if at is None else _integers(at)] = _extent(_state(value, _Stored))
    tensors, objects = {}, {}
    for name, entry in metadata["state_dict_metadata"].items():
        key = _name(name)
        if isinstance(entry, _Value):
            objects[key] = stored[key, None]
            continue
        described = _state(entry, _Tensor)
        boxes = []
        for chunk in described["chunks"]:
            box = _state(chunk, _Chunk)
            offsets = _integers(box["offsets"])
            boxes.append(Box(offsets, _integers(box["sizes"]), stored[key, offsets]))
        tensors[key] = SavedTensor(_dtype(described["properties"]), _integers(described["size"]), tuple(boxes))
    paths = metadata.get("planner_data")
    return Content(tensors, objects, {_name(key): _path(path) for key, path in paths.items()} if paths else None)


def _state(record: Any, kind: type[Record]) -> dict[str, Any]:
    if type(record) is not kind or not isinstance(record.state, dict):
        raise TypeError(f"a {type(record).__name__} in the place of a {kind.__name__}")
    return record.state


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a {type(key).__name__} in the place of a name")
    return key


def _integers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise TypeError("a size that is not made of integers")
    return tuple(values)


def _path(path: Any) -> tuple[str | int, ...]:
    if not isinstance(path, tuple) or not path or not all(type(key) in (str, int) for key in path):
        raise TypeError("a name that is not nested by texts and integers")
    return tuple(path)


def _extent(state: dict[str, Any]) -> Extent:
    file = _name(state["relative_path"])
    if "/" in file or "\\" in file or file in ("", ".", ".."):
        raise DamagedError(f"it names the file {file!r}, which is not in its directory")
    if state.get("transform_descriptors"):
        raise ValueError(f"{file} is compressed or encrypted, which cannot be read here")
    start, length = _integers((state["offset"], state["length"]))
    return Extent(file, start, length, None)


def _dtype(properties: Any) -> torch.dtype:
    if type(properties) is not _Properties or not isinstance(properties.state, tuple):
        raise TypeError(f"a {type(properties).__name__} in the place of properties")
    dtype = properties.state[0]
    if type(dtype) is not _DType:
        raise TypeError(f"a {type(dtype).__name__} in the place of a dtype")
    found = getattr(torch, dtype.args[0], None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"it has tensors of torch.{dtype.args[0]}, which torch {torch.__version__} does not know")
    return found
