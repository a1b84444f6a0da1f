"""Step counters: one tensor for all parameters of a flat that stepped equally often.

``state[p]["step"]`` is a 0-d float64 tensor, on the host, or on the device if capturable. Float32, as torch has it,
would stop at 2^24. A parameter whose gradient is missing keeps its count, and so leaves the others' tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = Mapping[Tensor, dict[str, Any]]


class Cohort(NamedTuple):
    """Slots that take their step number ``step`` now: a number, or a tensor on the device if capturable."""

    step: int | Tensor
    slots: frozenset[int]


@torch.inference_mode(False)
def set_counts(state: State, params: Sequence[Tensor], counts: Sequence[float], device: torch.device) -> None:
    """Set ``state[p]["step"]`` (modified in place) of parameters of one flat."""
    shared: dict[float, Tensor] = {}
    for param, count in zip(params, counts, strict=True):
        if count not in shared:
            shared[count] = torch.full((), count, dtype=torch.float64, device=device)
        state[param]["step"] = shared[count]


def count_step(state: State, params: Sequence[Tensor], has_grad: Sequence[bool], capturable: bool) -> list[Cohort]:
    """Add 1 to ``state[p]["step"]`` (modified in place) of all parameters of a flat that have a gradient."""
    counters = [state[param]["step"] for param in params]
    # Values on the device are not read, which would wait for it: there, one tensor is one count.
    keys = {id(c): id(c) if capturable else c.item() for c in {id(c): c for c in counters}.values()}
    holders: dict[float, list[int]] = defaultdict(list)
    for slot, counter in enumerate(counters):
        holders[keys[id(counter)]].append(slot)
    cohorts = []
    for slots in holders.values():
        stepping = [slot for slot in slots if has_grad[slot]]
        if not stepping:
            continue
        counter = counters[slots[0]]
        if len(stepping) < len(slots) or any(counters[slot] is not counter for slot in slots):
            counter = counter.clone()
            for slot in stepping:
                state[params[slot]]["step"] = counter
        counter.add_(1)
        cohorts.append(Cohort(counter if capturable else int(counter.item()), frozenset(stepping)))
    return cohorts
