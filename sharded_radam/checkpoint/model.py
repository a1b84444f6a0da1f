"""The state of a model that all ranks have alike, under the key ``model``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import Names, path_from, read_nested
from sharded_radam.checkpoint.format.reading import Target
from sharded_radam.checkpoint.parts import OfRank0
from sharded_radam.checkpoint.report import list_differences, some
from sharded_radam.state.dicts import plain_name

EXTRA_STATE = "_extra_state"
"""What torch calls a module's in a state dict."""


def model_content(model: nn.Module) -> dict[str, Any]:
    """Live tensors by name, and buffers and extra state, which each rank has for itself, as rank 0's.

    Names have no prefix of DistributedDataParallel, torch.compile or checkpointing.

    Raises:
        ValueError: the model is itself sharded.
    """
    params = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value if name in params else OfRank0(value) for name, value in _state(model).items()}


def _state(model: nn.Module) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    state = dict(get_model_state_dict(model))
    sharded = [name for name, value in state.items() if is_traceable_wrapper_subclass(value)]
    if sharded:
        raise ValueError(f"{some(sharded)}: sharded tensors; expected a model that every rank has as a whole")
    return state


def _is_value(name: str, value: Any) -> bool:
    """Whether something of a model comes back as it was saved, whatever its shape: extra state, for one."""
    return not isinstance(value, Tensor) or name.rpartition(".")[2] == EXTRA_STATE


class ModelPlan(NamedTuple):
    """A load of which all is decided: what to read, and the state dict that it makes."""

    model: nn.Module
    targets: list[Target]
    staged: dict[str, Any]
    strict: bool

    def apply(self) -> None:
        """Put what was read into the model."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        set_model_state_dict(self.model, self.staged, options=StateDictOptions(strict=self.strict))


def plan_model(model: nn.Module, index: Index, files: DataFiles, strict: bool, key: str = "model") -> ModelPlan:
    """Memory for the model's state, which was saved under ``key``.

    Raises:
        ValueError: names or shapes differ, and ``strict``.
    """
    state = _state(model)
    saved = _saved(index, f"{key}.", {name for name, value in state.items() if _is_value(name, value)})
    tensors = {name: value for name, value in state.items() if name in saved and not _is_value(name, value)}
    problems = {name: _problem(index, saved[name], value) for name, value in tensors.items()}
    mismatched = [f"{key}.{name} ({problem})" for name, problem in sorted(problems.items()) if problem]
    missing = sorted(f"{key}.{name}" for name in state.keys() - saved.keys())
    unexpected = sorted(saved_as for name in saved.keys() - state.keys() for saved_as in saved[name].values())
    differences = list_differences(missing, unexpected, mismatched)
    if strict and differences:
        raise ValueError(f"{'; '.join(differences)}. Expected the model that was saved; strict=False loads what fits")
    staged: dict[str, Any] = {
        name: torch.empty(value.shape, dtype=value.dtype) for name, value in tensors.items() if not problems[name]
    }
    targets = [Target(saved[name][()], (0,) * memory.dim(), memory) for name, memory in staged.items()]
    staged |= {
        name: read_nested(index, saved[name], files)
        for name, value in state.items()
        if name in saved and _is_value(name, value)
    }
    return ModelPlan(model, targets, staged, strict)


def _saved(index: Index, prefix: str, values: Collection[str]) -> dict[str, Names]:
    """What is saved below a prefix: names of a model -> keys, several for parts of one of the ``values``."""
    saved: dict[str, Names] = {}
    for key in [*index.tensors, *index.objects]:
        if key.startswith(prefix):
            name = _owner(key.removeprefix(prefix), values)
            saved.setdefault(name, {})[path_from(index, key, len(prefix) + len(name) + 1)] = key
    return saved


def saved_model(index: Index) -> dict[str, Names]:
    """Names of the model, or of all models, of a checkpoint -> keys."""
    parts = (key.removeprefix("model.").partition(EXTRA_STATE) for key in [*index.tensors, *index.objects])
    return _saved(index, "model.", {head + mark for head, mark, _ in parts})


def _owner(name: str, values: Collection[str]) -> str:
    ends = [number for number, character in enumerate(name) if character == "."]
    return next((name[:end] for end in ends if name[:end] in values), name)


def _problem(index: Index, names: Names, value: Tensor) -> str | None:
    """Why what was saved does not fit a tensor."""
    if [*names] != [()] or names[()] not in index.tensors:
        return "no tensor in the checkpoint"
    shape = index.tensors[names[()]].shape
    return None if shape == value.shape else f"shape {shape} in the checkpoint, expected {tuple(value.shape)}"
