"""Where the records of a chunk are: of the zip archive that torch.save writes, none of whose numbers is believed.

Python's zipfile takes 0.2 ms an archive, and as much memory as the archive says that it needs.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, Protocol

from sharded_radam.checkpoint.format.errors import DamagedError

_END = struct.Struct("<4s6xH2LH")
_END64_LOCATOR = struct.Struct("<4s4xQ4x")
_END64 = struct.Struct("<4s28x3Q")
_ENTRY = struct.Struct("<4s4x2H8x2L3H8xL")
_HEADER = struct.Struct("<4s22x2H")
_EXTRA = struct.Struct("<2H")
_ZIP64 = 1
"""The kind of extra field that has long numbers."""

_IN_EXTRA = 0xFFFFFFFF
"""In the place of a number that is in such a field."""

_ENCRYPTED = 1
"""A flag."""


class Content(Protocol):
    """Bytes of a chunk: a memoryview, or what has those parts of it that are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Any: ...


class Ends:
    """The first and the last bytes of a chunk of ``length`` bytes; to ask for others is a ValueError."""

    def __init__(self, first: bytes, last: bytes, length: int) -> None:
        self.first = first
        self.last = last
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._length)
        last_start = self._length - len(self.last)
        if stop <= len(self.first):
            return self.first[start:stop]
        if start < last_start:
            raise ValueError("bytes between the ends")
        return self.last[start - last_start : stop - last_start]


class Record(NamedTuple):
    """``length`` bytes after the header at ``header``."""

    header: int
    length: int

    def start(self, content: Content) -> int:
        """The record's first byte."""
        signature, name_length, extra_length = _unpack(_HEADER, content, self.header)
        start: int = self.header + _HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + self.length > len(content):
            raise ValueError("a record that is not there")
        return start

    def read(self, content: Content) -> bytes:
        """The record's bytes."""
        start = self.start(content)
        return bytes(content[start : start + self.length])


def find_records(content: Content) -> dict[str, Record]:
    """Records by their names, without that of the archive before the first slash.

    Raises:
        DamagedError: compressed records, which torch.save does not write.
        ValueError: this is no such archive.
    """
    records = {}
    count, place = _directory(content)
    for _ in range(count):  # each has bytes of its own, so this ends
        entry = _unpack(_ENTRY, content, place)
        signature, flags, compression, packed, length, name_length, extra_length, comment_length, header = entry
        if signature != b"PK\x01\x02":
            raise ValueError("an entry that is none")
        name = bytes(content[place + _ENTRY.size : place + _ENTRY.size + name_length]).decode()
        place += _ENTRY.size + name_length
        if _IN_EXTRA in (length, packed, header):
            length, packed, header = _long(bytes(content[place : place + extra_length]), [length, packed, header])
        if compression or flags & _ENCRYPTED or packed != length:
            raise DamagedError("it has compressed records, which torch.save does not write")
        records[name.partition("/")[2]] = Record(header, length)
        place += extra_length + comment_length
    return records


def _directory(content: Content) -> tuple[int, int]:
    """How many entries there are, and where they begin."""
    end = len(content) - _END.size
    signature, count, _, start, comment_length = _unpack(_END, content, end)
    if signature != b"PK\x05\x06" or comment_length:
        raise ValueError("no zip archive, or bytes after one")
    if end >= _END64_LOCATOR.size:
        signature, place = _unpack(_END64_LOCATOR, content, end - _END64_LOCATOR.size)
        if signature == b"PK\x06\x07":
            signature, count, _, start = _unpack(_END64, content, place)
            if signature != b"PK\x06\x06":
                raise ValueError("no end of a zip archive")
    return count, start


def _long(extra: bytes, numbers: list[int]) -> list[int]:
    """Sizes and offsets from 4 GiB on, which are kept beside the entry."""
    place = 0
    while place + _EXTRA.size <= len(extra):
        kind, length = _EXTRA.unpack_from(extra, place)
        if kind == _ZIP64:
            longs = iter(struct.unpack_from(f"<{length // 8}Q", extra, place + _EXTRA.size))
            return [next(longs, _IN_EXTRA) if number == _IN_EXTRA else number for number in numbers]
        place += _EXTRA.size + length
    return numbers


def _unpack(form: struct.Struct, content: Content, place: int) -> tuple[Any, ...]:
    if not 0 <= place <= len(content) - form.size:
        raise ValueError("it ends too early")
    return form.unpack(content[place : place + form.size])
