"""From param groups to a plan that all ranks have agreed on."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import _get_capturable_supported_devices
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharded_radam.buckets.flat import DTYPES
from sharded_radam.buckets.memory import dim_order, flatten, unflatten
from sharded_radam.plan import ParamSpec, ShardPlan
from sharded_radam.store.meeting import Meeting
from sharded_radam.transport import Choice, Everyone, Transport

FLAGS = ("foreach", "capturable", "differentiable", "maximize", "decoupled_weight_decay")
"""Of a param group: compared between ranks when the optimizer is built. What users change between steps, such as lr, is
compared later (``replicas``)."""

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")
"""Devices that torch has a fused Adam kernel for."""


def describe(
    groups: Sequence[Mapping[str, Any]], first_group: int, fused: bool
) -> tuple[list[Tensor], list[ParamSpec]]:
    """The parameters that take part, once each, and what the layout needs to know of them.

    Args:
        groups: param groups that were checked by torch.
        first_group: index of the first of them in the optimizer.
        fused: whether the fused engine was asked for.

    Raises:
        ValueError: a parameter that cannot be sharded, or not with its group's flags.
    """
    found: dict[Tensor, ParamSpec] = {}
    for index, group in enumerate(groups, first_group):
        names = group.get("param_names") or number(group, index)
        for name, param in zip(names, group["params"], strict=True):
            if param in found and found[param].group != index:
                raise ValueError(
                    f"parameter '{name}' of param group {index} is in group {found[param].group}, too (there it is "
                    f"'{found[param].name}'): a parameter can be in one group only"
                )
            if param not in found and _takes_part(name, param, group, fused):
                shape, order = tuple(param.shape), dim_order(param)
                found[param] = ParamSpec(name, shape, order, param.dtype, param.device.type, index)
    return list(found), list(found.values())


def check_shardable(groups: Sequence[Mapping[str, Any]], fused: bool) -> None:
    """Raise ValueError for groups of which one cannot be sharded; none is compared with another."""
    for index, group in enumerate(groups):
        describe([group], index, fused)


def number(group: Mapping[str, Any], index: int) -> list[str]:
    """Names for the parameters of a group that has none."""
    return [f"{index}.{position}" for position in range(len(group["params"]))]


def find_twice(groups: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong where a group lists a parameter twice, which torch only warns of; "" if none does."""
    for index, group in enumerate(groups):
        known: set[Tensor] = set()
        for name, param in zip(group.get("param_names") or number(group, index), group["params"], strict=True):
            if param in known:
                return (
                    f"parameter '{name}' is listed twice in param group {index}: RAdam would mix two updates of it in "
                    "each step. Expected: each parameter once, as list(dict.fromkeys(params)) has them"
                )
            known.add(param)
    return ""


def has_members(groups: Sequence[Mapping[str, Any]], members: Sequence[Sequence[Tensor]]) -> bool:
    """Whether the groups have these parameters, in this order."""
    return len(groups) == len(members) and all(
        isinstance(group["params"], list)
        and len(group["params"]) == len(known)
        and all(map(operator.is_, group["params"], known))
        for group, known in zip(groups, members, strict=True)
    )


def complete_groups(groups: Sequence[dict[str, Any]], required: Iterable[str], names: Mapping[Tensor, str]) -> None:
    """Bring groups (modified in place) that somebody has edited into torch's form.

    Args:
        groups: param groups.
        required: keys that each must have.
        names: of parameters that were there before; where a group has names, and not as many as parameters.

    Raises:
        ValueError: a group has no parameters, or lacks an option.
        TypeError: something in a group is no tensor.
    """
    for index, group in enumerate(groups):
        if missing := {"params", *required} - group.keys():
            raise ValueError(
                f"param group {index} has no {sorted(missing)}: add it by add_param_group(), which fills in what is "
                "left away, or give it all options"
            )
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif isinstance(group["params"], (set, frozenset)):
            raise TypeError(f"the parameters of group {index} are a set, which has no order: expected a list")
        elif not isinstance(group["params"], list):
            group["params"] = list(group["params"])
        if others := {type(param).__name__ for param in group["params"] if not isinstance(param, Tensor)}:
            raise TypeError(f"param group {index} has {sorted(others)} among its parameters: expected tensors")
        if "param_names" in group and len(group["param_names"]) != len(group["params"]):
            pairs = zip(group["params"], number(group, index), strict=True)
            group["param_names"] = [names.get(param, name) for param, name in pairs]


