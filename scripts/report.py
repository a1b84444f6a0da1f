"""One HTML page with plots of one or several runs, from what launch/train.py --metrics wrote.

    python scripts/report.py runs/a.jsonl runs/b.jsonl --output report.html

Loss, throughput, time of the optimizer by phase, memory of each rank, learning rate and norm of the gradient. A run
that was started again, at whatever number of ranks, is one run: of a step that was computed twice the last one counts,
and dotted lines say where it was resumed. The page needs nothing else: plots are SVG in it, without scripts.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "axes.spines.top": False})
mpl.rcParams.update({"axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False})

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin: 0 0 .3rem; }
table { border-collapse: collapse; margin: 1rem 0 2rem; }
.table { overflow-x: auto; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 32rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; min-width: 0; } svg { width: 100%; height: auto; }
"""


@dataclass
class Run:
    """What one file says; the last record of each step."""

    name: str
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    validations: dict[int, dict[str, Any]] = field(default_factory=dict)
    starts: list[tuple[int, int]] = field(default_factory=list)
    """(step, number of ranks) of each start."""
    summary: dict[str, Any] = field(default_factory=dict)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """A figure of all steps that have it."""
        found = {step: record[key] for step, record in sorted(self.steps.items()) if record.get(key) is not None}
        return list(found), list(found.values())

    def median(self, key: str) -> float:
        values = self.series(key)[1]
        return statistics.median(values) if values else float("nan")


def read_run(path: Path) -> Run:
    """Read a file of JSON lines; the last line may be torn, if the run was killed while it wrote.

    Raises:
        SystemExit: it is not such a file, or has no steps.
    """
    run, lines = Run(path.stem), path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise SystemExit(f"{path}, line {number}: expected a JSON record with a step, as --metrics has") from error
        if "loss" in record:
            run.steps[step] = record
        elif "validation_loss" in record:
            run.validations[step] = record
        elif "started_ranks" in record:
            run.starts.append((step, record["started_ranks"]))
        else:
            run.summary |= record
    if not run.steps:
        raise SystemExit(f"{path} has no steps: expected what launch/train.py --metrics wrote")
    return run


# Plots


def figure(title: str, draw: Callable[[Axes, Sequence[Run]], None], runs: Sequence[Run]) -> str:
    """A heading and an SVG."""
    fig, ax = plt.subplots(figsize=(6.2, 3.6), layout="constrained")
    draw(ax, runs)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        fig.legend(loc="outside lower center", ncols=3, fontsize=8)
    alt = f"{title}: {', '.join(run.name for run in runs)}"
    content = io.StringIO()
    fig.savefig(content, format="svg", metadata={"Date": None})
    plt.close(fig)
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{html.escape(alt)}"', 1)
    return f"<figure><h2>{html.escape(title)}</h2>{svg}</figure>"


