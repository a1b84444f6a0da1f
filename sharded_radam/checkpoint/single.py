"""One optimizer alone in a checkpoint: ``ShardedRAdam.save`` and ``load``."""

from __future__ import annotations

import os
from collections.abc import Callable

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.reading import Target
from sharded_radam.checkpoint.load import load_checkpoint
from sharded_radam.checkpoint.optimizer import LoadReport, OptimizerPart
from sharded_radam.checkpoint.save import Save, Saved, SaveReport
from sharded_radam.checkpoint.undo import Change
from sharded_radam.store.peers import Peers


def save_optimizer(
    path: str | os.PathLike[str], make_part: Callable[[], OptimizerPart], peers: Peers, timeout: float
) -> SaveReport:
    """Save under the key "optim"; ``make_part`` may raise, as all that can fail on one rank only."""

    def collect() -> Saved:
        part = make_part()
        return Saved({"optim": part.content()}, {}, {"step": part.step()}, replicas=part.facts())

    return Save(path, collect, peers, timeout).write()


def load_optimizer(
    path: str | os.PathLike[str],
    make_part: Callable[[], OptimizerPart],
    peers: Peers,
    timeout: float,
    strict: bool,
    prefix: str | None,
) -> LoadReport:
    """Load what any of torch's or our ways of saving wrote of a RAdam."""

    def prepare(index: Index, files: DataFiles) -> tuple[list[Target], tuple[Change, ...], Callable[[], LoadReport]]:
        part = make_part()
        prepared = part.prepare(index, files, strict, prefix)
        return prepared.targets, (), lambda: part.apply(prepared)

    return load_checkpoint(path, peers, timeout, prepare)
