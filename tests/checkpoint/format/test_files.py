"""Chunks: what torch.save writes, read without a copy; and parts of a file system."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sharded_radam.checkpoint.format import directory
from sharded_radam.checkpoint.format.chunks import DataFile, DataFiles, Extent
from sharded_radam.checkpoint.format.decode import decode, decode_tensor
from sharded_radam.checkpoint.format.errors import DamagedError, ForbiddenError

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
        found = decode_tensor(content)
        assert torch.equal(found, tensor)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        if tensor.numel():
            before = found.clone()
            content[:] = bytes(len(content))  # it has no memory of its own
            assert not torch.equal(found, before) or not before.any()


class Attributes(OrderedDict[Any, Any]):
    pass


def with_attributes() -> list[Any]:
    """What users put things on."""
    tensor, param, ordered = torch.ones(2), nn.Parameter(torch.ones(2), requires_grad=False), OrderedDict(a=1)
    for one in (tensor, param, ordered):
        one.tag = [1, "x"]  # type: ignore[union-attr]
    return [tensor, param, ordered]


CLONED = torch.arange(12.0).view(3, 4)
VALUES: list[Any] = [
    *(
        None,
        True,
        -3,
        2**40,
        -(10**400),
        0.1,
        float("inf"),
        1j,
        "text \ud800",
        "x" * 300,
        b"",
        b"\x00\xff",
        bytearray(b"ab"),
    ),
    *([], (), {}, set(), [[1, [2]], (3,)], {1, "a", (2, None)}, frozenset([b"x"])),
    *(bytearray(), bytearray(b"ab")),
    {1: "one", "two": (2, 2.0), (3, (4, "x")): [None, True], 2**63: b"6", None: {"five": {}}, torch.int8: 0.5},
    *(OrderedDict(b=1, a=[OrderedDict()]), Counter("aab"), Counter(), torch.Size([1, 2]), torch.device("cuda", 1)),
    *(torch.device("cpu"), torch.bfloat16, torch.tensor(3), torch.zeros(0, 4), torch.ones(2).requires_grad_()),
    *(nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)),
    *(torch.ones(3).to(torch.float8_e5m2), torch.ones(3, dtype=torch.uint16), torch.ones(1).expand(1000)),
    *(torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag, CLONED[1:, ::2].t()),
    *(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(), *with_attributes()),
]


def assert_same(found: Any, value: Any) -> None:
    """Types, values, dtypes, attributes."""
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert (found.dtype, found.shape, found.stride(), found.requires_grad) == (
            *(value.dtype, value.shape, value.stride(), value.requires_grad),
        )
        assert (found.is_conj(), found.is_neg()) == (value.is_conj(), value.is_neg())
        assert torch.equal(found.to(torch.complex128), value.to(torch.complex128))
    elif isinstance(value, dict):
        assert [*found] == [*value]
        for key in value:
            assert_same(found[key], value[key])
    elif isinstance(value, (list, tuple)):
        assert len(found) == len(value)
        for one, other in zip(found, value, strict=True):
            assert_same(one, other)
    else:
        assert found == value
    if hasattr(value, "__dict__"):
        assert vars(found).keys() == vars(value).keys()
        assert getattr(found, "tag", None) == getattr(value, "tag", None)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_come_back_with_their_types(value: Any) -> None:
    assert_same(decode(saved(value)), value)
    assert_same(decode(saved({"x": [value]})), {"x": [value]})


def test_what_was_one_object_is_one_again() -> None:
    whole, names = torch.arange(6.0), ["a"]
    found = decode(saved({"whole": whole, "part": whole[2:4], "names": names, "same": [names, names]}))
    found["whole"][3] = 70
    assert found["part"].tolist() == [2, 70]
    assert found["names"] is found["same"][0]
    assert found["names"] is found["same"][1]
    content = saved(whole)
    kept = decode(content)
    content[:] = bytes(len(content))
    assert torch.equal(kept, whole)  # it has memory of its own


def test_values_of_another_byte_order() -> None:
    other = {"little": "big", "big": "little"}[sys.byteorder]
    for value in (torch.tensor([1.5, -2.0]), torch.tensor([3 + 4j]), torch.tensor([7]), torch.tensor([1.5]).bfloat16()):
        swapped, target = value.clone(), io.BytesIO()
        swapped.untyped_storage().byteswap(value.dtype)  # type: ignore[no-untyped-call]
        with zipfile.ZipFile(io.BytesIO(saved(swapped))) as source, zipfile.ZipFile(target, "w") as archive:
            for name in source.namelist():
                archive.writestr(name, other if name.endswith("byteorder") else source.read(name))
        for made in (decode, decode_tensor):
            assert_same(made(memoryview(bytearray(target.getvalue()))), value)


@pytest.mark.parametrize(
    "value",
    [
        *(torch.eye(3).to_sparse(), torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)),
        *(torch.empty(2, device="meta"), torch.nested.nested_tensor([torch.ones(2)]), torch.ones(2).untyped_storage()),
        *(range(3), torch.strided, Path("x"), nn.Linear(2, 2), print, torch.nn.Linear, Attributes(a=1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_plain_value(value: Any) -> None:
    """It is refused when it is saved, since what was saved is read again then."""
    with pytest.raises((ForbiddenError, DamagedError), match=r"it needs .*, which is no plain value|as a plain value"):
        decode(saved({"x": value}))
    with pytest.raises((ForbiddenError, DamagedError)):
        decode_tensor(saved(value))


def test_nesting() -> None:
    value: Any = "x"
    for _ in range(100):
        value = [value]
    found = decode(saved(value))
    for _ in range(100):
        (found,) = found
    assert found == "x"
    with pytest.raises(DamagedError, match="it is nested in itself, or deeper than 100 levels"):
        decode(saved([value]))
    value.append(value)
    with pytest.raises(DamagedError, match="it is nested in itself, or deeper than 100 levels"):
        decode(saved(value))


def test_bytes_that_are_no_tensor() -> None:
    content = saved(torch.arange(100.0))
    for damaged in (b"nothing", b"", bytes(content[:-30]), bytes(content) + b"x"):
        with pytest.raises(DamagedError):
            decode_tensor(memoryview(bytearray(damaged)))
    for at in range(0, len(content), 7):
        changed = bytearray(content)
        changed[at] ^= 0xFF
        with contextlib.suppress(DamagedError, ForbiddenError):  # checksums find what is changed; this must not crash
            assert decode_tensor(memoryview(changed)).nbytes <= len(content)


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


LARGE = [
    *(torch.randn(300, 257), torch.randn(257, 300).t(), torch.randn(40, 50, 60).permute(2, 0, 1)),
    *(torch.randn(10**6).bfloat16(), torch.randn(20_000, dtype=torch.complex64), torch.arange(40_000)[10:]),
    *(torch.randn(70_000).to(torch.float8_e5m2), torch.rand(70_000) > 0.5),
]


@pytest.mark.parametrize("value", LARGE, ids=lambda value: f"{value.dtype}-{tuple(value.shape)}-{value.stride()}")
def test_large_tensors_are_read_into_their_place(tmp_path: Path, value: torch.Tensor) -> None:
    with DataFile(tmp_path / "x") as file:
        file.add(5)
        extent = file.add(value)
    memory = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    content = bytearray((tmp_path / "x").read_bytes())
    with DataFiles(tmp_path) as files:
        for begin in (files._begin, 0, 640, 4000):  # of the chunk before
            files._begin = begin
            memory.zero_()
            assert files.read_into(extent, "w", memory)
            assert torch.equal(memory.to(torch.complex128), value.to(torch.complex128))
        assert not files._buffer  # and not through other memory
        assert torch.equal(memory.to(torch.complex128), value.to(torch.complex128))
        for other in (memory.view(-1)[1:] if memory.is_contiguous() else memory[1:], torch.zeros(3)):
            assert not files.read_into(extent, "w", other)
        for at in (0, 700, extent.length // 2, extent.length - 9):  # whatever is damaged
            damaged = bytearray(content)
            damaged[extent.start + at] ^= 1
            (tmp_path / "x").write_bytes(damaged)
            with contextlib.suppress(DamagedError):
                assert not files.read_into(extent, "w", memory)
            with pytest.raises(DamagedError, match="the file is damaged"):
                files.tensor(extent, "w")
        os.truncate(tmp_path / "x", extent.start + extent.length - 1)
        with pytest.raises(DamagedError, match="x, w: the file ends at byte"):
            files.read_into(extent, "w", memory)


def test_a_pickle_that_was_read_before_says_nothing_of_the_bytes(tmp_path: Path) -> None:
    """Each chunk is checked by its own records, though most have the pickle of another one."""
    one, other = saved(torch.arange(80_000.0)), saved(torch.arange(80_000.0) + 1)
    assert torch.equal(decode_tensor(one) + 1, decode_tensor(other))
    with zipfile.ZipFile(io.BytesIO(one)) as source, zipfile.ZipFile(tmp_path / "x", "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name)[: -4 if name.endswith("data/0") else None])
    extent = Extent("x", 0, (tmp_path / "x").stat().st_size, None)
    with DataFiles(tmp_path) as files:
        with pytest.raises(DamagedError, match="a storage of another size"):
            files.tensor(extent, "w")
        assert not files.read_into(extent, "w", torch.zeros(80_000))


def test_small_and_scattered_tensors_are_not(tmp_path: Path) -> None:
    values = [torch.randn(5), torch.randn(80_000)[::2], torch.randn(40_000, dtype=torch.complex64).conj()]
    with DataFile(tmp_path / "x") as file:
        extents = [file.add(value) for value in values]
    with DataFiles(tmp_path) as files:
        for value, extent in zip(values, extents, strict=True):
            memory = torch.zeros_like(value)
            assert not files.read_into(extent, "w", memory)
            assert torch.equal(files.tensor(extent, "w"), value)


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
