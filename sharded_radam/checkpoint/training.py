"""All that a training needs to go on, as ``CheckpointManager`` saves it and loads into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from sharded_radam.checkpoint.draft import ToSave
from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.reading import Target
from sharded_radam.checkpoint.objects import Objects, ObjectsPlan
from sharded_radam.checkpoint.parts import Opaque
from sharded_radam.checkpoint.rank_values import (
    keys_of_ranks,
    load_own,
    load_position,
    random_states,
    read_positions,
    setting_random_states,
)
from sharded_radam.checkpoint.report import LoadReport
from sharded_radam.checkpoint.retention import Record, record_of
from sharded_radam.checkpoint.undo import Change, loading_into
from sharded_radam.store.peers import Peers


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint had beside what was loaded into objects.

    ``data`` is what this rank saved as its data position, or what all ranks saved if that is one and the same; None if
    the ranks are others now and had different ones. ``optimizers`` has what was loaded of several optimizers, by their
    names (``"g"``; ``"0"`` in a list), and ``optimizer`` what was of one alone.
    """

    step: int
    user: Any
    data: Any
    optimizer: LoadReport | None
    optimizers: dict[str, LoadReport]
    _read_positions: Callable[[], tuple[Any, ...]] = field(repr=False, compare=False)

    @property
    def data_of_ranks(self) -> tuple[Any, ...]:
        """Data positions of all ranks that saved, read when they are asked for: the checkpoint must still be there."""
        return self._read_positions()


@dataclass(frozen=True, slots=True)
class Training:
    """What a user saves, or loads into; nothing of it is checked yet.

    A model, an optimizer and a scheduler are one object, or several in dicts and lists. ``data`` is this rank's
    position in its data, or what has it.
    """

    model: Any
    optimizer: Any
    scheduler: Any
    data: Any

    def collect(self, user: Any, ranks: list[int]) -> ToSave:
        """What is saved.

        Args:
            user: a plain value that all ranks have; None for nothing.
            ranks: that save.

        Raises:
            TypeError: one of the objects is of a kind that cannot be saved.
            ValueError: an optimizer is partitioned over other ranks, or has what cannot be saved.
        """
        objects = Objects.of(self.model, self.optimizer, self.scheduler)
        objects.check_ranks(ranks)
        nested, replicas = objects.content()
        if user is not None:
            nested["user"] = Opaque(user)
        own = {"rng": random_states()}
        if self.data is not None:
            own["data"] = self.data.state_dict() if hasattr(self.data, "state_dict") else self.data
        return ToSave(nested, own, replicas=replicas)

    def prepare(
        self, index: Index, files: DataFiles, peers: Peers, step: int, *, rng: bool, strict: bool
    ) -> TrainingPlan:
        """Match all that there is with the checkpoint of a step.

        Raises:
            ValueError: something is not in the checkpoint; or names, shapes or groups differ, and ``strict``.
        """
        record = record_of(step, index.info)
        objects = Objects.of(self.model, self.optimizer, self.scheduler).prepare(index, files, strict)
        user = files.load(index.objects["user"], "user") if "user" in index.objects else None
        position = load_position(index, files, peers)
        changes = [*objects.changes]
        if self.data is not None:
            if position is None:
                raise ValueError(
                    f"data: the checkpoint has {len(keys_of_ranks(index, 'data'))} positions, of as many ranks, that "
                    f"differ, and there are {peers.world_size} ranks: load without data=, and choose from "
                    "data_of_ranks"
                )
            changes.append(loading_into(self.data, "data", position))
        states = load_own(index, files, "rng", peers) if rng else None
        if states is not None:
            changes.append(setting_random_states(states))
        return TrainingPlan(index, record, objects, changes, user, position)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A load of which all is decided."""

    index: Index
    record: Record
    objects: ObjectsPlan
    changes: Sequence[Change]
    user: Any
    position: Any

    @property
    def targets(self) -> Sequence[Target]:
        """Memory to read into."""
        return self.objects.targets

    @torch.no_grad()
    def apply(self) -> Restored:
        """Put what was read in its place; nothing in it can fail."""
        reports = self.objects.apply()
        alone = reports.pop("", None)  # an optimizer without a name
        return Restored(self.record.step, self.user, self.position, alone, reports, partial(read_positions, self.index))
