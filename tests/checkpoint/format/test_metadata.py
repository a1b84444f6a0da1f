"""Hostile and damaged ``.metadata`` and chunks: nothing that a file names is reached, let alone changed."""

from __future__ import annotations

import collections
import io
import json
import os
import pathlib
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as torchs

from sharded_radam.checkpoint.format import decode, metadata, pickles
from sharded_radam.checkpoint.format.chunks import DataFiles, Extent
from sharded_radam.checkpoint.format.errors import DamagedError, ForbiddenError
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.metadata import SavedBox, SavedTensor, unpack
from sharded_radam.checkpoint.format.packing import pack
from sharded_radam.checkpoint.format.verification import verify

pytestmark = pytest.mark.quick

BOXES = (SavedBox((0, 0), (2, 5), Extent("a", 0, 40, None)), SavedBox((2, 0), (1, 5), Extent("b", 0, 20, None)))
GOOD = pack(
    {"w": SavedTensor(torch.float32, (3, 5), BOXES)}, {"v": Extent("a", 40, 5, None)}, {"w": ("w",), "v": ("v", 0)}
)


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + pickle.STACK_GLOBAL


def program(*opcodes: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + b"".join(opcodes) + pickle.STOP


def set_attributes(attribute: str, value: bytes) -> bytes:
    """Opcodes that set an attribute of what is on the stack, as an object with slots has it: (None, {…})."""
    slots = pickle.EMPTY_DICT + text(attribute) + value + pickle.SETITEM
    return pickle.NONE + slots + pickle.TUPLE2 + pickle.BUILD


def classes() -> dict[str, dict[str, Any]]:
    """What a file may not change: classes and functions that a pickle names, and those that read it."""
    found = [pathlib.Path, pathlib.PurePath, collections.OrderedDict, torch.Size, torch.serialization]
    found += [
        torchs,
        filesystem,
        torch._utils,
        metadata,
        decode,
        pickles,
        pickles.Name,
        pickles.Instance,
        pickles.Pairs,
    ]
    return {repr(one): dict(vars(one)) for one in found}


NAMES = [
    *(tuple(name.rsplit(".", 1)) for name in sorted({*metadata._NAMES, *metadata._FUNCTIONS})),
    *[("torch", "float32")],
]


@pytest.mark.parametrize("name", NAMES, ids=".".join)
def test_no_attribute_of_a_class_can_be_set(name: tuple[str, str]) -> None:
    """`pathlib.Path.is_file` was exchanged so once, for the whole process."""
    before = classes()
    for attribute in ("is_file", "__new__", "__setstate__", "__hash__", "__class__", "args"):
        for value in (pickle.EMPTY_DICT, named("collections", "OrderedDict"), named("torch", "Size")):
            content = program(named(*name), set_attributes(attribute, value))
            with pytest.raises(DamagedError, match="a state for something that has none"):
                unpack(content)
            state = pickle.EMPTY_DICT + text(attribute) + value + pickle.SETITEM  # as an object with a __dict__ has it
            with pytest.raises(DamagedError, match="a state for something that has none"):
                unpack(program(named(*name), state, pickle.BUILD))
    assert classes() == before


@pytest.mark.parametrize("at", range(GOOD.count(pickle.STACK_GLOBAL)))
def test_a_good_file_that_also_sets_attributes(at: int, tmp_path: Path) -> None:
    """All else in it is as it should be."""
    parts = GOOD.split(pickle.STACK_GLOBAL)
    assert unpack(GOOD) == unpack(pickle.STACK_GLOBAL.join(parts))
    attack = pickle.STACK_GLOBAL + set_attributes("is_file", pickle.EMPTY_DICT)
    content = pickle.STACK_GLOBAL.join(parts[: at + 1]) + attack + pickle.STACK_GLOBAL.join(parts[at + 1 :])
    before = classes()
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DamagedError, match=r"\.metadata: it cannot be read: .* a state for something that has none"):
        read_index(tmp_path)
    assert classes() == before


def chunk(data: bytes, changed: bytes, compression: int = zipfile.ZIP_STORED) -> memoryview:
    """A chunk with another pickle."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for info in source.infolist():
            archive.writestr(info.filename, changed if info.filename.endswith("data.pkl") else source.read(info))
    return memoryview(bytearray(target.getvalue()))


def saved(tensor: Any) -> tuple[bytes, bytes]:
    """A chunk, and the pickle in it."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        return buffer.getvalue(), archive.read(name)


