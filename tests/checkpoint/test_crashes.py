"""Saves that fail or are killed, and damaged files: every rank raises the same, nothing hangs, nothing is lost."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint import save as saving
from sharded_radam.checkpoint.format import chunks as files
from sharded_radam.checkpoint.format import directory
from sharded_radam.checkpoint.format.directory import committed_steps
from sharded_radam.checkpoint.format.index import METADATA, read_index, write_index
from sharded_radam.checkpoint.format.metadata import SavedTensor
from sharded_radam.checkpoint.format.verification import check_coverage, verify
from sharded_radam.store.agreement import Agreement
from tests.cases import set_grads
from tests.ranks import WORLD_SIZES, ends, run, stop

Pair = tuple[nn.Module, ShardedRAdam]


def pair(steps: int) -> Pair:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 33), nn.Linear(33, 3))
    optimizer = ShardedRAdam(model.named_parameters(), bucket_cap_mb=1e-3)
    for step in range(1, steps + 1):
        set_grads(model.parameters(), step)
        optimizer.step()
    return model, optimizer


def state_bits(optimizer: ShardedRAdam) -> list[bytes]:
    return [bytes(t.reshape(-1).view(torch.uint8).tolist()) for s in optimizer.state.values() for t in s.values()]


# Killed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


STAGES = ("before data", "within data", "before the index", "before the rename", "after the rename")


def die_at(stage: str, rank: int) -> None:  # noqa: C901
    """Let this process be killed at a stage of its next save."""
    if stage == "before data":
        files.DataFile.__init__ = lambda *_: die()  # type: ignore[method-assign]
    elif stage == "within data":
        write = files.DataFile.write

        def partly(self: files.DataFile, data: Any) -> int:
            if self._size > 3000:
                self._file.flush()
                die()
            return write(self, data)

        files.DataFile.write = partly  # type: ignore[method-assign]
    elif rank:  # these stages are rank 0's: another rank is killed when it waits for them
        ask, number = Agreement._ask, STAGES.index(stage)

        def waiting(self: Agreement, post: str) -> Any:
            if self._stage == 3:
                self._board.put(self._key(rank), post)
                time.sleep(0.05 * (number - 2))
                die()
            return ask(self, post)

        Agreement._ask = waiting  # type: ignore[method-assign]
    elif stage == "before the index":
        saving.__dict__["write_index"] = lambda *_: die()
    elif stage == "before the rename":
        directory.commit = lambda *_: die()
    else:
        commit = directory.commit

        def renamed(unfinished: Path, final: Path) -> None:
            commit(unfinished, final)
            die()

        directory.commit = renamed


def save_and_die(rank: int, world_size: int, folder: str, victim: int, stage: str) -> None:
    manager = CheckpointManager(folder, timeout=60)
    manager.save(1, optimizer=pair(2)[1])
    _, optimizer = pair(4)
    if rank == victim:
        die_at(stage, rank)
    manager.save(2, optimizer=optimizer)


def check_what_is_left(rank: int, world_size: int, places: dict[str, list[int]]) -> None:
    _, old = pair(2)
    _, new = pair(4)
    for place, committed in places.items():
        manager = CheckpointManager(place, timeout=60)
        # The last one loads, with the state that it was saved with.
        model, resumed = pair(0)
        restored = manager.load_latest(optimizer=resumed)
        assert restored is not None
        assert restored.step == committed[-1]
        assert state_bits(resumed) == state_bits(old if restored.step == 1 else new)
        # And the next save of the same step is possible; what was left behind is gone.
        if committed == [1]:
            manager.save(2, optimizer=new)
        manager.load(2, optimizer=resumed)
        assert state_bits(resumed) == state_bits(new)
        manager.save(3, model=model, optimizer=resumed)
        dist.barrier()
        assert sorted(path.name for path in Path(place).iterdir()) == ["step_1", "step_2", "step_3"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_sigkill_of_each_rank_at_each_stage(tmp_path: Path, world_size: int) -> None:
    left = {}
    for victim in range(world_size) if world_size < 4 else (0, 3):
        places = [tmp_path / f"{victim}-{stage.replace(' ', '-')}" for stage in STAGES]
        calls = [(str(place), victim, stage) for place, stage in zip(places, STAGES, strict=True)]
        for place, stage, ended in zip(places, STAGES, ends(save_and_die, world_size, *calls), strict=True):
            lost = stage in STAGES[:2] or (victim == 0 and stage in STAGES[:4])
            assert committed_steps(place) == ([1] if lost else [1, 2]), stage
            left[str(place)] = committed_steps(place)
            assert ended.pop(victim).status == -signal.SIGKILL, (victim, stage, ended)
            # The others know what came of it, at once, and not after the time-out.
            for other in ended:
                assert other.status == (1 if lost else 0), (victim, stage, other)
                assert ("has ended: it was killed" in other.text) == lost, (victim, stage, other)
    run(check_what_is_left, world_size, left)


# Failures


@contextmanager
def same_error(rank: int, optimizer: ShardedRAdam, match: str, folder: Path | None = None) -> Iterator[None]:
    """Every rank raises one and the same CheckpointError; nothing is changed or left behind."""
    before = state_bits(optimizer)
    left = sorted(folder.iterdir()) if folder else []
    with pytest.raises(CheckpointError, match=match) as caught:
        yield
    if dist.is_initialized():
        texts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, str(caught.value))
        assert set(texts) == {str(caught.value)}
    assert state_bits(optimizer) == before
    assert not folder or sorted(folder.iterdir()) == left


def check_failures(rank: int, world_size: int, folder: str) -> None:
    place = Path(folder, str(world_size))
    place.mkdir(exist_ok=True)
    last = world_size - 1
    _, optimizer = pair(3)
    optimizer.save(place / "good")
    dist.barrier()
    with same_error(rank, optimizer, "good exists: checkpoints are never overwritten", place):
        optimizer.save(place / "good")
    if world_size > 1:
        with same_error(rank, optimizer, f"rank 0 is saving /.*/a, rank {last} is saving /.*/b; all ranks", place):
            optimizer.save(place / ("a" if rank < last else "b"))
        with same_error(rank, optimizer, f"rank 0 is saving .*step_1, rank {last} is saving .*step_2; all ranks"):
            CheckpointManager(place).save(1 if rank < last else 2, optimizer=optimizer)
        optimizer.save(place / "other")
        dist.barrier()
        with same_error(rank, optimizer, f"rank 0 is loading /.*/good, rank {last} is loading /.*/other; all ranks"):
            optimizer.load(place / ("good" if rank < last else "other"), timeout=5)
        if rank < last:
            for call in (
                lambda: optimizer.save(place / "c", timeout=1.5),
                lambda: optimizer.load(place / "good", timeout=1.5),
            ):
                with pytest.raises(CheckpointError, match=f"rank {last} did not come within 1.5 s"):
                    call()
            assert not (place / "c").exists()
        dist.barrier()
    # A rank that fails to write, in each way; the next save works.
    for number, failing in enumerate((OSError(28, "No space left on device"), RuntimeError("out of paper"))):
        add = files.DataFile.add

        def fail(self: files.DataFile, value: Any, failing: Exception = failing) -> Any:
            raise failing

        if rank == last:
            files.DataFile.add = fail  # type: ignore[method-assign]
        try:
            with same_error(rank, optimizer, f"rank {last}: .*{failing.args[-1]}", place):
                optimizer.save(place / "d")
        finally:
            files.DataFile.add = add  # type: ignore[method-assign]
        dist.barrier()
        optimizer.save(place / f"d{number}")
        dist.barrier()
    for path, text in (
        ("nothing", r"there is no .*nothing, only d0, d1, good(, other)?"),
        ("good/manifest.json", r"is a file, expected the directory of a checkpoint"),
        (".", r"has no .metadata: it is no checkpoint, or one whose save did not end"),
    ):
        with same_error(rank, optimizer, text):
            optimizer.load(place / path)
    # A value that could not be loaded again is found out when it is saved.
    with same_error(rank, optimizer, "rank 0.*: ValueError: user is a builtins.type, which cannot be saved", place):
        CheckpointManager(place).save(7, optimizer=optimizer, user=OSError)
    # And one that is no tensor of the model.
    with same_error(rank, optimizer, "TypeError: optimizer is a Linear, expected a ShardedRAdam or another", place):
        CheckpointManager(place).save(7, optimizer=nn.Linear(2, 2))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_raises_the_same(tmp_path: Path, world_size: int) -> None:
    run(check_failures, world_size, str(tmp_path))


def check_no_permission(rank: int, world_size: int, folder: str) -> None:
    """As another user than root, who may do anything."""
    _, optimizer = pair(2)
    if rank == 0:
        Path(folder, "closed").mkdir(mode=0o755, exist_ok=True)
        Path(folder).chmod(0o755)
    optimizer.save(Path(folder, f"secret-{world_size}"))
    if rank == 0:
        for file in Path(folder, f"secret-{world_size}").iterdir():
            file.chmod(0o600)
    dist.barrier()
    root = os.geteuid() == 0
    if root:
        default: Any = dist.distributed_c10d._get_default_store()
        store = Path(default.underlying_store.path)  # where the ranks meet stays open
        store.parent.chmod(0o755)
        store.chmod(0o666)
        dist.barrier()
        os.seteuid(65534)
    elif rank == 0:
        Path(folder, "closed").chmod(0o555)
        Path(folder, f"secret-{world_size}", METADATA).chmod(0)
    dist.barrier()
    try:
        with same_error(rank, optimizer, r"PermissionError: .*Permission denied.*closed"):
            optimizer.save(Path(folder, "closed", "x"))
        with same_error(rank, optimizer, r"PermissionError: .*Permission denied.*\.metadata"):
            optimizer.load(Path(folder, f"secret-{world_size}"))
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_no_permission(world_size: int) -> None:
    folder = Path(f"/tmp/sharded_radam-permission-{os.getpid()}-{world_size}")  # pytest's own is closed to others
    folder.mkdir()
    try:
        run(check_no_permission, world_size, str(folder))
    finally:
        shutil.rmtree(folder)


def can_mount() -> bool:
    return (
        os.geteuid() == 0
        and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0
    )


needs_mount = pytest.mark.skipif(not can_mount(), reason="mounting a file system needs root and CAP_SYS_ADMIN")


def check_full_disk(rank: int, world_size: int, folder: str) -> None:
    """A disk of 1 MiB, where a small checkpoint fits and another does not."""
    _, small = pair(2)
    model = nn.Linear(600, 400)
    large = ShardedRAdam(model.named_parameters())
    place = Path(folder)
    small.save(place / "small")
    dist.barrier()
    with same_error(rank, large, "No space left on device|unexpected pos|write", place):
        large.save(place / "large")
    _, loaded = pair(0)
    loaded.load(place / "small")
    assert state_bits(loaded) == state_bits(small)
    small.save(place / "again")


@needs_mount
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_full_disk(tmp_path: Path, world_size: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
    try:
        run(check_full_disk, world_size, str(disk))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def check_private_disk(rank: int, world_size: int, folder: str) -> None:
    """The last rank has another file system under the same name."""
    saving._SEEN_WITHIN_S = 0.3
    _, optimizer = pair(2)
    if rank == world_size - 1:
        clone_newns, ms_rec, ms_private = 0x20000, 0x4000, 1 << 18
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(clone_newns) == 0
        assert libc.mount(b"none", b"/", None, ms_rec | ms_private, None) == 0
        assert libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, None) == 0
    dist.barrier()
    with same_error(rank, optimizer, f"rank {world_size - 1} does not see the directory that rank 0 made in"):
        optimizer.save(Path(folder, "x"))


@needs_mount
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_file_system_that_is_not_shared(tmp_path: Path, world_size: int) -> None:
    stop()
    run(check_private_disk, world_size, str(tmp_path))
    stop()  # one of them has other mounts now
    assert list(tmp_path.iterdir()) == []


# Damage


def flip(path: Path, byte: int, bit: int = 3) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def check_damage(rank: int, world_size: int, folder: str) -> None:
    place = Path(folder)
    model, optimizer = pair(3)
    CheckpointManager(place).save(world_size, model=model, optimizer=optimizer, user={"a": 1})
    good = place / f"step_{world_size}"
    index = read_index(good)
    last = index.tensors["optim.state.0.weight.exp_avg"].boxes[-1].extent
    data = last.file

    def damaged(name: str, change: Callable[[Path], object], *texts: str) -> None:
        copy = place / f"{world_size}-{name}"
        if rank == 0:
            shutil.copytree(good, copy)
            change(copy)
        dist.barrier()
        _, target = pair(1)
        with same_error(rank, target, ".*".join(texts)):
            target.load(copy)
        if rank == 0:
            with pytest.raises(ValueError, match=texts[0]):
                verify(read_index(copy))
        dist.barrier()

    def at(offset: int) -> Callable[[Path], object]:
        return lambda copy: flip(copy / data, last.start + offset)

    damaged("data", at(last.length - 700), data, "optim.state.0.weight.exp_avg", "the file is damaged")
    damaged("header", at(4), data, "optim.state.0.weight.exp_avg", "the file is damaged")
    damaged("end", at(last.length - 1), data, "optim.state.0.weight.exp_avg", "the file is damaged")
    for byte in (10, 300, -20):
        damaged(f"metadata{byte}", lambda copy, byte=byte: flip(copy / METADATA, byte), r"\.metadata")  # type: ignore[misc]
        damaged(f"manifest{byte}", lambda copy, byte=byte: flip(copy / "manifest.json", byte), r"manifest\.json")  # type: ignore[misc]
    damaged("short", lambda copy: os.truncate(copy / data, last.start + 5), data, "bytes, and was saved with")
    damaged("gone", lambda copy: (copy / data).unlink(), f"{data} is missing")
    damaged("longer", lambda copy: (copy / data).open("ab").write(b"x"), data, "bytes, and was saved with")
    damaged("no metadata", lambda copy: (copy / METADATA).unlink(), "has no .metadata")
    damaged("format", lambda copy: new_format(copy / "manifest.json"), "manifest.json cannot be read: format 99")


def new_format(path: Path) -> None:
    body = json.loads(path.read_text())["body"]
    body["format"] = 99
    seal(path, body)


def seal(path: Path, body: Any) -> None:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({"body": body, "crc32": zlib.crc32(canonical)}))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_damage_of_each_kind_of_file(tmp_path: Path, world_size: int) -> None:
    run(check_damage, world_size, str(tmp_path))


def test_every_single_bit_counts(tmp_path: Path) -> None:
    """Whatever bit of whatever file is flipped, verify finds it."""
    model, optimizer = pair(1)
    CheckpointManager(tmp_path).save(1, model=model, optimizer=optimizer)
    generator = torch.Generator().manual_seed(0)
    for path in (tmp_path / "step_1").iterdir():
        size = path.stat().st_size
        for byte in torch.randint(size, (150,), generator=generator).tolist():
            flip(path, byte, byte % 8)
            with pytest.raises((ValueError, OSError)):
                verify(read_index(tmp_path / "step_1"))
            flip(path, byte, byte % 8)
    verify(read_index(tmp_path / "step_1"))


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_hostile_pickle_is_not_run(tmp_path: Path, with_manifest: bool) -> None:
    """With the right checksums, which whoever wrote it can compute; in the index, and as a value."""
    _, optimizer = pair(1)
    manager = CheckpointManager(tmp_path / "a")
    manager.save(1, optimizer=optimizer, user={"a": 1})
    folder = tmp_path / "a" / "step_1"
    hostile = Hostile(f"touch {tmp_path / 'ran'}")
    body = json.loads((folder / "manifest.json").read_text())["body"]
    original = (folder / METADATA).read_bytes()
    content = pickle.dumps(hostile)
    (folder / METADATA).write_bytes(content)
    body["files"][METADATA] = [[len(content), zlib.crc32(content)]]
    seal(folder / "manifest.json", body)
    if not with_manifest:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.system, which no checkpoint needs"):
        optimizer.load(folder)
    (folder / METADATA).write_bytes(original)
    (folder / "manifest.json").unlink(missing_ok=True)
    extent = read_index(folder).objects["user"]
    torch.save({"a": hostile}, tmp_path / "value")
    with (folder / extent.file).open("r+b") as file:
        file.seek(extent.start)
        value = (tmp_path / "value").read_bytes()
        file.write(value)
    metadata = pickle.loads(original)
    stored = next(info for index, info in metadata.storage_data.items() if index.fqn == "user")
    stored.length = len(value)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"user: it needs (posix|nt).system, which is no plain value"):
        manager.load(1, optimizer=optimizer)
    stored.relative_path = "../../etc/passwd"
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names the file '../../etc/passwd', which is not in its directory"):
        manager.load(1, optimizer=optimizer)
    assert not (tmp_path / "ran").exists()


def moves(tensor: SavedTensor) -> Iterator[SavedTensor]:
    """The same tensor, with one of its boxes moved by one element; it stays within the tensor."""
    for at, box in enumerate(tensor.boxes):
        for dim, (first, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            for by in (-1, 1):
                if 0 <= first + by <= tensor.shape[dim] - size:
                    offsets = (*box.offsets[:dim], first + by, *box.offsets[dim + 1 :])
                    boxes = (*tensor.boxes[:at], replace(box, offsets=offsets), *tensor.boxes[at + 1 :])
                    yield replace(tensor, boxes=boxes)


def check_moved(rank: int, world_size: int, folder: str) -> None:
    place, twice = Path(folder), "some elements are in the checkpoint twice, others are not"
    model, optimizer = pair(2)
    manager = CheckpointManager(place)
    manager.save(1, model=model, optimizer=optimizer)
    write = saving.Save._write_file

    def elsewhere(self: saving.Save) -> list[Any]:
        rows = write(self)
        at = next(number for number, (_, offsets, *_) in enumerate(rows) if offsets and any(offsets))
        dim = next(dim for dim, first in enumerate(rows[at][1]) if first)
        offsets = [first - (number == dim) for number, first in enumerate(rows[at][1])]
        return [*rows[:at], (rows[at][0], offsets, *rows[at][2:]), *rows[at + 1 :]]

    if rank == world_size - 1:
        saving.Save._write_file = elsewhere  # type: ignore[method-assign]
    try:
        with same_error(rank, optimizer, twice, place):
            manager.save(2, model=model, optimizer=optimizer)
    finally:
        saving.Save._write_file = write  # type: ignore[method-assign]
    manager.save(2, model=model, optimizer=optimizer)
    if rank == 0:
        shutil.copytree(place / "step_1", place / "moved")
        index = read_index(place / "step_1")
        key = "optim.state.0.weight.exp_avg"
        # The file names boxes by their offsets, so that no two can have the same.
        other = next(
            each for each in moves(index.tensors[key]) if len({box.offsets for box in each.boxes}) == len(each.boxes)
        )
        write_index(place / "moved", {**index.tensors, key: other}, index.objects, index.paths, index.info)
    dist.barrier()
    with same_error(rank, optimizer, twice):
        optimizer.load(place / "moved")
    manager.load(2, model=model, optimizer=optimizer)


@pytest.mark.parametrize("world_size", [2, 3, 8, 16])
def test_boxes_of_all_ranks_tile_each_tensor(tmp_path: Path, world_size: int) -> None:
    """And one of them, moved by one element, is found when it is saved, verified and loaded."""
    run(check_moved, world_size, str(tmp_path), timeout=200)
    index = read_index(tmp_path / "step_1")
    verify(index)
    for name in ("model.0.weight", "optim.state.0.weight.exp_avg"):
        assert len({box.extent.file for box in index.tensors[name].boxes}) >= world_size // 2, name
    moved = [{key: other} for key, tensor in index.tensors.items() for other in moves(tensor)]
    assert len(moved) > 20 * world_size
    for tensors in moved:
        with pytest.raises(ValueError, match="some elements are in the checkpoint twice, others are not"):
            check_coverage(tensors)
    with pytest.raises(ValueError, match="some elements are in the checkpoint twice, others are not"):
        verify(read_index(tmp_path / "moved"))


def test_elements_that_no_chunk_has(tmp_path: Path) -> None:
    model, optimizer = pair(1)
    optimizer.save(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").unlink()
    metadata = pickle.loads((tmp_path / "a" / METADATA).read_bytes())
    key = "optim.state.1.weight.exp_avg"
    metadata.state_dict_metadata[key].chunks.clear()
    (tmp_path / "a" / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=rf"{key}: 0 of 99 elements are in the checkpoint"):
        optimizer.load(tmp_path / "a")
    with pytest.raises(ValueError, match=rf"{key}: 0 of 99 elements are in the checkpoint"):
        verify(read_index(tmp_path / "a"))
    del model
