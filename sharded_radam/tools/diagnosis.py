"""What a machine has, and whether ShardedRAdam works on it, and how fast: for ``sharded-radam doctor``."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sharded_radam.optimizer import ShardedRAdam
from sharded_radam.plan import make_plan
from sharded_radam.preflight import describe
from sharded_radam.tools.estimate import estimate_ours
from sharded_radam.transport import Transport, make_transport

VARIABLES = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG"),
    *("TORCH_DISTRIBUTED_DEBUG", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCHELASTIC_MAX_RESTARTS"),
)
"""What is often the reason when something is slow, or does not start."""


def join(device_type: str | None = None) -> Transport:
    """Collective: the ranks that torchrun has started, or this process alone; returns the transport between them.

    Args:
        device_type: "cpu", or "cuda" for the GPU of this rank's local number; the latter where there is one if None.
    """
    device = torch.device(device_type or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return make_transport(None, device, None)


def versions(ours: str) -> dict[str, str]:
    """Of what takes part.

    Args:
        ours: this package's.
    """
    found = {"sharded_radam": ours, "torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def backends() -> list[str]:
    """Those of torch.distributed that this build of torch has."""
    if not dist.is_available():
        return []
    return [name for name in ("gloo", "nccl", "mpi", "ucc") if getattr(dist, f"is_{name}_available")()]


def machine() -> dict[str, Any]:
    """Host, processors and memory of this process; sizes in bytes."""
    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "shm_bytes": shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else None,
        "gpus": [],
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_bytes"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found["gpus"].append({"name": gpu.name, "memory_bytes": gpu.total_memory})
    return found


def advice(machines: Sequence[dict[str, Any]], all_versions: Sequence[dict[str, str]]) -> list[str]:
    """What is likely not meant so.

    Args:
        machines: of all ranks, as ``machine`` has them.
        all_versions: of all ranks.
    """
    found = []
    if any(other != all_versions[0] for other in all_versions):
        found.append(f"ranks have different versions: {[dict(v) for v in {tuple(v.items()) for v in all_versions}]}")
    for host, num_ranks in Counter(of["host"] for of in machines).items():
        of = next(of for of in machines if of["host"] == host)
        if not of["gpus"] and num_ranks * of["threads"] > of["cores"]:
            found.append(
                f"{host}: {num_ranks} ranks x {of['threads']} threads on {of['cores']} cores: set OMP_NUM_THREADS to "
                f"{max(1, of['cores'] // num_ranks)}, or start fewer ranks"
            )
        if of["gpus"] and num_ranks > len(of["gpus"]):
            found.append(f"{host}: {num_ranks} ranks share {len(of['gpus'])} GPUs; NCCL wants one rank a GPU")
        if of["gpus"] and num_ranks > 1 and (of["shm_bytes"] or 0) < 2**30:
            found.append(f"{host}: /dev/shm has less than 1 GiB free, which NCCL may need (containers: --shm-size)")
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares_store and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        found.append(
            "workers that torchrun restarts may read what those before them wrote in its store (pytorch#135712): "
            "start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    return found


def mesh(machines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What ``make_mesh`` would make of the ranks: rows and columns, None if there is no such mesh; and what follows.

    Args:
        machines: of all ranks, as ``machine`` has them.
    """
    hosts = [of["host"] for of in machines]
    counts = Counter(hosts)
    per_host = counts[hosts[0]]
    if len(counts) == 1:
        return {"shape": [1, per_host], "reason": "one host: make_mesh() shards the state over all ranks"}
    in_order = [host for host in counts for _ in range(per_host)]
    if hosts != in_order:
        those = ", ".join(f"{count} on {host}" for host, count in counts.items())
        return {"shape": None, "reason": f"hosts have different numbers of ranks, or these are mixed ({those})"}
    text = "mesh=make_mesh(device_type) shards the state within each host, and replicates it across hosts"
    return {"shape": [len(counts), per_host], "reason": text}


# Whether it works


def check(transport: Transport, folder: Path | None) -> dict[str, str]:
    """Collective: what was checked -> "ok", or what is wrong on which rank.

    Args:
        transport: between the ranks.
        folder: on a file system that all ranks share, to save and load a checkpoint in; None not to.
    """
    checks: dict[str, Callable[[], str]] = {
        "bits of torch.optim.RAdam(foreach=True)": lambda: _compare(transport, foreach=True),
        "sharded gradients": lambda: _compare(transport, foreach=True, shard_gradients=True),
    }
    if folder is not None:
        checks[f"saves and loads in {folder}"] = lambda: _save_and_load(transport, folder)
    found = {}
    for name, run in checks.items():
        try:
            problem = run()
        except Exception as error:  # whatever it is, it is what was looked for
            problem = f"{type(error).__name__}: {error}"
        problems = transport.all_gather_objects(problem)
        wrong = {text: [r for r, other in enumerate(problems) if other == text] for text in problems if text}
        found[name] = "; ".join(f"ranks {ranks}: {text}" for text, ranks in wrong.items()) or "ok"
    return found


