"""Milliseconds of whole training iterations of a GPT on real text, ours beside its peers, in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 scripts/bench_train.py --json out.json

Model and text are those of launch/train.py. Peers take turns, round by round, so that all see the same machine; a
round's figure is that of the slowest rank, between two barriers; medians are printed, with the 10th and 90th
percentile. Then, for some peers, a profile of rank 0: milliseconds of an iteration by what they are spent on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import peers
import torch
import torch.distributed as dist
import trainers
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent / "launch"))
import train

PROFILED = (trainers.ZERO2, trainers.ONE_COPY, trainers.ZERO)
RANGES: tuple[str, ...] = ("forward", "backward", "sharded_radam::reduce_scatter", "step", "sharded_radam::update")
RANGES += ("sharded_radam::all_gather", "gloo:all_reduce")


def blocks(model: nn.Module) -> list[nn.Module]:
    assert isinstance(model, train.GPT)
    return list(model.blocks)


class Race:
    """All peers on the same batches."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        sizes = train.Sizes(options.layers, options.heads, options.width, options.context)
        self.options, self.device = options, device
        self.text = train.Text(train.read_text([], 20_000_000), options.context, device)

        def make_model() -> nn.Module:
            torch.manual_seed(0)
            return train.GPT(sizes).to(device)

        self.numel = sum(param.numel() for param in make_model().parameters())
        names = trainers.names(dist.get_world_size())
        self.trainers = {name: trainers.Trainer(name, make_model, blocks) for name in names}
        self.losses: dict[str, float] = {}

    def iterate(self, name: str, step: int) -> float:
        """Milliseconds of one iteration, of the slowest rank."""
        ranks = dist.get_world_size()
        batch = self.text.batch(step, 0, self.options.batch * ranks, dist.get_rank(), ranks)
        dist.barrier()
        begin = time.perf_counter()
        self.losses[name] = float(self.trainers[name].iterate(*batch))
        elapsed = torch.tensor((time.perf_counter() - begin) * 1e3, device=self.device)
        dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
        return float(elapsed)

    def run(self, rounds: int, warmup: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in self.trainers}
        for step in range(warmup + rounds):
            for name, found in times.items():
                elapsed = self.iterate(name, step)
                if step >= warmup:
                    found.append(elapsed)
        return times

    def profile(self, name: str, first: int, rounds: int) -> dict[str, float]:
        """Milliseconds of an iteration, by range; ranges are nested."""
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            for step in range(first, first + rounds):
                self.iterate(name, step)
        found = {event.key: event.cpu_time_total / 1e3 / rounds for event in recorded.key_averages()}
        return {key: found[key] for key in RANGES if key in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--warmup", type=int, default=6, help="rounds not counted; rectification begins at step 6")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a rank")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    device = peers.start()
    is_main = dist.get_rank() == 0
    machine = peers.describe_machine()
    race = Race(options, device)
    times = race.run(options.rounds, options.warmup)
    done, losses = options.warmup + options.rounds, dict(race.losses)
    profiles = {name: race.profile(name, done, 5) for name in PROFILED if name in race.trainers}
    result: dict[str, Any] = {"machine": machine, "rounds": options.rounds, "elements": race.numel}
    result["model"] = {key: getattr(options, key) for key in ("layers", "heads", "width", "context", "batch")}
    result["iteration"] = peers.summarise(times, trainers.ZERO2)
    for name, row in result["iteration"].items():
        row["last_loss"] = losses[name]
    result["profile"] = profiles
    if is_main:
        print(", ".join(f"{key} {value}" for key, value in machine.items()))
        print(f"\n{race.numel / 1e6:.1f}M parameters, {options.batch} x {options.context} tokens a rank")
        peers.show("whole iteration", result["iteration"])
        for name, ranges in profiles.items():
            print(f"\n{name}: ms of an iteration, ranges nested, rank 0")
            for key, value in ranges.items():
                print(f"    {key:40}{value:9.2f}")
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.barrier()
    race.trainers.clear()  # before the group: a rank that frees DDP after its peers are gone may hang
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
