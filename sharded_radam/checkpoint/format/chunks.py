"""The files of a checkpoint: chunks one after the other, each a ``torch.save`` of its own, with its CRC-32.

This is what torch.distributed.checkpoint's FileSystemWriter writes. CRC-32 is zlib's.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from sharded_radam.buckets.memory import as_bytes, is_dense
from sharded_radam.checkpoint.format.decode import decode, decode_tensor, locate_tensor
from sharded_radam.checkpoint.format.errors import DamagedError
from sharded_radam.checkpoint.format.records import Ends
from sharded_radam.checkpoint.format.tensors import Layout

T = TypeVar("T")

_MOST_OPEN = 4
"""Files at a time."""

_READ_BYTES = 2**20
"""At a time: the checksum finds them in the processor's cache."""

_USUAL_BEGIN = 704
"""The byte of a chunk at which torch 2.13 begins the elements."""

_MOST_OVERHEAD = 4096
"""Bytes of a chunk that are not elements, in one that is read straight into memory."""

_LEAST_DIRECT = 16 * _MOST_OVERHEAD
"""Bytes of such a chunk."""

_WRITE_BACK_BYTES = 8 * 2**20
"""So much is written before the disk is told to begin with it."""

_SYNC_FILE_RANGE_WRITE = 2
"""Linux's SYNC_FILE_RANGE_WRITE."""


class Extent(NamedTuple):
    """Where a chunk is: ``length`` bytes from ``start`` on in ``file``; ``crc32`` None where none was saved."""

    file: str
    start: int
    length: int
    crc32: int | None


def in_order(extents: Iterable[Extent]) -> list[Extent]:
    """Each extent once, in the order of files and of bytes in them."""
    return sorted(set(extents), key=lambda extent: (extent.file, extent.start))


def start_write_back(descriptor: int, start: int, length: int) -> None:
    """Let the disk begin with a part of a file while the next one is made, and not only at the fsync; on Linux.

    Python has no function for it; ``posix_fadvise(DONTNEED)`` does it too, but drops the file from the page cache.
    """
    if sys.platform == "linux":
        sync_file_range = ctypes.CDLL(None).sync_file_range
        sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)


def encode(value: Any, what: str) -> memoryview:
    """The chunk of a value, in memory.

    Raises:
        ValueError: it cannot be saved, or could not be loaded again; named ``what``.
    """
    stream = io.BytesIO()
    try:
        torch.save(value, stream)
    except MemoryError:
        raise
    except Exception as error:  # whatever its own code raises
        raise ValueError(f"{what}: it cannot be saved: {type(error).__name__}: {error}") from error
    try:
        decode(stream.getbuffer())
    except ValueError as error:  # not to be found out when it is needed
        raise ValueError(f"{what}: {error}") from error
    return stream.getbuffer()