def mark_starts(ax: Axes, runs: Sequence[Run]) -> None:
    """Dotted lines where a run was resumed."""
    for run in runs:
        for step, ranks in run.starts[1:]:
            ax.axvline(step, color="0.5", linestyle=":", linewidth=1)
            place = ax.get_xaxis_transform()
            ax.text(step, 1.0, f" {ranks} ranks", transform=place, fontsize=7, color="0.4", va="bottom")


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of the ``width`` values up to each."""
    return [statistics.fmean(values[max(0, at + 1 - width) : at + 1]) for at in range(len(values))]


def draw_loss(ax: Axes, runs: Sequence[Run]) -> None:
    for index, run in enumerate(runs):
        color, (steps, values) = f"C{index}", run.series("loss")
        width = max(1, len(values) // 50)
        ax.plot(steps, values, color=color, alpha=0.25 if width > 1 else 1, linewidth=0.8)
        ax.plot(steps, running_mean(values, width), color=color, label=f"{run.name}, training")
        validated = sorted(run.validations)
        losses = [run.validations[step]["validation_loss"] for step in validated]
        ax.plot(validated, losses, "o--", color=color, markersize=4, linewidth=0.8, label=f"{run.name}, validation")
    ax.set(xlabel="step", ylabel="nats per byte")
    mark_starts(ax, runs)


def draw_lines(key: str, unit: str) -> Callable[[Axes, Sequence[Run]], None]:
    """A figure of each step, a line a run."""

    def draw(ax: Axes, runs: Sequence[Run]) -> None:
        for index, run in enumerate(runs):
            ax.plot(*run.series(key), color=f"C{index}", linewidth=0.9, label=run.name)
        ax.set(xlabel="step", ylabel=unit, ylim=(0, None))
        mark_starts(ax, runs)

    return draw


def phases(run: Run) -> dict[str, list[float]]:
    """Milliseconds of each phase in all steps, and what ``step()`` takes beside those within it."""
    names = sorted({name for record in run.steps.values() for name in record.get("phases_ms", {})})
    records = [record for _, record in sorted(run.steps.items())]
    found = {name: [record.get("phases_ms", {}).get(name, 0.0) for record in records] for name in names}
    inside = [name for name in names if name != "reduce_scatter"]  # which runs in backward
    found["other"] = [
        max(0.0, record["optimizer_ms"] - sum(found[name][at] for name in inside)) for at, record in enumerate(records)
    ]
    return found


def draw_phases(ax: Axes, runs: Sequence[Run]) -> None:
    """Medians, a bar a run."""
    names = list(dict.fromkeys(name for run in runs for name in phases(run)))
    bottoms = [0.0] * len(runs)
    for name in names:
        medians = [statistics.median(phases(run).get(name, [0.0])) for run in runs]
        ax.barh([run.name for run in runs], medians, left=bottoms, label=name.replace("_", "-"))
        bottoms = [bottom + value for bottom, value in zip(bottoms, medians, strict=True)]
    ax.invert_yaxis()
    ax.set(xlabel="ms a step on rank 0, medians")
    ax.margins(x=0.02)


def draw_phases_over_time(run: Run) -> Callable[[Axes, Sequence[Run]], None]:
    def draw(ax: Axes, runs: Sequence[Run]) -> None:
        found, width = phases(run), max(1, len(run.steps) // 50)
        smooth = [running_mean(values, width) for values in found.values()]
        ax.stackplot(sorted(run.steps), smooth, labels=[name.replace("_", "-") for name in found], alpha=0.8)
        ax.set(xlabel="step", ylabel="ms on rank 0", ylim=(0, None))
        mark_starts(ax, [run])

    return draw


def draw_memory(ax: Axes, runs: Sequence[Run]) -> None:
    """The most that each rank has had."""
    for index, run in enumerate(runs):
        ranks = sorted({int(r) for of in run.validations.values() for r in of.get("memory_bytes", {})})
        for rank in ranks:
            points = {
                step: of["memory_bytes"][str(rank)] / 2**20
                for step, of in sorted(run.validations.items())
                if str(rank) in of.get("memory_bytes", {})
            }
            style = ("-", "--", "-.", ":")[index % 4]
            ax.plot(list(points), list(points.values()), f"o{style}", markersize=3, label=f"{run.name}, rank {rank}")
    ax.set(xlabel="step", ylabel="MiB, the most so far", ylim=(0, None))
    mark_starts(ax, runs)


# The page


def cells(run: Run) -> list[str]:
    """A row of the table at the top."""
    state, replicated = run.summary.get("state_bytes"), run.summary.get("replicated_bytes")
    last = run.validations[max(run.validations)] if run.validations else {}
    memory = [int(size) for size in last.get("memory_bytes", {}).values()]
    return [
        run.name,
        str(run.summary.get("optimizer", "")),
        ", ".join(str(ranks) for _, ranks in run.starts),
        str(max(run.steps)),
        f"{run.series('loss')[1][-1]:.4f}",
        f"{last['validation_loss']:.4f}" if last else "",
        f"{run.median('tokens_per_s'):,.0f}",
        f"{run.median('optimizer_ms'):.2f}",
        f"{max(memory) / 2**20:,.0f}" if memory else "",
        f"{state / 2**20:,.2f} of {replicated / 2**20:,.2f}" if state and replicated else "",
    ]


HEAD = (
    *("run", "optimizer", "ranks", "steps", "last loss", "validation", "tokens/s", "optimizer, ms"),
    *("memory of a rank, MiB", "state of a rank, MiB"),
)


def page(runs: Sequence[Run]) -> str:
    """The HTML."""
    names = ", ".join(run.name for run in runs)
    plots: list[tuple[str, Callable[[Axes, Sequence[Run]], None]]] = [
        ("Loss", draw_loss),
        ("Throughput", draw_lines("tokens_per_s", "tokens per second")),
        ("Time of the optimizer by phase", draw_phases if len(runs) > 1 else draw_phases_over_time(runs[0])),
        ("Memory of each rank", draw_memory),
        ("Learning rate", draw_lines("lr", "learning rate")),
        ("Norm of the gradient", draw_lines("grad_norm", "norm before clipping")),
    ]
    figures = [figure(title, draw, runs) for title, draw in plots]
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in cells(run)) for run in runs]
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in HEAD)
    return (
        f"<!doctype html>\n<html lang='en'>\n<meta charset='utf-8'>\n<title>{html.escape(names)}</title>\n"
        "<meta name='viewport' content='width=device-width'>\n<link rel='icon' href='data:,'>\n"
        f"<style>{STYLE}</style>\n<h1>{html.escape(names)}</h1>\n"
        f"<div class='table'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{row}</tr>' for row in rows)}</tbody></table></div>\n"
        f"<main>{''.join(figures)}</main>\n</html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=Path, nargs="+", help="files that launch/train.py --metrics wrote")
    parser.add_argument("--output", type=Path, help="default: the first file, with .html")
    options = parser.parse_args()
    output = options.output or options.metrics[0].with_suffix(".html")
    output.write_text(page([read_run(path) for path in options.metrics]))
    print(output)


if __name__ == "__main__":
    main()
