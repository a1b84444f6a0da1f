"""Plots and Markdown tables of what the benchmarks wrote to scripts/results.

    python scripts/plot.py   # scripts/results/{step,train,memory,checkpoint}.png; tables of scripts/README.md on stdout

A plot has one panel for each number of ranks and kind of figure, and the command that made it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

RESULTS = Path(__file__).parent / "results"

Panel = tuple[str, dict[str, float]]
"""A title, and a figure for each bar."""


def step_panels(result: dict[str, Any]) -> Iterator[Panel]:
    titles = {"gpt2": "GPT-2 124M", "small": "500 tensors, 8.1M", "bf16": "20M in bf16"}
    for shapes, what in ((shapes, what) for shapes, what in titles.items() if shapes in result["step"]):
        for key, title in (("step", "optimizer step"), ("sync_and_step", "gradient synchronisation + step")):
            rows = result[key][shapes]
            yield f"{title}, {what}, ms", {name: row["median_ms"] for name, row in rows.items()}


def train_panels(result: dict[str, Any]) -> Iterator[Panel]:
    size = f"{result['elements'] / 1e6:.1f}M parameters"
    yield f"whole iteration, {size}, ms", {name: row["median_ms"] for name, row in result["iteration"].items()}


def memory_panels(result: dict[str, Any]) -> Iterator[Panel]:
    rows = result["memory"]["gpt2"]["peers"]
    for key, title in (
        ("state_bytes", "optimizer state of a rank"),
        ("all_pss", "all a rank has between two steps"),
        ("planned_bytes", "the same by sharded-radam plan"),
    ):
        yield f"{title}, GPT-2 124M, MiB", {name: row[key] / 2**20 for name, row in rows.items()}


def checkpoint_panels(result: dict[str, Any]) -> Iterator[Panel]:
    for key in ("save", "load, not cached"):
        figures = {name: sorted(times[key])[len(times[key]) // 2] for name, times in result["seconds"].items()}
        yield f"{key}, GPT-2 124M, s", figures


PANELS = {"step": step_panels, "train": train_panels, "memory": memory_panels, "checkpoint": checkpoint_panels}


def read(kind: str, folder: Path) -> dict[int, dict[str, Any]]:
    """The results of a benchmark, by number of ranks."""
    found = {}
    for path in folder.glob(f"{kind}_*_ranks.json"):
        match = re.fullmatch(rf"{kind}_(\d+)_ranks", path.stem)
        assert match
        found[int(match[1])] = json.loads(path.read_text())
    return dict(sorted(found.items()))


def plot(kind: str, results: dict[int, dict[str, Any]], folder: Path) -> None:
    columns = [(f"{ranks} rank{'s' * (ranks > 1)}", list(PANELS[kind](result))) for ranks, result in results.items()]
    rows = max(len(panels) for _, panels in columns)
    figure, axes = plt.subplots(
        rows, len(columns), figsize=(7 * len(columns), 0.6 + 3.4 * rows), squeeze=False, layout="constrained"
    )
    for column, (ranks, panels) in enumerate(columns):
        for row, (title, bars) in enumerate(panels):
            axis = axes[row][column]
            colours = ["C0" if "sharded_radam" in name else "C1" for name in bars]
            drawn = axis.barh(list(bars), list(bars.values()), color=colours)
            axis.bar_label(drawn, fmt="%.4g", padding=3)
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.set_title(f"{ranks}: {title}", fontsize=10)
    machine = list(results.values())[-1]["machine"]
    command = machine.get("command", f"scripts/bench_{kind}.py")
    text = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}\n{command}"
    figure.supxlabel(text, fontsize=8)
    figure.savefig(folder / f"{kind}.png", dpi=110)
    plt.close(figure)


def table(kind: str, results: dict[int, dict[str, Any]]) -> str:
    """Markdown: a row for each bar, a column for each number of ranks; in brackets the ratio to the first row."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for ranks, result in reversed(results.items()):  # with more ranks there are more rows
        for title, bars in PANELS[kind](result):
            for name, value in bars.items():
                found.setdefault(title, {}).setdefault(name, {})[ranks] = value
    lines = []
    for title, rows in found.items():
        first = next(iter(rows.values()))
        lines += [f"| {title} |" + "".join(f" {r} rank{'s' * (r > 1)} |" for r in results)]
        lines += ["|---" * (len(results) + 1) + "|"]
        for name, values in rows.items():
            cells = [
                f"{digits(values[r])} ({values[r] / first[r]:.2f} x)" if r in values and r in first else ""
                for r in results
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    for kind in PANELS:
        results = read(kind, RESULTS)
        plot(kind, results, RESULTS)
        if kind in ("step", "train", "memory"):
            print(table(kind, results))


if __name__ == "__main__":
    main()