class DataFile:
    """A file that is written once, from its beginning to its end; a context manager, which waits for the disk."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("xb")
        self._size = 0
        self._crc32 = 0
        self._written_back = 0

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def add(self, value: Any) -> Extent:
        """Append a chunk: a tensor (CPU, with a storage of no more elements than its own), or another object."""
        start, self._crc32 = self._size, 0
        torch.save(value, cast("IO[bytes]", self))
        return Extent(self._name, start, self._size - start, self._crc32)

    def append(self, chunk: memoryview) -> Extent:
        """Append what ``encode`` made."""
        start, self._crc32 = self._size, 0
        self.write(chunk)
        return Extent(self._name, start, len(chunk), self._crc32)

    def write(self, data: Any) -> int:
        """For torch.save: memory goes to the file without a copy."""
        self._crc32 = zlib.crc32(data, self._crc32)
        self._file.write(data)
        self._size += len(data)
        if self._size - self._written_back > _WRITE_BACK_BYTES:
            self._file.flush()
            start_write_back(self._file.fileno(), self._written_back, self._size - self._written_back)
            self._written_back = self._size
        return len(data)

    def flush(self) -> None:
        """For torch.save; the file is flushed at its end."""


class DataFiles:
    """The files of one checkpoint, opened when they are read, and a few of them at a time; a context manager."""

    def __init__(self, folder: Path, progress: Callable[[int], object] = lambda num_bytes: None) -> None:
        self._folder = folder
        self._progress = progress
        self._descriptors: dict[str, int] = {}
        self._buffer = bytearray()
        self._begin = _USUAL_BEGIN

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, extent: Extent, what: str) -> memoryview:
        """The bytes of an extent, until the next one is read.

        Raises:
            DamagedError: they are not those that were saved.
        """
        self._check_length(extent, what)
        if len(self._buffer) < extent.length:
            self._buffer = bytearray(extent.length)  # beside what views of the old one still need
        content = memoryview(self._buffer)[: extent.length]
        self._check(extent, what, self._read(extent, what, 0, content, 0))
        self._note(extent)
        return content

    def read_into(self, extent: Extent, what: str, memory: Tensor) -> bool:
        """Read a chunk's tensor straight into memory of the same dtype, shape and strides, dense and on CPU.

        From the first byte to the last, so that the system reads ahead: only the chunk's end says where the elements
        began. So that is taken from the chunk before, and is the same in nearly all; if it is not, it is read again.

        Returns:
            False if the chunk is small, or has no such tensor: ``tensor`` reads it. Memory may have some of its bytes.

        Raises:
            DamagedError: other bytes than were saved.
        """
        overhead = extent.length - memory.nbytes
        if extent.length < _LEAST_DIRECT or not 0 < overhead < _MOST_OVERHEAD or not is_dense(memory):
            return False
        self._check_length(extent, what)
        for _ in range(2):
            begin = min(self._begin, overhead)
            located = self._read_around(extent, what, begin, as_bytes(memory))
            if located is None:
                return False
            layout, first = located
            if (layout.dtype, layout.size, layout.stride) != (memory.dtype, tuple(memory.shape), memory.stride()):
                return False
            self._begin = first
            if self._begin == begin:
                self._note(extent)
                return True
        return False

    def _read_around(self, extent: Extent, what: str, begin: int, memory: memoryview) -> tuple[Layout, int] | None:
        """Read all of a chunk, its bytes from ``begin`` on into memory; what its ends say of the tensor."""
        first, last = bytearray(begin), bytearray(extent.length - begin - len(memory))
        crc32 = self._read(extent, what, 0, memoryview(first), 0)
        crc32 = self._read(extent, what, begin, memory, crc32)
        self._check(extent, what, self._read(extent, what, begin + len(memory), memoryview(last), crc32))
        first += memory[:_MOST_OVERHEAD]
        last[:0] = memory[-_MOST_OVERHEAD:]
        return locate_tensor(Ends(bytes(first), bytes(last), extent.length))

    def _check_length(self, extent: Extent, what: str) -> None:
        size = os.fstat(self._open(extent.file)).st_size
        if extent.start + extent.length > size:
            raise self._short(extent, what, size)

    def _short(self, extent: Extent, what: str, size: int) -> DamagedError:
        return DamagedError(
            f"{self._folder / extent.file}, {what}: the file ends at byte {size}, expected "
            f"{extent.start + extent.length} or more"
        )

    def _read(self, extent: Extent, what: str, begin: int, memory: memoryview, crc32: int) -> int:
        """Fill memory from byte ``begin`` of a chunk on; the checksum that goes on from ``crc32``."""
        descriptor, done = self._open(extent.file), 0
        while done < len(memory):
            part = memory[done : done + _READ_BYTES]
            count = os.preadv(descriptor, [part], extent.start + begin + done)
            if count == 0:
                raise self._short(extent, what, extent.start + begin + done)
            crc32 = zlib.crc32(part[:count], crc32)
            done += count
        return crc32

    def _check(self, extent: Extent, what: str, crc32: int) -> None:
        """Compare the checksum of a chunk that was read."""
        if extent.crc32 is not None and crc32 != extent.crc32:
            raise DamagedError(
                f"{self._folder / extent.file}, {what}: bytes {extent.start} to {extent.start + extent.length} have "
                f"the checksum {crc32:08x}, and were saved with {extent.crc32:08x}: the file is damaged"
            )

    def _note(self, extent: Extent) -> None:
        self._progress(extent.length)

    def tensor(self, extent: Extent, what: str) -> Tensor:
        """A chunk as it was saved, on CPU; its memory is used again when the next one is read.

        Raises:
            DamagedError: other bytes than were saved, or not those of a tensor.
        """
        return self._decode(decode_tensor, extent, what)

    def load(self, extent: Extent, what: str) -> Any:
        """A value of any kind, in memory of its own.

        Raises:
            DamagedError: other bytes than were saved, or not those of a plain value.
        """
        return self._decode(decode, extent, what)

    def _decode(self, function: Callable[[memoryview], T], extent: Extent, what: str) -> T:
        content = self.read(extent, what)
        try:
            return function(content)
        except ValueError as error:  # one of ours: DamagedError, ForbiddenError
            raise DamagedError(f"{self._folder / extent.file}, {what}: {error}") from error

    def _open(self, file: str) -> int:
        if file not in self._descriptors:
            if len(self._descriptors) == _MOST_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[file] = descriptor = os.open(self._folder / file, os.O_RDONLY)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._descriptors[file]
