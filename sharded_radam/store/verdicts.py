"""What ranks say when they meet (``meeting``), and what follows from it for all of them. Nothing here waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_KINDS: tuple[type[Exception], ...] = (ValueError, TypeError, MemoryError)
"""Exceptions of one rank that are raised as they are on the others; all else is a RuntimeError there."""


class LostError(RuntimeError):
    """What a rank learns of another's failure or absence; what that one says itself counts more."""


def is_agreed(error: Exception) -> bool:
    """Whether all ranks raise it."""
    return getattr(error, "_sharded_radam_agreed", False)


def agreed(error: Exception) -> Exception:
    """The error, as one that all ranks raise."""
    error._sharded_radam_agreed = True  # type: ignore[attr-defined]
    return error


def error_of(verdict: dict[str, Any]) -> Exception:
    """What all ranks raise of a failure."""
    kind = {each.__name__: each for each in _KINDS}.get(verdict.get("kind", ""), RuntimeError)
    return agreed(kind(verdict["failure"]))


def make_post(what: str, offer: Any, problem: Exception | None) -> dict[str, Any]:
    """What a rank says: what it does, and its offer or its problem."""
    if problem is None:
        return {"what": what, "offer": offer}
    kind = next((each.__name__ for each in _KINDS if isinstance(problem, each)), "RuntimeError")
    known = type(problem) in (*_KINDS, RuntimeError, LostError)
    text = str(problem) if known else f"{type(problem).__name__}: {problem}"
    return {"what": what, "kind": kind, "problem": text, "lost": isinstance(problem, LostError)}


def judge(
    posts: dict[int, dict[str, Any]], world_size: int, decide: Callable[[list[Any]], Any], vain: str
) -> dict[str, Any]:
    """What follows from the posts that there are; ``vain`` says why no more of them are waited for."""
    doing = _by_value({rank: post["what"] for rank, post in posts.items()})
    if len(doing) > 1:
        calls = "; ".join(f"{name_ranks(ranks)}: {what}" for what, ranks in doing.items())
        return {"failure": f"ranks do different things ({calls}): all ranks must make the same calls in the same order"}
    failed = {rank: post for rank, post in posts.items() if "problem" in post and not post["lost"]}
    problems = _by_value({rank: post["problem"] for rank, post in failed.items()})
    if problems:
        kind = next(iter(failed.values()))["kind"]
        if len(failed) == world_size and len(problems) == 1:
            return {"failure": next(iter(problems)), "kind": kind}
        return {"failure": _told(problems), "kind": kind}
    what = next(iter(doing))
    missing = [rank for rank in range(world_size) if rank not in posts]
    if vain.startswith("rank"):  # this one is certain
        return {"failure": f"{what}: {vain}"}
    lost = _by_value({rank: post["problem"] for rank, post in posts.items() if "problem" in post})
    absent = [f"{name_ranks(missing)} {vain}"] if missing else []
    if lost or absent:
        return {"failure": f"{what}: {'; '.join([*absent, *([_told(lost)] if lost else [])])}"}
    try:
        return {"value": decide([posts[rank]["offer"] for rank in range(world_size)])}
    except Exception as error:  # whatever it is, the others must not wait for a verdict
        post = make_post("", None, error)
        return {"failure": post["problem"], "kind": post["kind"]}


def _told(problems: dict[str, list[int]]) -> str:
    return "; ".join(f"{name_ranks(ranks)}: {text}" for text, ranks in problems.items())


def _by_value(of_rank: dict[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for rank, value in of_rank.items():
        found.setdefault(value, []).append(rank)
    return found


def name_ranks(ranks: Sequence[int]) -> str:
    """As text: "rank 1", "ranks 1, 2"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
