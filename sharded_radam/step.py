"""One step: all that can fail, then in three phases gradients, update and gather, bucket by bucket.

Every rank enters the same collectives, whatever its gradients are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.optim import RAdam

from sharded_radam import step_differentiable
from sharded_radam.buckets.counters import Cohort
from sharded_radam.buckets.flat import Flat
from sharded_radam.build import Shards, follow_groups
from sharded_radam.gradients.measures import divide_
from sharded_radam.radam import Engine, Hyperparameters, betas_of_kernel, default_engine
from sharded_radam.replicas import compare, facts
from sharded_radam.state.edits import find_edits, group_of, has_param, take_back
from sharded_radam.transport import Handle
from sharded_radam.update import OwnGradients, update_buckets


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
    shards.end_arrivals()
    follow_groups(optimizer, shards)
    if shards.listed_twice:
        raise ValueError(shards.listed_twice)
    for flat in shards.flats:
        if engine_of(optimizer, shards, flat) == "fused":
            hyper, dtype = Hyperparameters.of(group_of(optimizer, flat)), flat.state["exp_avg"].dtype.to_real()
            betas_of_kernel(hyper, dtype, flat.buffer.device.type)
    elsewhere = [flat.check(partial(has_param, optimizer)) for flat in shards.flats]
    edits = [find_edits(optimizer, flat) for flat in shards.flats]
    if shards.gradients is None:
        present = [[param.grad is not None for param in flat.params] for flat in shards.flats]
    else:
        present = shards.gradients.finish(waits=False)
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
    everyone = shards.transport.everyone
    if everyone.world_size > 1:
        has_one_copy = shards.transport.has_one_copy
        compare(facts(optimizer.param_groups, optimizer.state, shards.names(), has_one_copy), everyone)


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
    """The three phases; the first two some buckets at a time, the third in the background of the next buckets."""
    handles: dict[tuple[int, int], list[Handle]] = {}
    transport, meter = shards.transport, shards.transport.meter
    with meter.phase("all_gather"):
        transport.begin_update()
    for index, (flat, flat_cohorts) in enumerate(zip(shards.flats, cohorts, strict=True)):
        own = OwnGradients(flat, None if shards.gradients is None else shards.gradients.sums)
        hyper, engine = Hyperparameters.of(group_of(optimizer, flat)), engine_of(optimizer, shards, flat)
        for buckets in flat.plan.calls(flat.buffer.device.type):
            if shards.gradients is not None:
                shards.gradients.sums.wait(index, buckets[-1])
            with meter.phase("update"):
                update_buckets(flat, buckets, flat_cohorts, own, hyper, engine)
            with meter.phase("all_gather"):
                handles |= zip(((index, at) for at in buckets), _begin_to_gather(shards, flat, buckets), strict=True)
        flat.note_updated([slot for cohort in flat_cohorts for slot in cohort.slots])
    with meter.phase("all_gather"):
        transport.end_update()
        if shards.arrivals is not None and not any(flat.copied for flat in shards.flats):
            shards.arrivals.begin(shards.flats, handles)
            return
        for handle in (handle for bucket_handles in handles.values() for handle in bucket_handles):
            handle.wait()
    for flat in shards.flats:
        flat.copy_out()


def _begin_to_gather(shards: Shards, flat: Flat, buckets: Sequence[int]) -> list[list[Handle]]:
    transport, views = shards.transport, [flat.bucket(bucket) for bucket in buckets]
    for view in views:
        transport.count("all_gather", view)
    if shards.arrivals is not None:  # of which the first are wanted before the last have come
        return [transport.all_gather(view) for view in views]
    return transport.all_gather_each(views)


def engine_of(optimizer: RAdam, shards: Shards, flat: Flat) -> Engine:
    """How a flat is updated: as asked for; else by default; RAdam's own choice if fused=False."""
    foreach, fused = group_of(optimizer, flat)["foreach"], shards.options.fused
    device_type = flat.buffer.device.type
    if shards.options.compiled:
        return "compiled"
    if fused:
        return "fused"
    if foreach is None and fused is None and not optimizer.defaults["differentiable"]:
        return default_engine(device_type, flat.buffer.dtype)
    foreach = device_type != "cpu" if foreach is None else foreach
    return "foreach" if foreach and not optimizer.defaults["differentiable"] else "for-loop"
