"""Which checkpoints of a folder go on from which; the latest, the best, the protected; what is removed, and when."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sharded_radam import CheckpointError, CheckpointManager
from sharded_radam.checkpoint import retention
from sharded_radam.checkpoint import save as saving
from sharded_radam.checkpoint.format import chunks as files
from sharded_radam.checkpoint.format import directory
from sharded_radam.checkpoint.format.index import MANIFEST, _canonical, read_index
from sharded_radam.checkpoint.format.verification import verify
from sharded_radam.checkpoint.retention import Record, is_on, latest, next_branch, read_records, stale
from sharded_radam.tools.cli import main
from tests.checkpoint.test_crashes import die, pair, state_bits
from tests.ranks import WORLD_SIZES, ends, run

try:
    from numpy import float32, int64
except ImportError:  # numpy's numbers are tried where it is
    float32, int64 = float, int  # type: ignore[assignment]

# The rules, without files


@dataclass(eq=False)
class Node:
    """A checkpoint that knows the one it continues."""

    step: int
    parent: Node | None
    record: Record

    def line(self) -> set[Node]:
        return {self} | (self.parent.line() if self.parent else set())


def random_story(seed: int) -> None:
    """Saves, loads of any checkpoint, removals and restarts, against checkpoints that know what they continue."""
    rng = random.Random(seed)
    nodes: list[Node] = []  # by age
    current: Node | None = None
    loaded: Record | None = None
    branch: retention.Branch | None = None
    for _ in range(40):
        action = rng.choice(("save", "save", "save", "load", "remove", "restart"))
        records = [node.record for node in nodes]
        if action == "save":
            step = rng.randint(1, 3) + (current.step if current else 0)
            made = next_branch(records, step, loaded, branch)
            there = [node for node in nodes if node.step == step]
            assert not any(is_on(node.record, made) for node in there)
            nodes = [node for node in nodes if node not in there]
            current = Node(step, current, Record(step, retention.count(records), made))
            nodes.append(current)
            loaded, branch = None, made
        elif action == "remove" and len(nodes) > 1:
            nodes.remove(rng.choice(nodes))
        elif action == "load" and nodes:
            current = rng.choice(nodes)
            loaded = current.record
        elif action == "restart":  # and the latest is loaded
            loaded, branch, current = None, None, nodes[-1] if nodes else None
            if current:
                assert latest(records) == current.step
                loaded = current.record
        if nodes:
            records = [node.record for node in nodes]
            newest = retention.newest(records)
            assert newest is nodes[-1].record
            assert latest(records) == nodes[-1].step
            for node in nodes:
                assert is_on(node.record, newest.branch) == (node in nodes[-1].line()), seed


def test_random_stories() -> None:
    for seed in range(500):
        random_story(seed)


def test_what_stays() -> None:
    def record(step: int, written: int, *branch: tuple[int, int], value: float | None = None, **more: Any) -> Record:
        return Record(step, written, branch or ((1, step),), value=value, **more)

    line = [record(step, step, value=10.0 - step) for step in (1, 2, 3, 4, 5)]
    assert stale(line, 2, "min") == [1, 2, 3]
    assert stale(line, 2, "max") == [2, 3]
    nan = [
        record(1, 1, value=float("nan")),
        record(2, 2, value=3.0),
        record(3, 3, value=3.0),
        record(4, 4),
        record(5, 5),
    ]
    assert retention.best(nan, "min") == retention.best(nan, "max") == 2  # the first that had it
    assert stale(nan, 1, "min") == [1, 3, 4]
    protected = [record(1, 1, is_protected=True), *(record(step, step) for step in (2, 3))]
    assert stale(protected, 1, "min") == [2]
    # Back from 5 to 2: the abandoned ones go first, the oldest of them first.
    back = [*(record(step, step) for step in (1, 2, 4, 5)), record(3, 6, (1, 2), (6, 3))]
    assert stale(back, 4, "min") == [4]
    assert stale(back, 3, "min") == [4, 5]
    assert stale(back, 1, "min") == [1, 2, 4, 5]
    assert stale([record(10, 1), record(9, 2)], 1, "min") == []  # what was just written stays
    assert retention.best([record(1, 1, value=float("-inf")), record(2, 2, value=-1e308)], "min") == 1


# With files and ranks


def same_error(match: str, action: Callable[[], object]) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        action()
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, str(caught.value))
    assert set(texts) == {str(caught.value)}


def check_going_back(rank: int, world_size: int, folder: str) -> None:
    place = Path(folder, str(world_size))
    _, optimizer = pair(1)
    manager = CheckpointManager(place)

    def restarted() -> tuple[int, Any]:
        restored = CheckpointManager(place).load_latest(optimizer=pair(0)[1])
        assert restored is not None
        dist.barrier()
        return restored.step, restored.user

    for step in (1, 2, 4):
        manager.save(step, optimizer=optimizer, user="old")
    manager.load(1)  # to look at it: nothing goes back
    manager.save(5, optimizer=optimizer, user="old")
    manager.load(1, optimizer=optimizer)
    assert restarted() == (5, "old")  # nothing was saved yet
    manager.save(3, optimizer=optimizer, user="new")
    assert restarted() == (3, "new")
    assert read_index(place / "step_3").info["continues"] == 1
    manager.load(1, optimizer=optimizer)
    manager.save(2, optimizer=optimizer, user="newer", blocking=False)  # replaces one
    manager.wait()
    assert restarted() == (2, "newer")
    dist.barrier()
    assert manager.steps() == [1, 2, 3, 4, 5]
    same_error("step_2 exists: checkpoints are never overwritten", lambda: manager.save(2, optimizer=optimizer))
    # Another process, which goes on from the latest.
    manager = CheckpointManager(place)
    manager.load_latest(optimizer=optimizer)
    manager.save(3, optimizer=optimizer, user="newest")
    manager.save(7, optimizer=optimizer, user="newest")
    assert restarted() == (7, "newest")
    # Back to an abandoned one, which is not abandoned any more.
    manager.load(4, optimizer=optimizer)
    manager.protect(7)
    same_error(
        r"step 7, which training has gone back from, and which is protected: protect\(7, False\) first",
        lambda: manager.save(7, optimizer=optimizer),
    )
    manager.save(6, optimizer=optimizer, user="again")
    assert restarted() == (6, "again")
    manager.protect(7, False)
    manager.save(7, optimizer=optimizer, user="again")
    assert restarted() == (7, "again")
    # One that neither loads nor saved goes on from what was written last.
    CheckpointManager(place).save(8, optimizer=optimizer, user="fresh")
    assert restarted() == (8, "fresh")
    records = read_records(place)
    branch = max(records, key=lambda record: record.written).branch
    assert [record.step for record in records if not is_on(record, branch)] == [2, 3, 5]
    for step in manager.steps():
        verify(read_index(place / f"step_{step}"))
    dist.barrier()
    kept = CheckpointManager(place, keep=3)
    kept.save(9, optimizer=optimizer)
    dist.barrier()
    assert kept.steps() == [7, 8, 9]


@pytest.mark.quick
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_going_back(tmp_path: Path, world_size: int) -> None:
    run(check_going_back, world_size, str(tmp_path))


def check_best(rank: int, world_size: int, folder: str) -> None:
    place = Path(folder, str(world_size))
    _, optimizer = pair(1)
    manager = CheckpointManager(place, keep=2)
    assert manager.best() is None
    losses = [3.0, float("nan"), float32(1.5), torch.tensor(2.0), None, float("inf")]
    for step, loss in enumerate(losses, 1):
        # Rank 0's counts.
        manager.save(step, optimizer=optimizer, best=loss if rank == 0 else -1.0, blocking=step % 2 == 0)
    manager.wait()
    dist.barrier()
    assert (manager.steps(), manager.best()) == ([3, 5, 6], 3)
    assert CheckpointManager(place).best() == 3  # also after a restart
    assert CheckpointManager(place, best_mode="max").best() == 6
    same_error("rank 0: (TypeError|ValueError): .*float", lambda: manager.save(7, optimizer=optimizer, best="x"))
    # Protected, also after a restart.
    manager.protect(5)
    dist.barrier()
    manager = CheckpointManager(place, keep=1)
    manager.save(8, optimizer=optimizer, best=1.0)
    manager.save(9, optimizer=optimizer)
    dist.barrier()
    assert (manager.steps(), manager.best()) == ([5, 8, 9], 8)
    same_error(r"deleting .*step_5: it is protected: protect\(5, False\) first", lambda: manager.delete(5))
    same_error(r"deleting .*step_3: there is none, only steps \[5, 8, 9\]", lambda: manager.delete(3))
    same_error(r"protecting .*step_3: there is none", lambda: manager.protect(3))
    if world_size > 1:
        same_error(
            r"rank 0 is deleting .*step_8, rank 1 is deleting .*step_9; all ranks must make the same",
            lambda: manager.delete(8 if rank == 0 else 9),
        )
    manager.delete(8)
    manager.protect(5, False)
    dist.barrier()
    assert (manager.steps(), manager.best()) == ([5, 9], None)
    manager.delete(5)
    dist.barrier()
    assert sorted(path.name for path in place.iterdir()) == ["step_9"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_best_protected_and_deleted(tmp_path: Path, world_size: int) -> None:
    run(check_best, world_size, str(tmp_path))


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="best_mode='least': expected one of"):
        CheckpointManager(tmp_path, best_mode="least")
    manager = CheckpointManager(tmp_path)
    manager.save(int64(3))  # type: ignore[arg-type]
    assert read_index(tmp_path / "step_3").info["step"] == 3
    with pytest.raises(CheckpointError, match=r"step=1.5: expected a whole number from 0 on"):
        manager.save(1.5)  # type: ignore[arg-type]


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    body = json.loads((path / MANIFEST).read_text())["body"]
    change(body["info"])
    (path / MANIFEST).write_text(json.dumps({"body": body, "crc32": zlib.crc32(_canonical(body))}))


def test_checkpoints_of_earlier_versions(tmp_path: Path) -> None:
    """They say nothing of branches: the latest is the largest step."""
    _, optimizer = pair(1)
    for step in (10, 2, 9):
        CheckpointManager(tmp_path).save(step, optimizer=optimizer)
    for step in (2, 9, 10):
        change_manifest(tmp_path / f"step_{step}", lambda info: [info.pop(key) for key in ("written", "branch")])
    shutil.copytree(tmp_path / "step_9", tmp_path / "step_8")
    (tmp_path / "step_8" / MANIFEST).unlink()  # as torch.distributed.checkpoint's
    manager = CheckpointManager(tmp_path, keep=3)
    restored = manager.load_latest(optimizer=optimizer)
    assert restored is not None
    assert restored.step == 10
    manager.save(11, optimizer=optimizer)
    assert manager.steps() == [9, 10, 11]
    manager.load(9, optimizer=optimizer)
    manager.save(10, optimizer=optimizer)
    restored = CheckpointManager(tmp_path).load_latest(optimizer=optimizer)
    assert restored is not None
    assert restored.step == 10
    assert read_index(tmp_path / "step_10").info["branch"] == [[0, 9], [2, 10]]
    assert manager.steps() == [9, 10, 11]


@pytest.mark.parametrize("branch", [[], [[1]], "x", 3, [["a", 1]], [[1e999, 1]]])
def test_a_manifest_that_says_nonsense(tmp_path: Path, branch: Any) -> None:
    """The latest is an error when it is loaded, as any damage, and others are not concerned."""
    manager = CheckpointManager(tmp_path, keep=2)
    _, optimizer = pair(1)
    for step in (1, 2):
        manager.save(step, optimizer=optimizer, best=step)
    change_manifest(tmp_path / "step_2", lambda info: info.update(branch=branch))
    with pytest.raises(CheckpointError, match="step_2"):
        CheckpointManager(tmp_path).load_latest(optimizer=optimizer)
    assert manager.best() == 1
    manager.load(1, optimizer=optimizer)
    manager.save(3, optimizer=optimizer)
    restored = manager.load_latest(optimizer=optimizer)
    assert restored is not None
    assert restored.step == 3


def test_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, optimizer = pair(1)
    manager = CheckpointManager(tmp_path, best_mode="max")
    for step, value in ((1, 0.5), (2, 0.75), (3, None)):
        manager.save(step, optimizer=optimizer, best=value)
    manager.load(1, optimizer=optimizer)
    manager.save(4, optimizer=optimizer, best=float("nan"))
    manager.protect(1)
    (tmp_path / "step_3" / MANIFEST).write_text("{")
    assert main(["checkpoint", "list", str(tmp_path), "--json"]) == 0
    rows = {row["step"]: row for row in json.loads(capsys.readouterr().out)["checkpoints"]}
    marks = {step: row["marks"] for step, row in rows.items()}
    assert marks == {1: ["protected"], 2: ["best", "abandoned"], 3: ["damaged"], 4: ["latest"]}
    assert [row["continues"] for row in rows.values()] == [None, 1, None, 1]
    assert [row["value"] for row in rows.values()] == [0.5, 0.75, None, "nan"]
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "2", "3", "4"]
    assert lines[2].endswith("0.75  best, abandoned")
    for step in (1, 2, 4):
        assert main(["checkpoint", "verify", str(tmp_path / f"step_{step}")]) == 0
    capsys.readouterr()
    assert main(["checkpoint", "list", str(tmp_path / "step_1")]) == 1
    assert "has no checkpoint: expected directories step_<number>" in capsys.readouterr().err


# Killed while one is replaced or removed


def dying(owner: Any, name: str, when: str) -> None:
    """Let this process be killed before or after a function's first call."""
    original = getattr(owner, name)

    def deadly(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            original(*args, **kwargs)
        die()

    setattr(owner, name, deadly)


def die_half_way() -> None:
    """Within the removal of a tree."""

    def partly(path: Path, ignore_errors: bool) -> None:
        next(Path(path).glob("*.distcp")).unlink()
        die()

    directory.shutil.rmtree = partly  # type: ignore[attr-defined]


def die_at_rename(number: int, when: str) -> None:
    rename, calls = os.rename, [0]

    def counted(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == number and when == "before":
            die()
        rename(*args)
        if calls[0] == number:
            die()

    os.__dict__["rename"] = counted


REPLACING: dict[str, Callable[[], None]] = {
    "before data": lambda: dying(files.DataFile, "__init__", "before"),
    "before the index": lambda: dying(saving, "write_index", "before"),
    "before it is set aside": lambda: die_at_rename(1, "before"),
    "after it was set aside": lambda: die_at_rename(1, "after"),
    "before the commit": lambda: die_at_rename(2, "before"),
    "after the commit": lambda: die_at_rename(2, "after"),
    "before it is discarded": lambda: die_at_rename(3, "before"),
    "after it was discarded": lambda: die_at_rename(3, "after"),
    "within its removal": die_half_way,
}


def replace_and_die(rank: int, world_size: int, folder: str, stage: str, is_alone: bool) -> None:
    _, old = pair(2)
    manager = CheckpointManager(folder, timeout=20)
    for step in (1, 2) if is_alone else (1, 2, 3):
        manager.save(step, optimizer=old)
    manager.load(1, optimizer=old)
    if is_alone:
        manager.delete(1)
    _, new = pair(4)
    if rank == 0:
        REPLACING[stage]()
    manager.save(2, optimizer=new)


def check_latest(rank: int, world_size: int, expected: dict[str, tuple[int, bool]]) -> None:
    _, old = pair(2)
    _, new = pair(4)
    for place, (latest_step, is_new) in expected.items():
        manager = CheckpointManager(place, timeout=20)
        _, resumed = pair(0)
        restored = manager.load_latest(optimizer=resumed)
        assert restored is not None
        assert restored.step == latest_step, place
        assert state_bits(resumed) == state_bits(new if is_new else old), place
        manager.save(7, optimizer=resumed)
        dist.barrier()
        assert all(path.name.startswith("step_") for path in Path(place).iterdir())
        for step in manager.steps():
            verify(read_index(Path(place, f"step_{step}")))
        dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sigkill_while_one_is_replaced(tmp_path: Path, world_size: int) -> None:
    """At any moment the latest is a whole checkpoint; where the one gone back to was removed, the old one is."""
    some = [*REPLACING] if world_size < 3 else ["before it is set aside", "after it was set aside", "after the commit"]
    calls = [
        (str(tmp_path / f"{stage.replace(' ', '-')}-{is_alone}"), stage, is_alone)
        for stage in some
        for is_alone in ((False, True) if world_size == 1 or stage == "after it was set aside" else (False,))
    ]
    expected = {}
    for (place, stage, is_alone), ended in zip(calls, ends(replace_and_die, world_size, *calls), strict=True):
        is_new = stage in [*REPLACING][5:]
        assert ended[0].status == -signal.SIGKILL, (stage, ended)
        for other in ended[1:]:  # they say what is so
            assert other.status == (0 if is_new else 1), (stage, ended)
            assert ("has ended: it was killed" in other.text) != is_new, (stage, ended)
        expected[place] = (2 if is_new or is_alone else 3, is_new)
    run(check_latest, world_size, expected)


DELETING: tuple[Callable[[], None], ...] = (
    lambda: die_at_rename(1, "before"),
    lambda: die_at_rename(1, "after"),
    die_half_way,
)


def delete_and_die(rank: int, world_size: int, folder: str, number: int) -> None:
    _, optimizer = pair(1)
    manager = CheckpointManager(folder, timeout=20)
    manager.save(1, optimizer=optimizer)
    manager.save(2, optimizer=optimizer)
    if rank == 0:
        DELETING[number]()
    manager.delete(2)


def check_what_was_not_deleted(rank: int, world_size: int, places: list[str]) -> None:
    for number, place in enumerate(places):
        there = [1, 2] if number == 0 else [1]
        _, optimizer = pair(0)
        manager = CheckpointManager(place, timeout=20)
        assert manager.steps() == there
        for step in there:
            verify(read_index(Path(place, f"step_{step}")))
        restored = manager.load_latest(optimizer=optimizer)
        assert restored is not None
        assert restored.step == there[-1]
        manager.save(3, optimizer=optimizer)
        dist.barrier()
        assert {path.name for path in Path(place).iterdir()} == {f"step_{step}" for step in [*there, 3]}


@pytest.mark.parametrize("world_size", [1, 2])
def test_sigkill_while_one_is_deleted(tmp_path: Path, world_size: int) -> None:
    places = [str(tmp_path / str(number)) for number in range(len(DELETING))]
    for ended in ends(delete_and_die, world_size, *((place, number) for number, place in enumerate(places))):
        assert ended[0].status == -signal.SIGKILL, ended
    run(check_what_was_not_deleted, world_size, places)


def test_a_commit_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = pair(2)
    manager = CheckpointManager(tmp_path)
    for step in (1, 2):
        manager.save(step, optimizer=optimizer, user=step)
    manager.load(1, optimizer=optimizer)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(directory, "commit", fail)
        with pytest.raises(CheckpointError, match="No space left on device"):
            manager.save(2, optimizer=optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]
    assert manager.load(2).user == 2
    manager.save(2, optimizer=optimizer, user="new")  # it still goes on from 1
    assert manager.load(2).user == "new"
