"""Damaged and hostile checkpoints, made at random and read: nothing of them runs, hangs, crashes or takes much memory.

    OMP_NUM_THREADS=1 PYTHONPATH=. python -m tests.fuzz --cases 10000

A number always gives the same case: ``--first 4711 --cases 1 --keep folder`` makes one again, to look at.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import pickle
import pickletools
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint.format import decode, metadata
from sharded_radam.checkpoint.format.chunks import DataFiles, Extent
from sharded_radam.checkpoint.format.errors import DamagedError, ForbiddenError
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.metadata import SavedBox, SavedTensor
from sharded_radam.checkpoint.format.packing import pack
from sharded_radam.checkpoint.format.reading import read_value
from sharded_radam.checkpoint.format.verification import verify
from sharded_radam.state.values import equal

SECONDS = 20
"""Of the processor, for one case; all take a few milliseconds."""

BYTES_OF_ONE, BYTES_OF_ALL = 300, 2**20
"""So much memory may be taken for each byte of the files, and beside that."""

DATA = "__0_0.distcp"
ARCHIVES = ("3.10.13-2.6.0", "3.11.2-2.13.0", "3.14.10-2.15.0")
USER = {1: "one", (2, "x"): [2.5, None, {True}], "t": torch.arange(7), "u": {"v": b"8", "w": 1j, "x": Counter("ab")}}
NUMBERS = (0, 1, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**64 - 1)
FORBIDDEN = (
    *("posix.system", "os.system", "builtins.eval", "builtins.exec", "builtins.getattr", "builtins.__import__"),
    *("builtins.bytearray", "builtins.list", "builtins.range", "subprocess.Popen", "torch.load", "torch.Tensor"),
    *("torch.nn.parameter.Parameter", "copyreg._reconstructor", "operator.attrgetter", "collections.defaultdict"),
)


class Base(NamedTuple):
    """A checkpoint: its files, and the values in it."""

    files: dict[str, bytes]
    values: dict[str, Any]


class Case(NamedTuple):
    """Files to read, and the values that they must have if they can be read at all; None where nobody knows."""

    kind: str
    files: dict[str, bytes]
    values: dict[str, Any] | None


class HangError(BaseException):
    """A case took too long."""


def bases() -> list[Base]:
    found = []
    with tempfile.TemporaryDirectory() as name:
        for archive in ARCHIVES:
            shutil.unpack_archive(Path(__file__).parent / "data" / f"{archive}.tar.xz", Path(name, archive))
        model = nn.Linear(3, 2)
        optimizer = ShardedRAdam(model.named_parameters())
        CheckpointManager(name).save(1, model=model, optimizer=optimizer, user=USER, data={"at": 1})
        folders = [Path(name, archive, kind) for archive in ARCHIVES for kind in ("dcp", "ours")]
        for folder in [*folders, Path(name, "step_1")]:
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            found.append(Base(files, read_all(folder)))
    return found


def read_all(folder: Path) -> dict[str, Any]:
    """All that is in a checkpoint, each value when all else was checked."""
    index = read_index(folder)
    verify(index)
    with DataFiles(folder) as files:
        return {key: read_value(index, key, files) for key in [*index.tensors, *index.objects]}


# Making of bytes


def damaged(r: random.Random, content: bytes) -> bytes:
    """Bytes that were changed, lost, moved or added."""
    found = bytearray(content)
    for _ in range(r.choice((1, 1, 2, 4))):
        at = r.randrange(len(found) + 1)
        length = r.choice((1, 2, 8, 60, 600))
        part = bytes(found[at : at + length])
        number = r.choice(NUMBERS)
        found[at : at + r.choice((0, length))] = r.choice(
            (
                *(b"", r.randbytes(length), part * r.choice((2, 2, 300)), bytes([r.randrange(256)])),
                *(struct.pack("<Q", number), struct.pack("<I", number % 2**32), b"\xff" * length),
            )
        )
        if r.random() < 0.1:
            del found[at:]
    return bytes(found)


def text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def integer(number: int) -> bytes:
    encoded = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def named(r: random.Random) -> bytes:
    names = r.choice((FORBIDDEN, sorted({*metadata._NAMES, *metadata._FUNCTIONS}), sorted(decode._NAMES)))
    return named_one(r.choice(names))


def named_one(full: str) -> bytes:
    module, _, name = full.rpartition(".")
    if len(full) % 2:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()
    return text(module) + text(name) + pickle.STACK_GLOBAL


def opcodes(r: random.Random) -> bytes:
    """A few opcodes: values, calls, claims of lengths, and any byte."""
    numbered = r.choice((b"B", b"X", b"T", b"\x8b", b"j", b"r")) + struct.pack("<I", r.choice(NUMBERS) % 2**32)
    long = r.choice((b"\x8d", b"\x8e", b"\x95", b"\x96")) + struct.pack("<Q", r.choice(NUMBERS))
    value = r.choice((integer(r.choice(NUMBERS)), integer(-1), text("x" * r.randrange(300)), b"N", b")", b"]", b"}"))
    made = r.choice(
        (
            *(numbered, long, value, named(r), bytes([r.randrange(256)]), b"h" + bytes([r.randrange(20)])),
            *(b"\x94", b"q\x00", b"q\x01", b"h\x00h\x00\x86\x94", b"\x85", b"\x86", b"2", b"0", b"(", b"t", b"e"),
            *(named(r) + b"(" + value + b"tR", named(r) + value + b"\x85R", named(r) + b")\x81}b"),
            *(b"}" + value + b"Ns", b"]" + value + b"a", b"N}" + text("is_file") + value + b"s\x86b", b"G" + bytes(8)),
            *(value + b"Q", b"\x82\x05", b"ios\nsystem\n", b"\x8a\xff" + b"\x7f" * 255, named(r) + b"(" + value + b"o"),
        )
    )
    return made * r.choice((1, 1, 1, 2, 60, 3000))


def again(r: random.Random, part: bytes, *times: int) -> bytes:
    number = r.choice(times)
    return part * (number if number * len(part) < 10**6 else 1)


def formed(r: random.Random, depth: int = 0) -> bytes:
    """Opcodes of a value in the best of forms, which may ask for anything."""
    kind = r.randrange(9 if depth < 4 else 3)
    parts = [formed(r, depth + 1) for _ in range(r.choice((0, 1, 1, 2, 3)))] if kind > 3 else []
    if kind < 2:
        return r.choice(
            (integer(r.choice((-1, 3, *NUMBERS))), text(r.choice(("cpu", "latin1", "x" * 300))), b"N", b"\x88")
        )
    if kind == 2:
        return named(r)
    if kind == 3:  # what is there twice in what is there twice
        return formed(r, depth + 1) + b"q\xc8h\xc8\x86" * r.choice((1, 30, 200))
    if kind == 4:
        return formed(r, depth + 1) + r.choice((b"\x85", b"]q\xc9h\xc9\x86")) * r.choice((1, 50, 120, 5000))
    if kind == 5:
        return b"(" + again(r, b"".join(parts), 1, 1, 300) + b"t"
    if kind == 6:
        return b"](" + again(r, b"".join(parts), 1, 1, 300) + b"e"
    if kind == 7:
        pairs = b"".join(formed(r, 9) + part for part in parts)
        empty = r.choice((b"}", named_one("collections.OrderedDict") + b")R"))
        return empty + b"(" + again(r, pairs, 1, 300) + b"u"
    return named(r) + b"(" + b"".join(parts) + b"t" + r.choice((b"R", b"R", b"R", b"\x81", b"R}b"))


def hostile(r: random.Random, pickled: bytes) -> bytes:
    """Another pickle: of opcodes at random, or those of this one exchanged, repeated, left out, with others between."""
    if r.random() < 0.3:
        return b"\x80\x04" + formed(r) + b"."
    if r.random() < 0.3:
        return b"\x80\x04" + b"".join(opcodes(r) for _ in range(r.choice((1, 3, 10, 100)))) + b"."
    starts = [position for _, _, position in pickletools.genops(pickled) if position is not None]
    parts = [pickled[a:b] for a, b in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    for _ in range(r.choice((1, 1, 2, 5)) if len(parts) > 1 else 0):
        at, other = r.randrange(len(parts) or 1), r.randrange(len(parts) or 1)
        length = r.choice((1, 1, 1, 5, 40))
        parts[at : at + r.choice((0, length))] = r.choice(
            (
                *([], [opcodes(r)], parts[other : other + length], parts[at : at + length] * r.choice((2, 50))),
                *(
                    [integer(r.choice(NUMBERS))],
                    [*parts[other : other + 1]],
                    [text(r.choice(("x", "../x", "/etc/passwd", "")))],
                ),
            )
        )
    return b"".join(parts)


def chunk(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def hostile_chunk(r: random.Random, content: bytes) -> bytes:
    """A chunk with another pickle, or other sizes and places in its archive."""
    if r.random() < 0.3:
        return damaged(r, content)
    target = io.BytesIO()
    compression = r.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(target, "w", compression) as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, hostile(r, data) if name.endswith("data.pkl") else data)
    return target.getvalue() if r.random() < 0.9 else damaged(r, target.getvalue())


def sealed(files: dict[str, bytes], lengths: list[int], change: Callable[[Any], Any] = lambda body: body) -> bytes:
    """A manifest with the right checksums, as whoever wants to harm makes it."""
    listed: dict[str, Any] = {".metadata": [[len(files[".metadata"]), zlib.crc32(files[".metadata"])]], DATA: []}
    at = 0
    for length in lengths:
        listed[DATA].append([length, zlib.crc32(files[DATA][at : at + length])])
        at += length
    body = change({"format": 1, "files": listed, "info": {"step": 1, "world_size": 1}})
    crc32 = zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    return json.dumps({"body": body, "crc32": crc32}).encode()


def changed_json(r: random.Random, found: Any) -> Any:
    """The same with something else somewhere."""
    if isinstance(found, dict) and found and r.random() < 0.9:
        key = r.choice(sorted(found))
        name = r.choice((key, key, key, "", "../x", "/dev/zero", "a\0b", "x" * 300, "\ud800"))
        return {**{k: v for k, v in found.items() if k != key}, name: changed_json(r, found[key])}
    if isinstance(found, list) and found and r.random() < 0.9:
        at = r.randrange(len(found))
        return [*found[:at], *[changed_json(r, found[at])] * r.choice((0, 1, 1, 1, 2, 60)), *found[at + 1 :]]
    other: tuple[Any, ...] = (None, -1, 0.5, float("inf"), "x", [], {}, True, [[[]]] * 100, 10**30, "x" * 1000)
    return r.choice((*NUMBERS, *other))


# Making of cases


def damage(r: random.Random, base: Base) -> Case:
    """A byte that the disk lost, so to say: where there are checksums, it is found, or does not matter."""
    file = r.choice(sorted(base.files))
    files = {**base.files, file: damaged(r, base.files[file])}
    return Case(
        f"damage of {'data' if file == DATA else file}", files, base.values if "manifest.json" in files else None
    )


def hostile_index(r: random.Random, base: Base) -> Case:
    files = {**base.files, ".metadata": hostile(r, base.files[".metadata"])}
    if r.random() < 0.5 or "manifest.json" not in files:
        files.pop("manifest.json", None)
    else:
        content = json.loads(files["manifest.json"])["body"]["files"][DATA]
        files["manifest.json"] = sealed(files, [length for length, _ in content])
    return Case("hostile index", files, None)


def hostile_boxes(r: random.Random, base: Base) -> Case:
    """An index in the best of forms, with numbers that are none of a tensor."""
    content = chunk(torch.arange(12.0))

    odd = r.choice((0.0, 0.02, 0.5))

    def number(usual: int) -> int:
        return r.choice((0, 1, 2, 3, 6, 12, *NUMBERS[:-2])) if r.random() < odd else usual

    tensors = {}
    for name in "abc":
        shape = tuple(map(number, r.choice(((), (12,), (12,), (3, 4), (12, *[1] * 50), (2**40,), (2**31, 2**28)))))
        boxes = tuple(
            SavedBox(
                tuple(number(0) for _ in shape),
                tuple(map(number, shape)),
                Extent(DATA, number(0), number(len(content)), None),
            )
            for _ in range(r.choice((1, 1, 1, 1, 2, 300)))
        )
        tensors[name] = SavedTensor(r.choice((torch.float32,) * 8 + (torch.complex128,)), shape, boxes)
    packed = pack(tensors, {"v": Extent(DATA, 0, len(content), None)}, {name: (name,) for name in "abcv"})
    return Case("hostile boxes", {".metadata": packed, DATA: content}, None)


def hostile_manifest(r: random.Random, base: Base) -> Case:
    lengths = [length for length, _ in json.loads(base.files["manifest.json"])["body"]["files"][DATA]]
    files = dict(base.files)
    files["manifest.json"] = sealed(files, lengths, lambda body: changed_json(r, body))
    if r.random() < 0.2:
        deep = r.choice((b"[", b'{"body":', b"1")) * 20_000
        files["manifest.json"] = r.choice((deep, damaged(r, files["manifest.json"])))
    return Case("hostile manifest", files, base.values if files[DATA] == base.files[DATA] else None)


def hostile_data(r: random.Random, base: Base) -> Case:
    """Chunks that are as hostile, where index and checksums say that they are right."""
    tensor = torch.arange(12.0)
    value = r.choice((USER, tensor, nn.Linear(2, 2).state_dict(), [1, "x"], r.choice([*base.values.values()])))
    content = hostile_chunk(r, chunk(value))
    extent = Extent(DATA, 0, len(content), None)
    is_tensor = value is tensor and len(content) >= tensor.nbytes
    tensors = {"a": SavedTensor(torch.float32, (12,), (SavedBox((0,), (12,), extent),))} if is_tensor else {}
    files = {".metadata": pack(tensors, {"v": extent}, {"a": ("a",), "v": ("v",)}), DATA: content}
    if r.random() < 0.5:
        files["manifest.json"] = sealed(files, [len(content)])
    return Case("hostile chunk", files, None)


def make_case(number: int, found: list[Base]) -> Case:
    r = random.Random(number)
    kind = r.choice((damage, damage, hostile_index, hostile_boxes, hostile_manifest, hostile_data, hostile_data))
    with_manifest = [base for base in found if "manifest.json" in base.files]
    return kind(r, r.choice(with_manifest if kind is hostile_manifest else found))


# Reading


PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.Tensor, torch.dtype, torch.device)
RUNS = (
    "exec",
    "compile",
    "pickle.find_class",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "ctypes.dlopen",
)
_ran: list[str] = []


def note_what_runs(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: what no file may cause."""
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if event in RUNS or writes or event.startswith(("shutil.", "socket.", "os.remove", "os.rename")):
        _ran.append(f"{event}: {args!r:.200}")