def _params(device: torch.device) -> list[Parameter]:
    values = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=values).to(device)) for shape in ((17,), (257, 3), (1,), (40, 50))]


def _compare(transport: Transport, **options: Any) -> str:
    """Eight steps, past the one at which RAdam begins to rectify, with gradients whose mean is exact."""
    ours, theirs = _params(transport.device), _params(transport.device)
    optimizer = ShardedRAdam(ours, lr=0.01, **options)
    reference = torch.optim.RAdam(theirs, lr=0.01, foreach=True)
    for step in range(8):
        for param, other in zip(ours, theirs, strict=True):
            mean = torch.full_like(other, step - 3.0)
            other.grad = mean
            if optimizer.shards_gradients:
                own = mean * transport.world_size if transport.rank == 0 else torch.zeros_like(mean)
                torch.autograd.backward((param * own).sum())
            else:
                param.grad = mean.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    moments = optimizer.consolidate_state_dict(to=0)
    if moments is not None:
        expected: Any = reference.state_dict()["state"]
        for index, state in moments["state"].items():
            if not all(_is_equal(state[name], expected[index][name].cpu()) for name in ("exp_avg", "exp_avg_sq")):
                return f"the moments of parameter {index} differ from RAdam's"
    wrong = [index for index, pair in enumerate(zip(ours, theirs, strict=True)) if not _is_equal(*pair)]
    return f"parameters {wrong} differ from RAdam's" if wrong else ""


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.detach(), other.detach())


def _save_and_load(transport: Transport, folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / transport.all_gather_objects(f"doctor-{secrets.token_hex(8)}")[0]
    params = _params(transport.device)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = ShardedRAdam([(str(index), param) for index, param in enumerate(params)])
    optimizer.step()
    saved = [tensor.clone() for flat in optimizer.state.values() for tensor in flat.values() if tensor.dim()]
    try:
        optimizer.save(path, timeout=60)
        other = ShardedRAdam([(str(index), param) for index, param in enumerate(params)])
        other.load(path, timeout=60)
    finally:
        transport.all_gather_objects(None)
        if transport.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
    loaded = [tensor for flat in other.state.values() for tensor in flat.values() if tensor.dim()]
    return "" if all(map(_is_equal, saved, loaded)) else "what was loaded is not what was saved"


# How fast it is


def bandwidth(transport: Transport, num_bytes: int, rounds: int = 5) -> tuple[dict[str, float | None], str]:
    """Collective: bytes per second of the slowest rank, and the engine.

    "memcpy" of host or device memory, all ranks at once; "update" of what the update reads and writes; "all_gather" and
    "reduce_scatter" of what a rank receives of the others, None where nothing is. Medians are not needed: the best of
    ``rounds`` is what the machine can do.

    Args:
        transport: between the ranks.
        num_bytes: of fp32 parameters.
        rounds: of each.
    """
    source = torch.ones(max(num_bytes // 4, 1), device=transport.device)
    target = torch.empty_like(source)
    seconds = {"memcpy": [_seconds(transport, lambda: target.copy_(source)) for _ in range(rounds)]}
    moved = {"memcpy": float(source.nbytes)}
    param = Parameter(source)
    optimizer = ShardedRAdam([param], shard_gradients=True)
    optimizer.time_phases()
    plan = make_plan(describe(optimizer.param_groups, 0, False)[1], transport.world_size)
    expected = estimate_ours(plan, transport.world_size, device=transport.device.type, shard_gradients=True)
    before = optimizer.stats()
    for index in range(7 + rounds):  # the first steps are not rectified
        torch.autograd.backward((param * 0.5).sum())
        transport.all_gather_objects(None)
        optimizer.step()
        now = optimizer.stats()
        for phase in now.milliseconds:
            spent = (now.milliseconds[phase] - before.milliseconds.get(phase, 0.0)) / 1e3
            if index >= 7:
                seconds.setdefault(phase, []).append(spent)
                received = now.received_bytes.get(phase, 0) - before.received_bytes.get(phase, 0)
                moved[phase] = float(expected.update_bytes if phase == "update" else received)
        before = now
    own = {name: moved[name] / min(times) if moved[name] and min(times) else None for name, times in seconds.items()}
    everyone = transport.all_gather_objects(own)
    found: dict[str, float | None] = {}
    for name in ("memcpy", "update", "all_gather", "reduce_scatter"):
        rates = [of[name] for of in everyone if of.get(name) is not None]
        found[name] = min(rates) if len(rates) == len(everyone) else None
    return found, before.engine


def _seconds(transport: Transport, action: Any) -> float:
    transport.all_gather_objects(None)
    begin = time.perf_counter()
    action()
    if transport.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
