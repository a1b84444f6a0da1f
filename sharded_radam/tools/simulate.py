"""The real optimizer on a fake process group: the code's own figures, beside those of the plan.

Parameters are fake CUDA tensors, which have shapes and no memory, so that one process can be any rank of thousands.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sharded_radam.compat import check_fake_collectives
from sharded_radam.optimizer import ShardedRAdam
from sharded_radam.plan import ParamSpec, default_bucket_cap_mb, make_plan
from sharded_radam.stats import Stats
from sharded_radam.tools.estimate import estimate_ours
from sharded_radam.tools.layout import layout
from sharded_radam.transport import Alone, Choice, NativeTransport, Transport

LARGEST_WORLD_SIZE = 4096


class FakeTransport(NativeTransport):
    """Collectives of the fake backend. Fake tensors have no values, so every rank says what this one does."""

    def all_gather_objects(self, item: object) -> list[Any]:
        return [item] * self.world_size

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        self.meter.count("broadcast", 0 if self.rank == source else tensor.nbytes)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        self.meter.count("all_reduce", tensor.nbytes)
        return tensor


def _connect(choice: Choice) -> Transport:
    shard = choice.groups.shard
    assert shard is not None
    is_alone = choice.groups.shard_size == 1
    transport = (
        Alone(choice.device, shard, choice.meeting) if is_alone else FakeTransport(shard, choice.device, choice.meeting)
    )
    if choice.groups.replica is not None:
        transport.add_replicas(FakeTransport(choice.groups.replica, choice.device, choice.meeting))
    return transport


class FakeOptimizer(ShardedRAdam):
    """ShardedRAdam with that transport."""

    _connect = staticmethod(_connect)


@dataclass(frozen=True, slots=True)
class Check:
    """A figure of the plan and that of the code."""

    rank: int
    what: str
    planned: int
    built: int

    @property
    def agrees(self) -> bool:
        """Whether they are the same."""
        return self.planned == self.built


@dataclass(frozen=True, slots=True)
class _Case:
    """What is built, and planned."""

    params: Sequence[ParamSpec]
    world_size: int
    bucket_cap_mb: float | None
    replicas: int
    rank: int
    shard_gradients: bool


def simulate(
    params: Sequence[ParamSpec], world_size: int, bucket_cap_mb: float | None = None, replicas: int = 1
) -> list[Check]:
    """Build the optimizer as the first, a middle and the last rank, take one step, and compare with the plan.

    Args:
        params: of the model.
        world_size: 2 to 4096.
        bucket_cap_mb: size of a bucket in MiB; as by default if None.
        replicas: number of copies of the state; a divisor of it.

    Raises:
        ValueError: the world size; a process group exists already; or torch is too old for it.
    """
    if not 2 <= world_size <= LARGEST_WORLD_SIZE:
        raise ValueError(f"--simulate {world_size}: expected 2 to {LARGEST_WORLD_SIZE} ranks")
    if dist.is_initialized():
        raise ValueError("a simulation needs a process without a process group: run it without torchrun")
    check_fake_collectives()
    if bucket_cap_mb is None:
        bucket_cap_mb = default_bucket_cap_mb(params[0].device_type, world_size // replicas)
    checks = []
    for rank in sorted({0, world_size // 2, world_size - 1}):
        for shard_gradients in (False, True):
            case = _Case(params, world_size, bucket_cap_mb, replicas, rank, shard_gradients)
            checks += _compare(case, _build(case))
    return checks


def _build(case: _Case) -> Stats:
    from torch._subclasses.fake_tensor import FakeTensorMode  # as torch.serialization.skip_data documents it

    dist.init_process_group("fake", rank=case.rank, world_size=case.world_size)
    try:
        mesh = None
        if case.replicas > 1:
            from torch.distributed.device_mesh import init_device_mesh

            mesh = init_device_mesh("cpu", (case.replicas, case.world_size // case.replicas))
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of data pointers of fake tensors, which compare as nothing
            made = [_fake(param) for param in case.params]
            # A counter on the device is not read, and so may be fake.
            optimizer = FakeOptimizer(
                [(param.name, tensor) for param, tensor in zip(case.params, made, strict=True)],
                mesh=mesh,
                bucket_cap_mb=case.bucket_cap_mb,
                capturable=True,
                foreach=True,
                shard_gradients=case.shard_gradients,
            )
            for tensor in made:
                tensor.grad = torch.zeros_like(tensor)
            optimizer.step()
            return optimizer.stats()
    finally:
        dist.destroy_process_group()


def _fake(spec: ParamSpec) -> Parameter:
    inverse = sorted(range(len(spec.dim_order)), key=spec.dim_order.__getitem__)
    memory = torch.empty([spec.shape[dim] for dim in spec.dim_order], dtype=spec.dtype, device="cuda")
    return Parameter(memory.permute(inverse))


def _compare(case: _Case, built: Stats) -> list[Check]:
    params, world_size, bucket_cap_mb, replicas = case.params, case.world_size, case.bucket_cap_mb, case.replicas
    planned = layout(params, world_size, bucket_cap_mb, replicas)
    plan = make_plan(params, world_size // replicas, bucket_cap_mb)
    row = estimate_ours(plan, world_size, shard_gradients=case.shard_gradients, replicas=replicas)
    memory = row.memory
    pairs = [
        ("elements", planned.numel, built.numel),
        ("padding, elements", planned.padding_numel, built.padding_numel),
        ("buckets", planned.num_buckets, built.num_buckets),
        ("bytes of state", memory.moments + memory.masters, built.state_bytes),
        ("bytes of gathered parameters", row.parameters_received, built.received_bytes.get("all_gather", 0)),
        ("all-gathers", planned.num_buckets if replicas < world_size else 0, built.collectives.get("all_gather", 0)),
    ]
    if case.shard_gradients:
        received = (built.received_bytes.get(kind, 0) for kind in ("reduce_scatter", "average"))
        pairs += [
            ("bytes of gradients", memory.gradients, built.gradient_bytes),
            ("bytes of gradient buckets", memory.buckets, built.bucket_bytes),
            ("bytes of reduced gradients", row.gradients_received, sum(received)),
            (
                "reduce-scatters",
                planned.num_buckets if replicas < world_size else 0,
                built.collectives.get("reduce_scatter", 0),
            ),
        ]
    return [Check(case.rank, f"{row.optimizer}: {what}", planned, built) for what, planned, built in pairs]