def _takes_part(name: str, param: Tensor, group: Mapping[str, Any], fused: bool) -> bool:
    """Whether a parameter can ever have a gradient that RAdam takes; those that cannot are left alone, as by RAdam."""
    if is_lazy(param):
        raise ValueError(
            f"parameter '{name}' has no shape yet: it is of a lazy module, which gets its parameters in its first "
            "forward pass. Run one, on every rank, and then build the optimizer"
        )
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter '{name}' is FullyShardedDataParallel's, which has other elements of it on each rank: "
            "ShardedRAdam is for replicated parameters; use torch.optim.RAdam with FSDP, which shards the state, too"
        )
    if is_traceable_wrapper_subclass(param):
        raise ValueError(
            f"parameter '{name}' is a {type(param).__name__}: ShardedRAdam shards the state of plain, replicated "
            "parameters (those of DistributedDataParallel); use torch.optim.RAdam with FSDP2 or tensor parallelism"
        )
    if param.layout is not torch.strided:
        raise ValueError(f"parameter '{name}' has layout {param.layout}, expected torch.strided")
    if not (param.is_floating_point() or param.is_complex()):
        return False
    if param.dtype not in DTYPES:
        if param.requires_grad:
            raise ValueError(f"parameter '{name}' is {param.dtype}, expected one of {', '.join(map(str, DTYPES))}")
        return False
    device = param.device.type
    if group["capturable"] and device not in (supported := _get_capturable_supported_devices()):
        raise ValueError(f"If capturable=True, parameters must be on one of {supported}: '{name}' is on {device}")
    if fused and device not in FUSED_DEVICES:
        raise ValueError(f"If fused=True, parameters must be on one of {FUSED_DEVICES}: '{name}' is on {device}")
    return True


@dataclass(frozen=True, slots=True)
class Draft:
    """What a rank is about to build, as far as it gets alone.

    Attributes:
        groups: all param groups, and in the end those parameters that are in none, but have state.
        params: those of their parameters that take part.
        plan: their layout.
        options: arguments that must be equal on all ranks, by their names; JSON values.
        buffers: of the model, that are to be broadcast.
        choice: of a transport, at construction.
    """

    groups: Sequence[Mapping[str, Any]]
    params: list[Tensor]
    plan: ShardPlan
    options: dict[str, Any]
    buffers: tuple[tuple[str, Tensor], ...] = ()
    choice: Choice | None = None

    def rows(self) -> list[tuple[str, str]]:
        """What must be equal on all ranks of each group, parameter and buffer: its name, and all else in words."""
        groups = [
            (f"param group {index}", f"with {', '.join(f'{flag}={group.get(flag)}' for flag in FLAGS)}")
            for index, group in enumerate(self.groups)
        ]
        params = [
            (
                f"parameter '{spec.name}'",
                f"{_in_words(spec.shape, spec.dim_order, spec.dtype, spec.device_type)} in group {spec.group}",
            )
            for spec in self.plan.params
        ]
        buffers = [
            (f"buffer '{name}'", _in_words(buffer.shape, dim_order(buffer), buffer.dtype, buffer.device.type))
            for name, buffer in self.buffers
        ]
        return groups + params + buffers


def _in_words(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: str) -> str:
    return f"of shape {tuple(shape)}, {dtype}, dimensions nested as {tuple(order)}, on {device}"


def agree(meeting: Meeting, what: str, make: Callable[[], Draft]) -> Draft:
    """Collective: make a draft, which may fail, and compare it with that of the other ranks.

    Args:
        meeting: of the ranks.
        what: is built, for errors.
        make: returns the draft, or raises.

    Raises:
        Exception: on every rank, in the same words: what ``make`` raised on one of them.
        ValueError: on every rank: drafts differ.
    """
    draft, problem, offer = None, None, None
    try:
        draft = make()
        rows = draft.rows()
        offer = {**draft.options, "layout": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
    different = meeting.agree(what, offer, problem, _compare)
    assert draft is not None
    if different is not None:
        meeting.agree(f"{what}, comparing layouts", rows if meeting.rank in (0, different) else None, None, _differ)
    return draft


def _compare(offers: list[dict[str, Any]]) -> int | None:
    """The first rank whose layout is not rank 0's, if there is one."""
    for name, value in offers[0].items():
        for rank, offer in enumerate(offers):
            if offer.get(name) != value:
                if name == "layout":
                    return rank
                raise ValueError(
                    f"{name} differs between ranks: rank 0 has {value!r}, rank {rank} has {offer.get(name)!r}; all "
                    "ranks must pass the same"
                )
    return None


def _differ(offers: list[list[list[str]] | None]) -> None:
    """Raise ValueError with the first difference of the two layouts."""
    ours = offers[0] or []
    rank = next(rank for rank, rows in enumerate(offers) if rank and rows is not None)
    theirs = offers[rank] or []
    one, other = next((one, other) for one, other in zip_longest(ours, theirs) if one != other)
    name = (one or other)[0]
    raise ValueError(
        f"layout differs between ranks 0 and {rank}, first at {name}: rank 0 has {_row(one)}, rank {rank} has "
        f"{_row(other)}; all ranks must pass the same parameters, in the same order, groups, dtypes and memory format, "
        "and a model with the same buffers"
    )


def _row(row: Sequence[str] | None) -> str:
    return "nothing" if row is None else " ".join(row)


def broadcast_(tensors: Sequence[Tensor], transport: Transport | Everyone) -> None:
    """Collective: rank 0's values into tensors of any memory order (modified in place)."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)
        flat = flatten(tensor.detach(), dim_order(tensor)).contiguous()
        transport.broadcast(flat)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(unflatten(flat, tensor.shape, dim_order(tensor)))
