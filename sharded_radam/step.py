"""One step: all that can fail, then in three phases gradients, update and gather, bucket by bucket.

Every rank enters the same collectives, whatever its gradients are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.optim import RAdam

from sharded_radam import step_differentiable
from sharded_radam.buckets.counters import Cohort
from sharded_radam.buckets.flat import Flat, ShardPiece
from sharded_radam.buckets.memory import flat_gradient
from sharded_radam.build import Shards, follow_groups
from sharded_radam.gradients.measures import divide_
from sharded_radam.radam import Engine, Hyperparameters, Operands, capturable_update_, update_
from sharded_radam.replicas import compare, facts
from sharded_radam.state.edits import find_edits, group_of, has_param, take_back
from sharded_radam.transport import Handle


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """What a closure returns, which computes gradients."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@torch.no_grad()
def heed_scaler(optimizer: RAdam, shards: Shards) -> bool:
    """Whether a GradScaler, or whoever sets ``found_inf`` as for torch's fused optimizers, wants this step.

    Gradients are unscaled here if ``grad_scale`` is set too.
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is None or not (shards.options.shard_gradients or shards.options.fused):
        return True
    if found_inf.item():
        if shards.gradients is not None:
            shards.gradients.stepped()
        return False
    if scale is not None:
        divide_(shards.all_gradients(optimizer.param_groups), scale)
    return True


@torch.no_grad()
def prepare(optimizer: RAdam, shards: Shards) -> list[list[Cohort]]:
    """All that can fail, then count the steps of the parameters that have a gradient.

    Returns:
        For each flat, the parameters that take a step, by its number.
    """
    shards.wait()
    follow_groups(optimizer, shards)
    if shards.listed_twice:
        raise ValueError(shards.listed_twice)
    elsewhere = [flat.check(partial(has_param, optimizer)) for flat in shards.flats]
    edits = [find_edits(optimizer, flat) for flat in shards.flats]
    if shards.gradients is None:
        present = [[param.grad is not None for param in flat.params] for flat in shards.flats]
    else:
        present = shards.gradients.finish()
    if _is_check_due(optimizer, shards):
        check_replicas(optimizer, shards)
    for flat, slots, flat_edits in zip(shards.flats, elsewhere, edits, strict=True):
        flat.take_back(slots)
        take_back(optimizer, flat, flat_edits)
    shards.consolidated = None
    return [
        flat.counters.add_step(has_grad, group_of(optimizer, flat)["capturable"])
        for flat, has_grad in zip(shards.flats, present, strict=True)
    ]


def _is_check_due(optimizer: RAdam, shards: Shards) -> bool:
    interval = shards.options.check_replicas
    if interval == 0:
        return shards.steps == 0 and not optimizer.defaults["capturable"]
    return shards.steps % interval == 0


@torch.no_grad()
def check_replicas(optimizer: RAdam, shards: Shards) -> None:
    """Collective: raise RuntimeError on every rank if hyperparameters, step counts or parameters differ."""
    shards.wait()
    if shards.transport.world_size > 1:
        has_one_copy = shards.transport.has_one_copy
        compare(facts(optimizer.param_groups, optimizer.state, shards.names(), has_one_copy), shards.transport)


def update(optimizer: RAdam, shards: Shards, cohorts: Sequence[Sequence[Cohort]]) -> None:
    """The step itself.

    Args:
        optimizer: whose hyperparameters.
        shards: of this rank.
        cohorts: of each flat.
    """
    if optimizer.defaults["differentiable"]:
        with torch.enable_grad():
            _update_differentiably(optimizer, shards, cohorts)
    else:
        with torch.no_grad():
            _update_and_gather(optimizer, shards, cohorts)
    if shards.gradients is not None:
        shards.gradients.stepped()
    shards.steps += 1


def _update_differentiably(optimizer: RAdam, shards: Shards, cohorts: Sequence[Sequence[Cohort]]) -> None:
    for flat, flat_cohorts in zip(shards.flats, cohorts, strict=True):
        steps = {slot: int(cohort.step) for cohort in flat_cohorts for slot in cohort.slots}
        step_differentiable.update(flat, steps, Hyperparameters.of(group_of(optimizer, flat)), optimizer.state)


def _update_and_gather(optimizer: RAdam, shards: Shards, cohorts: Sequence[Sequence[Cohort]]) -> None:
    """The three phases; the first two bucket by bucket, the third in the background of the next buckets."""
    handles: dict[tuple[int, int], list[Handle]] = {}
    transport, meter = shards.transport, shards.transport.meter
    with meter.phase("all_gather"):
        transport.begin_update()
    for index, (flat, flat_cohorts) in enumerate(zip(shards.flats, cohorts, strict=True)):
        gradient_of = _gradients_of(shards, flat)
        hyper, engine = Hyperparameters.of(group_of(optimizer, flat)), engine_of(optimizer, shards, flat)
        for bucket in range(flat.plan.num_buckets):
            with meter.phase("update"):
                update_bucket(flat, bucket, flat_cohorts, gradient_of, hyper, engine)
            with meter.phase("all_gather"):
                transport.count("all_gather", flat.bucket(bucket))
                handles[index, bucket] = transport.all_gather(flat.bucket(bucket))
        flat.note_updated(slot for cohort in flat_cohorts for slot in cohort.slots)
    with meter.phase("all_gather"):
        transport.end_update()
        if shards.arrivals is not None and not any(flat.copied for flat in shards.flats):
            shards.arrivals.begin(shards.flats, handles)
            return
        for handle in (handle for bucket_handles in handles.values() for handle in bucket_handles):
            handle.wait()
    for flat in shards.flats:
        flat.copy_out()


GradientOf = Callable[[ShardPiece], Tensor]
"""The gradient of a piece, as 1-D real numbers."""


def _gradients_of(shards: Shards, flat: Flat) -> GradientOf:
    """Phase 1: from the shards' sums, or from ``param.grad``, which is flattened when its first piece comes."""
    reals = flat.reals
    if shards.gradients is not None:
        sums = shards.gradients.sum_of(flat)
        return lambda own: sums.narrow(0, reals * own.piece.local_start, reals * own.piece.numel)

    @cache
    def whole(slot: int) -> Tensor:
        grad = flat.params[slot].grad
        assert grad is not None
        return flat_gradient(grad, flat.specs[slot])

    def gradient_of(own: ShardPiece) -> Tensor:
        grad, piece = whole(own.piece.slot), own.piece
        is_all = piece.numel == flat.plan.slots[piece.slot].numel
        return grad if is_all else grad.narrow(0, reals * piece.start, reals * piece.numel)

    return gradient_of


