"""A tensor in the bytes that torch.save made of it, without a copy and without running any code of the file.

``torch.load(weights_only=True)`` takes 0.7 ms of Python a tensor, and copies it twice from anything but a file of its
own: loading the moments of GPT-2 took twice as long by it. What is more than a plain tensor is left to it all the same.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from typing import Any

import torch
from torch import Tensor

from sharded_radam.checkpoint.errors import DamagedError
from sharded_radam.checkpoint.pickles import PERSISTENT, Instance, ordered_dict, parse

_LOCAL_HEADER = struct.Struct("<26xHH")


class _NotPlainError(Exception):
    pass


_DTYPES = {
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


class Bytes(io.RawIOBase):
    """Memory as a file, without a copy."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._at = memory, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._memory)}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        part = self._memory[self._at : self._at + len(view)]
        view[: len(part)] = part
        self._at += len(part)
        return len(part)


def decode(content: memoryview) -> Tensor | None:
    """Return the tensor that was saved, as a view of ``content``; None if it is not a plain one of this byte order.

    Raises:
        DamagedError: compressed records, which torch.save does not write.
    """
    try:
        with zipfile.ZipFile(Bytes(content)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            is_compressed = any(info.compress_type for info in records.values())
            found = None if is_compressed else _plain(archive, records, content)
    except Exception:  # not plain, or damaged, which raises whatever it likes: torch.load says what is wrong
        return None
    if is_compressed:
        raise DamagedError("it has compressed records, which torch.save does not write")
    return found


def _plain(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], content: memoryview) -> Tensor | None:
    order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
    if order.decode() != sys.byteorder:
        return None
    found = parse(archive.read(records["data.pkl"]), _NAMES.__contains__, _FUNCTIONS)
    return _tensor(found, content, records)


_TENSOR = "torch._utils._rebuild_tensor_v2"
_FUNCTIONS = {"collections.OrderedDict": ordered_dict}
_NAMES = {_TENSOR, *_FUNCTIONS, *_DTYPES}


def _tensor(found: Any, content: memoryview, records: dict[str, zipfile.ZipInfo]) -> Tensor:
    """Make the tensor: storage, offset, size, stride, requires_grad, hooks; conjugate and negative views have more."""
    if type(found) is not Instance or found.name != _TENSOR or found.state is not None or any(found.args[6:]):
        raise _NotPlainError
    storage, offset, size, stride, _, _, *_ = found.args
    return _elements(storage, content, records).as_strided(size, stride, offset)


def _elements(storage: Any, content: memoryview, records: dict[str, zipfile.ZipInfo]) -> Tensor:
    if type(storage) is not Instance or storage.name != PERSISTENT:
        raise _NotPlainError
    ((kind, name, key, _, numel),) = storage.args
    if kind != "storage":
        raise _NotPlainError
    dtype, info = _DTYPES[name], records[f"data/{key}"]
    name_length, extra_length = _LOCAL_HEADER.unpack_from(content, info.header_offset)
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if numel * dtype.itemsize != info.file_size or start + info.file_size > len(content):
        raise _NotPlainError
    if not numel:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=numel, offset=start)
