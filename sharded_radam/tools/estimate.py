"""Bytes of a rank, and bytes between ranks, of ShardedRAdam and of what one could use instead.

For n elements of b bytes on N ranks, P = n b, and c = 4 bytes for half precision, otherwise b (padding apart):

=====================  ==========  =========  ==================  =======  =================  ================
optimizer              parameters  gradients  moments             masters  gradients received  parameters received
=====================  ==========  =========  ==================  =======  =================  ================
DDP + RAdam            P           P          2 P                          2 P (N-1)/N
DDP + ZeRO [1]_        P           P          2 P, largest share           2 P (N-1)/N        P, less the own share
ZeRO-2 [2]_            P           P/N        2 n c/N             n c/N    P (N-1)/N          P (N-1)/N
FSDP2 [3]_             P/N         P/N        2 P/N                        P (N-1)/N          2 P (N-1)/N
DDP + ShardedRAdam     P           P          2 n c/N             n c/N    2 P (N-1)/N        P (N-1)/N
the same, sharding     P           n c/N      2 n c/N             n c/N    P (N-1)/N          P (N-1)/N
gradients
=====================  ==========  =========  ==================  =======  =================  ================

An all-reduce brings ``2 (N-1)/N`` of what is reduced, by a ring; an all-gather or a reduce-scatter half of that.
ShardedRAdam has masters for half precision only. DDP has ``gradient_as_bucket_view=True``, otherwise its gradients
exist twice. Activations are nobody's.

.. [1] ``ZeroRedundancyOptimizer(RAdam, parameters_as_bucket_view=True)`` of torch 2.13: whole parameters, the largest
   first, each to the rank with the least.
.. [2] Rajbhandari et al., "ZeRO", https://arxiv.org/abs/1910.02054, table 1, and DeepSpeed's buffer of
   ``reduce_bucket_size`` = 5e8 elements; it keeps masters for fp32, too.
.. [3] ``fully_shard`` of blocks that a number in their name tells apart, and of the rest: rows of dimension 0 are cut,
   and two blocks with their gradients are whole at a time.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sharded_radam.buckets.range_tensor import range_boxes
from sharded_radam.checkpoint.parts import CHUNK_BYTES
from sharded_radam.dtypes import HALF_DTYPES, wide
from sharded_radam.plan import FlatPlan, ParamSpec, ShardPlan, make_plan
from sharded_radam.radam import CPU_CHUNK_NUMEL
from sharded_radam.transport import REDUCERS

DEEPSPEED_BUCKET_NUMEL = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``."""

OURS, OURS_SHARDED = "DDP + ShardedRAdam", "ShardedRAdam, shard_gradients"
TRANSPORTS = ("native", "gloo", "shared_memory", "shared_memory, share_parameters")


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank, the one with the most. ``temporaries`` are there at the peak of an iteration only."""

    parameters: int
    gradients: int
    moments: int
    masters: int = 0
    buckets: int = 0
    temporaries: int = 0

    @property
    def steady(self) -> int:
        """Between two iterations, gradients included."""
        return self.parameters + self.gradients + self.moments + self.masters + self.buckets

    @property
    def peak(self) -> int:
        """The most in an iteration."""
        return self.steady + self.temporaries


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Bytes per second: of a device's memory, and of what a rank receives from the others."""

    memory: float
    network: float


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one optimizer takes of a rank in a step: bytes received of other ranks, and bytes its update reads, writes.

    ``milliseconds`` is gradient synchronisation, update and gathering one after the other; None without bandwidths.
    """

    optimizer: str
    memory: Memory
    gradients_received: int
    parameters_received: int
    update_bytes: int
    milliseconds: float | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """What ShardedRAdam makes of the parameters at a world size.

    ``received`` are bytes of a step by transport, as (gradients, parameters) with ``shard_gradients``. ``construction``
    and ``consolidation`` are the most bytes a rank has then, gradients not included. A checkpoint's bytes are those of
    all ranks; ``chunks`` those of the optimizer that rank 0 writes.
    """

    world_size: int
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


def _others(num_bytes: int, world_size: int) -> int:
    """Of a bucket, the bytes of all shards but one's own."""
    return num_bytes // world_size * (world_size - 1)


def _state_size(dtype: torch.dtype) -> int:
    """Bytes of an element of the state."""
    return wide(dtype).itemsize


def _dtype(plan: ShardPlan, flat: FlatPlan) -> torch.dtype:
    return plan.params[flat.slots[0].param].dtype


def _bytes(params: Sequence[ParamSpec]) -> int:
    return sum(param.numel * param.dtype.itemsize for param in params)


