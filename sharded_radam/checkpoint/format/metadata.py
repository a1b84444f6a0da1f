"""``.metadata`` of torch.distributed.checkpoint, a pickle, read as data: every form that Pythons and torches write.

How a class is pickled depends on the release of Python and of torch: enum members, ``TensorProperties``, paths. So none
of torch's objects is made when it is read, nor when it is written (:mod:`sharded_radam.checkpoint.format.packing`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sharded_radam.checkpoint.format.chunks import Extent
from sharded_radam.checkpoint.format.errors import DamagedError, ForbiddenError
from sharded_radam.checkpoint.format.pickles import Instance, Name, Pairs, ordered_dict, parse

MODULE = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"
MEMORY_FORMAT = f"{MODULE}._MEM_FORMAT_ENCODING"
MEMORY_FORMATS = ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT")


@dataclass(frozen=True, slots=True)
class SavedBox:
    """The elements of a tensor at ``offsets``, ``sizes`` of them, and where they are stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor and the boxes it was saved in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: tuple[SavedBox, ...]

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


_NAMES = {
    *(f"{MODULE}.{name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "StorageMeta")),
    *(f"{MODULE}.{name}" for name in ("ChunkStorageMetadata", "MetadataIndex", "TensorProperties")),
    *(MEMORY_FORMAT, f"{FILESYSTEM}._StorageInfo", "torch.serialization._get_layout"),
    # Python 3.13 has pathlib._local.
    *(f"{module}.{flavour}Path" for module in ("pathlib", "pathlib._local") for flavour in ("", "Posix", "PurePosix")),
    *(f"{module}.{flavour}Path" for module in ("pathlib", "pathlib._local") for flavour in ("Windows", "PureWindows")),
}
_DTYPE = re.compile(r"torch\.(b?float|complex|q?u?int|bool|bits|half|double|short|long)\w*")
_FILE = re.compile(r"(?!\.\.?$)[^/\\\x00-\x1f\ud800-\udfff]{1,255}")
_LONGEST_FILE = 255
"""Bytes of a name, as file systems have them."""

_MOST_DIMENSIONS = 64
"""Of a tensor in torch."""

_MOST_FIELDS = 32
"""Attributes of an object."""

_LARGEST = 2**60
"""A number of elements or bytes; sums of them are no larger than torch counts."""

_DEEPEST = 100
"""Nesting of a state dict."""


class _Size(tuple[int, ...]):
    """Not negative, and not too many."""

    __slots__ = ()


def _size(numbers: Any) -> _Size:
    """What torch.Size is called with."""
    if type(numbers) is not tuple or len(numbers) > _MOST_DIMENSIONS:
        raise TypeError("a size that is no tuple")
    if not all(type(number) is int and 0 <= number < _LARGEST for number in numbers):
        raise TypeError("a size that is not made of integers below 2**60")
    return _Size(numbers)


def _member(cls: Any, name: Any) -> Instance:
    """What getattr is called with: Python 3.11.0 to 3.11.3 pickle a member of an enum by it."""
    if cls != MEMORY_FORMAT or type(cls) is not Name or name not in MEMORY_FORMATS:
        raise ForbiddenError("it asks for getattr of something else than a memory format, which no checkpoint needs")
    return Instance(cls, (MEMORY_FORMATS.index(name),))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch.Size": _size,
    "collections.OrderedDict": ordered_dict,
    "builtins.getattr": _member,
    "__builtin__.getattr": _member,  # as protocol 2 calls it
}


def _check_name(name: str) -> None:
    if name not in _NAMES and name not in _FUNCTIONS and not _DTYPE.fullmatch(name):
        raise ForbiddenError(
            f"it asks for {name}, which no checkpoint needs: it was not read, since loading it could run code of "
            "whoever wrote it"
        )


def unpack(content: bytes) -> Content:
    """Return what ``.metadata`` says, whichever Python and torch wrote it. Checksums of extents are None.

    Raises:
        ForbiddenError: it names something that no checkpoint needs.
        DamagedError: it is no pickle, or not one of a checkpoint.
        ValueError: what it describes cannot be read here.
    """
    tree = parse(content, _check_name, _FUNCTIONS)
    try:
        return _content(tree)
    except (LookupError, TypeError) as error:
        raise DamagedError(f"it does not describe a checkpoint: {type(error).__name__}: {error}") from error


