"""The checkpoints of a folder: which goes on from which, which is the latest, which is the best, which of them stay.

Whoever loads an earlier checkpoint and trains on begins a new branch, named by the number of its first save::

    saves 1 2 3    step_1 - step_2 - step_3     branch 1, abandoned after step_1
    save  4        step_1 - step_5              branch 4: [[1, 1], [4, 5]]

A manifest says which number its save has in the folder ("written"), and for each branch on the way to it the last step
that was taken from it ("branch"). What was saved by earlier versions counts as one branch, number 0.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sharded_radam.checkpoint.format.directory as directory
from sharded_radam.checkpoint.format.index import MANIFEST, read_info

logger = logging.getLogger("sharded_radam")

Branch = tuple[tuple[int, int], ...]
"""Number and last step of each branch on the way to a checkpoint; its own is the last."""

MODES = ("min", "max")

_MOST_KEPT = 4096
"""Manifests that are not read again."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a manifest says of a checkpoint among others.

    ``written`` counts the saves of the folder, 0 for those of earlier versions; ``value`` is what ``best=`` was.
    """

    step: int
    written: int
    branch: Branch
    continues: int | None = None
    value: float | None = None
    mode: str | None = None
    time: float | None = None
    world_size: int | None = None
    is_protected: bool = False
    is_readable: bool = True

    @property
    def own(self) -> int:
        """Number of its own branch."""
        return self.branch[-1][0]


def record_of(step: int, info: Mapping[str, Any]) -> Record:
    """What a manifest's facts say; ValueError, TypeError or OverflowError if they are none of ours."""

    def number(key: str, kind: Callable[[Any], Any]) -> Any:
        return None if info.get(key) is None else kind(info[key])

    branch = tuple((int(number), int(last)) for number, last in info.get("branch", [[0, step]]))
    if not branch:
        raise ValueError("a checkpoint of no branch")
    return Record(
        step=step,
        written=number("written", int) or 0,
        branch=branch,
        continues=number("continues", int),
        value=number("best", float),
        mode=number("best_mode", str),
        time=number("time", float),
        world_size=number("world_size", int),
    )


