"""What ShardedRAdam makes of parameters at a world size: buckets, padding, bytes that travel, chunks of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sharded_radam.buckets.range_tensor import range_boxes
from sharded_radam.checkpoint.parts import CHUNK_BYTES
from sharded_radam.dtypes import HALF_DTYPES, wide
from sharded_radam.plan import ALIGNMENT, FlatPlan, ParamSpec, ShardPlan, cut, make_plan

TRANSPORTS = ("native", "gloo", "shared_memory", "shared_memory, share_parameters")


@dataclass(frozen=True, slots=True)
class Layout:
    """What ShardedRAdam makes of the parameters at a world size.

    ``received`` are bytes of a step by transport, as (gradients, parameters) with ``shard_gradients``. ``replicas`` are
    copies of the state, with ``world_size / replicas`` ranks each. ``construction``
    and ``consolidation`` are the most bytes a rank has then, gradients not included. A checkpoint's bytes are those of
    all ranks; ``chunks`` those of the optimizer that rank 0 writes.
    """

    world_size: int
    replicas: int
    num_params: int
    numel: int
    num_buckets: int
    padding_numel: int
    received: dict[str, tuple[int, int]]
    construction: int
    consolidation: int
    checkpoint_model_bytes: int
    checkpoint_optimizer_bytes: int
    chunks: int


def others(num_bytes: int, world_size: int) -> int:
    """Of a bucket, the bytes of all shards but one's own."""
    return num_bytes // world_size * (world_size - 1)


def state_itemsize(dtype: torch.dtype) -> int:
    """Bytes of an element of the state."""
    return wide(dtype).itemsize


def dtype_of(plan: ShardPlan, flat: FlatPlan) -> torch.dtype:
    """Of the parameters of a flat."""
    return plan.params[flat.slots[0].param].dtype


def bytes_of(params: Sequence[ParamSpec]) -> int:
    """Of parameters, without padding."""
    return sum(param.numel * param.dtype.itemsize for param in params)


def layout(
    params: Sequence[ParamSpec], world_size: int, bucket_cap_mb: float | None = None, replicas: int = 1
) -> Layout:
    """The layout that ShardedRAdam would have.

    Args:
        params: as in ``make_plan``.
        world_size: number of ranks, in all.
        bucket_cap_mb: size of a bucket in MiB; as by default if None.
        replicas: number of copies of the state.
    """
    plan = make_plan(params, world_size // replicas, bucket_cap_mb)
    numel = sum(param.numel for param in params)
    # Complex moments are complex; a count of steps, 4 bytes a parameter, is stored as a scalar.
    state_bytes = sum(param.numel * state_itemsize(param.dtype) * _num_states(param.dtype) for param in params)
    local_bytes = sum(
        flat.local_numel * state_itemsize(dtype_of(plan, flat)) * _num_states(dtype_of(plan, flat))
        for flat in plan.flats
    )
    flat_bytes = sum(flat.numel * dtype_of(plan, flat).itemsize for flat in plan.flats)
    largest = max((flat.bucket_numel * state_itemsize(dtype_of(plan, flat)) for flat in plan.flats), default=0)
    return Layout(
        world_size=world_size,
        replicas=replicas,
        num_params=len(params),
        numel=numel,
        num_buckets=sum(flat.num_buckets for flat in plan.flats),
        padding_numel=sum(flat.numel for flat in plan.flats) - numel,
        received={name: bytes_received(plan, name, replicas) for name in TRANSPORTS},
        construction=bytes_of(params) + flat_bytes + local_bytes,
        consolidation=flat_bytes + local_bytes + state_bytes + largest,
        checkpoint_model_bytes=bytes_of(params),
        checkpoint_optimizer_bytes=state_bytes,
        chunks=sum(_num_chunks(plan, flat, replicas) for flat in plan.flats),
    )


def _num_states(dtype: torch.dtype) -> int:
    return 3 if dtype in HALF_DTYPES else 2


def bytes_received(plan: ShardPlan, transport: str, replicas: int = 1) -> tuple[int, int]:
    """Bytes of a step: gradients that are reduced, and averaged over replicas; parameters that are gathered."""
    gradients, parameters = sum(2 * others(each, replicas) for each in averaged_bytes(plan, replicas)), 0
    for flat in plan.flats:
        dtype = dtype_of(plan, flat)
        for bucket in range(flat.num_buckets):
            start, stop = flat.bucket_range(bucket)
            gradients += others((stop - start) * dtype.itemsize, flat.world_size)
            if transport != "shared_memory, share_parameters":
                parameters += others((stop - start) * dtype.itemsize, flat.world_size)
    return gradients, parameters


def averaged_bytes(plan: ShardPlan, replicas: int, at_once: bool = False) -> list[int]:
    """Of the own shards of each flat, as replicas average them; or of the largest piece that travels at once."""
    found = []
    reals = {flat: 2 if dtype_of(plan, flat).is_complex else 1 for flat in plan.flats if replicas > 1}
    most = max((count * flat.bucket_numel for flat, count in reals.items()), default=0)
    for flat, count in reals.items():
        numel = min(count * flat.local_numel, most) if at_once else count * flat.local_numel
        numel += -numel % (ALIGNMENT * replicas)
        found.append(numel * wide(dtype_of(plan, flat)).to_real().itemsize)
    return found


def _num_chunks(plan: ShardPlan, flat: FlatPlan, replicas: int) -> int:
    """Boxes that rank 0's pieces are written as."""
    dtype, count = dtype_of(plan, flat), 0
    most = max(1, CHUNK_BYTES // state_itemsize(dtype))
    for piece in cut(flat.pieces(0), flat.part_of(0, replicas)):
        spec = plan.params[flat.slots[piece.slot].param]
        outermost_first = tuple(spec.shape[dim] for dim in spec.dim_order)
        for at in range(0, piece.numel, most):
            start = piece.start + at
            count += len(range_boxes(outermost_first, start, start + min(most, piece.numel - at)))
    return count * _num_states(dtype)
