"""A tensor in the bytes that torch.save made of it, without a copy and without running any code of the file.

``torch.load(weights_only=True)`` takes 0.7 ms of Python a tensor, and copies it twice from anything but a file of its
own: loading the moments of GPT-2 took twice as long by it. What is more than a plain tensor is left to it all the same.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from typing import Any

import torch
from torch import Tensor

from sharded_radam.checkpoint.closed import ClosedDict, Record

_LOCAL_HEADER = struct.Struct("<26xHH")


class _NotPlainError(Exception):
    pass


_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexFloatStorage": torch.complex64,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
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
    """The tensor that was saved, as a view of ``content``; None if that is not a plain tensor of this byte order."""
    try:
        with zipfile.ZipFile(Bytes(content)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            order = archive.read(records["byteorder"]) if "byteorder" in records else b"little"
            if order.decode() != sys.byteorder or any(info.compress_type for info in records.values()):
                return None
            return _tensor(_Unpickler(io.BytesIO(archive.read(records["data.pkl"]))).load(), content, records)
    except Exception:  # not plain, or damaged, which raises whatever it likes: torch.load says what is wrong
        return None


class _Tensor(Record):
    """Stands for the call that makes a tensor of a storage."""

    __slots__ = ()


class _Storage(Record):
    __slots__ = ()


class _Unpickler(pickle.Unpickler):
    """Knows tensors only, and keeps what the file says of them."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("collections", "OrderedDict"):
            return ClosedDict
        if module == "torch" and name in _DTYPES:
            return Record(name)
        raise _NotPlainError

    def persistent_load(self, saved_id: Any) -> Any:
        return _Storage(*saved_id)


def _tensor(found: Any, content: memoryview, records: dict[str, zipfile.ZipInfo]) -> Tensor:
    """Make the tensor: storage, offset, size, stride, requires_grad, hooks; conjugate and negative views have more."""
    if type(found) is not _Tensor or found.state is not None or any(found.args[6:]) or len(found.args) < 6:
        raise _NotPlainError
    storage, offset, size, stride = found.args[:4]
    return _elements(storage, content, records).as_strided(tuple(size), tuple(stride), offset)


def _elements(storage: Any, content: memoryview, records: dict[str, zipfile.ZipInfo]) -> Tensor:
    if type(storage) is not _Storage:
        raise _NotPlainError
    kind, name, key, _, numel = storage.args
    if kind != "storage" or type(name) is not Record:
        raise _NotPlainError
    dtype, info = _DTYPES[name.args[0]], records[f"data/{key}"]
    name_length, extra_length = _LOCAL_HEADER.unpack_from(content, info.header_offset)
    start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if numel * dtype.itemsize != info.file_size or start + info.file_size > len(content):
        raise _NotPlainError
    if not numel:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=numel, offset=start)
