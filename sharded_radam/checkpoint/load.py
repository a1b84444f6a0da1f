"""Loading: nothing is changed before every rank has read and checked all that it needs.

Stages, each agreed on: all ranks have matched what they want with the same checkpoint; all have read it, into memory of
its own, or where there were zeros, which are put back if anything fails; objects of the user have taken it
(:mod:`sharded_radam.checkpoint.undo`). Then each rank copies the rest to its place, where nothing can fail.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index, read_index
from sharded_radam.checkpoint.format.reading import Reads, Target, plan_reads, put_back, read
from sharded_radam.checkpoint.undo import Change, change_all
from sharded_radam.store.agreement import Agreement
from sharded_radam.store.offers import absolute, expect_same
from sharded_radam.store.peers import Peers

T = TypeVar("T")


@torch.no_grad()
def load_checkpoint(
    path: str | os.PathLike[str],
    peers: Peers,
    timeout: float,
    prepare: Callable[[Index, DataFiles], tuple[Sequence[Target], Sequence[Change], Callable[[], T]]],
) -> T:
    """Load on all ranks, or on none.

    Args:
        path: of the checkpoint.
        peers: the ranks.
        timeout: see :class:`Agreement`.
        prepare: checks the index against what is to be loaded; returns memory to read into, what may fail when all
            ranks have read, and what to do in the end, which cannot.

    Returns:
        What that returned.

    Raises:
        CheckpointError: the same on every rank; nothing was changed.
    """
    reads: Reads = {}
    targets: Sequence[Target] = ()
    problem: Exception | None = None
    digest = 0
    index: Index | None = None
    changes: Sequence[Change] = ()
    apply: Callable[[], T] | None = None
    try:
        with Agreement.begin(peers, f"loading {absolute(path)}", timeout) as agreement:
            try:
                folder = Path(os.path.abspath(path))
                index = read_index(folder)
                digest = index.digest
                index.check_files()
                with DataFiles(folder) as files:
                    targets, changes, apply = prepare(index, files)
                reads = plan_reads(index, targets)
            except Exception as error:
                problem = error
            agreement.decide({"checkpoint": digest}, problem, _same)
            assert index is not None
            assert apply is not None
            try:
                read(index, reads)
            except Exception as error:
                problem = error
            agreement.decide(None, problem)
            change_all(changes, agreement)
    except BaseException:
        put_back(targets)
        raise
    return apply()


def _same(offers: list[Any]) -> None:
    for what in offers[0]:
        expect_same([offer[what] for offer in offers], what)