def test_chunks_cannot_set_attributes_either() -> None:
    """Not of the functions and classes that make tensors."""
    tensor = torch.arange(6.0)
    data, pickled = saved(tensor)
    before = classes()
    for name in ("_rebuild_tensor_v2", "FloatStorage", "OrderedDict"):
        end = pickled.index(name.encode()) + len(name) + 1  # GLOBAL is two lines
        attack = set_attributes("__defaults__", pickle.EMPTY_TUPLE)
        for read in (decode.decode, decode.decode_tensor):
            with pytest.raises(DamagedError, match="a state for something that has none"):
                read(chunk(data, pickled[:end] + attack + pickled[end:]))
            assert classes() == before
    assert torch.equal(decode.decode_tensor(chunk(data, pickled)), tensor)


def test_chunks_that_grow(tmp_path: Path) -> None:
    """A few bytes that become many: compressed records, strides of 0; another dtype or shape than the index has."""
    data, pickled = saved(torch.arange(6.0))
    with pytest.raises(DamagedError, match="it has compressed records"):
        decode.decode_tensor(chunk(data, pickled, zipfile.ZIP_DEFLATED))
    wide = torch.ones(1).expand(10**12)
    content, _ = saved(wide)
    (tmp_path / "a").write_bytes(content)
    extent = Extent("a", 0, len(content), None)
    with DataFiles(tmp_path) as files:
        for read in (files.tensor, files.load):
            with pytest.raises(DamagedError, match="more elements than are saved"):
                read(extent, "w")
        for kind in (torch.eye(3).to_sparse(), torch.empty(2, device="meta")):
            content, _ = saved(kind)
            (tmp_path / "a").write_bytes(content)
            with pytest.raises(DamagedError, match="which is no plain value"):
                files.tensor(Extent("a", 0, len(content), None), "w")


