"""The state of a model that all ranks have alike, under the key ``model``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharded_radam.checkpoint.contents import flatten
from sharded_radam.checkpoint.files import DataFiles
from sharded_radam.checkpoint.index import Index
from sharded_radam.checkpoint.optimizer_part import list_differences, some
from sharded_radam.checkpoint.reading import Target, read_value
from sharded_radam.state import plain_name


def model_content(model: nn.Module) -> dict[str, Any]:
    """Live tensors by name; names have no prefix of DistributedDataParallel, torch.compile or checkpointing.

    Raises:
        ValueError: the model is itself sharded.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    content = dict(get_model_state_dict(model))
    sharded = [name for name, value in content.items() if is_traceable_wrapper_subclass(value)]
    if sharded:
        raise ValueError(f"{some(sharded)}: sharded tensors; expected a model that every rank has as a whole")
    return content


def may_differ(model: nn.Module, content: Mapping[str, Any]) -> set[str]:
    """Names of what a model's content has beside parameters: buffers, extra state, which each rank has for itself."""
    params = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return {*(content.keys() - params)}


def model_targets(
    model: nn.Module, index: Index, files: DataFiles, strict: bool, key: str = "model"
) -> tuple[list[Target], Callable[[], None]]:
    """Memory for the model's state, which was saved under ``key``, and what puts it into the model.

    Raises:
        ValueError: names or shapes differ, and ``strict``.
    """
    flat, paths = flatten({key: model_content(model)})
    saved = {name for name in [*index.tensors, *index.objects] if name.startswith(f"{key}.")}
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    shapes = {key: index.tensors[key].shape for key in tensors.keys() & index.tensors.keys()}
    mismatched = [
        f"{key} (shape {shape} in the checkpoint, expected {tuple(tensors[key].shape)})"
        for key, shape in sorted(shapes.items())
        if shape != tuple(tensors[key].shape)
    ]
    found = list_differences(sorted(flat.keys() - saved), sorted(saved - flat.keys()), mismatched)
    if strict and found:
        raise ValueError(f"{'; '.join(found)}. Expected the model that was saved; strict=False loads what fits")
    staged: dict[str, Any] = {
        key: torch.empty(tensors[key].shape, dtype=tensors[key].dtype)
        for key, shape in shapes.items()
        if shape == tuple(tensors[key].shape)
    }
    targets = [Target(key, (0,) * memory.dim(), memory) for key, memory in staged.items()]
    staged |= {key: read_value(index, key, files) for key in flat if key in index.objects}

    def apply() -> None:
        from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        content = unflatten_state_dict(staged, paths).get(key, {})
        set_model_state_dict(model, content, options=StateDictOptions(strict=strict))

    return targets, apply
