"""Who asks: torch.distributed.checkpoint tells neither optimizers nor tensors what it is about; its frames do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

_CHECKPOINT = "torch.distributed.checkpoint"
_WRAPPERS = {("accelerate.optimizer", "__init__")}
"""Module and function of those who take a state apart only to give it back: to move it to a device."""


@dataclass(frozen=True, slots=True)
class Whole:
    """What ``StateDictOptions(full_state_dict=True)`` asks for: whole tensors, on all ranks or on global rank 0."""

    on_rank_0: bool


def _callers() -> Iterator[tuple[str, FrameType]]:
    """Module and frame of whoever called, and of their callers."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame.f_globals.get("__name__") or "", frame
        frame = frame.f_back


def takes_parts() -> bool:
    """Whether the caller can do something with one rank's part of a state: save each rank's, or give it back."""
    return any(
        module == _CHECKPOINT or module.startswith(f"{_CHECKPOINT}.") or (module, frame.f_code.co_name) in _WRAPPERS
        for module, frame in _callers()
    )


def takes_whole() -> Whole | None:
    """What torch's ``get_optimizer_state_dict`` promises its caller; None if that is parts, or it is someone else."""
    for module, frame in _callers():
        if module == f"{_CHECKPOINT}.state_dict":
            options: Any = frame.f_locals.get("info")  # with the fields of StateDictOptions
            return Whole(options.cpu_offload) if getattr(options, "full_state_dict", False) else None
    return None


def num_writers() -> int | None:
    """How many ranks plan the checkpoint together that torch.distributed.checkpoint is saving; None if it is not."""
    for module, frame in _callers():
        if module == f"{_CHECKPOINT}.utils" and frame.f_code.co_name in ("reduce_scatter", "all_reduce"):
            return int(frame.f_locals["self"].get_world_size())
    return None
