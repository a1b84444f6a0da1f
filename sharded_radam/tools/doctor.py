"""``sharded-radam doctor``: what there is, what would be chosen and why, whether it works, and how fast."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

import sharded_radam.tools.diagnosis as diagnosis
from sharded_radam.tools.output import mib, print_result, table
from sharded_radam.version import __version__

ENGINES = {
    "fused": "the default on CPU: one pass over memory",
    "foreach": "the default on this device, as torch.optim.RAdam's; fused=True is one pass over memory",
    "for-loop": "the default on this device, as torch.optim.RAdam's",
}


def add_to(topics: Any) -> None:
    """Add the topic to the parser of the command line."""
    text = "versions, devices, hosts, and a short check; on several ranks: torchrun ... -m sharded_radam doctor"
    parser: argparse.ArgumentParser = topics.add_parser("doctor", help=text, description=text)
    add = parser.add_argument
    add("--folder", type=Path, help="save and load a small checkpoint in there: is it shared by all ranks?")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--mb", type=float, default=128.0, help="size of the parameters whose step is timed, in MiB")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _doctor(options: Any) -> int:
    if not options.mb > 0:
        raise ValueError(f"--mb {options.mb}: expected a size in MiB above 0")
    transport = diagnosis.join(options.device)
    try:
        machines = transport.all_gather_objects(diagnosis.machine())
        versions = transport.all_gather_objects(diagnosis.versions(__version__))
        checks = diagnosis.check(transport, options.folder)
        bandwidth, engine = diagnosis.bandwidth(transport, int(options.mb * 2**20))
        result = {
            "versions": versions[0],
            "ranks": transport.world_size,
            "device": transport.device.type,
            "backends": diagnosis.backends(),
            "hosts": machines,
            "environment": {name: os.environ[name] for name in diagnosis.VARIABLES if name in os.environ},
            "transport": {"name": transport.name, "reason": transport.reason},
            "mesh": diagnosis.mesh(machines),
            "engine": {"name": engine, "reason": ENGINES[engine]},
            "checks": checks,
            "bandwidth": bandwidth,
            "advice": diagnosis.advice(machines, versions),
        }
        if transport.rank == 0:
            print_result(options, result, "\n".join(_lines(result, machines)))
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    return 0 if all(text == "ok" for text in checks.values()) else 1


def _lines(result: dict[str, Any], machines: Sequence[dict[str, Any]]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [versions, f"backends of torch.distributed: {', '.join(result['backends']) or 'none'}"]
    for host, num_ranks in Counter(of["host"] for of in machines).items():
        of = next(of for of in machines if of["host"] == host)
        shm = "no /dev/shm" if of["shm_bytes"] is None else f"{mib(of['shm_bytes'])} MiB free in /dev/shm"
        gpus = Counter(f"{gpu['name']} with {mib(gpu['memory_bytes'])} MiB" for gpu in of["gpus"])
        lines += [
            f"host {host}: {num_ranks} rank{'s' if num_ranks > 1 else ''}, {of['cores']} cores ({of['instructions']}), "
            f"{of['threads']} threads a rank, {mib(of.get('memory_bytes', 0))} MiB, {shm}, "
            + (", ".join(f"{count} x {name}" for name, count in gpus.items()) or "no GPU")
        ]
    lines += [f"{name}={value}" for name, value in result["environment"].items()]
    for what in ("transport", "engine"):
        lines.append(f"{what} {result[what]['name']}: {result[what]['reason']}")
    mesh = result["mesh"]
    lines.append(f"mesh {' x '.join(map(str, mesh['shape'])) if mesh['shape'] else 'none'}: {mesh['reason']}")
    rates = {name: rate for name, rate in result["bandwidth"].items() if rate is not None}
    lines += [
        "",
        *table([("GB/s of the slowest rank", ""), *((name, f"{rate / 1e9:.2f}") for name, rate in rates.items())]),
    ]
    lines += ["", *(f"{name}: {text}" for name, text in result["checks"].items())]
    return [*lines, *(f"advice: {text}" for text in result["advice"])]
