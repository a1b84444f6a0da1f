"""What is in a checkpoint, and where: ``.metadata`` of torch.distributed.checkpoint, and ``manifest.json`` of ours.

``.metadata`` is a pickle, so it is read by an unpickler that knows its classes and nothing else. The manifest has what
torch's format lacks: the length and CRC-32 of every chunk of every file, ``.metadata`` included, and of itself.
Checkpoints that torch.distributed.checkpoint wrote have none, and can be read without checks.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sharded_radam.checkpoint.files import DamagedError, Extent

METADATA = ".metadata"
MANIFEST = "manifest.json"
_FORMAT = 1

_ALLOWED = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.serialization": {"_get_layout"},
}


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


@dataclass(frozen=True, slots=True)
class Manifest:
    """What was said when the checkpoint was saved.

    ``files`` has for each file the length and CRC-32 of its chunks, one after the other. ``info`` is what the saver
    knew: world size, step, time, version of torch.
    """

    files: dict[str, list[tuple[int, int]]]
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Index:
    """All of a checkpoint but its data. ``paths`` are the keys that nest each name, as torch keeps them."""

    folder: Path
    tensors: dict[str, SavedTensor]
    objects: dict[str, Extent]
    paths: dict[str, tuple[str | int, ...]]
    manifest: Manifest | None
    digest: int = field(compare=False)

    @property
    def info(self) -> dict[str, Any]:
        return self.manifest.info if self.manifest else {}

    def check_files(self) -> None:
        """Raise DamagedError if a file is missing or of another length than was saved."""
        saved = self.manifest.files if self.manifest else {}
        expected = {file: sum(length for length, _ in chunks) for file, chunks in saved.items()}
        extents = [box.extent for tensor in self.tensors.values() for box in tensor.boxes] + [*self.objects.values()]
        for extent in extents:
            if extent.file not in saved:
                expected[extent.file] = max(expected.get(extent.file, 0), extent.start + extent.length)
        for file in sorted(expected):
            path = self.folder / file
            if not path.is_file():
                raise DamagedError(f"{path} is missing")
            if (size := path.stat().st_size) < expected[file] or (size > expected[file] and file in saved):
                raise DamagedError(f"{path} has {size} bytes, and was saved with {expected[file]}: it is damaged")


def write_index(
    folder: Path,
    tensors: Mapping[str, SavedTensor],
    objects: Mapping[str, Extent],
    paths: Mapping[str, tuple[str | int, ...]],
    info: Mapping[str, Any],
) -> None:
    """Write ``.metadata`` and ``manifest.json`` for data files that are complete; not yet waiting for the disk."""
    metadata = _pack(tensors, objects, paths)
    files: dict[str, dict[int, tuple[int, int]]] = {}
    for extent in [*(box.extent for tensor in tensors.values() for box in tensor.boxes), *objects.values()]:
        assert extent.crc32 is not None
        files.setdefault(extent.file, {})[extent.start] = (extent.length, extent.crc32)
    listed = {file: [chunk for _, chunk in sorted(chunks.items())] for file, chunks in sorted(files.items())}
    listed[METADATA] = [(len(metadata), zlib.crc32(metadata))]
    body = {"format": _FORMAT, "files": listed, "info": dict(info)}
    manifest = json.dumps({"body": body, "crc32": zlib.crc32(_canonical(body))})
    (folder / METADATA).write_bytes(metadata)
    (folder / MANIFEST).write_text(manifest)


def read_index(folder: Path) -> Index:
    """Read what a checkpoint has; no data.

    Raises:
        ValueError: no checkpoint, damage, or a pickle with other things in it than a checkpoint has.
        OSError: it cannot be read.
    """
    if not (folder / METADATA).is_file():
        raise ValueError(_no_checkpoint(folder))
    content = (folder / METADATA).read_bytes()
    manifest = _read_manifest(folder)
    digest = zlib.crc32(content)
    if manifest and manifest.files.get(METADATA) != [(len(content), digest)]:
        raise DamagedError(f"{folder / METADATA} has other bytes than were saved: it is damaged")
    metadata = _Unpickler(io.BytesIO(content), folder / METADATA).read()
    try:
        return _unpack(folder, metadata, manifest, digest)
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"{folder / METADATA} does not describe a checkpoint: {error!r}") from error


def _no_checkpoint(folder: Path) -> str:
    if not folder.exists():
        nearby = sorted(p.name for p in folder.parent.iterdir()) if folder.parent.is_dir() else []
        return f"there is no {folder}" + (f", only {', '.join(nearby[:20])}" if nearby else "")
    if folder.is_file():
        return (
            f"{folder} is a file, expected the directory of a checkpoint; for a consolidated file use torch.load and "
            "load_state_dict(), or `sharded-radam checkpoint import`"
        )
    return f"{folder} has no {METADATA}: it is no checkpoint, or one whose save did not end"


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def _read_manifest(folder: Path) -> Manifest | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        outer = json.loads(path.read_bytes())
        body = outer["body"]
        if zlib.crc32(_canonical(body)) != outer["crc32"] or outer.keys() != {"body", "crc32"}:
            raise ValueError("other content than its own checksum says")
        if body["format"] != _FORMAT:
            raise ValueError(f"format {body['format']}, and this version of sharded_radam reads {_FORMAT}")
        files = {file: [(int(n), int(crc32)) for n, crc32 in chunks] for file, chunks in body["files"].items()}
        return Manifest(files, body["info"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error


class _Unpickler(pickle.Unpickler):
    """Of torch's metadata classes only. No name that it allows can call anything but its own constructor."""

    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(
                f"{self._path} asks for {module}.{name}, which no checkpoint needs: it was not read, since loading it "
                "could run code of whoever wrote it"
            )
        return super().find_class(module, name)

    def read(self) -> Any:
        """The one object in it.

        Raises:
            ValueError: a class that is not allowed, or no pickle.
        """
        try:
            return self.load()
        except ValueError:
            raise
        except Exception as error:  # a pickle of which bits were flipped raises whatever it likes
            raise DamagedError(f"{self._path} cannot be read: {error!r}") from error


