"""Hostile and damaged ``.metadata`` and chunks: nothing that a file names is reached, let alone changed."""

from __future__ import annotations

import io
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharded_radam.checkpoint import decode, metadata
from sharded_radam.checkpoint.closed import ForbiddenError
from sharded_radam.checkpoint.files import DamagedError, Extent
from sharded_radam.checkpoint.index import read_index
from sharded_radam.checkpoint.metadata import Box, SavedTensor, pack, unpack

pytestmark = pytest.mark.quick

BOXES = (Box((0, 0), (2, 5), Extent("a", 0, 9, None)), Box((2, 0), (1, 5), Extent("b", 0, 9, None)))
GOOD = pack(
    {"w": SavedTensor(torch.float32, (3, 5), BOXES)}, {"v": Extent("a", 9, 5, None)}, {"w": ("w",), "v": ("v", 0)}
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


def stand_ins() -> list[Any]:
    return [*metadata._STAND_INS.values(), decode._Tensor, decode._Storage, metadata._DType]


@pytest.mark.parametrize("name", [*metadata._STAND_INS, ("torch", "float32")], ids=".".join)
def test_no_attribute_of_a_class_can_be_set(name: tuple[str, str]) -> None:
    """Today's `pathlib.Path.is_file` was exchanged so, for the whole process."""
    before = [dict(vars(cls)) for cls in stand_ins()]
    paths = dict(vars(pathlib.Path))
    for attribute in ("is_file", "__new__", "__setstate__", "__hash__", "__class__", "args"):
        for value in (pickle.EMPTY_DICT, named("collections", "OrderedDict"), named("torch", "Size")):
            content = program(named(*name), set_attributes(attribute, value))
            with pytest.raises((ForbiddenError, DamagedError)):
                unpack(content)
            state = pickle.EMPTY_DICT + text(attribute) + value + pickle.SETITEM  # as an object with a __dict__ has it
            with pytest.raises((ForbiddenError, DamagedError)):
                unpack(program(named(*name), state, pickle.BUILD))
    assert [dict(vars(cls)) for cls in stand_ins()] == before
    assert dict(vars(pathlib.Path)) == paths


@pytest.mark.parametrize("at", range(GOOD.count(pickle.STACK_GLOBAL)))
def test_a_good_file_that_also_sets_attributes(at: int, tmp_path: Path) -> None:
    """All else in it is as it should be."""
    parts = GOOD.split(pickle.STACK_GLOBAL)
    assert unpack(GOOD) == unpack(pickle.STACK_GLOBAL.join(parts))
    attack = pickle.STACK_GLOBAL + set_attributes("is_file", pickle.EMPTY_DICT)
    content = pickle.STACK_GLOBAL.join(parts[: at + 1]) + attack + pickle.STACK_GLOBAL.join(parts[at + 1 :])
    before = pathlib.Path.is_file
    (tmp_path / ".metadata").write_bytes(content)
    if b"float32" in parts[at]:  # a dtype is an object of this file's own: what is set on it nobody reads
        assert read_index(tmp_path).tensors.keys() == {"w"}
    else:
        with pytest.raises(ValueError, match=r"\.metadata: (the pickle sets the attribute|it cannot be read)"):
            read_index(tmp_path)
    assert pathlib.Path.is_file is before


def test_chunks_cannot_set_attributes_either() -> None:
    """Not of the functions and classes that make tensors; torch.load then says what it thinks of the file."""
    tensor = torch.arange(6.0)
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    for name in ("_rebuild_tensor_v2", "FloatStorage", "OrderedDict"):
        changed = io.BytesIO()
        with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(changed, "w") as target:
            for info in source.infolist():
                content = source.read(info)
                if info.filename.endswith("data.pkl"):
                    end = content.index(name.encode()) + len(name) + 1  # GLOBAL is two lines
                    attack = set_attributes("__defaults__", pickle.EMPTY_TUPLE)
                    content = content[:end] + attack + content[end:]
                target.writestr(info, content)
        before = [dict(vars(cls)) for cls in stand_ins()]
        found = decode.decode(memoryview(bytearray(changed.getvalue())))
        assert found is None or (name == "FloatStorage" and torch.equal(found, tensor))
        assert [dict(vars(cls)) for cls in stand_ins()] == before
        plain = decode.decode(memoryview(bytearray(buffer.getvalue())))
        assert plain is not None
        assert torch.equal(plain, tensor)


FORBIDDEN: dict[str, Callable[[], bytes]] = {
    "a function": lambda: named("posix", "system") + text("true") + pickle.TUPLE1 + pickle.REDUCE,
    "of torch": lambda: named("torch", "load"),
    "of the format's own module": lambda: named("torch.distributed.checkpoint.metadata", "os"),
    "an attribute of an allowed class": lambda: named("pathlib", "Path.write_text"),
    "through torch": lambda: named("torch", "float32.__class__"),
    "of ours": lambda: named("sharded_radam.checkpoint.closed", "Record"),
    "by protocol 0": lambda: b"cos\nsystem\n",
    "an instance by protocol 0": lambda: pickle.MARK + b"ios\nsystem\n",
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
    "getattr without arguments": lambda: named("__builtin__", "getattr") + pickle.EMPTY_TUPLE + pickle.REDUCE,
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
