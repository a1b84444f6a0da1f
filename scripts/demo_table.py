"""The table of scripts/demo.sh; exits with 1 if the loss does not continue where it was saved."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """What the table says of one file of metrics."""

    ranks: int
    state_bytes: int
    replicated_bytes: int
    loss_before: float
    loss_after: float
    optimizer_ms: float


def read(path: Path) -> Run:
    """A run's metrics: losses are validation losses, milliseconds the median after ten steps."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [record["validation_loss"] for record in records if "validation_loss" in record]
    times = [record["optimizer_ms"] for record in records if "optimizer_ms" in record]
    last = records[-1]
    return Run(
        last["ranks"],
        last["state_bytes"],
        last["replicated_bytes"],
        losses[0],
        losses[-1],
        statistics.median(times[10:]),
    )


def problems(first: Run, resumed: Run) -> list[str]:
    """Why the loss did not continue, if it did not."""
    found = []
    if not first.loss_after < 0.8 * first.loss_before:
        found.append(f"training did not lower the loss: {first.loss_before:.4f} to {first.loss_after:.4f}")
    if not abs(resumed.loss_before - first.loss_after) < 1e-3:
        found.append(f"saved at loss {first.loss_after:.4f}, resumed at {resumed.loss_before:.4f}")
    if not resumed.loss_after < first.loss_after:
        found.append(f"the resumed run did not lower the loss: {first.loss_after:.4f} to {resumed.loss_after:.4f}")
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    first, resumed, zero = (read(folder / f"{name}.jsonl") for name in ("first", "resumed", "zero"))
    rows = [
        ("", f"{first.ranks} ranks", f"resumed on {resumed.ranks}"),
        ("validation loss before, nats per byte", f"{first.loss_before:.4f}", f"{resumed.loss_before:.4f}"),
        ("validation loss after", f"{first.loss_after:.4f}", f"{resumed.loss_after:.4f}"),
        ("optimizer state per rank, MB", f"{first.state_bytes / 1e6:.2f}", f"{resumed.state_bytes / 1e6:.2f}"),
        ("  replicated RAdam, MB", f"{first.replicated_bytes / 1e6:.2f}", f"{resumed.replicated_bytes / 1e6:.2f}"),
        ("optimizer step, ms", f"{first.optimizer_ms:.2f}", f"{resumed.optimizer_ms:.2f}"),
        ("  ZeroRedundancyOptimizer(RAdam, foreach), ms", f"{zero.optimizer_ms:.2f}", ""),
    ]
    print()
    for label, *cells in rows:
        print(f"{label:<48}" + "".join(f"{cell:>16}" for cell in cells))
    if found := problems(first, resumed):
        sys.exit("\n".join(found))
    print("\nThe loss continued where it was saved.")


if __name__ == "__main__":
    main()
