"""What an optimizer says of itself: one line, figures, and a table of who owns what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.optim import RAdam

from sharded_radam.build import Shards
from sharded_radam.plan import FlatPlan, ParamSpec
from sharded_radam.step import engine_of


@dataclass(frozen=True, slots=True)
class Stats:
    """Figures of one rank since its optimizer was built, or copied. ``dataclasses.asdict`` makes them JSON.

    Attributes:
        rank, world_size: of the process group, or of all ranks of a mesh.
        num_replicas: copies of the state: the rows of a mesh of two dimensions; otherwise 1.
        transport, engine: what was chosen; several engines are joined by "+".
        steps: that were taken; those that a GradScaler skipped are not.
        num_params, numel: parameters and their elements.
        num_buckets: of all flats.
        padding_numel: elements of the flats, all ranks together, that belong to no parameter.
        param_bytes: of the parameters, which every rank has.
        state_bytes: moments and masters of this rank, padding included.
        replicated_state_bytes: what ``torch.optim.RAdam`` keeps on every rank.
        gradient_bytes: with ``shard_gradients``, this rank's shards of the gradients; otherwise 0.
        bucket_bytes: with ``shard_gradients``, buckets of gradients that are filled or under way on this rank.
        collectives: their number by kind: "all_gather" and "reduce_scatter" once a bucket, "average" (of own shards of
            gradients over replicas) once a flat, and the small "all_reduce" (norms, flags) and "broadcast".
        received_bytes: by the same kinds, from other ranks; for all-gathers and reduce-scatters as many are sent.
            0 for parameters that are shared.
        milliseconds: host time by phase, "update", "all_gather", "reduce_scatter", "average"; on other devices than the
            CPU device time, and only while ``time_phases(True)``.
    """

    rank: int
    world_size: int
    num_replicas: int
    transport: str
    engine: str
    steps: int
    num_params: int
    numel: int
    num_buckets: int
    padding_numel: int
    param_bytes: int
    state_bytes: int
    replicated_state_bytes: int
    gradient_bytes: int
    bucket_bytes: int
    collectives: dict[str, int]
    received_bytes: dict[str, int]
    milliseconds: dict[str, float]

    def __str__(self) -> str:
        """The layout in one line."""
        return (
            f"ShardedRAdam: ranks {self._ranks()}, parameters {self.num_params} ({self.numel} elements), "
            f"buckets {self.num_buckets}, engine {self.engine or 'none'}, transport {self.transport}, "
            f"state {self.state_bytes} bytes per rank, replicated RAdam {self.replicated_state_bytes} bytes"
        )

    def _ranks(self) -> str:
        shards = self.world_size // self.num_replicas
        return str(self.world_size) if self.num_replicas == 1 else f"{self.num_replicas} replicas x {shards} shards"


def stats(optimizer: RAdam, shards: Shards) -> Stats:
    """The figures of now; not collective."""
    flats, gradients, transport = shards.flats, shards.gradients, shards.transport
    engines = {engine_of(optimizer, shards, flat) for flat in flats}
    params = [param for flat in flats for param in flat.params]
    numel = sum(param.numel() for param in params)
    meter = transport.meter
    return Stats(
        rank=transport.meeting.rank,
        world_size=transport.meeting.world_size,
        num_replicas=1 if transport.replicas is None else transport.replicas.world_size,
        transport=transport.name,
        engine="+".join(sorted(engines)),
        steps=shards.steps,
        num_params=len(params),
        numel=numel,
        num_buckets=sum(flat.plan.num_buckets for flat in flats),
        padding_numel=sum(flat.plan.numel for flat in flats) - numel,
        param_bytes=sum(param.nbytes for param in params),
        state_bytes=sum(tensor.nbytes for flat in flats for tensor in flat.state.values()),
        replicated_state_bytes=sum(2 * param.nbytes for param in params),
        gradient_bytes=gradients.sums.shard_bytes() if gradients else 0,
        bucket_bytes=gradients.sums.slot_bytes() if gradients else 0,
        collectives=dict(meter.collectives),
        received_bytes=dict(meter.received_bytes),
        milliseconds=meter.milliseconds(),
    )


def ownership(plans: Sequence[tuple[FlatPlan, Sequence[ParamSpec]]], rows: Sequence[Sequence[int]] = ()) -> str:
    """Who owns what: a line for each shard, with its elements in the flat and the ranges of parameters among them.

    Args:
        plans: layout of each flat, and the parameters of its slots.
        rows: of a mesh: a shard is owned by all ranks of its column.
    """
    columns = [" ".join(map(str, column)) for column in zip(*rows, strict=True)]
    lines = []
    for plan, specs in plans:
        padding = plan.numel - sum(spec.numel for spec in specs)
        lines.append(
            f"group {specs[0].group}, {str(specs[0].dtype).removeprefix('torch.')}, {specs[0].device_type}: "
            f"{len(specs)} parameters, {plan.numel} elements with {padding} of padding, {plan.num_buckets} buckets"
        )
        table = [("bucket", "rank", "elements", "parameters"), *_rows(plan, specs, columns)]
        widths = [max(len(row[column]) for row in table) for column in range(3)]
        lines += ["  ".join([*map(str.rjust, row[:3], widths), row[3]]) for row in table]
    return "\n".join(lines)


def _rows(plan: FlatPlan, specs: Sequence[ParamSpec], columns: Sequence[str]) -> Iterator[tuple[str, str, str, str]]:
    for bucket in range(plan.num_buckets):
        for rank in range(plan.world_size):
            first, end = plan.shard_range(bucket, rank)
            parts = [
                _part(specs[slot], start - plan.slots[slot].start, stop - plan.slots[slot].start)
                for slot, start, stop in plan.overlaps(first, end)
            ]
            if len(parts) > 4:
                parts = [*parts[:2], f"{len(parts) - 3} more", parts[-1]]
            yield str(bucket), columns[rank] if columns else str(rank), f"{first}:{end}", ", ".join(parts) or "padding"


def _part(spec: ParamSpec, start: int, stop: int) -> str:
    return spec.name if stop - start == spec.numel else f"{spec.name}[{start}:{stop}]"
