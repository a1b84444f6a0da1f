"""A checkpoint out of a file that torch.save made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_radam.checkpoint.draft import ToSave
from sharded_radam.checkpoint.save import Save, SaveReport
from sharded_radam.store.peers import Peers

_TIMEOUT_S = 600.0
"""Which one process alone does not need."""


def import_file(source: Path, output: Path, names: Sequence[str] | None = None) -> SaveReport:
    """Make a checkpoint directory of a file that ``torch.save`` made of a consolidated optimizer state.

    Args:
        source: with the ``state_dict()`` of torch.optim.RAdam or of a consolidated ZeroRedundancyOptimizer or
            ShardedRAdam, or with a dict that has one beside other things; a model's state dict under "model" or
            "state_dict" is taken too.
        output: the directory; it must not exist.
        names: of the parameters, in the optimizer's order. Without them, those of the file; without these, the
            checkpoint has numbers.

    Raises:
        ValueError: the file has no optimizer, or other numbers of parameters than names.
        CheckpointError: the directory could not be written.
    """
    content = torch.load(source, map_location="cpu", mmap=True, weights_only=True)
    optimizer, model = _find_parts(content, source)
    groups = [dict(group) for group in optimizer["param_groups"]]
    numbers = [number for group in groups for number in group["params"]]
    listed = [name for group in groups for name in group.get("param_names", ())]
    chosen = list(names) if names is not None else listed
    if chosen and len(chosen) != len(numbers):
        raise ValueError(f"{len(chosen)} names for {len(numbers)} parameters of {source}")
    name_of = dict(zip(numbers, chosen, strict=True)) if chosen else {number: str(number) for number in numbers}
    if chosen:
        for group in groups:
            group["params"] = [name_of[number] for number in group["params"]]
    state = {
        name_of[number]: {kind: torch.as_tensor(value, dtype=_dtype(kind, value)) for kind, value in kinds.items()}
        for number, kinds in optimizer["state"].items()
        if number in name_of
    }
    step = max((int(kinds["step"]) for kinds in state.values() if "step" in kinds), default=0)
    nested = {"optim": {"state": state, "param_groups": groups}, **({"model": model} if model else {})}
    to_save = ToSave(nested, info={"step": step})
    return Save.begin(output, lambda: to_save, Peers(0, 1, None), _TIMEOUT_S).write()


def _dtype(kind: str, value: Any) -> torch.dtype:
    if kind == "step":
        return torch.float32
    return value.dtype if isinstance(value, Tensor) else torch.float32


def _find_parts(content: Any, source: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    def is_optimizer(value: Any) -> bool:
        return isinstance(value, dict) and {"state", "param_groups"} <= value.keys()

    if is_optimizer(content):
        return content, None
    keys = [key for key, value in content.items() if is_optimizer(value)] if isinstance(content, dict) else []
    if len(keys) != 1:
        raise ValueError(f"{source} has {len(keys)} optimizer states, expected one")
    model = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), dict)), None)
    return content[keys[0]], model
