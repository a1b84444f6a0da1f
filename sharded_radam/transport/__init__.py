"""How shards travel. The only package that calls collectives."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist

from sharded_radam.transport.base import Alone, Handle, Transport
from sharded_radam.transport.gloo import GlooTransport
from sharded_radam.transport.native import NativeTransport

__all__ = ["Alone", "Handle", "Transport", "make_transport"]

_BY_NAME = {"native": NativeTransport, "gloo": GlooTransport}


def make_transport(group: dist.ProcessGroup | None, device: torch.device, name: str | None) -> Transport:
    """The transport for a process group (None: the default one, or one rank where there is none) and a device.

    Args:
        group: a process group that this process is a member of.
        device: where the buckets are.
        name: ``"native"``, ``"gloo"``, or None for the best one: ``gloo`` for a Gloo backend on CPU.

    Raises:
        ValueError: unknown name, a group without this process, or without a backend for the device.
    """
    if name is not None and name not in _BY_NAME:
        raise ValueError(f"transport={name!r}: expected None or one of {sorted(_BY_NAME)}")
    if not dist.is_available() or not dist.is_initialized():
        _warn_if_launched()
        return Alone()
    group = dist.group.WORLD if group is None else group
    assert group is not None
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"process_group does not contain this process (global rank {dist.get_rank()}): build the optimizer only "
            "on the ranks of its group, and give it the group that they are in"
        )
    if dist.get_world_size(group) == 1:
        return Alone(group)
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    backend = backends.get(device.type)
    if backend is None:
        raise ValueError(
            f"parameters are on {device.type}, but the process group has backends for {sorted(backends)} only: "
            "initialise it with a backend for this device, or move the model first"
        )
    if name == "gloo" and backend != "gloo":
        raise ValueError(f"transport='gloo' needs the gloo backend for {device.type}, which has {backend!r} here")
    if name is None:
        name = "gloo" if backend == "gloo" and device.type == "cpu" else "native"
    return _BY_NAME[name](group, device)


def _warn_if_launched() -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        warnings.warn(
            f"WORLD_SIZE is {launched}, but torch.distributed is not initialised: this optimizer will neither shard "
            "nor communicate. Call torch.distributed.init_process_group() before it is built.",
            stacklevel=2,
        )
