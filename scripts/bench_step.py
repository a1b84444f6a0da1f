"""Milliseconds of one optimizer step, and of gradient synchronisation and step, ours beside its peers, in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 scripts/bench_step.py --json out.json

For the second table a backward pass hands out gradients that exist already, a parameter at a time, the last ones first:
what is timed is the synchronisation, the step, and what autograd itself takes, which has a row of its own.

All peers at once would not fit into memory. They are built one after the other, and the whole sequence runs
``--passes`` times, each time in the opposite order. A round's figure is that of the slowest rank, between two barriers;
medians over all rounds are printed, with the 10th and 90th percentile. The limit is our update alone, and the bytes
that must move to and from other ranks, at the speed at which all ranks together copy memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peers
import torch
import torch.distributed as dist
import trainers
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from sharded_radam import ShardedRAdam
from sharded_radam.plan import ParamSpec, make_plan

LIMIT = "limit: update, bytes at the speed of memcpy"
BACKWARD = "the backward pass alone"
BLOCK = 12
"""Tensors in a block of GPT-2, which FSDP2 shards as one."""


def milliseconds(action: Callable[[], object], device: torch.device) -> float:
    """Of the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = torch.tensor((time.perf_counter() - begin) * 1e3, device=device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


class Given(torch.autograd.Function):
    """Passes a scalar on; its backward gives each parameter the gradient that lies ready, without copying it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grad: Tensor, param: Tensor) -> Tensor:
        ctx.grad = grad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        return grads[0], None, ctx.grad.view_as(ctx.grad)


class Layer(nn.Module):
    """Some parameters, and their gradients to be."""

    def __init__(self, params: list[nn.Parameter], grads: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(params)
        self.grads = grads

    def forward(self, x: Tensor) -> Tensor:
        for param, grad in zip(self.weights, self.grads, strict=True):
            x = Given.apply(x, grad, param)  # type: ignore[no-untyped-call]
        return x


def bag(shapes: list[tuple[int, ...]], device: torch.device, grads: list[Tensor], dtype: torch.dtype) -> nn.Sequential:
    """A model of parameters of these shapes; its forward returns its input."""
    params = peers.make_params(shapes, device, [None] * len(shapes), dtype)
    blocks = [slice(i, i + BLOCK) for i in range(0, len(params), BLOCK)]
    return nn.Sequential(*(Layer(params[at], grads[at]) for at in blocks))


@contextmanager
def without_communication(optimizer: ShardedRAdam) -> Iterator[None]:
    network: Any = optimizer._shards.transport
    names = ("begin_update", "all_gather", "end_update")
    for name in names:
        setattr(network, name, lambda *_: [])
    yield
    for name in names:
        delattr(network, name)


Build = Callable[[], Callable[[], object]]
"""Makes a peer, and returns what is to be timed."""


def step_cases(shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> dict[str, Build]:
    """Optimizers, each with a step to time."""
    grads = peers.make_grads(shapes, device, dtype)

    def builder(name: str) -> Build:
        def build() -> Callable[[], object]:
            optimizer = peers.build(name, peers.make_params(shapes, device, grads, dtype))
            if name != peers.FLOOR:
                return optimizer.step
            assert isinstance(optimizer, ShardedRAdam)

            def floor() -> None:
                with without_communication(optimizer):
                    optimizer.step()

            return floor

        return build

    return {name: builder(name) for name in peers.names(dist.get_world_size(), device, dtype)}


def sync_cases(shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> dict[str, Build]:
    """Whole iterations without a model."""
    grads = peers.make_grads(shapes, device, dtype)
    policy = None if dtype == torch.float32 else MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)

    def builder(name: str) -> Build:
        def build() -> Callable[[], object]:
            x = torch.ones((), device=device, requires_grad=True)
            if name == BACKWARD:
                model = bag(shapes, device, grads, dtype)

                def backward() -> None:
                    model(x).backward()
                    model.zero_grad()

                return backward
            # FSDP2 has masters as parameters, which its policy makes half precision of.
            own = torch.float32 if name == trainers.FSDP else dtype
            trainer = trainers.Trainer(
                name, lambda: bag(shapes, device, grads, own), lambda model: list(model.children()), policy
            )
            return lambda: trainer.iterate(x)

        return build

    return {name: builder(name) for name in (*trainers.names(dist.get_world_size(), dtype), BACKWARD)}


def measure(
    cases: dict[str, Build], rounds: int, warmup: int, passes: int, device: torch.device
) -> dict[str, list[float]]:
    """All rounds of all peers, built one after the other."""
    times: dict[str, list[float]] = defaultdict(list)
    order = list(cases)
    for _ in range(passes):
        for name in order:
            action = cases[name]()
            for index in range(warmup + rounds):
                elapsed = milliseconds(action, device)
                if index >= warmup:
                    times[name].append(elapsed)
            del action
            gc.collect()
        order.reverse()
    return {name: times[name] for name in cases}


def copy_milliseconds(num_bytes: int, device: torch.device) -> float:
    """To copy so many bytes on each rank, all at the same time."""
    source, target = (torch.ones(max(1, num_bytes // 4), device=device) for _ in range(2))
    return statistics.median(milliseconds(lambda: target.copy_(source), device) for _ in range(7))


def add_limit(rows: dict[str, dict[str, float]], floor: float, moved_ms: float, ours: str) -> None:
    limit = floor + moved_ms
    rows[LIMIT] = dict.fromkeys(("median_ms", "p10_ms", "p90_ms"), limit)
    rows[LIMIT]["times_ours"] = limit / rows[ours]["median_ms"]


def plan_milliseconds(world_size: int) -> float:
    """The plan of GPT-2, and the pieces of the last rank."""
    specs = [
        ParamSpec(str(i), shape, tuple(range(len(shape))), torch.float32, "cpu", 0)
        for i, shape in enumerate(peers.gpt2_shapes())
    ]
    begin = time.perf_counter()
    plan = make_plan(specs, world_size)
    for flat in plan.flats:
        flat.pieces(world_size - 1)
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(peers.SHAPES), default=["gpt2", "small", "bf16"])
    parser.add_argument("--rounds", type=int, default=3, help="of each pass")
    parser.add_argument("--warmup", type=int, default=5, help="rounds of each pass that are not counted")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    device = peers.start()
    is_main, ranks = dist.get_rank() == 0, dist.get_world_size()
    machine = peers.describe_machine()
    if is_main:
        print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    result: dict[str, Any] = {"machine": machine, "rounds": arguments.rounds * arguments.passes}
    result |= {"step": {}, "sync_and_step": {}, "plan_ms": {}}
    for name in arguments.shapes:
        shapes, dtype = peers.SHAPES[name](), peers.dtype_of(name)
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        moved_ms = copy_milliseconds(numel * dtype.itemsize * (ranks - 1) // ranks, device)
        counts = (arguments.rounds, arguments.warmup, arguments.passes, device)
        ours, zero2 = peers.names(ranks, device, dtype)[0], trainers.names(ranks, dtype)[0]
        steps = peers.summarise(measure(step_cases(shapes, device, dtype), *counts), ours)
        floor = steps[peers.FLOOR]["median_ms"]
        add_limit(steps, floor, moved_ms, ours)
        if is_main:
            print(f"\n{name}: {len(shapes)} tensors, {numel / 1e6:.1f}M elements")
            peers.show("optimizer step", steps)
        syncs = peers.summarise(measure(sync_cases(shapes, device, dtype), *counts), zero2)
        add_limit(syncs, floor, 2 * moved_ms, zero2)
        if is_main:
            peers.show("gradient synchronisation + step", syncs)
        result["step"][name], result["sync_and_step"][name] = steps, syncs
    if is_main:
        for world_size in (1, 1024):
            result["plan_ms"][world_size] = statistics.median(plan_milliseconds(world_size) for _ in range(5))
            print(f"\nplan of GPT-2 for {world_size} ranks: {result['plan_ms'][world_size]:.2f} ms", end="")
        print()
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
