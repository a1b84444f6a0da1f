"""Bytes of a rank, and bytes between ranks, of ShardedRAdam. ``compare`` has those of others, and all formulas."""

from __future__ import annotations

from dataclasses import dataclass

from sharded_radam.dtypes import HALF_DTYPES
from sharded_radam.plan import ShardPlan
from sharded_radam.radam import CPU_CHUNK_NUMEL
from sharded_radam.tools.layout import averaged_bytes, bytes_of, bytes_received, dtype_of, others, state_itemsize
from sharded_radam.transport import REDUCERS

OURS, OURS_SHARDED = "DDP + ShardedRAdam", "ShardedRAdam, shard_gradients"


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


FOREACH_TRAVERSALS = 22
"""Times that torch's foreach RAdam reads or writes an array of all elements; the fused update does so 7 times."""


def foreach_bytes(param_bytes: int) -> int:
    """That torch's foreach RAdam reads and writes."""
    return FOREACH_TRAVERSALS * param_bytes


def estimate_ours(
    plan: ShardPlan,
    world_size: int,
    transport: str = "native",
    device: str = "cuda",
    *,
    shard_gradients: bool,
    replicas: int = 1,
) -> Estimate:
    """ShardedRAdam alone; arguments as in ``estimates``, which has its times too."""
    shard_size = world_size // replicas
    parameters = moments = masters = shards = update = 0
    bucket = native_bucket = temporaries = 0
    for flat in plan.flats:
        dtype = dtype_of(plan, flat)
        size, state_size, local = dtype.itemsize, state_itemsize(dtype), flat.local_numel
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
            chunk = CPU_CHUNK_NUMEL if device == "cpu" else flat.bucket_numel // shard_size
            temporaries = max(temporaries, 3 * state_size * min(chunk, local))
        bucket = max(bucket, flat.bucket_numel * size)
        native_bucket = max(native_bucket, flat.bucket_numel * state_size)
    received_gradients, received_parameters = bytes_received(plan, transport, replicas)
    if not shard_gradients:
        gradients = bytes_of(plan.params)
        memory = Memory(parameters, gradients, moments, masters, temporaries=temporaries)
        all_reduced = 2 * others(gradients, world_size)
        return Estimate(OURS, memory, all_reduced, received_parameters, update)
    kind = transport.split(",")[0]
    name = kind if shard_size > 1 else "none"
    slots = REDUCERS[name].num_slots * (native_bucket if name == "native" else bucket)
    if kind != "native":  # replicas are on several hosts, as a rule
        slots += REDUCERS["gloo"].num_slots * max(averaged_bytes(plan, replicas, at_once=True), default=0)
    # What backward has produced, and no bucket holds yet.
    waiting = 2 * bucket + max((param.numel * param.dtype.itemsize for param in plan.params), default=0)
    waiting = min(waiting, bytes_of(plan.params))
    if transport == "shared_memory, share_parameters":
        parameters //= shard_size
    memory = Memory(parameters, shards, moments, masters, slots, max(temporaries, waiting))
    return Estimate(OURS_SHARDED, memory, received_gradients, received_parameters, update)
