"""Phases 1 and 2 of a step: the gradients of the own shards, and the update with them.

An engine gets pieces, or stretches, which take neighbours along, and the padding between them, which is zero. So the
number of calls follows from that of flats and buckets, not of parameters. Fused code on a CPU wants pieces: it treats
the last elements of a tensor otherwise than those before, and a parameter is to have the same bits wherever its
gradient lies. torch's other engines have the same bits in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_radam.buckets.counters import Cohort
from sharded_radam.buckets.flat import Flat
from sharded_radam.buckets.memory import flat_gradient
from sharded_radam.compiled import compiled_update_
from sharded_radam.gradients.packing import Sums
from sharded_radam.plan import ALIGNMENT, Piece, Stretch
from sharded_radam.radam import Engine, Hyperparameters, Operands, update_

SEPARATE_NUMEL = 2**16
"""Pieces of so many elements get a call of their own. The gradients of smaller ones are copied together first."""

SMALL_EPS = 1e-20
"""With a smaller eps, padding may become NaN in an update."""


class OwnGradients:
    """Phase 1: gradients as 1-D real numbers, from the sums or from ``param.grad``, which is flattened when needed.

    Args:
        flat: whose parameters.
        sums: of the own shards; None if gradients are in ``.grad``.
    """

    def __init__(self, flat: Flat, sums: Sums | None) -> None:
        self._flat = flat
        self.sums = None if sums is None else sums.total_of(flat)
        self._views = None if sums is None else sums.views_of(flat)
        self._flattened: dict[int, Tensor] = {}

    def _whole(self, slot: int) -> Tensor:
        if slot not in self._flattened:
            grad = self._flat.params[slot].grad
            assert grad is not None
            self._flattened[slot] = flat_gradient(grad, self._flat.specs[slot])
        return self._flattened[slot]

    def of_piece(self, piece: Piece) -> Tensor:
        """A view."""
        if self._views is not None:
            return self._views[piece.local_start]
        reals = self._flat.reals
        grad, is_all = self._whole(piece.slot), piece.numel == self._flat.plan.slots[piece.slot].numel
        return grad if is_all else grad.narrow(0, reals * piece.start, reals * piece.numel)

    def of_stretch(self, stretch: Stretch) -> Tensor:
        """A view, or a copy if it has several parts, or padding, that lie apart."""
        reals = self._flat.reals
        if self.sums is not None:
            return self.sums.narrow(0, reals * stretch.local_start, reals * stretch.numel)
        if stretch.parts[0].numel == stretch.numel:
            return self.of_piece(stretch.parts[0])
        sources, end = [], stretch.flat_start
        zeros = self.of_piece(stretch.parts[0]).new_zeros(reals * ALIGNMENT)
        for part in stretch.parts:
            sources += [zeros.narrow(0, 0, reals * (part.flat_start - end)), self.of_piece(part)]
            end = part.flat_start + part.numel
        rest = stretch.flat_start + stretch.numel - end
        return torch.cat([*sources, zeros.narrow(0, 0, reals * rest)])


def update_buckets(
    flat: Flat,
    buckets: Sequence[int],
    cohorts: Sequence[Cohort],
    own: OwnGradients,
    hyper: Hyperparameters,
    engine: Engine,
) -> None:
    """Phase 2: update the own pieces of some buckets, each with the number of its step.

    Args:
        flat: whose buckets.
        buckets: their numbers.
        cohorts: of the flat.
        own: the gradients.
        hyper: of the flat's param group.
        engine: of the flat.
    """
    for bucket in buckets:
        flat.copy_in(bucket)
    for cohort in cohorts:
        is_stretched = _is_stretched(flat, cohort, own, hyper, engine)
        if is_stretched:
            separate_numel = SEPARATE_NUMEL if own.sums is None else math.inf
            found = [each for b in buckets for each in flat.stretches.find(b, cohort.slots, separate_numel)]
            operands = [Operands(each.param, own.of_stretch(each.stretch), *each[2:]) for each in found]
        else:
            operands = [
                Operands(each.param, own.of_piece(each.piece), each.exp_avg, each.exp_avg_sq, each.master)
                for bucket in buckets
                for each in flat.pieces[bucket]
                if each.piece.slot in cohort.slots
            ]
        if engine == "compiled":
            compiled_update_(operands, cohort.step, hyper)
        else:
            update_(operands, engine, cohort.step, hyper, flat.endless_step)
        if is_stretched and hyper.eps < SMALL_EPS:  # 0 / 0, or 0 times infinity
            for padding in (padding for each in found for padding in each.padding()):
                padding.zero_()


def _is_stretched(flat: Flat, cohort: Cohort, own: OwnGradients, hyper: Hyperparameters, engine: Engine) -> bool:
    """Whether an engine gets stretches.

    Gradients that are whole must be copied together for them. That pays where an engine has calls for each operand: the
    compiled one, and the equation, one operation after the other, if the number of the step is on the device.
    """
    if own.sums is None:
        return engine == "compiled" or (isinstance(cohort.step, Tensor) and engine != "fused")
    is_fused_on_cpu = engine == "fused" and flat.buffer.device.type == "cpu"
    return engine == "compiled" or (hyper.eps >= SMALL_EPS and not is_fused_on_cpu)
