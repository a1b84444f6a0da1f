"""State, or gradients, of all ranks on one of them, or on all; and from one layout into another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from sharded_radam.buckets.flat import Flat
from sharded_radam.buckets.memory import unflatten
from sharded_radam.transport import Transport


def gather_flat(
    flat: Flat, state: Mapping[str, Tensor], transport: Transport, to: int | None, device: torch.device
) -> list[dict[str, Tensor]] | None:
    """Collective: the whole state of a flat's slots, shaped as the parameters.

    Beyond the result, who gets it allocates one bucket, the other ranks nothing.

    Args:
        flat: whose state.
        state: what of it, or other tensors of its layout and dtype.
        transport: of its ranks.
        to: the rank that gets it, the others get None; all if it is None.
        device: of the result.
    """
    if to is not None and transport.rank != to:
        for name, bucket in _name_and_bucket(flat, state):
            transport.gather(flat.shard_of(state[name], bucket), None, to)
        return None
    found = [
        {name: torch.empty(slot.numel, dtype=local.dtype, device=device) for name, local in state.items()}
        for slot in flat.plan.slots
    ]
    any_state = flat.state["exp_avg"]
    staging = torch.empty(
        flat.plan.bucket_numel if flat.plan.numel else 0, dtype=any_state.dtype, device=any_state.device
    )
    for name, bucket in _name_and_bucket(flat, state):
        start, stop = flat.plan.bucket_range(bucket)
        shard, whole = flat.shard_of(state[name], bucket), staging[: stop - start]
        if to is None:
            transport.gather_to_all(shard, whole)
        else:
            transport.gather(shard, whole, to)
        for slot, tensors in zip(flat.plan.slots, found, strict=True):
            first, last = max(slot.start, start), min(slot.start + slot.numel, stop)
            if first < last:
                tensors[name][first - slot.start : last - slot.start] = staging[first - start : last - start]
    return [
        {name: unflatten(tensor, spec.shape, spec.dim_order) for name, tensor in tensors.items()}
        for spec, tensors in zip(flat.specs, found, strict=True)
    ]


def gather_slot(flat: Flat, slot: int, local: Tensor, transport: Transport) -> Tensor:
    """Collective: all elements of a parameter, shaped as it is, of a tensor with the layout of the flat's state."""
    at, spec = flat.plan.slots[slot], flat.specs[slot]
    found = local.new_empty(at.numel)
    for bucket in flat.plan.buckets_of(slot):
        first, stop = flat.plan.bucket_range(bucket)
        whole = local.new_empty(stop - first)
        transport.gather_to_all(flat.shard_of(local, bucket), whole)
        low, high = max(first, at.start), min(stop, at.start + at.numel)
        found[low - at.start : high - at.start] = whole[low - first : high - first]
    return unflatten(found, spec.shape, spec.dim_order)


def move(
    sources: Iterable[tuple[Flat, Mapping[str, Tensor]]],
    targets: Mapping[Tensor, tuple[Flat, int, Mapping[str, Tensor]]],
    transport: Transport,
) -> None:
    """Collective: copy state, or gradients, from one layout into another; one kind of one flat at a time is whole.

    Args:
        sources: flats, and what they have; all ranks give the same.
        targets: for each parameter that moves: its flat, its slot, and where to copy to (modified in place).
        transport: of the ranks.
    """
    for flat, state in sources:
        if targets.keys().isdisjoint(flat.params):
            continue
        for name in state:
            wholes = gather_flat(flat, {name: state[name]}, transport, None, flat.buffer.device)
            for param, whole in zip(flat.params, wholes or [], strict=True):
                new, slot, into = targets.get(param, (flat, 0, {}))
                if name in into:
                    new.copy_own(slot, whole[name], into[name])


def _name_and_bucket(flat: Flat, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    return ((name, bucket) for name in names for bucket in range(flat.plan.num_buckets))
