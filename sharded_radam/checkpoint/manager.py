"""CheckpointManager: all that a training needs to go on, of which it keeps the last few."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

import sharded_radam.checkpoint.format.directory as directory
import sharded_radam.checkpoint.retention as retention
from sharded_radam.checkpoint.draft import ToSave
from sharded_radam.checkpoint.load import load_checkpoint
from sharded_radam.checkpoint.save import Save, SaveReport
from sharded_radam.checkpoint.staging import Staging
from sharded_radam.checkpoint.training import Restored, Training
from sharded_radam.store.agreement import Agreement
from sharded_radam.store.offers import absolute
from sharded_radam.store.peers import Peers, ranks_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger("sharded_radam")


class CheckpointManager:
    """Saves to, and loads from, ``folder/step_<number>``; every method is collective, but for those that say so.

    A checkpoint has the model, the optimizer (a ShardedRAdam), the scheduler, each rank's random number generators,
    each rank's data position, and what the user adds; all by names, so that it loads at any world size. It is
    committed by a rename: the latest is the one of the largest step that has a name, whatever happened, in the branch
    that was written last (see ``load``).

    Args:
        folder: on a file system that all ranks share; one training at a time writes there.
        keep: how many checkpoints to keep beside the best and the protected ones; others are removed after a commit:
            first those that training has gone back from, the oldest first, then the smallest steps. None for all.
        best_mode: whether the best of what ``save(best=)`` was given is the smallest, "min", or the largest, "max".
        process_group: whose ranks save together, or a DeviceMesh, all of whose ranks do; the default group if None.
        timeout: seconds to wait for a rank that does not come, or is silent; a slow disk is waited for.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int | None = None,
        best_mode: str = "min",
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
        timeout: float = 600.0,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep={keep}: expected None or at least 1")
        if best_mode not in retention.MODES:
            raise ValueError(f"best_mode={best_mode!r}: expected one of {retention.MODES}")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: expected seconds above 0")
        self.folder = Path(folder)
        self._mode = best_mode
        self._peers, self._ranks = Peers.of(process_group), ranks_of(process_group)
        self._timeout = timeout
        self._thread = ThreadPoolExecutor(1, "sharded_radam-save")  # joined when the interpreter ends
        self._staging = Staging()
        self._in_flight: Future[SaveReport] | None = None
        self.last_report: SaveReport | None = None
        self._history = retention.History(self.folder, keep, best_mode)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that are committed, in increasing order; not collective."""
        return directory.committed_steps(self.folder)

    def best(self) -> int | None:
        """The step with the best value of all that are there; None if none has a value; not collective."""
        return retention.best(retention.read_records(self.folder), self._mode)

    def protect(self, step: int, protected: bool = True) -> None:
        """Keep a checkpoint until ``protect(step, False)``, also after a restart: nothing here removes it.

        Raises:
            CheckpointError: on every rank the same: there is none of this step.
        """
        self._on_one(
            step,
            "protecting" if protected else "no longer protecting",
            lambda record, path: directory.protect(path, protected),
        )

    def delete(self, step: int) -> None:
        """Remove a checkpoint, whichever it is but a protected one.

        Raises:
            CheckpointError: on every rank the same: there is none of this step, it is protected, or cannot be removed.
        """

        def remove(record: retention.Record, path: Path) -> None:
            if record.is_protected:
                raise ValueError(f"it is protected: protect({step}, False) first")
            directory.remove(path)

        self._on_one(step, "deleting", remove)

    def _on_one(self, step: int, what: str, act: Callable[[retention.Record, Path], None]) -> None:
        """Let rank 0 do something with one checkpoint."""
        self.wait()
        path = directory.step_path(self.folder, step)
        problem: Exception | None = None
        number = 0
        try:
            number = directory.check_step(step)
        except ValueError as error:
            problem = error

        def decide(_: list[Any]) -> None:
            directory.recover(self.folder)
            records = {record.step: record for record in retention.read_records(self.folder)}
            if number not in records:
                raise ValueError(f"there is none, only steps {[*records]}")
            act(records[number], path)

        with Agreement.begin(self._peers, f"{what} {absolute(path)}", self._timeout) as agreement:
            agreement.decide(None, problem, decide)

    # Saving

    def save(
        self,
        step: int,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        data: Any = None,
        user: Any = None,
        best: Any = None,
        blocking: bool = True,
    ) -> SaveReport | None:
        """Save a checkpoint.

        Args:
            step: its number; there must be none of this number, unless training has gone back to a step before, by
                ``load`` with an optimizer, and this one is an abandoned one. That is replaced when this is committed.
            model, optimizer: a model whose parameters all ranks have alike, and a ShardedRAdam, or another optimizer
                that all ranks have as a whole, of which rank 0's is saved. Buffers and extra state of the model are
                rank 0's, as under DistributedDataParallel; what each rank shall have back for itself goes into
                ``data``.
            scheduler: anything with ``state_dict()``. Models, optimizers and schedulers may be several, in dicts and
                lists; parameters have the names of the model with the optimizer's name, or of all models together.
            data: this rank's position in its data: a plain value, or anything with ``state_dict()``.
            user: a plain value that all ranks have; rank 0's is saved.
            best: a number by which checkpoints are compared, rank 0's, see ``best_mode``; NaN is never the best.
            blocking: if False, this returns as soon as there is a copy of this rank's part in host memory, which is
                kept for the next save until ``close``; what was saved may then change. One save is in flight at a
                time: the next one waits for it. What fails while it is written comes from the next call, or ``close``.

        Returns:
            What it took, None if not blocking; ``last_report`` has it once it is committed.

        Raises:
            CheckpointError: on every rank the same: this save failed, or the one that was in flight; or ranks differ in
                parameters, hyperparameters or step counts. There is no part of it left, and all earlier checkpoints
                are.
        """
        self.wait()
        final = directory.step_path(self.folder, step)
        collect = partial(self._collect, Training(model, optimizer, scheduler, data), step, user, best)
        staging = None if blocking else self._staging
        save = Save.begin(final, collect, self._peers, self._timeout, staging, leftovers="*")
        if blocking:
            self.last_report = self._write(save)
            return self.last_report
        self._in_flight = self._thread.submit(self._write, save)
        return None

    def _collect(self, training: Training, step: int, user: Any, best: Any) -> ToSave:
        to_save = training.collect(user, self._ranks)
        number = directory.check_step(step)
        notes, replaces = self._history.place(number, best) if self._peers.rank == 0 else ({}, False)
        return replace(to_save, info={"step": number}, notes=notes, replaces=replaces)

    def _write(self, save: Save) -> SaveReport:
        report = save.write()
        if self._peers.rank == 0:
            logger.info("saved %s", report)
            self._history.saved()
        return report

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight on this rank; not collective."""
        return self._in_flight is not None and not self._in_flight.done()

    def wait(self) -> SaveReport | None:
        """Wait for the save in flight; raises what it failed with. Returns the report of the last save."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            self.last_report = in_flight.result()
        return self.last_report

    def close(self) -> None:
        """Wait for the save in flight; raises what it failed with."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._staging.free()

    # Loading

    def load_latest(self, **parts: Any) -> Restored | None:
        """Load the largest step of the branch that was written last, as ``load`` does; None if there is none."""
        self.wait()
        what = f"looking for checkpoints in {absolute(self.folder)}"
        with Agreement.begin(self._peers, what, self._timeout) as agreement:
            # Rank 0 looks: a network file system may show others something else.
            step = agreement.decide(None, decide=lambda offers: self._latest())
        return None if step is None else self.load(step, **parts)

    def _latest(self) -> int | None:
        directory.recover(self.folder)
        return retention.latest(retention.read_records(self.folder))

    def load(
        self,
        step: int,
        *,
        model: Any = None,
        optimizer: Any = None,
        scheduler: Any = None,
        data: Any = None,
        rng: bool = True,
        strict: bool = True,
    ) -> Restored:
        """Load the checkpoint of a step into what is given, all or nothing.

        What is saved after a load with an optimizer goes on from that checkpoint: what was saved after it is abandoned,
        and ``load_latest`` follows the new branch. Without an optimizer, a load changes nothing of that.

        Until all ranks have read and checked it, it takes as much memory as is loaded: a model, and this rank's shards
        (of a new optimizer, only masters: moments that are zero take what is read, and are zeros again after an error).

        Args:
            step: its number.
            model, optimizer, scheduler: to load into.
            data: something with ``load_state_dict``, if the position is to be loaded into it.
            rng: whether to set the random number generators; only done at the world size of saving, and only on the
                ranks that saved some.
            strict: whether missing, unexpected and mismatched names of models and optimizers are errors; where there
                are several, all that were saved are expected.

        Raises:
            CheckpointError: on every rank the same; nothing was changed.
        """
        self.wait()
        path = directory.step_path(self.folder, step)
        training = Training(model, optimizer, scheduler, data)
        prepare = partial(training.prepare, peers=self._peers, step=step, rng=rng, strict=strict)
        plan = load_checkpoint(path, self._peers, self._timeout, prepare)
        restored = plan.apply()
        if optimizer is not None:
            self._history.loaded = plan.record
        if self._peers.rank == 0:
            reports = (
                [restored.optimizer] if restored.optimizer else [f"{k}: {v}" for k, v in restored.optimizers.items()]
            )
            logger.info("loaded %s", "; ".join(map(str, [path, *reports])))
        return restored
