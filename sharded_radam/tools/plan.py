"""``sharded-radam plan``: what a model will take at some numbers of ranks, before it is built."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sharded_radam.plan import ParamSpec
from sharded_radam.tools.compare import estimates
from sharded_radam.tools.estimate import Bandwidth, Estimate
from sharded_radam.tools.layout import TRANSPORTS, Layout, layout
from sharded_radam.tools.models import read_model
from sharded_radam.tools.output import mib, print_result, table
from sharded_radam.tools.simulate import Check, simulate

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def add_to(topics: Any) -> None:
    """Add the topic to the parser of the command line."""
    text = "memory, traffic, checkpoint size and time of a model at some numbers of ranks, beside other optimizers"
    parser: argparse.ArgumentParser = topics.add_parser("plan", help=text, description=text)
    add = parser.add_argument
    add(
        "model",
        help="package.module:function that returns a module (called on the meta device), a .safetensors file or index, "
        "a config.json of Hugging Face, or a number of elements: 124e6, 7B",
    )
    add("--world-size", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of ranks")
    add("--replicas", type=int, default=1, metavar="R", help="copies of ShardedRAdam's state: rows of its mesh")
    add("--dtype", choices=sorted(DTYPES), help="of all parameters, instead of the model's own")
    add("--device", choices=["cpu", "cuda"], default="cuda", help="fused on cpu, foreach on cuda; default: cuda")
    add("--bucket-cap-mb", type=float, metavar="MIB", help="default: 25 on cpu; 4 a rank on cuda, but from 64 to 256")
    add("--transport", choices=TRANSPORTS, help="default: shared_memory for cpu, native for cuda")
    add("--memory-bandwidth", type=float, metavar="GB/S", help="of a device's memory; with --network-bandwidth: times")
    add("--network-bandwidth", type=float, metavar="GB/S", help="of what one rank receives from the others")
    add("--measured", type=Path, metavar="FILE", help="both, from the output of sharded-radam doctor --json")
    add(
        "--simulate",
        type=int,
        metavar="N",
        help="build the real optimizer as some of N ranks and compare; at most 4096",
    )
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_plan)


def _plan(options: Any) -> int:
    if min(options.world_size) < 1:
        raise ValueError(f"--world-size {min(options.world_size)}: expected at least 1")
    for world_size in (*options.world_size, *([options.simulate] if options.simulate else ())):
        if options.replicas < 1 or world_size % options.replicas:
            raise ValueError(f"--replicas {options.replicas}: expected at least 1, and a divisor of {world_size} ranks")
    if options.bucket_cap_mb is not None and not options.bucket_cap_mb > 0:
        raise ValueError(f"--bucket-cap-mb {options.bucket_cap_mb}: expected a size in MiB above 0")
    params = read_model(options.model, DTYPES.get(options.dtype), options.device)
    transport = options.transport or ("shared_memory" if options.device == "cpu" else "native")
    bandwidth = _bandwidth(options)
    sizes, replicas = options.world_size, options.replicas
    layouts = [layout(params, world_size, options.bucket_cap_mb, replicas) for world_size in sizes]
    rows = [
        estimates(
            params,
            world_size,
            bucket_cap_mb=options.bucket_cap_mb,
            transport=transport,
            device=options.device,
            bandwidth=bandwidth,
            replicas=replicas,
        )
        for world_size in sizes
    ]
    checks = simulate(params, options.simulate, options.bucket_cap_mb, replicas) if options.simulate else []
    lines = [_title(params)]
    for found, estimated in zip(layouts, rows, strict=True):
        lines += ["", *_table(found, estimated, transport)]
    if checks:
        lines += ["", *_checks(checks, options.simulate)]
    print_result(options, _result(options, params, layouts, rows, checks), "\n".join(lines))
    return 0 if all(check.agrees for check in checks) else 1


def _bandwidth(options: Any) -> Bandwidth | None:
    memory, network = options.memory_bandwidth, options.network_bandwidth
    if options.measured is not None:
        try:
            measured = json.loads(options.measured.read_text())["bandwidth"]
            memory = memory or measured["update"] / 1e9
            network = network or (measured["all_gather"] or measured["memcpy"]) / 1e9
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{options.measured} is not the output of sharded-radam doctor --json") from error
    if memory is None and network is None:
        return None
    if not (memory and network and memory > 0 and network > 0):
        raise ValueError("times need both --memory-bandwidth and --network-bandwidth, in GB/s above 0")
    return Bandwidth(memory * 1e9, network * 1e9)


def _title(params: Sequence[ParamSpec]) -> str:
    numel = sum(param.numel for param in params)
    dtypes = sorted({str(param.dtype).removeprefix("torch.") for param in params})
    size = sum(param.numel * param.dtype.itemsize for param in params)
    return f"{numel:,} elements in {len(params)} parameters, {', '.join(dtypes)}: {mib(size)} MiB"


def _table(found: Layout, rows: Sequence[Estimate], transport: str) -> list[str]:
    mesh = f" as {found.replicas} x {found.world_size // found.replicas}" if found.replicas > 1 else ""
    ranks = f"{found.world_size} rank{'s' if found.world_size > 1 else ''}{mesh}, MiB per rank"
    head = [ranks, "parameters", "gradients", "moments", "masters", "buckets", "peak", "received a step"]
    timed = rows[0].milliseconds is not None
    cells = [[*head, *(["ms a step"] if timed else [])]]
    for row in rows:
        memory = row.memory
        parts = (memory.parameters, memory.gradients, memory.moments, memory.masters, memory.buckets, memory.peak)
        cells.append([row.optimizer, *map(mib, (*parts, row.gradients_received + row.parameters_received))])
        if timed:
            cells[-1].append(f"{row.milliseconds:,.1f}")
    padding = 100 * found.padding_numel / max(found.numel + found.padding_numel, 1)
    received = "; ".join(
        f"by {name} {mib(gradients)} of gradients, {mib(parameters)} of parameters"
        for name, (gradients, parameters) in found.received.items()
    )
    lines = [
        f"ShardedRAdam: {found.num_buckets} buckets, {padding:.3f} % padding, transport {transport}; at most",
        f"{mib(found.construction)} MiB at construction, {mib(found.consolidation)} on the rank that consolidates;",
        f"checkpoint of {mib(found.checkpoint_optimizer_bytes)} MiB of optimizer (of rank 0 {found.chunks} chunks),",
        f"{mib(found.checkpoint_model_bytes)} of model",
    ]
    return [
        *table(cells),
        " ".join(lines),
        *([f"received with shard_gradients, gradients + parameters: {received}"] if found.world_size > 1 else []),
    ]


def _checks(checks: Sequence[Check], world_size: int) -> list[str]:
    wrong = [check for check in checks if not check.agrees]
    ranks = sorted({check.rank for check in checks})
    title = f"simulated {world_size} ranks, as ranks {ranks}: {len(checks) - len(wrong)} of {len(checks)} figures agree"
    return [title, *(f"  rank {c.rank}, {c.what}: planned {c.planned}, built {c.built}" for c in wrong)]


def _result(
    options: Any,
    params: Sequence[ParamSpec],
    layouts: Sequence[Layout],
    rows: Sequence[Sequence[Estimate]],
    checks: Sequence[Check],
) -> dict[str, Any]:
    return {
        "model": options.model,
        "numel": sum(param.numel for param in params),
        "num_params": len(params),
        "world_sizes": [
            {
                "layout": dataclasses.asdict(found),
                "optimizers": [
                    {
                        **dataclasses.asdict(row),
                        "steady_bytes": row.memory.steady,
                        "peak_bytes": row.memory.peak,
                    }
                    for row in estimated
                ],
            }
            for found, estimated in zip(layouts, rows, strict=True)
        ],
        "simulated": [{**dataclasses.asdict(check), "agrees": check.agrees} for check in checks],
    }
