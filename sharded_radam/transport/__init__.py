"""How shards travel. The only package that calls collectives."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from sharded_radam.store.groups import Groups, backend_of, groups_of, timeout_of
from sharded_radam.store.meeting import Meeting
from sharded_radam.transport.alone import Alone
from sharded_radam.transport.averages import Averages
from sharded_radam.transport.base import Handle, Transport
from sharded_radam.transport.everyone import Everyone
from sharded_radam.transport.gloo import GlooReducer, GlooTransport
from sharded_radam.transport.native import NativeReducer, NativeTransport
from sharded_radam.transport.reducers import AloneReducer, Reducer
from sharded_radam.transport.shared_memory import SharedMemoryReducer, SharedMemoryTransport
from sharded_radam.transport.sockets import connect

__all__ = [
    "REDUCERS",
    "Alone",
    "Averages",
    "Choice",
    "Everyone",
    "Handle",
    "NativeTransport",
    "Reducer",
    "Transport",
    "choose",
    "make_transport",
]

logger = logging.getLogger("sharded_radam")

REDUCERS: dict[str, type[Reducer]] = {
    "none": AloneReducer,
    "native": NativeReducer,
    "gloo": GlooReducer,
    "shared_memory": SharedMemoryReducer,
}
"""By the name of their transport."""

NAMES = sorted(REDUCERS.keys() - {"none"})
"""That a user may ask for."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A transport that this rank would take; ranks whose arguments are equal choose the same one.

    Attributes:
        name: of the transport.
        reason: why it is this one.
        groups, device: what it connects.
        meeting: where all ranks meet; that of the group if None.
        required: whether shared memory was asked for, so that there is no other way if the ranks have none.
        share_parameters: one copy of the parameters for all ranks of the host.
        has_native_replicas: whether replicas use the backend's own collectives, too.
    """

    name: str
    reason: str
    groups: Groups
    device: torch.device
    meeting: Meeting | None = None
    required: bool = False
    share_parameters: bool = False
    has_native_replicas: bool = False

    def connect(self) -> Transport:
        """Collective: make it.

        Raises:
            ValueError: on every rank, if shared memory was asked for, and there is none.
        """
        transport, reason = self._connect()
        transport.reason = reason
        if self.groups.replica is not None:
            transport.add_replicas(self._connect_replicas(transport.meeting))
        return transport

    def _connect(self) -> tuple[Transport, str]:
        groups, places = self.groups, (self.meeting, self.groups.names())
        if self.name == "none" or groups.shard is None:
            return Alone(self.device, groups.shard, *places), self.reason
        if self.name == "native":
            return NativeTransport(groups.shard, self.device, *places), self.reason
        gloo = GlooTransport(groups.shard, self.device, *places)
        if self.name == "gloo":
            return gloo, self.reason
        timeout = min(timeout_of(groups.shard), gloo.meeting.timeout)  # those of a DeviceMesh have torch's default
        signals = connect(gloo.rank, gloo.world_size, gloo.all_gather_objects, timeout, gloo.names)
        problem = signals if isinstance(signals, str) else None
        if groups.replica is not None:  # all shard groups, or none
            problem = gloo.meeting.agree(gloo.operation, problem, decide=_first)
        if not isinstance(signals, str) and problem is None:
            shares = self.share_parameters
            return SharedMemoryTransport(groups.shard, self.device, signals, shares, *places), self.reason
        if not isinstance(signals, str):
            signals.close()
        if self.required:
            raise ValueError(f"no shared memory between the ranks: {problem}. It needs all ranks on one Linux host")
        reason = f"there is no shared memory between the ranks: {problem}"
        if gloo.meeting.rank == 0:
            logger.info("ShardedRAdam: transport gloo, since %s", reason)
        return gloo, reason

    def _connect_replicas(self, meeting: Meeting) -> Transport:
        """They are on several hosts, as a rule: nothing is shared."""
        assert self.groups.replica is not None
        kind = NativeTransport if self.has_native_replicas else GlooTransport
        return kind(self.groups.replica, self.device, meeting, self.groups.names_of_replicas())


def choose(
    groups: Groups,
    device: torch.device,
    name: str | None,
    share_parameters: bool = False,
    meeting: Meeting | None = None,
) -> Choice:
    """The transport for some groups and a device; not collective.

    Args:
        groups: that this process is a member of.
        device: where the buckets are.
        name: ``"native"``, ``"gloo"``, ``"shared_memory"``, or None for the best one. With a Gloo backend on CPU that
            is ``shared_memory`` where all ranks are on one host, otherwise ``gloo``.
        share_parameters: one copy of the parameters for all ranks of the host.
        meeting: where all ranks meet; that of the shard group if None.

    Raises:
        ValueError: unknown name, a group without this process, or without a backend for the device; or shared memory
            was asked for, and there cannot be any.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"transport={name!r}: expected None or one of {NAMES}")
    choice = _choose(groups, device, name, share_parameters)
    replica = groups.replica
    is_native = replica is not None and (name == "native" or not _sends_messages(device, _backend(replica, device)))
    return replace(choice, meeting=meeting, has_native_replicas=is_native)


def _choose(groups: Groups, device: torch.device, name: str | None, share_parameters: bool) -> Choice:
    if groups.shard is None:
        _warn_if_launched()
        return Choice("none", "torch.distributed is not initialised", groups, device)
    if groups.shard_size == 1:
        return Choice("none", "there is one rank", groups, device)
    backend = _backend(groups.shard, device)
    _check_choice(name, share_parameters, device, backend)
    asked_for = f"transport={name!r} was asked for"
    if name == "native" or not _sends_messages(device, backend):
        reason = asked_for if name else f"{device.type} tensors, a {backend} backend"
        return Choice("native", reason, groups, device)
    if name == "gloo":
        return Choice("gloo", asked_for, groups, device)
    required, reason = name is not None or share_parameters, "all ranks are on CPUs of one host"
    return Choice("shared_memory", reason, groups, device, None, required, share_parameters)


def make_transport(
    group: dist.ProcessGroup | None, device: torch.device, name: str | None, share_parameters: bool = False
) -> Transport:
    """Collective: ``choose(...).connect()``, after all ranks have chosen.

    Raises:
        ValueError: on every rank, what ``choose`` raised on one of them.
    """
    choice = Meeting.of(group).attempt(
        "connecting the ranks", lambda: choose(groups_of(group, None), device, name, share_parameters)
    )
    return choice.connect()


def _first(problems: list[str | None]) -> str | None:
    return next(filter(None, problems), None)


def _backend(group: dist.ProcessGroup, device: torch.device) -> str:
    backend = backend_of(group, device.type)
    if backend is None:
        backends = [part.split(":")[0] for part in dist.get_backend_config(group).split(",")]
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


def _warn_if_launched() -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        warnings.warn(
            f"WORLD_SIZE is {launched}, but torch.distributed is not initialised: this optimizer will neither shard "
            "nor communicate. Call torch.distributed.init_process_group() before it is built.",
            stacklevel=2,
        )
