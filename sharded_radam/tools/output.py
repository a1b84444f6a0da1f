"""How commands answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def print_result(options: Any, result: Any, text: str) -> None:
    """Print a result as JSON if ``--json`` asks for it, otherwise the text."""
    print(json.dumps(result) if options.json else text)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def mib(num_bytes: float) -> str:
    """Bytes as MiB, with digits for small ones."""
    return f"{num_bytes / 2**20:,.1f}" if num_bytes < 100 * 2**20 else f"{num_bytes / 2**20:,.0f}"
