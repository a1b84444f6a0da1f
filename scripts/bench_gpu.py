"""One optimizer step of one rank: milliseconds, and what of the speed of a copy they are, ours beside other optimizers.

    python scripts/bench_gpu.py --json out.json          # of the GPU; scripts/test_gpu.sh calls it
    python scripts/bench_gpu.py --table out.json         # prints the tables once more

A row's bytes an element are those that its operations read and write, counted by torch's dispatcher, which sees each of
them. Where one kernel does all that the dispatcher does not see, the figure is the least that it must move: 28 (p, m, v
read and written, g read, in fp32; or bf16 g read and p written, fp32 master, m, v read and written), and 30 where the
bf16 parameter is read, too, as ours is, to notice what others have written to it. GB/s are these bytes in that time.
A copy reads and writes each byte once.

Rows are built one after the other, ``--passes`` times, each time in the opposite order. On a GPU ten steps are launched
before it is waited for, as in training; figures are of one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import bench_step
import peers
import torch
import torch.distributed as dist
import traffic
from torch import Tensor
from torch.nn import Parameter

from sharded_radam import ShardedRAdam

COPY = "a copy"
LR = peers.LR
WARM_UPS = 3
"""Steps before a graph is captured, as torch wants them."""

SIZES = {"gpt2": "GPT-2 124M", "small": "500 tensors, 8.1M", "tiny": "24 tensors", "one": "one tensor, 50M"}

Step = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        name: of the row.
        build: makes it for parameters that have gradients, and returns its step.
        bytes_per_element: that a step moves; None if they can be counted.
        in_graph: whether its step is captured, and replayed.
        package: that must be installed.
    """

    name: str
    build: Callable[[list[Parameter]], Step]
    bytes_per_element: float | None = None
    in_graph: bool = False
    package: str = "torch"


def ours(**flags: Any) -> Callable[[list[Parameter]], Step]:
    return lambda params: ShardedRAdam(params, lr=LR, **flags).step


