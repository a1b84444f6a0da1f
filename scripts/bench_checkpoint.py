"""Seconds to save and load the optimizer state of GPT-2 124M, ours beside its peers, in one run.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2 scripts/bench_checkpoint.py --folder runs/bench

Peers take turns, round by round; a figure is that of the slowest rank, between two barriers, and the disk is idle when
it begins. The limits are one process that writes the same bytes and waits for the disk, and ranks that read their parts
of the bytes. ZeroRedundancyOptimizer, which takes a minute, comes last, twice, of which the first warms up. Loads are
timed three times: into a new optimizer, as in a new process, with the files in the page cache, and after they were
dropped; and into one that has taken steps, from the page cache. What builds the optimizer is not in it, and touches the
moments' memory, so a load finds pages; the ranks that read the bytes alone use 16 MiB again and again, which is less
than to have them all in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peers
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from sharded_radam import CheckpointManager, ShardedRAdam

OURS = "sharded_radam"
ZERO, FSDP, PLAIN = "ZeroRedundancyOptimizer + torch.save", "FSDP2 + torch.distributed.checkpoint", "the bytes alone"
KINDS = (OURS, FSDP, PLAIN, ZERO)


def seconds(action: Callable[[], object]) -> float:
    """Of the slowest rank."""
    if dist.get_rank() == 0:
        os.sync()
    dist.barrier()
    begin = time.perf_counter()
    action()
    elapsed = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return float(elapsed)


class Model(nn.Module):
    """Parameters, and no more."""

    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(peers.make_params(shapes, torch.device("cpu"), [None] * len(shapes)))


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make state in which no bytes are zero."""
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.25)
    optimizer.step()
    for param in model.parameters():
        param.grad = None


class Peer:
    """Saves to and loads from a path."""

    def __init__(self, kind: str, shapes: list[tuple[int, ...]]) -> None:
        self.kind = kind
        self.shapes = shapes
        self.renew()
        if kind != PLAIN:
            stepped(self.optimizer, self.model)

    def renew(self) -> None:
        """Build model and optimizer anew, as a new process does."""
        if self.kind == PLAIN:
            return
        self.model = model = Model(self.shapes)
        if self.kind == OURS:
            self.optimizer: Any = ShardedRAdam(model.named_parameters())
        elif self.kind == ZERO:
            self.optimizer = ZeroRedundancyOptimizer(
                model.parameters(), torch.optim.RAdam, parameters_as_bucket_view=True, foreach=True
            )
        elif self.kind == FSDP:
            fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            self.optimizer = torch.optim.RAdam(model.parameters(), foreach=True)

    def save(self, path: Path) -> None:
        if self.kind == OURS:
            self.optimizer.save(path)
        elif self.kind == ZERO:
            self.optimizer.consolidate_state_dict(to=0)
            if dist.get_rank() == 0:
                torch.save(self.optimizer.state_dict(), path)
            dist.barrier()
        elif self.kind == FSDP:
            dcp_save({"optim": get_optimizer_state_dict(self.model, self.optimizer)}, checkpoint_id=path)
        elif dist.get_rank() == 0:
            with path.open("wb", buffering=0) as file:
                for tensor in PLAIN_BYTES:
                    file.write(tensor.numpy().data)
                os.fsync(file.fileno())

    def load(self, path: Path) -> None:
        if self.kind == OURS:
            self.optimizer.load(path)
        elif self.kind == ZERO:
            self.optimizer.load_state_dict(torch.load(path, weights_only=True))
        elif self.kind == FSDP:
            state = get_optimizer_state_dict(self.model, self.optimizer)
            dcp_load({"optim": state}, checkpoint_id=path)
            set_optimizer_state_dict(self.model, self.optimizer, state)
        else:
            size, ranks, rank = path.stat().st_size, dist.get_world_size(), dist.get_rank()
            with path.open("rb", buffering=0) as file:
                file.seek(size // ranks * rank)
                left = size // ranks
                while left:
                    left -= len(file.read(min(left, 2**24)))


PLAIN_BYTES: list[torch.Tensor] = []


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.iterdir())


def drop_from_cache(path: Path) -> None:
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def blocked(peer: Peer, manager: CheckpointManager, step: int) -> tuple[float, float]:
    """Seconds that training waits for an asynchronous save, and until it is committed."""
    begin = time.perf_counter()
    waited = seconds(lambda: manager.save(step, optimizer=peer.optimizer, blocking=False))
    manager.wait()
    return waited, time.perf_counter() - begin


def measure(
    rounds: int, folder: Path, shapes: list[tuple[int, ...]], kinds: list[str]
) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    everyone = {kind: Peer(kind, shapes) for kind in KINDS if kind in kinds}
    main = dist.get_rank() == 0
    manager = CheckpointManager(folder / "async", keep=1)
    for round_ in range(rounds + (3 if ZERO in kinds else 1)):
        for kind, peer in everyone.items():
            if (kind == ZERO) != (round_ > rounds):
                continue
            path = folder / f"{kind.split()[0].strip(',')}-{round_}"
            dist.barrier()
            times = {"save": seconds(lambda p=peer, at=path: p.save(at))}  # type: ignore[misc]
            peer.renew()
            times["load"] = seconds(lambda p=peer, at=path: p.load(at))  # type: ignore[misc]
            times["load, running"] = seconds(lambda p=peer, at=path: p.load(at))  # type: ignore[misc]
            peer.renew()
            if main:
                drop_from_cache(path)
            times["load, not cached"] = seconds(lambda p=peer, at=path: p.load(at))  # type: ignore[misc]
            if kind == OURS:
                waited, committed = blocked(peer, manager, round_)
                times |= {"async save: training waits": waited, "async save: committed": committed}
            dist.barrier()
            if main:
                times["bytes"] = float(sum(file.stat().st_size for file in files_of(path)))
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
            if round_ not in (0, rounds + 1):  # the first one warms up
                for name, value in times.items():
                    found.setdefault(kind, {}).setdefault(name, []).append(value)
    manager.close()
    if main:
        shutil.rmtree(manager.folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench_checkpoint"), help="on the disk to measure")
    parser.add_argument("--shapes", choices=peers.SHAPES, default="gpt2")
    parser.add_argument("--peers", nargs="+", choices=KINDS, default=KINDS, help="those to compare, ours among them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    shapes = peers.SHAPES[options.shapes]()
    peers.start()
    if dist.get_rank() == 0:
        options.folder.mkdir(parents=True, exist_ok=True)
        PLAIN_BYTES.extend(torch.rand(sum(map(math.prod, shapes))) for _ in range(2))
    found = measure(options.rounds, options.folder, shapes, options.peers)
    if dist.get_rank() == 0:
        medians = {kind: {name: statistics.median(t) for name, t in times.items()} for kind, times in found.items()}
        names = ["save", "async save: training waits", "async save: committed"]
        names += ["load", "load, not cached", "load, running"]
        print(f"{'seconds (ratio to ours)':45}" + "".join(f"{name:>28}" for name in names) + f"{'MB':>10}")
        for kind, times in medians.items():
            row = [
                f"{times[name]:.3f} ({times[name] / medians[OURS][name]:.2f})" if name in times else ""
                for name in names
            ]
            print(f"{kind:45}" + "".join(f"{cell:>28}" for cell in row) + f"{times['bytes'] / 1e6:10.1f}")
        if options.json:
            machine = peers.describe_machine()
            options.json.write_text(json.dumps({"machine": machine, "seconds": found}, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
