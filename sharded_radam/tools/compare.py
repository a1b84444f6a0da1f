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
ShardedRAdam has masters for half precision only. With R copies of its state, its state and the parameters that it
receives are those of N/R ranks, and the last row receives ``2 (n c R/N) (R-1)/R`` more: replicas average their shards.
DDP has ``gradient_as_bucket_view=True``, otherwise its gradients exist twice. Activations are nobody's.

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

from sharded_radam.plan import ParamSpec, make_plan
from sharded_radam.tools.estimate import Bandwidth, Estimate, Memory, estimate_ours, foreach_bytes
from sharded_radam.tools.layout import bytes_of, others, state_itemsize

DEEPSPEED_BUCKET_NUMEL = 500_000_000
"""DeepSpeed's default ``reduce_bucket_size``."""


def estimates(
    params: Sequence[ParamSpec],
    world_size: int,
    *,
    bucket_cap_mb: float | None = None,
    transport: str = "native",
    device: str = "cuda",
    bandwidth: Bandwidth | None = None,
    replicas: int = 1,
) -> list[Estimate]:
    """ShardedRAdam with and without ``shard_gradients``, beside the others, for parameters that all have gradients.

    Args:
        params: as in ``make_plan``.
        world_size: number of ranks, in all.
        bucket_cap_mb: size of a bucket of ShardedRAdam in MiB; as by default if None.
        transport: of ShardedRAdam, one of ``TRANSPORTS``.
        device: of the parameters; on "cpu" ShardedRAdam is fused, elsewhere foreach, as the others are.
        bandwidth: for times.
        replicas: copies of ShardedRAdam's state; the others shard over all ranks.
    """
    plan = make_plan(params, world_size // replicas, bucket_cap_mb)
    found = [
        _replicated(params, world_size),
        _zero_1(params, world_size),
        _zero_2(params, world_size),
        _fsdp(params, world_size),
        estimate_ours(plan, world_size, transport, device, shard_gradients=False, replicas=replicas),
        estimate_ours(plan, world_size, transport, device, shard_gradients=True, replicas=replicas),
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


def _replicated(params: Sequence[ParamSpec], world_size: int) -> Estimate:
    size = bytes_of(params)
    memory = Memory(parameters=size, gradients=size, moments=2 * size, temporaries=size)
    return Estimate("DDP + RAdam", memory, 2 * others(size, world_size), 0, foreach_bytes(size))


def _zero_1(params: Sequence[ParamSpec], world_size: int) -> Estimate:
    shares = [0] * world_size
    sizes = [0] * world_size
    for param in sorted(params, key=lambda param: param.numel, reverse=True):
        least = shares.index(min(shares))
        shares[least] += param.numel
        sizes[least] += param.numel * param.dtype.itemsize
    size, largest, smallest = bytes_of(params), max(sizes), min(sizes)
    memory = Memory(parameters=size, gradients=size, moments=2 * largest, temporaries=largest)
    name = "DDP + ZeroRedundancyOptimizer"
    received = 0 if world_size == 1 else size - smallest
    return Estimate(name, memory, 2 * others(size, world_size), received, foreach_bytes(largest))


def _zero_2(params: Sequence[ParamSpec], world_size: int) -> Estimate:
    size, numel = bytes_of(params), sum(param.numel for param in params)
    state_size = sum(param.numel * state_itemsize(param.dtype) for param in params)
    share, wide_share = math.ceil(size / world_size), math.ceil(state_size / world_size)
    buffer = int(size * min(1, DEEPSPEED_BUCKET_NUMEL / max(numel, 1)))
    memory = Memory(size, share, 2 * wide_share, wide_share, buffer, temporaries=2 * wide_share)
    moved = others(size, world_size)
    return Estimate("ZeRO-2 (DeepSpeed)", memory, moved, moved, foreach_bytes(wide_share) + 2 * wide_share)


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
    moved = others(bytes_of(params), world_size)
    return Estimate("FSDP2 + RAdam", memory, moved, 2 * moved, foreach_bytes(share))
