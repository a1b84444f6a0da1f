"""What ranks say in the stages of an operation (see ``agreement``), as text, and what differs between them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any


def encode_post(offer: Any, problem: BaseException | None) -> str:
    """What a rank says; that its offer cannot be said is a problem too."""
    try:
        if problem is None:
            return json.dumps({"offer": offer})
    except Exception as error:
        problem = error
    return json.dumps({"problem": describe_error(problem)})


def join_reasons(problems: dict[int, str], lost: dict[int, str]) -> str:
    """What ranks failed with, and why ranks are given up; ranks with the same words together."""
    ranks: dict[str, list[str]] = {}
    for rank, text in [
        *((rank, f": {text}") for rank, text in problems.items()),
        *((rank, f" {why}") for rank, why in lost.items()),
    ]:
        ranks.setdefault(text, []).append(str(rank))
    return "; ".join(f"rank {', '.join(listed)}{text}" for text, listed in ranks.items())


def describe_error(error: BaseException | None) -> str:
    """Class and text of an error."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its text is its own code
        return type(error).__name__


def expect_one_call(offers: list[Any]) -> None:
    """Raise ValueError unless all ranks have called the same operation."""
    calls = [offer["what"] for offer in offers]
    for rank, call in enumerate(calls):
        if call != calls[0]:
            raise ValueError(f"rank 0 is {calls[0]}, rank {rank} is {call}; all ranks must make the same call")


def absolute(path: Any) -> object:
    """A path as the name of an operation: alike on all ranks, wherever they run; itself if it is none."""
    try:
        return os.path.abspath(path)
    except (OSError, TypeError, ValueError):  # will be raised when it is used
        return path


def expect_same(offers: Sequence[Any], what: str) -> None:
    """Raise ValueError unless all ranks offered the same."""
    for rank, offer in enumerate(offers):
        if offer != offers[0]:
            raise ValueError(f"{what}: rank 0 has {offers[0]!r}, rank {rank} has {offer!r}; all ranks must have one")
