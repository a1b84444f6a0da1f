"""State of an optimizer <-> dicts in the format of ``torch.optim.RAdam.state_dict()``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _get_scalar_dtype

from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.dtypes import HALF_DTYPES
from sharded_radam.state.values import is_dense_tensor, plain, without_numpy

KINDS = ("step", "exp_avg", "exp_avg_sq", "master")
"""What this optimizer keeps of a parameter; all other keys of its state are users' own."""

_WRAPPERS = re.compile(r"(?<![^.])(module|_orig_mod|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True, slots=True)
class Entry:
    """The state of one parameter as found in a dict, after all checks; None where the dict has none.

    ``own`` is what users keep there.
    """

    step: float
    tensors: dict[str, Tensor] | None
    own: dict[Any, Any] = field(default_factory=dict)


def plain_name(name: str) -> str:
    """A parameter's name without the parts that wrappers put into it."""
    return _WRAPPERS.sub("", name)


def pack_groups(param_groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Param groups with parameters replaced by their indices, as torch writes them."""
    index_of: dict[int, int] = {}
    packed, start = [], 0
    for number, group in enumerate(param_groups):
        for index, param in enumerate(group["params"], start):
            index_of.setdefault(id(param), index)
        options = {key: value for key, value in group.items() if key != "params"}
        packed.append({key: without_numpy(value, f"param_groups.{number}.{key}") for key, value in options.items()})
        packed[-1]["params"] = [index_of[id(param)] for param in group["params"]]
        start += len(group["params"])
    return packed


def users_own(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """What users keep in the state of a parameter."""
    return {key: value for key, value in state.items() if key not in KINDS}


def plain_groups(param_groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Param groups as they are saved: a copy of plain values.

    Raises:
        ValueError: there is something that cannot be saved.
    """
    groups = enumerate(pack_groups(param_groups))
    return [{key: _copy(v, f"param_groups.{at}.{key}") for key, v in group.items()} for at, group in groups]


def plain_state(state: Mapping[Any, Any], param_groups: Sequence[dict[str, Any]]) -> dict[Any, Any]:
    """What users keep in the state of an optimizer, for parameters and for other keys: a copy of plain values.

    Raises:
        ValueError: there is something that cannot be saved.
    """
    own = {}
    for name, key in index_state({key: key for key in state}, param_groups).items():
        found = state[key]
        if not isinstance(found, dict):
            own[key] = _copy(found, f"state.{name}")
        elif found:
            mine = users_own(found)
            plain(dict.fromkeys(mine), f"state.{name}")  # keys may be anything
            own[key] = {kind: _copy(value, f"state.{name}.{kind}") for kind, value in mine.items()}
    return own


def _copy(value: Any, name: str) -> Any:
    return deepcopy(plain(value, name))


def full_precision(model: nn.Module, masters: Mapping[Tensor, Tensor]) -> dict[str, Any]:
    """The state dict of a model with fp32 tensors in the place of half-precision ones, masters where there are some."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    params = {plain_name(name): param for name, param in model.named_parameters(remove_duplicate=False)}
    copies: dict[int, Tensor] = {}

    def wide(name: str, value: Any) -> Any:
        if not is_dense_tensor(value):
            return value
        source = params.get(name, value)
        if id(source) not in copies:
            is_half = value.dtype in HALF_DTYPES
            copy = value.detach().to("cpu", torch.float32 if is_half else value.dtype, copy=True)
            copies[id(source)] = masters.get(source, copy)
        return copies[id(source)]

    state = get_model_state_dict(model)
    return {name: wide(name, value) for name, value in state.items()}


def export_step(step: Tensor) -> Tensor:
    """A step counter in torch's type; ours counts in float64, since float32 stops at 2^24."""
    return step.detach().to(_get_scalar_dtype(), copy=True)  # type: ignore[no-untyped-call]


def is_left_alone(param: Any, state: Any) -> bool:
    """Whether a parameter is frozen, never took a step, and has nothing else: RAdam has no state for it."""
    if not isinstance(param, Tensor) or param.requires_grad or not isinstance(state, Mapping):
        return False
    if "exp_avg" not in state or users_own(state) or float(state["step"]) != 0:
        return False
    # Of a part of them, ranks could not say the same.
    return isinstance(state["exp_avg"], RangeTensor) or not (state["exp_avg"].any() or state["exp_avg_sq"].any())


def index_state(state: Mapping[Tensor, Any], param_groups: Sequence[dict[str, Any]]) -> dict[Any, Any]:
    """State keyed by parameter -> keyed by index, as torch writes it; other keys stay."""
    packed = pack_groups(param_groups)
    index_of = {
        p: i for g, q in zip(param_groups, packed, strict=True) for p, i in zip(g["params"], q["params"], strict=True)
    }
    found = {index_of.get(key, key): value for key, value in state.items()}
    return dict(sorted(found.items(), key=lambda item: item[0] if isinstance(item[0], int) else len(index_of)))


def saved_state(param_groups: Sequence[dict[str, Any]], state_dict: Mapping[str, Any]) -> dict[Tensor, Any]:
    """What a dict has for each parameter, matched by position; None where it has nothing."""
    groups = zip(param_groups, state_dict["param_groups"], strict=True)
    pairs = [pair for ours, saved in groups for pair in zip(ours["params"], saved["params"], strict=True)]
    state = state_dict["state"]
    # torch.distributed.checkpoint makes strings of the numbers.
    return {param: state.get(key, state.get(str(key))) for param, key in pairs}


def other_state(by_param: Mapping[Tensor, Any], state_dict: Mapping[str, Any]) -> dict[Any, Any]:
    """State of parameters as ``saved_state`` found it, and what a dict has for other keys, which stay as they are."""
    known = {key for group in state_dict["param_groups"] for key in group["params"]}
    known |= {str(key) for key in known}
    others = {key: value for key, value in state_dict["state"].items() if key not in known}
    return {**{param: value for param, value in by_param.items() if value}, **others}


def check_keys(state_dict: Mapping[str, Any]) -> None:
    """Raise ValueError unless a dict has what an optimizer's state_dict() has."""
    if missing := {"state", "param_groups"} - state_dict.keys():
        raise ValueError(f"loaded state dict has no {sorted(missing)}, only {sorted(map(str, state_dict))}")


def check_groups(groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless the groups of a dict have as many parameters as ours, of the same names."""
    if len(groups) != len(saved):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}, and the optimizer "
            f"{len(groups)}"
        )
    for index, (ours, theirs) in enumerate(zip(groups, saved, strict=True)):
        if len(ours["params"]) != len(theirs["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(theirs['params'])} parameters in the dict and {len(ours['params'])} in the "
                "optimizer"
            )
        names = zip(ours.get("param_names", ()), theirs.get("param_names", ()), strict=False)
        for position, (our_name, their_name) in enumerate(names):
            if plain_name(our_name) != plain_name(their_name):
                raise ValueError(
                    f"parameter {position} of group {index} is '{our_name}' in the optimizer and '{their_name}' in the "
                    "loaded state dict: build the optimizer with the parameters in the order in which they were saved"
                )


def read_entry(
    name: str, param: Tensor, shape: Sequence[int], spans: Sequence[tuple[int, int]], saved: Mapping[str, Any] | None
) -> Entry:
    """Check the state that a dict has for one parameter.

    Args:
        name: of the parameter, for errors.
        param: the parameter.
        shape: what its moments are to have: the parameter's, or that of a rank's own elements.
        spans: the rank's own ranges of elements, which a range tensor must have.
        saved: ``{"step", "exp_avg", "exp_avg_sq"}`` and perhaps ``"master"``; empty or None for a parameter that
            never took a step.

    Raises:
        ValueError: a key is missing, not a tensor, of another shape, or of another rank's elements.
    """
    if not saved:
        return Entry(0.0, None)
    tensors = {}
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in saved:
            raise ValueError(f"loaded state of parameter '{name}' has no '{key}', only {sorted(map(str, saved))}")
    for key in ("exp_avg", "exp_avg_sq", "master"):
        value = saved.get(key)
        if key == "master" and (value is None or value == {}):  # torch unflattens what is not there to {}
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"loaded {key} of parameter '{name}' is no tensor but {type(value).__name__}")
        if tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"loaded {key} of parameter '{name}' has shape {tuple(value.shape)}, expected {tuple(shape)}"
            )
        if isinstance(value, RangeTensor) and value.spans() != list(spans):
            raise ValueError(
                f"loaded {key} of parameter '{name}' has the elements {value.spans()}, and this rank owns "
                f"{list(spans)}: a local state_dict() is for the rank, layout and world size that it is from; load a "
                "consolidated one, or load with torch.distributed.checkpoint"
            )
        if value.is_complex() and not param.is_complex():
            raise ValueError(f"loaded {key} of parameter '{name}' is {value.dtype}, and the parameter {param.dtype}")
        tensors[key] = value.detach()
    step = saved["step"]
    return Entry(float(step.item() if isinstance(step, Tensor) else step), tensors, users_own(saved))


@torch.inference_mode(False)
def merge_groups(
    groups: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The saved hyperparameters with our parameters; keys that the dict lacks get the optimizer's defaults."""
    merged = []
    for ours, theirs in zip(groups, saved, strict=True):
        group = {key: deepcopy(value) for key, value in theirs.items() if key != "params"}
        for key, value in defaults.items():
            group.setdefault(key, value)
        group["params"] = ours["params"]
        if "param_names" in ours:
            group.setdefault("param_names", ours["param_names"])
        merged.append(group)
    return merged
