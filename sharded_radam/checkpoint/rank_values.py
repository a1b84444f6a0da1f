"""What each rank of a training has for itself: its position in the data, its random number generators."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.undo import Change, PutBack
from sharded_radam.store.peers import Peers


def keys_of_ranks(index: Index, name: str) -> list[str]:
    """Keys of what the ranks saved, each its own, in the order of ranks."""
    keys = [key for key in index.objects if key.startswith(f"{name}.")]
    return sorted(keys, key=lambda key: int(key.removeprefix(f"{name}.")))


def read_positions(index: Index) -> tuple[Any, ...]:
    """Data positions of all ranks that saved."""
    with DataFiles(index.folder) as files:
        return tuple(files.load(index.objects[key], key) for key in keys_of_ranks(index, "data"))


def load_own(index: Index, files: DataFiles, name: str, peers: Peers) -> Any:
    """What this rank saved for itself, if as many ranks saved as there are now: only its own file is opened."""
    keys = keys_of_ranks(index, name)
    if len(keys) != peers.world_size:
        return None
    return files.load(index.objects[keys[peers.rank]], keys[peers.rank])


def load_position(index: Index, files: DataFiles, peers: Peers) -> Any:
    """This rank's data position, or the one that all had; None if there are other ranks now, and they differed."""
    keys = keys_of_ranks(index, "data")
    if len(keys) in (0, peers.world_size):
        return load_own(index, files, "data", peers)
    first, *others = (files.load(index.objects[key], key) for key in keys)
    return first if all(other == first for other in others) else None


def random_states() -> dict[str, Any]:
    """States of all generators that this process uses, as plain values."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set those that this process has."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(states["numpy"]))


def setting_random_states(states: dict[str, Any]) -> Change:
    """The last change, since others may draw random numbers."""

    def remember() -> PutBack:
        states_now = random_states()
        return lambda: set_random_states(states_now)

    return Change("the random number generators", remember, lambda: set_random_states(states))
