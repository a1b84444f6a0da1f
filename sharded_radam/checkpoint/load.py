"""Loading: nothing is changed before every rank has read and checked all that it needs.

Stages, each agreed on: all ranks have matched what they want with the same checkpoint; all have read it, into memory of
its own, or where there were zeros, which are put back if anything fails; objects of the user have taken it
(:mod:`sharded_radam.checkpoint.undo`). Then each rank copies the rest to its place, where nothing can fail: that is for
who called :func:`load_checkpoint`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index, read_index
from sharded_radam.checkpoint.format.reading import Reads, Target, plan_reads, put_back, read
from sharded_radam.checkpoint.undo import Change, change_all
from sharded_radam.store.agreement import Agreement
from sharded_radam.store.offers import absolute, expect_same
from sharded_radam.store.peers import Peers


class LoadPlan(Protocol):
    """A load of which all is decided."""

    @property
    def targets(self) -> Sequence[Target]:
        """Memory to read into."""

    @property
    def changes(self) -> Sequence[Change]:
        """What may fail when all ranks have read."""


P = TypeVar("P", bound=LoadPlan)


@torch.no_grad()
def load_checkpoint(
    path: str | os.PathLike[str], peers: Peers, timeout: float, prepare: Callable[[Index, DataFiles], P]
) -> P:
    """Read a checkpoint on all ranks, and do all of a load that can fail; or nothing, on none.

    Args:
        path: of the checkpoint.
        peers: the ranks.
        timeout: see :class:`Agreement`.
        prepare: checks the index against what is to be loaded.

    Returns:
        What ``prepare`` returned. Its targets are filled, its changes made; now it can be applied.

    Raises:
        CheckpointError: the same on every rank; nothing was changed.
    """
    reads: Reads = {}
    problem: Exception | None = None
    digest = 0
    index: Index | None = None
    plan: P | None = None
    try:
        with Agreement.begin(peers, f"loading {absolute(path)}", timeout) as agreement:
            try:
                folder = Path(os.path.abspath(path))
                with _no_collection():
                    index = read_index(folder)
                    digest = index.digest
                    index.check_files()
                    with DataFiles(folder) as files:
                        plan = prepare(index, files)
                    reads = plan_reads(index, plan.targets)
            except Exception as error:
                problem = error
            agreement.decide({"checkpoint": digest}, problem, _same)
            assert index is not None
            assert plan is not None
            try:
                read(index, reads)
            except Exception as error:
                problem = error
            agreement.decide(None, problem)
            change_all(plan.changes, agreement)
    except BaseException:
        if plan is not None:
            put_back(plan.targets)
        raise
    return plan


@contextmanager
def _no_collection() -> Iterator[None]:
    """Do not look for garbage: an index is thousands of small objects, and none of them is garbage yet.

    Beside torch's modules, one look takes a tenth of a second.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _same(offers: list[Any]) -> None:
    for what in offers[0]:
        expect_same([offer[what] for offer in offers], what)
