"""What users put into ``optimizer.state``: it counts, as it does with RAdam."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.optim import RAdam

from sharded_radam.buckets.counters import Counters
from sharded_radam.buckets.flat import Flat
from sharded_radam.state.dicts import Entry, read_entry


def group_of(optimizer: RAdam, flat: Flat) -> dict[str, Any]:
    """The param group of a flat; the defaults for parameters that are in no group any more."""
    index = flat.specs[0].group
    return optimizer.param_groups[index] if index < len(optimizer.param_groups) else optimizer.defaults


def has_param(optimizer: RAdam, param: Tensor) -> bool:
    """Whether a parameter is in one of the groups."""
    return any(each is param for group in optimizer.param_groups for each in group["params"])


def find_edits(optimizer: RAdam, flat: Flat, among: Set[Tensor] | None = None) -> dict[int, Entry]:
    """What somebody has put into the state of a flat's parameters, by slot; nothing in an entry for what is missing.

    Args:
        optimizer: whose state.
        flat: whose parameters.
        among: look at these parameters only.

    Raises:
        ValueError: it is not of this rank's part of the parameter.
    """
    edits = {}
    for slot in flat.slots_of_others(optimizer.state, not optimizer.defaults["differentiable"]):
        param, own = flat.params[slot], flat.local_state[slot]["exp_avg"].shape
        if among is not None and param not in among:
            continue
        state = optimizer.state[param] if "step" in optimizer.state[param] else None
        is_whole = state is not None and getattr(state.get("exp_avg"), "shape", None) == param.shape
        shape = param.shape if is_whole else own
        edits[slot] = read_entry(flat.specs[slot].name, param, shape, flat.spans(slot), state)
    return edits


@torch.no_grad()
def take_back(
    optimizer: RAdam, flat: Flat, edits: dict[int, Entry] | None = None, device: torch.device | None = None
) -> None:
    """Follow what somebody did to the state of a flat: tensors put there are copied, missing ones start anew.

    Args:
        optimizer: whose state.
        flat: whose parameters.
        edits: that were found; they are looked for if it is None.
        device: where step counters are to be; as the param group has it if None.
    """
    edits = find_edits(optimizer, flat) if edits is None else edits
    device = device or _counter_device(optimizer, flat)
    for slot, entry in edits.items():
        if optimizer.defaults["differentiable"] and entry.tensors is not None:
            continue  # they are part of a graph
        flat.take_back_state(slot, entry.tensors)
        optimizer.state[flat.params[slot]].update(flat.local_state[slot])
    if edits or flat.counters.device != device:
        views = enumerate(flat.counters.views)
        counts = [edits[slot].step if slot in edits else float(count) for slot, count in views]
        set_counts(optimizer, flat, counts, device)


def set_counts(optimizer: RAdam, flat: Flat, counts: Sequence[float], device: torch.device | None = None) -> None:
    """Let the parameters of a flat have taken so many steps (device: of the counters; as the group has it if None)."""
    flat.counters = Counters(counts, device or _counter_device(optimizer, flat))
    for param, step in zip(flat.params, flat.counters.views, strict=True):
        if param in optimizer.state:
            optimizer.state[param]["step"] = step


def _counter_device(optimizer: RAdam, flat: Flat) -> torch.device:
    return flat.buffer.device if group_of(optimizer, flat)["capturable"] else torch.device("cpu")