def _content(tree: Any) -> Content:
    metadata = _fields(tree, f"{MODULE}.Metadata")
    stored: dict[tuple[str, tuple[int, ...] | None], Extent] = {}
    for key, value in _pairs(metadata["storage_data"]):
        index = _fields(key, f"{MODULE}.MetadataIndex")
        offsets = index.get("offset")
        extent = _extent(_fields(value, f"{FILESYSTEM}._StorageInfo"))
        stored[_text_of(index["fqn"]), None if offsets is None else _checked(offsets)] = extent
    tensors, objects = {}, {}
    for name, entry in _pairs(metadata["state_dict_metadata"]):
        key = _text_of(name)
        if _is(entry, f"{MODULE}.BytesStorageMetadata"):
            objects[key] = stored.pop((key, None))
            continue
        described = _fields(entry, f"{MODULE}.TensorStorageMetadata")
        shape = _checked(described["size"])
        boxes = []
        for chunk in _list(described["chunks"]):
            box = _fields(chunk, f"{MODULE}.ChunkStorageMetadata")
            offsets, sizes = _checked(box["offsets"]), _checked(box["sizes"])
            if not len(offsets) == len(sizes) == len(shape):
                raise TypeError("boxes of another number of dimensions than their tensor")
            boxes.append(SavedBox(offsets, sizes, stored.pop((key, offsets))))  # each is one tensor's
        tensors[key] = SavedTensor(_dtype(described["properties"]), shape, tuple(boxes))
        _check_extents(key, tensors[key])
    nested = metadata.get("planner_data")
    paths = {_text_of(name): _path(path) for name, path in _pairs(nested)} if nested else None
    return Content(tensors, objects, paths)


def _check_extents(key: str, tensor: SavedTensor) -> None:
    """Raise DamagedError if boxes have more elements than bytes, or share bytes: they would grow when read."""
    itemsize, last = tensor.dtype.itemsize, Extent("", 0, 0, None)
    for box in tensor.boxes:
        if math.prod(box.sizes) * itemsize > box.extent.length:
            raise DamagedError(f"{key}: {tuple(box.sizes)} elements of {tensor.dtype} in {box.extent.length} bytes")
    for extent in sorted(box.extent for box in tensor.boxes if math.prod(box.sizes)):
        if extent.file == last.file and extent.start < last.start + last.length:
            raise DamagedError(f"{key}: byte {extent.start} of {extent.file} is in two boxes")
        last = extent


def _checked(value: Any) -> _Size:
    if type(value) is not _Size:
        raise TypeError(f"a {type(value).__name__} in the place of a torch.Size")
    return value


def _is(value: Any, name: str) -> bool:
    return type(value) is Instance and value.name == name


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The attributes of an instance."""
    if not _is(value, name) or type(value.state) is not Pairs:
        what = value.name if type(value) is Instance else type(value).__name__
        raise TypeError(f"a {what} in the place of a {name}")
    if len(value.state) > _MOST_FIELDS:
        raise TypeError(f"a {name} of {len(value.state)} attributes")
    for field, _ in value.state:
        if type(field) is not str:  # others may take forever to hash
            raise TypeError(f"a {type(field).__name__} in the place of an attribute")
    return dict(value.state)


def _pairs(value: Any) -> Pairs:
    if type(value) is not Pairs:
        raise TypeError(f"a {type(value).__name__} in the place of a dict")
    return value


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"a {type(value).__name__} in the place of a list")
    return value


def _text_of(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"a {type(value).__name__} in the place of a text")
    return value


def _path(path: Any) -> tuple[str | int, ...]:
    if type(path) is not tuple or not 0 < len(path) <= _DEEPEST or any(type(key) not in (str, int) for key in path):
        raise TypeError("a name that is not nested by texts and integers")
    return path


def check_file(file: str) -> None:
    """Raise DamagedError for a name that is not one of a file in the directory of a checkpoint."""
    if not _FILE.fullmatch(file) or len(file.encode()) > _LONGEST_FILE:
        raise DamagedError(f"it names the file {file!r:.100}, which is not in its directory")


def _extent(fields: dict[str, Any]) -> Extent:
    file = _text_of(fields["relative_path"])
    check_file(file)
    if fields.get("transform_descriptors"):
        raise ValueError(f"{file} is compressed or encrypted, which cannot be read here")
    start, length = _size((fields["offset"], fields["length"]))
    return Extent(file, start, length, None)


def _dtype(properties: Any) -> torch.dtype:
    if not _is(properties, f"{MODULE}.TensorProperties") or type(properties.state) is not tuple:
        raise TypeError("a tensor without properties")
    dtype, *_ = properties.state
    if type(dtype) is not Name or not _DTYPE.fullmatch(dtype):
        raise TypeError("a tensor without a dtype")
    known = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(known, torch.dtype):
        raise ValueError(f"it has tensors of {dtype}, which torch {torch.__version__} does not know")
    return known
