"""Shapes, peers and the description of the machine, shared by the benchmarks."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer

from sharded_radam import ShardedRAdam

LR = 1e-3


def gpt2_shapes() -> list[tuple[int, ...]]:
    """GPT-2 124M: 148 tensors, 124 439 808 elements."""
    block = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (3072, 768), (3072,), (768, 3072), (768,)]
    return [(50257, 768), (1024, 768), *(12 * block), (768,), (768,)]


def small_shapes() -> list[tuple[int, ...]]:
    """500 tensors in the manner of a ResNet: convolutions of 4 thousand to 147 thousand elements and their norms."""
    block: list[tuple[int, ...]] = []
    for width in (64, 128):
        for conv in ((width, 64, 1, 1), (width, width, 3, 3)):
            block += [conv, (width,), (width,)]
    return (block * 42)[:500]


def half_shapes() -> list[tuple[int, ...]]:
    """20M elements in the manner of a GPT: 6 blocks of width 512."""
    block = [(512,), (512,), (1536, 512), (1536,), (512, 512), (512,)]
    block += [(512,), (512,), (2048, 512), (2048,), (512, 2048), (512,)]
    return [(2048, 512), (128, 512), *(6 * block), (512,), (512,)]


SHAPES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "gpt2": gpt2_shapes,
    "small": small_shapes,
    "bf16": half_shapes,
    "tiny-bf16": lambda: half_shapes()[3:9],
    "tiny": lambda: small_shapes()[:24],
    "one": lambda: [(50_000_000,)],
}

OURS, FLOOR, DDP, ZERO = "sharded_radam", "sharded_radam, no communication", "DDP + RAdam", "ZeroRedundancyOptimizer"
OURS_GLOO, OURS_SHARED = "sharded_radam, transport gloo", "sharded_radam, share_parameters"
OURS_SHARDED = "sharded_radam, shard_gradients"
OURS_MESH = "sharded_radam, mesh of 2 replicas"
OURS_COMPILED = "sharded_radam, compiled"


def dtype_of(shapes: str) -> torch.dtype:
    """That of the parameters of ``SHAPES[shapes]``."""
    return torch.bfloat16 if "bf16" in shapes else torch.float32


def names(world_size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    """The optimizers that can run here; the first is what the others' times are divided by."""
    if dtype == torch.bfloat16:
        return [OURS_COMPILED, OURS, FLOOR, *((ZERO,) if world_size > 1 else ()), DDP]
    if world_size == 1:
        return [OURS, FLOOR, DDP]
    mesh = (OURS_MESH,) if world_size >= 4 and world_size % 2 == 0 else ()
    return [OURS, *mesh, *((OURS_SHARED, OURS_GLOO) if device.type == "cpu" else ()), FLOOR, ZERO, DDP]


def two_replicas(device_type: str) -> DeviceMesh:
    """The ranks as two rows, each with one copy of the state: with 4 ranks, 2 x 2."""
    return init_device_mesh(device_type, (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


def make_params(
    shapes: list[tuple[int, ...]],
    device: torch.device,
    grads: Sequence[Tensor | None],
    dtype: torch.dtype = torch.float32,
) -> list[torch.nn.Parameter]:
    """Parameters, equal on all ranks, that share the gradients given."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype)) for shape in shapes]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def make_grads(shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [(torch.randn(shape, device=device) * 1e-3).to(dtype) for shape in shapes]


def build(peer: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a peer; for "DDP + RAdam" the replicated one, since DDP is no part of the step."""
    if peer in (OURS, FLOOR, OURS_COMPILED):
        is_compiled = peer == OURS_COMPILED or (peer == FLOOR and params[0].dtype == torch.bfloat16)
        return ShardedRAdam(params, lr=LR, compiled=is_compiled)
    if peer in (OURS_GLOO, OURS_SHARED):
        transport, share = ("gloo", False) if peer == OURS_GLOO else (None, True)
        return ShardedRAdam(params, lr=LR, transport=transport, share_parameters=share)
    if peer == OURS_MESH:
        return ShardedRAdam(params, lr=LR, mesh=two_replicas(params[0].device.type))
    if peer == OURS_SHARDED:
        return ShardedRAdam(params, lr=LR, shard_gradients=True)
    if peer == DDP:
        return torch.optim.RAdam(params, lr=LR, foreach=True)
    return ZeroRedundancyOptimizer(params, torch.optim.RAdam, parameters_as_bucket_view=True, lr=LR, foreach=True)


def start(device_type: str | None = None) -> torch.device:
    """Join torchrun's process group, or make one of one rank; returns this rank's device: a GPU if there is one."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    device = torch.device("cpu")
    if device_type != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1"))
    )
    return device


def describe_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    script = " ".join([f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()}"
    return {
        "command": f"{threads} torchrun --standalone --nproc-per-node={dist.get_world_size()} {script}",
        "processor": model,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads per rank": torch.get_num_threads(),
        "ranks": dist.get_world_size(),
        "backend": dist.get_backend(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def summarise(times: dict[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    reference = statistics.median(times[ours])
    rows = {}
    for name, values in times.items():
        ordered = sorted(values)
        rows[name] = {
            "median_ms": statistics.median(values),
            "p10_ms": ordered[len(ordered) // 10],
            "p90_ms": ordered[-1 - len(ordered) // 10],
            "times_ours": statistics.median(values) / reference,
        }
    return rows


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"{title:50}{'median ms':>11}{'p10':>9}{'p90':>9}{'ratio':>8}")
    for name, row in rows.items():
        figures = f"{row['median_ms']:11.2f}{row['p10_ms']:9.2f}{row['p90_ms']:9.2f}{row['times_ours']:8.2f}"
        print(f"{name:50}{figures}", flush=True)


def file_store(path: str, world_size: int) -> FileStore:
    """Where the ranks of a process group of their own meet."""
    return FileStore(path, world_size)