def check_plain(value: Any) -> None:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            check_plain(part)
    else:
        assert isinstance(value, PLAIN), type(value)


def outcome(case: Case, folder: Path) -> str:
    """How reading ended.

    Raises:
        AssertionError: otherwise than a file may end it.
    """
    size = sum(map(len, case.files.values()))
    _ran.clear()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    found, what, refusal = {}, "right" if case.values is not None else "harmless", None
    try:
        load(folder)
        found = read_all(folder)
    except (ValueError, OSError) as error:
        what, refusal = type(error).__name__, error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    _, peak = tracemalloc.get_traced_memory()
    assert peak - before < BYTES_OF_ONE * size + BYTES_OF_ALL, f"{peak - before} bytes of memory for {size} of files"
    assert not _ran, _ran
    check_clear(refusal)
    check_plain(found)
    if what == "right":
        assert case.values is not None
        assert found.keys() == case.values.keys(), "other names"
        for key, value in found.items():
            assert equal(value, case.values[key]), f"{key}: {value!r:.200}"
    return what


def load(folder: Path) -> None:
    """The same into an optimizer, all or nothing."""
    optimizer = ShardedRAdam(nn.Linear(3, 2).named_parameters())
    refusal = None
    try:
        optimizer.load(folder, strict=False)
    except CheckpointError as error:
        refusal = error.__cause__
        check_clear(refusal)
    is_new = not any(tensor.any() for flat in optimizer._shards.flats for tensor in flat.state.values())
    assert is_new or refusal is None, "it was refused, and has changed the optimizer"


