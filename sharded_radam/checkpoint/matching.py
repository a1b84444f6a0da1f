"""Which of the saved parameters and param groups are an optimizer's.

By the parameters' names, or by their position where neither side has names, as torch does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.saved_optimizer import SavedOptimizer, differing_options, read_options
from sharded_radam.state.dicts import plain_name

_SHOWN = 10
"""Of many parameters."""

Groups = Sequence[Mapping[str, Any]]
"""Param groups of an optimizer."""

ParamNames = Mapping[Tensor, tuple[str, ...]]
"""Of each parameter; a tied one has several."""


def names_of(groups: Groups, model: nn.Module | None) -> ParamNames:
    """Names of every parameter: of a tied one all that the model has for it; its number where there are none.

    Args:
        groups: of the optimizer.
        model: whose names are to be used, if the optimizer was built without.

    Raises:
        ValueError: two parameters have one name, or one is not the model's.
    """
    params = [param for group in groups for param in group["params"]]
    pairs: list[tuple[Tensor, str]]
    if model is not None:
        pairs = [(param, plain_name(name)) for name, param in model.named_parameters(remove_duplicate=False)]
    elif _has_names(groups):
        listed = [plain_name(name) for group in groups for name in group["param_names"]]
        pairs = [*zip(params, listed, strict=True)]
    else:
        pairs = [(param, str(number)) for number, param in enumerate(params)]
    names: dict[Tensor, list[str]] = {}
    owners: dict[str, Tensor] = {}
    for param, name in pairs:
        names.setdefault(param, []).append(name)
        if owners.setdefault(name, param) is not param:
            raise ValueError(f"two parameters are called '{name}': give the optimizer names that differ")
    if unknown := [number for number, param in enumerate(params) if param not in names]:
        raise ValueError(f"parameters {unknown[:_SHOWN]} of the optimizer are not the given model's")
    return {param: tuple(names[param]) for param in params}


def _has_names(groups: Groups) -> bool:
    return all("param_names" in group for group in groups)


def names_in(saved: SavedOptimizer, groups: Groups, model: nn.Module | None) -> ParamNames:
    """Under which names the checkpoint may have our parameters.

    Raises:
        ValueError: one side has names, the other has none; or neither has, and their groups differ.
    """
    if saved.is_numbered:
        ours = [len(group["params"]) for group in groups]
        theirs = [len(names) for names in saved.members]
        if ours != theirs:
            raise ValueError(
                f"the checkpoint has no parameter names, and groups of {theirs} parameters; the optimizer has "
                f"groups of {ours}. Without names both must have the same groups"
            )
        numbers = [number for members in saved.members for number in members]
        params = [param for group in groups for param in group["params"]]
        return {param: (number,) for param, number in zip(params, numbers, strict=True)}
    if model is None and not _has_names(groups):
        raise ValueError(
            "the checkpoint has names of parameters, the optimizer has none: build it with "
            "model.named_parameters(), or pass model="
        )
    saved_as = {own: name for name, own in saved.called.items()}
    return {
        param: (*names, *(saved_as[name] for name in names if name in saved_as))
        for param, names in names_of(groups, model).items()
    }


def match_groups(
    index: Index, saved: SavedOptimizer, groups: Groups, names: ParamNames, files: DataFiles
) -> tuple[list[dict[str, Any]], list[str]]:
    """Our groups, each with the options of the saved groups that had its parameters, if these have the same.

    Options that were not saved stay as they are.

    Returns:
        The groups, and which of them are not so, as text.
    """
    group_of = {name: number for number, members in enumerate(saved.members) for name in members}
    options: dict[int, dict[str, Any]] = {}
    merged, differing = [], []
    for number, group in enumerate(groups):
        held = [name for param in group["params"] for name in names[param] if name in group_of]
        numbers = dict.fromkeys(group_of[name] for name in held)
        for saved_number in numbers:
            if saved_number not in options:
                options[saved_number] = read_options(index, saved.groups[saved_number], files)
        sources = [options[saved_number] for saved_number in numbers]
        keys = sorted({key for other in sources[1:] for key in differing_options(sources[0], other)})
        if keys:
            differing.append(f"param group {number} (it was in groups that differ in {', '.join(keys)})")
        merged.append({**group, **(deepcopy(sources[0]) if sources and not keys else {})})
    return merged, differing
