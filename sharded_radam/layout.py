"""From param groups to a plan that all ranks have agreed on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_capturable_supported_devices
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharded_radam.flat import DTYPES
from sharded_radam.memory import dim_order, flatten, unflatten
from sharded_radam.plan import ParamSpec, ShardPlan, first_difference, make_plan
from sharded_radam.transport import Transport

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu")
"""Devices that torch has a fused Adam kernel for."""


def describe(groups: Sequence[dict[str, Any]], first_group: int, fused: bool) -> tuple[list[Tensor], list[ParamSpec]]:
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
        names = group.get("param_names") or [f"{index}.{position}" for position in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            if param not in found and _takes_part(name, param, group, fused):
                shape, order = tuple(param.shape), dim_order(param)
                found[param] = ParamSpec(name, shape, order, param.dtype, param.device.type, index)
    return list(found), list(found.values())


def _takes_part(name: str, param: Tensor, group: dict[str, Any], fused: bool) -> bool:
    """Whether a parameter can ever have a gradient that RAdam takes; those that cannot are left alone, as by RAdam."""
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


def agree(
    specs: Sequence[ParamSpec], problem: ValueError | None, transport: Transport, bucket_cap_mb: float
) -> ShardPlan:
    """Collective: make the plan and compare it with that of the other ranks.

    Args:
        specs: of this rank's parameters.
        problem: what this rank's parameters failed with, if they did.
        transport: of the ranks.
        bucket_cap_mb: size of a bucket.

    Raises:
        ValueError: on every rank, if one has a problem, or another layout than rank 0.
    """
    plan = make_plan(specs, transport.world_size, bucket_cap_mb)
    heard = transport.all_gather_objects(None if problem else plan.digest())
    if problem is not None:
        raise problem
    if None in heard:
        bad = [rank for rank, digest in enumerate(heard) if digest is None]
        raise ValueError(f"ranks {bad} could not lay out their parameters; their own errors say why")
    different = [rank for rank, digest in enumerate(heard) if digest != heard[0]]
    if different:
        everybody = transport.all_gather_objects(plan.params)
        name = first_difference(everybody[0], everybody[different[0]])
        where = f"first at parameter '{name}'" if name is not None else "in bucket_cap_mb"
        raise ValueError(
            f"layout differs on ranks {different}, {where}: all ranks must pass the same parameters, in the same "
            "order, groups, dtypes and memory format, and the same bucket_cap_mb"
        )
    return plan


def broadcast_(tensors: Sequence[Tensor], transport: Transport) -> None:
    """Collective: rank 0's values into tensors of any memory order (modified in place)."""
    torch.autograd.graph.increment_version(tensors)
    for tensor in tensors:
        flat = flatten(tensor.detach(), dim_order(tensor)).contiguous()
        transport.broadcast(flat)
        if flat.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(unflatten(flat, tensor))
