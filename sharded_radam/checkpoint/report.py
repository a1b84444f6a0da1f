"""What a load found of an optimizer, and what of a checkpoint did not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN = 10
"""Of many names."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: parameters found of all that there are, elements of state, and what the checkpoint says.

    ``from_masters``: how many parameters, not of half precision here, have the saved fp32 masters as their weights.
    """

    loaded: int
    parameters: int
    numel: int
    step: int
    world_size: int | None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    from_masters: int = 0

    def __str__(self) -> str:
        saved_at = f"saved at world size {self.world_size}" if self.world_size else "saved by torch"
        loaded = f"{self.loaded}/{self.parameters} parameters, {self.numel / 1e6:.4g} M elements, step {self.step}"
        masters = [f"weights of {self.from_masters} parameters from fp32 masters"] if self.from_masters else []
        return "; ".join([f"{loaded}, {saved_at}", *masters, *self.differences()])

    def differences(self) -> list[str]:
        """Names that are missing, unexpected or mismatched, as text."""
        return list_differences(self.missing, self.unexpected, self.mismatched)


def list_differences(missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str]) -> list[str]:
    """What of a checkpoint does not fit, as text; nothing if all does."""
    kinds = {
        "missing in the checkpoint": missing,
        "unexpected in the checkpoint": unexpected,
        "mismatched": mismatched,
    }
    return [f"{len(names)} {what}: {some(names)}" for what, names in kinds.items() if names]


def expect_all(report: LoadReport, strict: bool) -> None:
    """Raise ValueError if something of a checkpoint does not fit, and ``strict``."""
    if strict and report.differences():
        raise ValueError(
            f"{'; '.join(report.differences())}. Expected the same parameters on both sides; strict=False loads "
            "what fits and leaves the rest of the optimizer alone"
        )


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