def read_records(folder: Path) -> list[Record]:
    """Of all that are committed, by increasing step; not collective.

    One whose manifest is damaged counts as of the branch that was written last: if it has the largest step there, it is
    the latest, and an error when it is loaded.
    """
    records: list[Record] = []
    for step in directory.committed_steps(folder):
        path = directory.step_path(folder, step)
        try:
            record = record_of(step, _info(path, _stamp(path)))
        except (OSError, ValueError, TypeError, OverflowError):
            record = Record(step, -1, ((0, step),), is_readable=False)
        records.append(replace(record, is_protected=directory.is_protected(path)))
    last = newest([record for record in records if record.is_readable])
    if last is None:
        return records
    return [r if r.is_readable else replace(r, branch=(*last.branch[:-1], (last.own, r.step))) for r in records]


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes if another checkpoint has the name."""
    try:
        stat = (path / MANIFEST).stat()
    except FileNotFoundError:
        return ()
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


@functools.lru_cache(_MOST_KEPT)
def _info(path: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    return read_info(path)


def _age(record: Record) -> tuple[int, int]:
    return record.written, record.step


def is_on(record: Record, branch: Branch) -> bool:
    """Whether a branch goes through a checkpoint."""
    *earlier, (own, _) = branch
    return record.own == own or any(record.own == number and record.step <= last for number, last in earlier)


def newest(records: Sequence[Record]) -> Record | None:
    """The checkpoint that was written last."""
    return max(records, key=_age, default=None)


def latest(records: Sequence[Record]) -> int | None:
    """The largest step of the branch that was written last; None if there is no checkpoint."""
    last = newest(records)
    return None if last is None else max(record.step for record in records if record.own == last.own)


def best(records: Sequence[Record], mode: str) -> int | None:
    """The step with the smallest or largest value, the first one with it; None if none has a value other than NaN."""
    sign = 1 if mode == "min" else -1
    valued = [r for r in records if r.value is not None and not math.isnan(r.value)]
    return min(valued, key=lambda r: (sign * (r.value or 0.0), *_age(r))).step if valued else None


def stale(records: Sequence[Record], keep: int, mode: str) -> list[int]:
    """Steps to remove: all but ``keep``, the best, the protected, and the one that was written last.

    Those of the branch that was written last are kept first, the largest steps; then, for what is left of ``keep``,
    the youngest of the others.
    """
    last = newest(records)
    if last is None:
        return []
    line = sorted((r for r in records if is_on(r, last.branch)), key=lambda r: r.step)
    others = sorted((r for r in records if not is_on(r, last.branch)), key=_age)
    stay = {record.step for record in [*others, *line][-keep:]} | {last.step, best(records, mode)}
    return [record.step for record in records if record.step not in stay and not record.is_protected]


def next_branch(records: Sequence[Record], step: int, loaded: Record | None, last_saved: Branch | None) -> Branch:
    """The branch of a save.

    Args:
        records: all that there are.
        step: that is saved.
        loaded: the checkpoint that was loaded since the last save, if one was.
        last_saved: the branch of this process's last save, if there was one. Without both, the save continues what was
            written last.
    """
    number = count(records)
    went_on = {passed for record in records for passed in record.branch}
    if loaded is not None and any(own == loaded.own and last > loaded.step for own, last in went_on):
        return (*loaded.branch, (number, step))
    last = newest(records)
    branch = (loaded.branch if loaded else last_saved) or (last.branch if last else ((number, step),))
    return (*branch[:-1], (branch[-1][0], step))


def count(records: Sequence[Record]) -> int:
    """The number of the next save in a folder: larger than all that a manifest there has, of saves and of branches."""
    return 1 + max((max(r.written, *(number for number, _ in r.branch)) for r in records), default=0)


def number_of(value: Any) -> float | str:
    """A value to compare checkpoints by, as JSON can have it."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


class History:
    """Where a training is among the checkpoints of its folder, and what it does there; on rank 0.

    Args:
        folder, keep, mode: as :class:`CheckpointManager` has them.

    ``loaded`` is what was loaded since the last save, to go on from it.
    """

    def __init__(self, folder: Path, keep: int | None, mode: str) -> None:
        self._folder = folder
        self._keep = keep
        self._mode = mode
        self.loaded: Record | None = None
        self._last_saved: Branch | None = None
        self._writing: Branch | None = None

    def place(self, step: int, value: Any) -> tuple[dict[str, Any], bool]:
        """What the manifest is to say of a save among others, and whether it replaces one.

        Raises:
            ValueError: that one is protected, or the value is no number.
            TypeError: the value is no number.
        """
        directory.recover(self._folder)
        records = read_records(self._folder)
        branch = next_branch(records, step, self.loaded, self._last_saved)
        replaced = [record for record in records if record.step == step and not is_on(record, branch)]
        if any(record.is_protected for record in replaced):
            raise ValueError(
                f"there is a step {step}, which training has gone back from, and which is protected: protect({step}, "
                "False) first, or save another number"
            )
        continues = self.loaded.step if self.loaded else self._last_saved[-1][1] if self._last_saved else None
        notes: dict[str, Any] = {"written": count(records), "branch": branch, "continues": continues}
        if value is not None:
            notes |= {"best": number_of(value), "best_mode": self._mode}
        self._writing = branch
        return notes, bool(replaced)

    def saved(self) -> None:
        """What was placed last is committed: others may go."""
        self._last_saved, self.loaded = self._writing, None
        if self._keep is None:
            return
        try:
            for step in stale(read_records(self._folder), self._keep, self._mode):
                directory.remove(directory.step_path(self._folder, step))
        except OSError as error:  # the new checkpoint is there: no reason to end the training
            logger.warning("could not remove old checkpoints in %s: %s", self._folder, error)