def our_rows(dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    one_pass = 28 if dtype == torch.float32 else 30
    name = "sharded_radam"
    yield Row(f"{name}, foreach", ours(foreach=True))
    yield Row(f"{name}, fused", ours(fused=True))
    yield Row(f"{name}, compiled", ours(compiled=True), one_pass)
    if device.type == "cuda":
        yield Row(f"{name}, capturable", ours(capturable=True))
        yield Row(f"{name}, capturable, in a graph", ours(capturable=True), in_graph=True)
        yield Row(f"{name}, capturable, fused, in a graph", ours(capturable=True, fused=True), in_graph=True)
        compiled = ours(capturable=True, compiled=True)
        yield Row(f"{name}, capturable, compiled, in a graph", compiled, one_pass, in_graph=True)


class ByHand:
    """An optimizer of fp32 masters, as one writes it without help: gradients are widened, masters rounded."""

    def __init__(self, build: Callable[[list[Parameter]], torch.optim.Optimizer], params: list[Parameter]) -> None:
        self.params: list[Tensor] = [param.detach() for param in params]
        self.grads = [param.grad for param in params if param.grad is not None]
        masters = [Parameter(param.float()) for param in self.params]
        self.masters: list[Tensor] = [master.detach() for master in masters]
        self.wide_grads = [torch.empty_like(master) for master in self.masters]
        for master, grad in zip(masters, self.wide_grads, strict=True):
            master.grad = grad
        self.optimizer = build(masters)

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_copy_(self.wide_grads, self.grads)
        self.optimizer.step()
        torch._foreach_copy_(self.params, self.masters)


def module(name: str) -> Any:
    return importlib.import_module(name)


def radam(**flags: Any) -> Callable[[list[Parameter]], torch.optim.Optimizer]:
    return lambda params: torch.optim.RAdam(params, lr=LR, **flags)


def adam(params: list[Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=LR, fused=True)


def other_rows(dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """The last of them are Adam: it has one multiplication less, and moves the same bytes."""
    if dtype == torch.float32:
        yield Row("torch RAdam, foreach", lambda params: radam(foreach=True)(params).step)
        yield Row("torch RAdam, for-loop", lambda params: radam(foreach=False)(params).step)
        if device.type == "cuda":
            graphed = radam(foreach=True, capturable=True)
            yield Row("torch RAdam, capturable, in a graph", lambda params: graphed(params).step, in_graph=True)
        yield Row("torch Adam, fused", lambda params: adam(params).step)
    else:
        by_hand = ", masters by hand"
        yield Row(f"torch RAdam, foreach{by_hand}", lambda params: ByHand(radam(foreach=True), params).step)
        yield Row(f"torch RAdam, for-loop{by_hand}", lambda params: ByHand(radam(foreach=False), params).step)
        yield Row(f"torch Adam, fused{by_hand}", lambda params: ByHand(adam, params).step)
    if device.type == "cuda":
        masters: dict[str, Any] = {} if dtype == torch.float32 else {"capturable": True, "master_weights": True}

        def apex(params: list[Parameter]) -> Step:
            step: Step = module("apex.optimizers").FusedAdam(params, lr=LR, adam_w_mode=False, **masters).step
            return step

        def bitsandbytes(bits: int, params: list[Parameter]) -> Step:
            step: Step = module("bitsandbytes").optim.Adam(params, lr=LR, optim_bits=bits).step
            return step

        wide, without = (28, "") if dtype == torch.float32 else (22, ", no masters")
        yield Row("Apex FusedAdam", apex, 28, package="amp_C")
        yield Row(f"bitsandbytes Adam, 32 bit{without}", partial(bitsandbytes, 32), wide, package="bitsandbytes")
        yield Row(f"bitsandbytes Adam, 8 bit{without}", partial(bitsandbytes, 8), wide - 12, package="bitsandbytes")


def captured(step: Step) -> Step:
    """The replay of a step."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL has a thread that looks at events
        step()

    def replay(_owner: Step = step) -> None:  # whose memory the graph uses
        graph.replay()

    return replay


class Cases:
    """Rows to be built and timed.

    Args:
        shapes: of the parameters.
        dtype: of them.
        device: of them.
    """

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.repeats = 10 if device.type == "cuda" else 1
        self.numel = sum(torch.Size(shape).numel() for shape in shapes)
        self.grads: list[Tensor] = peers.make_grads(shapes, device, dtype)
        self.bytes_per_element: dict[str, float] = {}
        self.missing: dict[str, str] = {}

    def step(self, row: Row) -> Step:
        return row.build(peers.make_params(self.shapes, self.device, self.grads, self.dtype))

    def build(self, row: Row) -> Step:
        step = captured(self.step(row)) if row.in_graph else self.step(row)

        def round_of_steps() -> None:
            for _ in range(self.repeats):
                step()

        return round_of_steps

    def try_out(self, row: Row) -> bool:
        """Whether it can run here; counts its bytes, in a step after the switch of rho."""
        try:
            if importlib.util.find_spec(row.package) is None:
                raise ImportError(f"{row.package} is not installed")
            step = self.step(row)
            for _ in range(7):
                step()
            counted = row.bytes_per_element
            self.bytes_per_element[row.name] = counted or round(traffic.bytes_of(step) / self.numel, 1)
            if row.in_graph:
                captured(step)()
        except Exception as error:  # of any package, and the other rows are worth having
            self.missing[row.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return False
        return True

    def copy(self) -> Step:
        source, target = (torch.ones(self.numel, device=self.device) for _ in range(2))

        def round_of_copies() -> None:
            for _ in range(self.repeats):
                target.copy_(source)

        return round_of_copies

    def measure(self, rounds: int, warmup: int, passes: int, only: str = "") -> dict[str, dict[str, float]]:
        """Figures by row, for those with ``only`` in their name; that of a copy last."""
        rows = [*our_rows(self.dtype, self.device), *other_rows(self.dtype, self.device)]
        cases = {row.name: partial(self.build, row) for row in rows if only in row.name and self.try_out(row)}
        times = bench_step.measure({**cases, COPY: self.copy}, rounds, warmup, passes, self.device)
        one = {name: [each / self.repeats for each in values] for name, values in times.items()}
        found: dict[str, dict[str, float]] = peers.summarise(one, COPY)
        for name, row in found.items():
            del row["times_ours"]
            row["bytes_per_element"] = self.bytes_per_element.get(name, 8)
            row["gb_per_s"] = row["bytes_per_element"] * self.numel / row["median_ms"] / 1e6
        for row in found.values():
            row["of_a_copy"] = row["gb_per_s"] / found[COPY]["gb_per_s"]
        return found


def tests_of(report: Path) -> dict[str, Any]:
    """How many tests of a report of pytest's ``--junit-xml`` passed and failed, and by reason how many were skipped."""
    cases = [*ET.parse(report).getroot().iter("testcase")]
    skipped = Counter(each.get("message", "") for case in cases for each in case.iter("skipped"))
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    return {"passed": len(cases) - failed - skipped.total(), "failed": failed, "skipped": dict(skipped)}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = []
    for title, rows in result["rows"].items():
        lines += [f"| optimizer step, {title} | ms | bytes an element | GB/s | of a copy |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            figures = (f"{row['median_ms']:.3g}", f"{row['bytes_per_element']:g}", f"{row['gb_per_s']:.3g}")
            lines.append(f"| {name} | {' | '.join(figures)} | {row['of_a_copy']:.0%} |")
        lines.append("")
    return "\n".join(lines)


def machine_of(device: torch.device, is_called_by: str | None) -> dict[str, Any]:
    found = peers.describe_machine()
    if device.type == "cuda":
        nccl: Any = torch.cuda.nccl
        return found | {"command": is_called_by, "cuda": torch.version.cuda, "nccl": ".".join(map(str, nccl.version()))}
    return found | {"command": is_called_by, "device": "cpu"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SIZES), help="gpt2 and small on a GPU, else small")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--rounds", type=int, default=5, help="of each pass")
    parser.add_argument("--warmup", type=int, default=2, help="rounds of each pass that are not counted")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--tests", type=Path, help="a report of pytest --junit-xml, whose counts are written, too")
    parser.add_argument("--command", default=" ".join(sys.argv), help="that the file names")
    parser.add_argument("--table", type=Path, help="print the tables of this file; measures nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    device = peers.start(arguments.device)
    if device.type != arguments.device:
        parser.error(f"torch {torch.__version__} finds no GPU; --device cpu measures the CPU")
    result: dict[str, Any] = {"machine": machine_of(device, arguments.command), "tests": {}, "rows": {}, "missing": {}}
    if arguments.tests and arguments.tests.exists():
        result["tests"] = tests_of(arguments.tests)
    shapes = arguments.shapes or (["gpt2", "small"] if device.type == "cuda" else ["small"])
    for name, dtype in ((name, dtype) for name in shapes for dtype in (torch.float32, torch.bfloat16)):
        cases = Cases(peers.SHAPES[name](), dtype, device)
        title = f"{SIZES[name]}, {'fp32' if dtype == torch.float32 else 'bf16 with fp32 masters'}"
        counts = (arguments.rounds, arguments.warmup, arguments.passes)
        result["rows"][title] = cases.measure(*counts, arguments.only)
        result["missing"] |= cases.missing
    print(table(result))
    for name, reason in result["missing"].items():
        print(f"without {name}: {reason}")
    if tests := result["tests"]:
        print(f"\ntests: {tests['passed']} passed, {tests['failed']} failed, {sum(tests['skipped'].values())} skipped")
        for reason, count in tests["skipped"].items():
            print(f"  {count} skipped: {reason}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    dist.destroy_process_group()
    return int(any(name.startswith("sharded_radam") for name in result["missing"]))


if __name__ == "__main__":
    sys.exit(main())