def layout(params: Sequence[ParamSpec], world_size: int, bucket_cap_mb: float = 25.0) -> Layout:
    """The layout that ShardedRAdam would have.

    Args:
        params: as in ``make_plan``.
        world_size: number of ranks.
        bucket_cap_mb: size of a bucket in MiB.
    """
    plan = make_plan(params, world_size, bucket_cap_mb)
    numel = sum(param.numel for param in params)
    # Complex moments are complex; a count of steps, 4 bytes a parameter, is stored as a scalar.
    state_bytes = sum(param.numel * _state_size(param.dtype) * _num_states(param.dtype) for param in params)
    local_bytes = sum(
        flat.local_numel * _state_size(_dtype(plan, flat)) * _num_states(_dtype(plan, flat)) for flat in plan.flats
    )
    flat_bytes = sum(flat.numel * _dtype(plan, flat).itemsize for flat in plan.flats)
    largest = max((flat.bucket_numel * _state_size(_dtype(plan, flat)) for flat in plan.flats), default=0)
    return Layout(
        world_size=world_size,
        num_params=len(params),
        numel=numel,
        num_buckets=sum(flat.num_buckets for flat in plan.flats),
        padding_numel=sum(flat.numel for flat in plan.flats) - numel,
        received={name: _received(plan, name) for name in TRANSPORTS},
        construction=_bytes(params) + flat_bytes + local_bytes,
        consolidation=flat_bytes + local_bytes + state_bytes + largest,
        checkpoint_model_bytes=_bytes(params),
        checkpoint_optimizer_bytes=state_bytes,
        chunks=sum(_num_chunks(plan, flat) for flat in plan.flats),
    )


def _num_states(dtype: torch.dtype) -> int:
    return 3 if dtype in HALF_DTYPES else 2


def _received(plan: ShardPlan, transport: str) -> tuple[int, int]:
    """Bytes of a step: gradients that are reduce-scattered, parameters that are gathered."""
    gradients = parameters = 0
    for flat in plan.flats:
        dtype = _dtype(plan, flat)
        sent = _state_size(dtype) if transport == "native" else dtype.itemsize
        for bucket in range(flat.num_buckets):
            start, stop = flat.bucket_range(bucket)
            gradients += _others((stop - start) * sent, flat.world_size)
            if transport != "shared_memory, share_parameters":
                parameters += _others((stop - start) * dtype.itemsize, flat.world_size)
    return gradients, parameters