def _pack(
    tensors: Mapping[str, SavedTensor], objects: Mapping[str, Extent], paths: Mapping[str, tuple[str | int, ...]]
) -> bytes:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    stored: dict[Any, Any] = {
        MetadataIndex(key): _StorageInfo(extent.file, extent.start, extent.length) for key, extent in objects.items()
    }
    for key, tensor in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in tensor.boxes]
        described[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), torch.Size(tensor.shape), chunks)
        for number, box in enumerate(tensor.boxes):
            where = _StorageInfo(box.extent.file, box.extent.start, box.extent.length)
            stored[MetadataIndex(key, torch.Size(box.offsets), number)] = where
    return pickle.dumps(Metadata(described, planner_data=dict(paths), storage_data=stored))


def _unpack(folder: Path, metadata: Any, manifest: Manifest | None, digest: int) -> Index:
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

    checksums = _checksums(manifest)

    def extent(stored: Any) -> Extent:
        file = stored.relative_path
        if Path(file).name != file:
            raise DamagedError(f"{folder / METADATA} names the file {file!r}, which is not in its directory")
        if getattr(stored, "transform_descriptors", None):
            raise ValueError(f"{folder / METADATA}: {file} is compressed or encrypted, which cannot be read here")
        found = checksums.get((file, stored.offset))
        if manifest and (found is None or found[0] != stored.length):
            raise DamagedError(f"{folder / MANIFEST} has no checksum for byte {stored.offset} of {file}")
        return Extent(file, stored.offset, stored.length, found[1] if found else None)

    tensors, objects = {}, {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            objects[key] = extent(metadata.storage_data[MetadataIndex(key)])
            continue
        boxes = []
        for chunk in entry.chunks:
            where = extent(metadata.storage_data[MetadataIndex(key, chunk.offsets)])
            boxes.append(Box(tuple(chunk.offsets), tuple(chunk.sizes), where))
        tensors[key] = SavedTensor(entry.properties.dtype, tuple(entry.size), tuple(boxes))
    paths = metadata.planner_data or {key: tuple(key.split(".")) for key in metadata.state_dict_metadata}
    return Index(folder, tensors, objects, paths, manifest, digest)


def _checksums(manifest: Manifest | None) -> dict[tuple[str, int], tuple[int, int]]:
    found = {}
    for file, chunks in (manifest.files if manifest else {}).items():
        at = 0
        for length, crc32 in chunks:
            found[file, at] = (length, crc32)
            at += length
    return found
