"""What is in a checkpoint, and where: ``.metadata`` of torch.distributed.checkpoint, and ``manifest.json`` of ours.

The manifest has what torch's format lacks: the length and CRC-32 of every chunk of every file, ``.metadata`` included,
and of itself. Checkpoints that torch.distributed.checkpoint wrote have none, and can be read without checks.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sharded_radam.checkpoint.format.chunks import Extent
from sharded_radam.checkpoint.format.errors import DamagedError
from sharded_radam.checkpoint.format.metadata import Content, SavedTensor, check_file, unpack
from sharded_radam.checkpoint.format.packing import pack

METADATA = ".metadata"
MANIFEST = "manifest.json"
_FORMAT = 1

_SHOWN = 20
"""Names that an error lists."""


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
    """All of a checkpoint but its data. ``paths`` are the keys that nest each name, as torch keeps them, if it has."""

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
    metadata = pack(tensors, objects, paths)
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
    try:
        unpacked = unpack(content)
    except ValueError as error:  # one of ours: DamagedError, ForbiddenError
        raise type(error)(f"{folder / METADATA}: {error}") from error
    tensors, objects, paths = _with_checksums(folder, unpacked, manifest)
    return Index(folder, tensors, objects, paths or {}, manifest, digest)


def read_info(folder: Path) -> dict[str, Any]:
    """What the saver of a checkpoint knew; nothing if that was torch.distributed.checkpoint.

    Raises:
        DamagedError: the manifest cannot be read.
        OSError: as of open.
    """
    manifest = _read_manifest(folder)
    return manifest.info if manifest else {}


def _no_checkpoint(folder: Path) -> str:
    if not folder.exists():
        nearby = sorted(p.name for p in folder.parent.iterdir()) if folder.parent.is_dir() else []
        return f"there is no {folder}" + (f", only {', '.join(nearby[:_SHOWN])}" if nearby else "")
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
    if not path.is_file():
        raise DamagedError(f"{path} is no file")
    try:
        outer = json.loads(path.read_bytes().decode())  # else the bytes choose a codec
        body = outer["body"]
        if zlib.crc32(_canonical(body)) != outer["crc32"] or outer.keys() != {"body", "crc32"}:
            raise ValueError("other content than its own checksum says")
        if body["format"] != _FORMAT:
            raise ValueError(f"format {body['format']!r:.50}, and this version of sharded_radam reads {_FORMAT}")
        files = {file: [(_count(n), _count(crc32)) for n, crc32 in chunks] for file, chunks in body["files"].items()}
        for file in files:
            check_file(file)
        if not isinstance(body["info"], dict):
            raise TypeError("what the saver knew is no dict")
        return Manifest(files, body["info"])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, LookupError) else str(error)
        raise DamagedError(f"{path} cannot be read: {why:.300}") from error


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise TypeError(f"{number!r:.50} is no number of bytes, nor a checksum")
    return number


def _with_checksums(folder: Path, content: Content, manifest: Manifest | None) -> Content:
    """The content with the manifest's checksum in each extent."""
    if manifest is None:
        return content
    checksums = _checksums(manifest)

    def checked(extent: Extent) -> Extent:
        length, crc32 = checksums.get((extent.file, extent.start), (None, None))
        if length != extent.length:
            raise DamagedError(f"{folder / MANIFEST} has no checksum for byte {extent.start} of {extent.file}")
        return extent._replace(crc32=crc32)

    tensors = {
        key: replace(tensor, boxes=tuple(replace(box, extent=checked(box.extent)) for box in tensor.boxes))
        for key, tensor in content.tensors.items()
    }
    return content._replace(tensors=tensors, objects={key: checked(extent) for key, extent in content.objects.items()})


def _checksums(manifest: Manifest) -> dict[tuple[str, int], tuple[int, int]]:
    """Of each chunk, by its file and first byte: its length and CRC-32."""
    checksums = {}
    for file, chunks in manifest.files.items():
        start = 0
        for length, crc32 in chunks:
            checksums[file, start] = (length, crc32)
            start += length
    return checksums
