"""What a rank is about to save, and how that is compared with the others' before anything is written."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_radam.checkpoint.format.chunks import encode
from sharded_radam.checkpoint.parts import RankPart, part_of_rank
from sharded_radam.replicas import NO_FACTS, Facts, fingerprint
from sharded_radam.store.offers import expect_same
from sharded_radam.store.peers import Peers


@dataclass(frozen=True, slots=True)
class ToSave:
    """What is to be saved: values that all ranks have, values of this rank only, and facts for the manifest.

    ``notes`` are rank 0's facts for the manifest; ``replaces`` says there whether one that has the name is to be
    replaced. ``replicas`` must be equal on all ranks, which is checked.
    """

    nested: Mapping[str, Any]
    own: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    replaces: bool = False
    replicas: Facts = NO_FACTS


@dataclass(frozen=True, slots=True)
class Draft:
    """What this rank is to write, and where; ``chunks`` are the objects of ``part`` as they are written."""

    final: Path
    leftovers: str | None
    part: RankPart
    chunks: Mapping[str, memoryview]
    info: Mapping[str, Any]
    replaces: bool


class Offer(NamedTuple):
    """What is compared with the other ranks': ``values``, and ``replicas``, of which ``sums`` are checksums."""

    values: Mapping[str, Any]
    replicas: Facts
    sums: Tensor | None


def make_draft(
    final: str | os.PathLike[str], collect: Callable[[], ToSave], peers: Peers, leftovers: str | None
) -> tuple[Draft, Offer]:
    """All that can fail on one rank alone."""
    path = Path(os.path.abspath(final))
    to_save = collect()
    facts = {"world_size": peers.world_size, "torch": torch.__version__, "time": time.time()}
    part = part_of_rank(to_save.nested, to_save.own, peers.rank, peers.world_size)
    chunks = {key: encode(value, key) for key, value in part.objects.items()}
    values = {"contents": part.digest(), **to_save.info}
    sums: Tensor | None = None
    if peers.world_size > 1:
        digest, sums = fingerprint(to_save.replicas)
        values["replicas"] = digest.tolist()
    draft = Draft(
        final=path,
        leftovers=leftovers,
        part=replace(part, objects={}),
        chunks=chunks,
        info={**facts, **to_save.info, **to_save.notes},
        replaces=to_save.replaces,
    )
    return draft, Offer(values, to_save.replicas, sums)


def compare(offers: Sequence[Mapping[str, Any]]) -> bool:
    """Raise ValueError unless all ranks offer the same; False if their replicas differ, in what is yet to be found."""
    expect_same([offer["contents"] for offer in offers], "contents")
    if any(offer.get("replicas") != offers[0].get("replicas") for offer in offers):
        return False
    for what in offers[0]:
        expect_same([offer.get(what) for offer in offers], what)
    return True
