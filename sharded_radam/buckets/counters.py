"""Step counters of a flat: one tensor for all its parameters, of which each one's ``state[p]["step"]`` is a view.

In float64, on the host, or on the device if capturable. Float32, as torch has it, would stop at 2^24. A parameter
whose gradient is missing keeps its count, and users may set each one's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_radam.buckets.memory import addresses_of, changed


class Cohort(NamedTuple):
    """Slots that take their step number ``step`` now: a number, or a tensor on the device if capturable."""

    step: int | Tensor
    slots: frozenset[int]


class Counters:
    """How many steps the parameters of a flat have taken.

    Args:
        counts: for each slot.
        device: of the tensor.

    ``views`` are 0-d, one for each slot.
    """

    @torch.inference_mode(False)
    def __init__(self, counts: Sequence[float], device: torch.device) -> None:
        self.device = device
        self._all = torch.tensor(counts, dtype=torch.float64, device=device)
        self.views = [*self._all.unbind()]
        self._addresses = addresses_of(self.views)
        # Values on the device are not read, which would wait for it: slots of one class have the same count.
        self._classes: list[float] = list(counts)
        self._version = self._all._version

    def moved(self) -> list[int]:
        """Slots to the ``.data`` of whose counter somebody has assigned."""
        return changed(addresses_of(self.views), self._addresses)

    def add_step(self, has_grad: Sequence[bool], capturable: bool) -> list[Cohort]:
        """Add 1 for all slots that have a gradient.

        Args:
            has_grad: for each slot.
            capturable: whether the numbers of the steps are to be tensors.
        """
        counts = self._known_classes() if capturable else self._all.tolist()
        cohorts: dict[float, list[int]] = defaultdict(list)
        for slot, has in enumerate(has_grad):
            if has:
                cohorts[counts[slot]].append(slot)
        if all(has_grad):
            self._all.add_(1)
        elif cohorts:
            torch._foreach_add_([self.views[slot] for slots in cohorts.values() for slot in slots], 1)
        if capturable:
            self._split_classes(has_grad)
            return [Cohort(self.views[slots[0]], frozenset(slots)) for slots in cohorts.values()]
        return [Cohort(int(count) + 1, frozenset(slots)) for count, slots in cohorts.items()]

    def _known_classes(self) -> list[float]:
        """Without reading the counts: if somebody else has written to them, each slot is a class of its own."""
        if self._version != self._all._version:
            self._classes = [float(slot) for slot in range(len(self.views))]
        return self._classes

    def _split_classes(self, has_grad: Sequence[bool]) -> None:
        """Those that stay behind leave the class of the others."""
        numbers: dict[tuple[float, bool], float] = {}
        pairs = zip(self._classes, has_grad, strict=True)
        self._classes = [numbers.setdefault(pair, float(len(numbers))) for pair in pairs]
        self._version = self._all._version
