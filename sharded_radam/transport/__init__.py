"""How shards travel. The only package that calls collectives."""

from __future__ import annotations

import datetime as dt
import logging
import os
import warnings

import torch
import torch.distributed as dist

from sharded_radam.transport.base import Alone, Handle, Transport
from sharded_radam.transport.gloo import GlooReducer, GlooTransport
from sharded_radam.transport.native import NativeReducer, NativeTransport
from sharded_radam.transport.reducers import AloneReducer, Reducer
from sharded_radam.transport.shared_memory import SharedMemoryReducer, SharedMemoryTransport
from sharded_radam.transport.signals import connect

__all__ = ["REDUCERS", "Alone", "Handle", "NativeTransport", "Reducer", "Transport", "make_transport"]

logger = logging.getLogger("sharded_radam")

NAMES = ("gloo", "native", "shared_memory")

REDUCERS: dict[str, type[Reducer]] = {
    "none": AloneReducer,
    "native": NativeReducer,
    "gloo": GlooReducer,
    "shared_memory": SharedMemoryReducer,
}
"""By the name of their transport."""


def make_transport(
    group: dist.ProcessGroup | None, device: torch.device, name: str | None, share_parameters: bool = False
) -> Transport:
    """Collective: the transport for a process group (None: the default one, or one rank without one) and a device.

    Args:
        group: a process group that this process is a member of.
        device: where the buckets are.
        name: ``"native"``, ``"gloo"``, ``"shared_memory"``, or None for the best one. With a Gloo backend on CPU that
            is ``shared_memory`` where all ranks are on one host, otherwise ``gloo``.
        share_parameters: one copy of the parameters for all ranks of the host.

    Raises:
        ValueError: unknown name, a group without this process, or without a backend for the device; or shared memory
            was asked for, and there is none.
    """
    transport, reason = _choose(group, device, name, share_parameters)
    transport.reason = reason
    return transport


def _choose(
    group: dist.ProcessGroup | None, device: torch.device, name: str | None, share_parameters: bool
) -> tuple[Transport, str]:
    if name is not None and name not in NAMES:
        raise ValueError(f"transport={name!r}: expected None or one of {list(NAMES)}")
    if not dist.is_available() or not dist.is_initialized():
        _warn_if_launched()
        return Alone(device), "torch.distributed is not initialised"
    group = _own(group)
    if dist.get_world_size(group) == 1:
        return Alone(device, group), "there is one rank"
    backend = _backend(group, device)
    _check_choice(name, share_parameters, device, backend)
    asked_for = f"transport={name!r} was asked for"
    if name == "native" or not _sends_messages(device, backend):
        return NativeTransport(group, device), asked_for if name else f"{device.type} tensors, a {backend} backend"
    gloo = GlooTransport(group, device)
    if name == "gloo":
        return gloo, asked_for
    signals = connect(gloo.rank, gloo.world_size, gloo.all_gather_objects, _timeout(gloo.group))
    if not isinstance(signals, str):
        return SharedMemoryTransport(group, device, signals, share_parameters), "all ranks are on CPUs of one host"
    if name or share_parameters:
        raise ValueError(f"no shared memory between the ranks: {signals}. It needs all ranks on one Linux host")
    reason = f"there is no shared memory between the ranks: {signals}"
    if gloo.rank == 0:
        logger.info("ShardedRAdam: transport gloo, since %s", reason)
    return gloo, reason


def _own(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group given, or the default one."""
    group = dist.group.WORLD if group is None else group
    assert group is not None
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"process_group does not contain this process (global rank {dist.get_rank()}): build the optimizer only "
            "on the ranks of its group, and give it the group that they are in"
        )
    return group


def _backend(group: dist.ProcessGroup, device: torch.device) -> str:
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    backend = backends.get(device.type)
    if backend is None:
        raise ValueError(
            f"parameters are on {device.type}, but the process group has backends for {sorted(backends)} only: "
            "initialise it with a backend for this device, or move the model first"
        )
    return backend


def _sends_messages(device: torch.device, backend: str) -> bool:
    return backend == "gloo" and device.type == "cpu"


def _check_choice(name: str | None, share_parameters: bool, device: torch.device, backend: str) -> None:
    messages = _sends_messages(device, backend)
    if name in ("gloo", "shared_memory") and not messages:
        raise ValueError(
            f"transport={name!r} is for CPU tensors and a gloo backend; here are {device.type} and {backend!r}"
        )
    if share_parameters and not (messages and name in (None, "shared_memory")):
        raise ValueError("share_parameters=True needs transport='shared_memory': all ranks on CPUs of one host, Gloo")


def _timeout(group: dist.ProcessGroup) -> float:
    """Seconds that a Gloo group waits for a rank."""
    timeout: dt.timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return timeout.total_seconds()


def _warn_if_launched() -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        warnings.warn(
            f"WORLD_SIZE is {launched}, but torch.distributed is not initialised: this optimizer will neither shard "
            "nor communicate. Call torch.distributed.init_process_group() before it is built.",
            stacklevel=2,
        )