FORBIDDEN: dict[str, Callable[[], bytes]] = {
    "a function": lambda: named("posix", "system") + text("true") + pickle.TUPLE1 + pickle.REDUCE,
    "of torch": lambda: named("torch", "load"),
    "of the format's own module": lambda: named("torch.distributed.checkpoint.metadata", "os"),
    "an attribute of an allowed class": lambda: named("pathlib", "Path.write_text"),
    "through torch": lambda: named("torch", "float32.__class__"),
    "of ours": lambda: named("sharded_radam.checkpoint.closed", "Record"),
    "by protocol 0": lambda: b"cos\nsystem\n",
    "getattr of a class": lambda: (
        named("builtins", "getattr") + named("pathlib", "Path") + text("write_text") + pickle.TUPLE2 + pickle.REDUCE
    ),
    "getattr of an enum's other attribute": lambda: (
        named("builtins", "getattr")
        + named("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
        + text("__class__")
        + pickle.TUPLE2
        + pickle.REDUCE
    ),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_no_checkpoint_needs(what: str) -> None:
    with pytest.raises(ForbiddenError, match="asks for"):
        unpack(program(FORBIDDEN[what]()))


def without(content: bytes, part: bytes, other: bytes) -> bytes:
    assert content.count(part) == 1
    return content.replace(part, other)


BROKEN: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "an instance by protocol 0": lambda: program(pickle.MARK, b"ios\nsystem\n"),
    "getattr without arguments": lambda: program(named("__builtin__", "getattr"), pickle.EMPTY_TUPLE, pickle.REDUCE),
    # What Python's own unpickler would crash on, or need gigabytes or years for:
    "a tuple nested too deep, as a key": lambda: b"\x80\x04})" + b"\x85" * 1_000_000 + b"Ns.",
    "a tuple of itself, as a key": lambda: b"\x80\x04})" + b"2\x86" * 60 + b"Ns.",
    "a tuple of itself": lambda: b"\x80\x04)" + b"\x94h\x00\x86" * 60 + b".",
    "a memo of gigabytes": lambda: b"\x80\x04Nr\xff\xff\xff\x7f.",
    "bytes of gigabytes": lambda: b"\x80\x04\x8e" + b"\x00" * 7 + b"\x10.",
    "sizes of sizes": lambda: program(
        pickle.MARK, b"K\x00" * 20_000, pickle.TUPLE, pickle.MEMOIZE, (named("torch", "Size") + b"h\x00\x85R") * 5_000
    ),
    "dicts of one list": lambda: program(
        pickle.MARK,
        b"K\x00" * 20_000,
        pickle.LIST,
        pickle.MEMOIZE,
        (named("collections", "OrderedDict") + b"h\x00\x85R") * 5_000,
    ),
    "a long name, many times": lambda: program(
        text("x" * 20_000), pickle.MEMOIZE, (b"h\x00h\x00" + pickle.STACK_GLOBAL) * 20_000
    ),
    "another instance": lambda: program(named("torch.distributed.checkpoint.metadata", "TensorProperties"), b")\x81)b"),
    "an extension": lambda: b"\x80\x04\x82\x05.",
    "a persistent value": lambda: program(text("x"), pickle.BINPERSID),
    "no pickle": lambda: b"hello",
    "cut off": lambda: GOOD[:-9],
    "another object": lambda: pickle.dumps({"w": 1}),
    "a class": lambda: program(named("torch", "Size")),
    "a size of texts": lambda: program(named("torch", "Size"), text("ab"), pickle.TUPLE1, pickle.REDUCE),
    "other classes": lambda: without(GOOD, b"\x14BytesStorageMetadata", b"\x14ChunkStorageMetadata"),
    "a path for a file": lambda: without(GOOD, b"\x01a", b"\x04../a"),
    "a folder for a file": lambda: without(GOOD, b"\x01a", b"\x02.."),
    "a missing field": lambda: without(GOOD, b"storage_data", b"storage_dat_"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_checkpoint(what: str) -> None:
    with pytest.raises(ValueError, match=r"it (cannot be read|does not describe a checkpoint|asks for|names the file)"):
        unpack(BROKEN[what]())


def test_a_dtype_that_only_newer_torches_have() -> None:
    content = GOOD.replace(b"\x07float32", b"\x07float99")
    with pytest.raises(ValueError, match=r"it has tensors of torch.float99, which torch .* does not know"):
        unpack(content)


@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=400, deadline=None)
def test_any_bytes_changed(changes: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for at, value in changes:
        content[at] = value
    if content[0:2] != GOOD[0:2]:
        return
    try:
        tensors, objects, _ = unpack(bytes(content))
    except ValueError:
        return
    assert all(isinstance(tensor, SavedTensor) for tensor in tensors.values())
    assert all(isinstance(extent, Extent) for extent in objects.values())


MANIFESTS: dict[str, Callable[[], Any]] = {
    "a negative length": lambda: {"files": {"f": [[3_000_000_000, 0], [-2_999_999_997, 0]]}},
    "a length that is no integer": lambda: {"files": {"f": [[float("inf"), 0]]}},
    "a checksum that is a text": lambda: {"files": {"f": [[3, "0"]]}},
    "facts that are a list": lambda: {"info": [1]},
    "files that are a list": lambda: {"files": [1]},
}


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "", "..", "a/b", "a\0b", "x" * 256, "\ud800"])
def test_files_elsewhere(file: str, tmp_path: Path) -> None:
    """Neither the index nor the manifest names them."""
    body = {"format": 1, "files": {file: [[3, 0]], ".metadata": [[len(GOOD), zlib.crc32(GOOD)]]}, "info": {}}
    crc32 = zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    (tmp_path / "manifest.json").write_text(json.dumps({"body": body, "crc32": crc32}))
    (tmp_path / ".metadata").write_bytes(GOOD)
    with pytest.raises(DamagedError, match=r"it names the file .*, which is not in its directory"):
        read_index(tmp_path)
    with pytest.raises(DamagedError, match=r"it names the file .*, which is not in its directory"):
        unpack(pack({}, {"v": Extent(file, 0, 1, None)}, {"v": ("v",)}))


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe would keep waiting whoever opens it."""
    for name in (".metadata", "manifest.json", "a"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / ".metadata").write_bytes(GOOD)
        (folder / "b").write_bytes(bytes(100))
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=rf"{name} (is missing|is no file)|has no \.metadata"):
            verify(read_index(folder))


def test_boxes_that_would_grow() -> None:
    """A tensor of terabytes in a few bytes, or a thousand times in the same bytes."""
    wide = SavedTensor(torch.float32, (10**12,), (SavedBox((0,), (10**12,), Extent("a", 0, 1000, None)),))
    with pytest.raises(DamagedError, match=r"w: \(1000000000000,\) elements of torch.float32 in 1000 bytes"):
        unpack(pack({"w": wide}, {}, {"w": ("w",)}))
    rows = tuple(SavedBox((at,), (1,), Extent("a", at, 1000, None)) for at in range(1000))
    with pytest.raises(DamagedError, match="w: byte 1 of a is in two boxes"):
        unpack(pack({"w": SavedTensor(torch.float32, (1000,), rows)}, {}, {"w": ("w",)}))


def test_an_instance_of_many_attributes() -> None:
    """Shared by many, each of which would go through all of them."""
    fields = b"".join(text(f"x{number}") + b"N" for number in range(100))
    many = named("torch.distributed.checkpoint.metadata", "Metadata") + b")\x81}(" + fields + b"ub"
    with pytest.raises(DamagedError, match=r"a .*Metadata of 100 attributes"):
        unpack(program(many))


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifests_that_no_one_writes(what: str, tmp_path: Path) -> None:
    body = {"format": 1, "files": {}, "info": {}, **MANIFESTS[what]()}
    crc32 = zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    (tmp_path / "manifest.json").write_text(json.dumps({"body": body, "crc32": crc32}))
    (tmp_path / ".metadata").write_bytes(GOOD)
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be read"):
        read_index(tmp_path)


def test_a_manifest_that_is_nested_too_deep(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    (tmp_path / ".metadata").write_bytes(GOOD)
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be read"):
        read_index(tmp_path)