def _num_chunks(plan: ShardPlan, flat: FlatPlan) -> int:
    """Boxes that rank 0's pieces are written as."""
    dtype, count = _dtype(plan, flat), 0
    most = max(1, CHUNK_BYTES // _state_size(dtype))
    for piece in flat.pieces(0):
        spec = plan.params[flat.slots[piece.slot].param]
        outermost_first = tuple(spec.shape[dim] for dim in spec.dim_order)
        for at in range(0, piece.numel, most):
            start = piece.start + at
            count += len(range_boxes(outermost_first, start, start + min(most, piece.numel - at)))
    return count * _num_states(dtype)


def estimates(
    params: Sequence[ParamSpec],
    world_size: int,
    *,
    bucket_cap_mb: float = 25.0,
    transport: str = "native",
    device: str = "cuda",
    bandwidth: Bandwidth | None = None,
) -> list[Estimate]:
    """ShardedRAdam with and without ``shard_gradients``, beside the others, for parameters that all have gradients.

    Args:
        params: as in ``make_plan``.
        world_size: number of ranks.
        bucket_cap_mb: size of a bucket of ShardedRAdam in MiB.
        transport: of ShardedRAdam, one of ``TRANSPORTS``.
        device: of the parameters; on "cpu" ShardedRAdam is fused, elsewhere foreach, as the others are.
        bandwidth: for times.
    """
    plan = make_plan(params, world_size, bucket_cap_mb)
    found = [
        _replicated(params, world_size),
        _zero_1(params, world_size),
        _zero_2(params, world_size),
        _fsdp(params, world_size),
        estimate_ours(plan, world_size, transport, device, shard_gradients=False),
        estimate_ours(plan, world_size, transport, device, shard_gradients=True),
    ]
    return [_timed(row, bandwidth) if bandwidth else row for row in found]


def _timed(row: Estimate, bandwidth: Bandwidth) -> Estimate:
    received = row.gradients_received + row.parameters_received
    seconds = received / bandwidth.network + row.update_bytes / bandwidth.memory
    return Estimate(
        row.optimizer,
        row.memory,
        row.gradients_received,
        row.parameters_received,
        row.update_bytes,
        milliseconds=1e3 * seconds,
    )


FOREACH_TRAVERSALS = 22
"""Times that torch's foreach RAdam reads or writes an array of all elements; the fused update does so 7 times."""


def _foreach_bytes(param_bytes: int) -> int:
    return FOREACH_TRAVERSALS * param_bytes


def _replicated(params: Sequence[ParamSpec], world_size: int) -> Estimate:
    size = _bytes(params)
    memory = Memory(parameters=size, gradients=size, moments=2 * size, temporaries=size)
    return Estimate("DDP + RAdam", memory, 2 * _others(size, world_size), 0, _foreach_bytes(size))


def _zero_1(params: Sequence[ParamSpec], world_size: int) -> Estimate:
    shares = [0] * world_size
    bytes_of = [0] * world_size
    for param in sorted(params, key=lambda param: param.numel, reverse=True):
        least = shares.index(min(shares))
        shares[least] += param.numel
        bytes_of[least] += param.numel * param.dtype.itemsize
    size, largest, smallest = _bytes(params), max(bytes_of), min(bytes_of)
    memory = Memory(parameters=size, gradients=size, moments=2 * largest, temporaries=largest)
    name = "DDP + ZeroRedundancyOptimizer"
    received = 0 if world_size == 1 else size - smallest
    return Estimate(name, memory, 2 * _others(size, world_size), received, _foreach_bytes(largest))


def _zero_2(params: Sequence[ParamSpec], world_size: int) -> Estimate:
    size, numel = _bytes(params), sum(param.numel for param in params)
    state_size = sum(param.numel * _state_size(param.dtype) for param in params)
    share, wide_share = math.ceil(size / world_size), math.ceil(state_size / world_size)
    buffer = int(size * min(1, DEEPSPEED_BUCKET_NUMEL / max(numel, 1)))
    memory = Memory(size, share, 2 * wide_share, wide_share, buffer, temporaries=2 * wide_share)
    moved = _others(size, world_size)
    return Estimate("ZeRO-2 (DeepSpeed)", memory, moved, moved, _foreach_bytes(wide_share) + 2 * wide_share)


def _fsdp(params: Sequence[ParamSpec], world_size: int) -> Estimate:
    share = 0
    blocks: defaultdict[str, int] = defaultdict(int)
    for param in params:
        rows = param.shape[0] if param.shape else 1
        row_numel = param.numel // max(rows, 1)
        share += math.ceil(rows / world_size) * row_numel * param.dtype.itemsize
        block = re.match(r".*?\.\d+(?=\.)", param.name)
        blocks[block.group() if block else ""] += param.numel * param.dtype.itemsize
    whole = sum(sorted(blocks.values())[-2:]) * 2 if world_size > 1 else 0
    memory = Memory(share, share, 2 * share, temporaries=max(share, whole))
    moved = _others(_bytes(params), world_size)
    return Estimate("FSDP2 + RAdam", memory, moved, 2 * moved, _foreach_bytes(share))


def estimate_ours(
    plan: ShardPlan, world_size: int, transport: str = "native", device: str = "cuda", *, shard_gradients: bool
) -> Estimate:
    """ShardedRAdam alone; arguments as in ``estimates``, which has its times too."""
    parameters = moments = masters = shards = update = 0
    bucket = native_bucket = temporaries = 0
    for flat in plan.flats:
        dtype = _dtype(plan, flat)
        size, state_size, local = dtype.itemsize, _state_size(dtype), flat.local_numel
        parameters += flat.numel * size
        moments += 2 * local * state_size
        masters += local * state_size if dtype in HALF_DTYPES else 0
        shards += local * state_size
        gradient_size = state_size if shard_gradients else size
        is_fused = device == "cpu" and dtype not in HALF_DTYPES
        if is_fused:
            update += local * (2 * size + gradient_size + 4 * state_size)
        else:
            update += local * state_size * FOREACH_TRAVERSALS + local * (2 * size if state_size != size else 0)
            chunk = CPU_CHUNK_NUMEL if device == "cpu" else flat.bucket_numel // world_size
            temporaries = max(temporaries, 3 * state_size * min(chunk, local))
        bucket = max(bucket, flat.bucket_numel * size)
        native_bucket = max(native_bucket, flat.bucket_numel * state_size)
    received_gradients, received_parameters = _received(plan, transport)
    if not shard_gradients:
        gradients = _bytes(plan.params)
        memory = Memory(parameters, gradients, moments, masters, temporaries=temporaries)
        all_reduced = 2 * _others(gradients, world_size)
        return Estimate(OURS, memory, all_reduced, received_parameters, update)
    name = transport.split(",")[0] if world_size > 1 else "none"
    slots = REDUCERS[name].num_slots * (native_bucket if name == "native" else bucket)
    # What backward has produced, and no bucket holds yet.
    waiting = 2 * bucket + max((param.numel * param.dtype.itemsize for param in plan.params), default=0)
    waiting = min(waiting, _bytes(plan.params))
    if transport == "shared_memory, share_parameters":
        parameters //= world_size
    memory = Memory(parameters, shards, moments, masters, slots, max(temporaries, waiting))
    return Estimate(OURS_SHARDED, memory, received_gradients, received_parameters, update)