def check_clear(refusal: BaseException | None) -> None:
    assert type(refusal) in (type(None), DamagedError, ForbiddenError, ValueError), f"no clear error: {refusal!r}"
    assert "allocate" not in str(refusal), f"it tried to take memory: {refusal!r}"
    assert len(str(refusal)) < 1000, f"a long error: {refusal!s:.2000}"


def on_alarm(number: int, frame: Any) -> None:
    raise HangError(f"more than {SECONDS} s")


def prepare() -> list[Base]:
    """Limit this process, for good."""
    found = bases()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**30  # tracemalloc needs some of it
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    faulthandler.enable()
    signal.signal(signal.SIGPROF, on_alarm)
    tracemalloc.start()
    sys.addaudithook(note_what_runs)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="a folder for the files of the last case")
    options = parser.parse_args()
    torch.manual_seed(0)
    found, begin = prepare(), time.monotonic()
    ended: Counter[tuple[str, str]] = Counter()
    failures = 0
    for number in range(options.first, options.first + options.cases):
        case = make_case(number, found)
        with tempfile.TemporaryDirectory() as name:
            folder = options.keep or Path(name)
            for file, content in case.files.items():
                (folder / file).write_bytes(content)
            try:
                ended[case.kind, outcome(case, folder)] += 1
            except BaseException as error:
                failures += 1
                print(f"case {number}, {case.kind}: {type(error).__name__}: {error}", flush=True)
                if isinstance(error, KeyboardInterrupt):
                    raise
    for (kind, what), count in sorted(ended.items()):
        print(f"{kind:25} {what:15} {count:6}")
    print(f"{options.cases} cases, {failures} failures, {time.monotonic() - begin:.0f} s")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