def update_bucket(
    flat: Flat,
    bucket: int,
    cohorts: Sequence[Cohort],
    gradient_of: GradientOf,
    hyper: Hyperparameters,
    engine: Engine,
) -> None:
    """Phase 2: update the own pieces of a bucket, each with the number of its step.

    Args:
        flat: whose bucket.
        bucket: its number.
        cohorts: of the flat.
        gradient_of: phase 1.
        hyper: of the flat's param group.
        engine: of the flat.
    """
    flat.copy_in(bucket)
    for cohort in cohorts:
        operands = [
            Operands(own.param, gradient_of(own), own.exp_avg, own.exp_avg_sq, own.master)
            for own in flat.pieces[bucket]
            if own.piece.slot in cohort.slots
        ]
        if isinstance(cohort.step, Tensor):
            capturable_update_(operands, cohort.step, hyper)
        else:
            update_(operands, engine, cohort.step, hyper)


def engine_of(optimizer: RAdam, shards: Shards, flat: Flat) -> Engine:
    """How a flat is updated: as asked for; otherwise fused on CPU, and as RAdam does elsewhere."""
    foreach, fused = group_of(optimizer, flat)["foreach"], shards.options.fused
    is_on_cpu = flat.buffer.device.type == "cpu"
    if optimizer.defaults["differentiable"]:
        return "for-loop"
    if fused or (fused is None and foreach is None and is_on_cpu):
        return "fused"
    return "foreach" if foreach or (foreach is None and not is_on_cpu) else "for-loop"
