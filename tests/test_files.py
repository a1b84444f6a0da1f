"""Chunks: what torch.save writes, read without a copy; and parts of a file system."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_radam.checkpoint import directory
from sharded_radam.checkpoint.decode import decode
from sharded_radam.checkpoint.errors import DamagedError
from sharded_radam.checkpoint.files import DataFile, DataFiles, Extent

pytestmark = pytest.mark.quick

DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
]


def saved(value: Any) -> memoryview:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return memoryview(bytearray(buffer.getvalue()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plain_tensors_are_views_of_the_bytes(dtype: torch.dtype) -> None:
    base = torch.arange(-30, 30).view(5, 4, 3).to(dtype)
    for tensor in (base, base.permute(2, 0, 1), base[1:3, ::2], base[0, 0, 0], base[:0], base.flatten()[7:]):
        content = saved(tensor)
        found = decode(content)
        assert found is not None
        assert torch.equal(found, tensor)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        if tensor.numel():
            before = found.clone()
            content[:] = bytes(len(content))  # it has no memory of its own
            assert not torch.equal(found, before) or not before.any()


@pytest.mark.parametrize(
    "value",
    [
        *(nn.Parameter(torch.ones(3)), torch.eye(3).to_sparse(), torch.ones(3).to(torch.float8_e5m2), {"a": 1}),
        *(
            [torch.ones(2)],
            torch.ones(2, dtype=torch.complex64).conj(),
            torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8),
        ),
    ],
    ids=["parameter", "sparse", "float8", "dict", "list", "conjugate", "quantized"],
)
def test_others_are_left_to_torch(value: Any) -> None:
    assert decode(saved(value)) is None


def test_bytes_that_are_no_tensor() -> None:
    content = saved(torch.arange(100.0))
    assert decode(memoryview(bytearray(b"nothing"))) is None
    assert decode(content[:-30]) is None
    for at in range(0, len(content), 37):
        changed = bytearray(content)
        changed[at] ^= 0xFF
        found = decode(memoryview(changed))  # checksums find what is changed; this must only not fail or crash
        assert found is None or isinstance(found, Tensor)


def test_a_file_of_chunks(tmp_path: Path) -> None:
    values: list[Any] = [torch.arange(10.0), {"a": (1, None)}, torch.ones(3, 4).bfloat16(), torch.tensor(5)]
    with DataFile(tmp_path / "x") as file:
        extents = [file.add(value) for value in values]
    assert [extent.start for extent in extents] == [0, *(e.start + e.length for e in extents[:-1])]
    assert (tmp_path / "x").stat().st_size == extents[-1].start + extents[-1].length
    seen: list[int] = []
    with DataFiles(tmp_path, seen.append) as files:
        assert torch.equal(files.tensor(extents[0], "a"), values[0])
        assert files.load(extents[1], "b") == values[1]
        kept = files.load(extents[2], "c")
        files.load(extents[0], "a")
        assert torch.equal(kept, values[2])
        with pytest.raises(DamagedError, match=r"x, b: a dict, expected a tensor"):
            files.tensor(extents[1], "b")
        with pytest.raises(DamagedError, match=r"x, d: bytes .* have the checksum .*, and were saved with 00000000"):
            files.load(extents[3]._replace(crc32=0), "d")
        with pytest.raises(DamagedError, match=r"x, e: the file ends at byte"):
            files.load(Extent("x", extents[3].start, 10**6, None), "e")
    assert sum(seen[:4]) == sum(extents[i].length for i in (0, 1, 2, 0))
    with pytest.raises(FileExistsError):
        DataFile(tmp_path / "x")


def test_directories(tmp_path: Path) -> None:
    final = tmp_path / "new" / "deep" / "step_5"
    unfinished = directory.begin(final)
    assert unfinished.parent == final.parent
    assert directory.committed_steps(final.parent) == []
    again = directory.begin(final)  # after a crash: what the first one left is gone
    assert not unfinished.exists()
    (again / ".metadata").touch()
    directory.commit(again, final)
    assert directory.committed_steps(final.parent) == [5]
    with pytest.raises(ValueError, match="step_5 exists"):
        directory.begin(final)
    odd = directory.begin(tmp_path / "a[b]*")
    other = directory.begin(tmp_path / "a[b]*c")
    assert odd.is_dir()  # a name is no pattern
    directory.begin(tmp_path / "a[b]*")
    assert other.is_dir()
    assert not odd.exists()
    directory.remove(final)
    assert os.listdir(final.parent) == []
    assert directory.committed_steps(tmp_path / "nothing") == []
