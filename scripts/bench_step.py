"""Milliseconds of one optimizer step, ours beside its peers, in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 scripts/bench_step.py
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 scripts/bench_step.py --shapes gpt2 --json out.json

Peers take turns, round by round, so that all see the same machine. A round's figure is that of the slowest rank,
between two barriers; medians over the rounds are printed, with the 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import peers
import torch
import torch.distributed as dist

from sharded_radam.plan import ParamSpec, make_plan


def milliseconds(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    """One step, by the slowest rank."""
    dist.barrier()
    begin = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = torch.tensor((time.perf_counter() - begin) * 1e3, device=device)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


def measure(shapes: list[tuple[int, ...]], rounds: int, warmup: int, device: torch.device) -> dict[str, list[float]]:
    """All rounds of all peers."""
    grads = peers.make_grads(shapes, device)
    names = [peers.OURS, peers.FLOOR, peers.DDP]
    if dist.get_world_size() > 1:
        names.append(peers.ZERO)
    optimizers = {}
    for name in names:
        if name != peers.FLOOR:
            optimizers[name] = peers.build(name, peers.make_params(shapes, device, grads))
        gc.collect()
    ours = optimizers[peers.OURS]
    network = ours._transport  # type: ignore[attr-defined]
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warmup + rounds):
        for name in names:
            if name == peers.FLOOR:
                network.all_gather = lambda _: []
            elapsed = milliseconds(optimizers.get(name, ours), device)
            if name == peers.FLOOR:
                del network.all_gather
            if index >= warmup:
                times[name].append(elapsed)
    return times


def plan_milliseconds(world_size: int) -> float:
    """The plan of GPT-2, and the pieces of the last rank."""
    specs = [
        ParamSpec(str(i), shape, tuple(range(len(shape))), torch.float32, "cpu", 0)
        for i, shape in enumerate(peers.gpt2_shapes())
    ]
    begin = time.perf_counter()
    plan = make_plan(specs, world_size)
    plan.digest()
    for flat in plan.flats:
        flat.pieces(world_size - 1)
    return (time.perf_counter() - begin) * 1e3


def summarise(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    ours = statistics.median(times[peers.OURS])
    rows = {}
    for name, values in times.items():
        ordered = sorted(values)
        rows[name] = {
            "median_ms": statistics.median(values),
            "p10_ms": ordered[len(ordered) // 10],
            "p90_ms": ordered[-1 - len(ordered) // 10],
            "times_ours": statistics.median(values) / ours,
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(peers.SHAPES), default=list(peers.SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=7, help="rounds not counted; rectification begins at step 6")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    device = peers.start()
    is_main = dist.get_rank() == 0
    machine = peers.describe_machine()
    if is_main:
        print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    result: dict[str, Any] = {"machine": machine, "rounds": arguments.rounds, "step": {}, "plan_ms": {}}
    for name in arguments.shapes:
        shapes = peers.SHAPES[name]()
        numel = sum(torch.Size(shape).numel() for shape in shapes)
        rows = summarise(measure(shapes, arguments.rounds, arguments.warmup, device))
        result["step"][name] = rows
        if is_main:
            print(f"\n{name}: {len(shapes)} tensors, {numel / 1e6:.1f}M elements")
            print(f"{'optimizer step':36}{'median ms':>11}{'p10':>9}{'p90':>9}{'ratio':>8}")
            for peer, row in rows.items():
                figures = f"{row['median_ms']:11.2f}{row['p10_ms']:9.2f}{row['p90_ms']:9.2f}{row['times_ours']:8.2f}"
                print(f"{peer:36}{figures}", flush=True)
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
