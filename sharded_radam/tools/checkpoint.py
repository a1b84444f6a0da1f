"""``sharded-radam checkpoint list|inspect|verify|consolidate|export|import|diff``."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sharded_radam.checkpoint.retention as retention
from sharded_radam.checkpoint.convert.consolidate import consolidate
from sharded_radam.checkpoint.convert.export_model import export_model
from sharded_radam.checkpoint.convert.import_file import import_file
from sharded_radam.checkpoint.convert.inspection import differences, summary
from sharded_radam.checkpoint.format.directory import step_path
from sharded_radam.checkpoint.format.index import Index, read_index
from sharded_radam.checkpoint.format.verification import verify
from sharded_radam.tools.output import print_result


def add_to(topics: Any) -> None:
    """Add the topic to the parser of the command line."""
    commands = topics.add_parser("checkpoint", help="look at and convert checkpoint directories").add_subparsers(
        required=True, metavar="COMMAND"
    )

    def command(name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    for name, run, text in (
        ("list", _list, "show the checkpoints of a folder: which is the latest, the best, protected, abandoned"),
        ("inspect", _inspect, "show what a checkpoint has: names, shapes, dtypes, bytes, step, world size"),
        ("verify", _verify, "read all of a checkpoint; check its checksums, and that nothing is missing"),
    ):
        command(name, run, text).add_argument("path", type=Path)
    made = command("consolidate", _consolidate, "write the optimizer as one file for torch.optim.RAdam")
    made.add_argument("path", type=Path)
    made.add_argument("output", type=Path, help="file to write, for torch.load and load_state_dict")
    made.add_argument("--prefix", help="key of the optimizer, where a checkpoint has several")
    made = command("export", _export, "write the model's weights as one file: .safetensors, or as torch.save does")
    made.add_argument("--fp32", action="store_true", help="in fp32, from the masters of half-precision training")
    made.add_argument("path", type=Path)
    made.add_argument("output", type=Path, help="file to write, for load_state_dict")
    made = command("import", _import, "make a checkpoint of a file with a RAdam or ZeroRedundancyOptimizer state")
    made.add_argument("source", type=Path, help="file that torch.save made")
    made.add_argument("output", type=Path, help="directory to make")
    made.add_argument("--names", type=Path, help="text file with the parameters' names, one a line, in their order")
    made = command("diff", _diff, "compare two checkpoints, bit by bit")
    made.add_argument("path", type=Path)
    made.add_argument("other", type=Path)


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda num_bytes: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, disable=True if quiet else None) as bar:
        yield bar.update


def _open(path: Path) -> Index:
    index = read_index(path)
    index.check_files()
    return index


def _num_bytes(*indices: Index) -> int:
    return sum(summary(index)["bytes"] for index in indices)


def _list(options: Any) -> int:
    records = retention.read_records(options.path)
    if not records:
        raise ValueError(f"{options.path} has no checkpoint: expected directories step_<number> in it")
    found = [_row(options.path, record, records) for record in records]
    lines = ["      step  saved (UTC)          ranks          MB   continues         value"]
    for row in found:
        saved, ranks, continues, value = (
            "" if row[key] is None else row[key] for key in ("saved", "world_size", "continues", "value")
        )
        line = f"{row['step']:10}  {saved:19}  {ranks:>5}  {row['bytes'] / 1e6:10.1f}  {continues:>10}  {value:>12}"
        lines.append(f"{line}  {', '.join(row['marks'])}".rstrip())
    print_result(options, {"checkpoints": found}, "\n".join(lines))
    return 0


def _row(folder: Path, record: retention.Record, records: list[retention.Record]) -> dict[str, Any]:
    last = retention.newest(records)
    mode = next((r.mode for r in sorted(records, key=lambda r: -r.written) if r.mode in retention.MODES), "min")
    marks = {
        "latest": record.step == retention.latest(records),
        "best": record.step == retention.best(records, mode or "min"),
        "protected": record.is_protected,
        "abandoned": last is not None and not retention.is_on(record, last.branch),
        "damaged": not record.is_readable,
    }
    saved = None
    with contextlib.suppress(TypeError, ValueError, OverflowError, OSError):  # there is none, or it is no time
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.time or math.nan))
    return {
        "step": record.step,
        "saved": saved,
        "world_size": record.world_size,
        "bytes": sum(file.stat().st_size for file in step_path(folder, record.step).iterdir()),
        "continues": record.continues,
        "value": None if record.value is None else retention.number_of(record.value),
        "marks": [mark for mark, is_so in marks.items() if is_so],
    }


def _inspect(options: Any) -> int:
    found = summary(read_index(options.path))
    saved_at = f"world size {found['world_size']}" if found["world_size"] else "torch.distributed.checkpoint"
    checksums = "with checksums" if found["checksums"] else "without checksums"
    size = f"{found['bytes'] / 1e6:.1f} MB in {found['files']} files"
    lines = [f"{found['path']}: step {found['step']}, saved at {saved_at}, torch {found['torch']}, {size}, {checksums}"]
    width = max((len(tensor["name"]) for tensor in found["tensors"]), default=4)
    lines.append(f"{'name':{width}}  {'dtype':10} {'bytes':>14} {'chunks':>6}  shape")
    lines += [
        f"{t['name']:{width}}  {t['dtype']:10} {t['bytes']:14} {t['chunks']:6}  {tuple(t['shape'])}"
        for t in found["tensors"]
    ]
    lines += [f"{name:{width}}  value" for name in found["values"]]
    print_result(options, found, "\n".join(lines))
    return 0


def _verify(options: Any) -> int:
    index = _open(options.path)
    num_bytes = _num_bytes(index)
    with _progress(num_bytes, options.json) as progress:
        verify(index, progress)
    result = {"path": str(options.path), "bytes": num_bytes, "checksums": index.manifest is not None, "ok": True}
    how = "all checksums are right" if index.manifest else "it has no checksums, and all of it can be read"
    print_result(options, result, f"{options.path}: {num_bytes / 1e6:.1f} MB, complete; {how}")
    return 0


def _consolidate(options: Any) -> int:
    index = _open(options.path)
    with _progress(_num_bytes(index), options.json) as progress:
        result = consolidate(index, options.output, options.prefix, progress)
    text = f"{options.output}: {result['parameters']} parameters, {result['bytes'] / 1e6:.1f} MB"
    print_result(options, {"path": str(options.output), **result}, text)
    return 0


def _export(options: Any) -> int:
    index = _open(options.path)
    with _progress(_num_bytes(index), options.json) as progress:
        result = export_model(index, options.output, options.fp32, progress)
    masters = f", {result['from_masters']} from fp32 masters" if options.fp32 else ""
    text = f"{options.output}: {result['tensors']} tensors{masters}, {result['bytes'] / 1e6:.1f} MB"
    print_result(options, {"path": str(options.output), **result}, text)
    return 0


def _import(options: Any) -> int:
    names = options.names.read_text().split() if options.names else None
    report = import_file(options.source, options.output, names)
    result = {"path": str(options.output), "bytes": report.num_bytes}
    print_result(options, result, f"{options.output}: {report.num_bytes / 1e6:.1f} MB")
    return 0


def _diff(options: Any) -> int:
    one, other = _open(options.path), _open(options.other)
    with _progress(_num_bytes(one, other), options.json) as progress:
        lines = differences(one, other, progress)
    print_result(options, {"differences": lines}, "\n".join(lines) or "no difference")
    return 1 if lines else 0
