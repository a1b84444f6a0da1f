"""The state as dicts: whole on one rank or on all, by collectives; or this rank's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import RAdam

from sharded_radam import callers
from sharded_radam.buckets.flat import find_slot
from sharded_radam.build import Shards, follow_groups
from sharded_radam.state.dicts import (
    export_step,
    full_precision,
    index_state,
    is_left_alone,
    pack_groups,
    plain_groups,
    plain_state,
    users_own,
)
from sharded_radam.state.edits import has_param, take_back
from sharded_radam.state.gather import gather_flat, gather_slot
from sharded_radam.state.values import without_numpy

T = TypeVar("T")
State = dict[Tensor, Any]
"""State by parameter, with tensors of the parameters' shapes, or range tensors; and what users keep by other keys."""

_CPU = torch.device("cpu")


# The whole state


def consolidate(optimizer: RAdam, shards: Shards, to: int | None) -> dict[str, Any] | None:
    """Collective: see ShardedRAdam.consolidate_state_dict."""
    to = shards.ranks()[0] if to is None else to
    what = f"consolidate_state_dict(to={to}) {shards.when}"
    made = _gather(optimizer, shards, what, to, _CPU, lambda state: (state, _copy(optimizer, state)))
    if made is None:
        return None
    state, whole = made
    if shards.transport.world_size > 1:
        shards.consolidated = state
    return whole


@torch.no_grad()
def _gather(
    optimizer: RAdam,
    shards: Shards,
    what: str,
    to: int | None,
    device: torch.device | None,
    finish: Callable[[State], T],
) -> T | None:
    """Collective: the whole state on global rank ``to``, or on all; on a device, or where the parameters are.

    Of a mesh, only the shard group of rank ``to`` has something to send.

    Returns:
        What ``finish`` makes of it, which may fail as well; None on ranks that do not get it.
    """
    follow_groups(optimizer, shards)
    own = shards.transport.meeting.attempt(what, lambda: _prepare_to_gather(optimizer, shards, to))
    state: State = {}
    row, is_target = shards.row(), to in (None, shards.global_rank)
    with _together_to_the_end(shards, what):
        for flat in shards.flats if to is None or to in row else ():
            at = None if to is None else row.index(to)
            gathered = gather_flat(flat, flat.state, shards.transport, at, device or flat.buffer.device)
            for param, tensors in zip(flat.params, gathered or [{}] * len(flat.params), strict=True):
                step = export_step(optimizer.state[param]["step"])
                state[param] = {"step": step.to(device or step.device), **tensors}
        for key, value in own.items():
            state[key] = {**state[key], **value} if key in state else value
        return finish(state) if is_target else None


@contextmanager
def _together_to_the_end(shards: Shards, what: str) -> Iterator[None]:
    """Raise on all ranks what one of them raises in here, also on those that have nothing left to do."""
    with shards.transport.together(what):
        yield
        shards.transport.meeting.agree(what, is_within=True)


@torch.no_grad()
def _prepare_to_gather(optimizer: RAdam, shards: Shards, to: int | None) -> dict[Any, Any]:
    """All that can fail on one rank; returns what users keep in the state."""
    if to is not None:
        _check_target(shards, to)
    shards.wait()
    plain_groups(optimizer.param_groups)  # raises if they cannot be saved
    own = plain_state(optimizer.state, optimizer.param_groups)
    for flat in shards.flats:
        take_back(optimizer, flat)
    return own


def _check_target(shards: Shards, to: int) -> None:
    ranks = shards.ranks()
    if to not in ranks:
        those = f"0 to {len(ranks) - 1}" if ranks == [*range(len(ranks))] else f"one of the global ranks {ranks}"
        raise ValueError(f"to={to}: expected a rank of the group, {those}")


@torch.no_grad()
def full_state(optimizer: RAdam, shards: Shards, param: Tensor) -> dict[str, Any]:
    """Collective: see ShardedRAdam.full_state."""
    shards.wait()
    follow_groups(optimizer, shards)
    index, slot = find_slot(shards.flats, param)
    flat, own = shards.flats[index], optimizer.state.get(param)
    if not own:
        return {}
    take_back(optimizer, flat)
    with shards.transport.together(f"full_state() {shards.when}"):
        tensors = {name: gather_slot(flat, slot, local, shards.transport) for name, local in flat.state.items()}
    return {**users_own(own), "step": export_step(own["step"]), **tensors}


@torch.no_grad()
def full_precision_state_dict(
    optimizer: RAdam, shards: Shards, model: nn.Module, to: int | None
) -> dict[str, Any] | None:
    """Collective: see ShardedRAdam.full_precision_state_dict."""
    to = shards.ranks()[0] if to is None else to
    follow_groups(optimizer, shards)
    what = f"full_precision_state_dict(to={to}) {shards.when}"
    shards.transport.meeting.attempt(what, lambda: _prepare_masters(optimizer, shards, to))
    masters: dict[Tensor, Tensor] = {}
    row = shards.row()
    with _together_to_the_end(shards, what):
        for flat in (flat for flat in shards.flats if flat.is_half and to in row):
            gathered = gather_flat(flat, {"master": flat.state["master"]}, shards.transport, row.index(to), _CPU)
            masters |= {p: t["master"] for p, t in zip(flat.params, gathered or [], strict=gathered is not None)}
        return full_precision(model, masters) if shards.global_rank == to else None


def _prepare_masters(optimizer: RAdam, shards: Shards, to: int) -> None:
    """All that can be wrong on one rank, before masters are gathered."""
    _check_target(shards, to)
    shards.wait()
    for flat in (flat for flat in shards.flats if flat.is_half):
        take_back(optimizer, flat)
        flat.take_back(flat.check(partial(has_param, optimizer)))
        flat.follow()


# What state_dict() returns


def state_dict(optimizer: RAdam, shards: Shards) -> dict[str, Any]:
    """See ShardedRAdam.state_dict."""
    transport = shards.transport
    asked = callers.takes_whole()
    if asked is not None and transport.world_size > 1:
        return _with_hooks(
            optimizer, lambda: _as_dict(optimizer, _gather_for_torch(optimizer, shards, asked.on_rank_0))
        )
    if callers.takes_parts() or transport.world_size == 1:
        return sharded_state_dict(optimizer, shards)
    whole = shards.consolidated
    if whole is None:
        raise RuntimeError(
            f"state_dict() on rank {transport.rank} of {transport.world_size}: only this rank's part of "
            "the state is here, and a file of it could never be loaded; no file has been touched. Expected one of: "
            "consolidate_state_dict(to=0) on all ranks after the last step, then state_dict() on rank 0 alone; "
            "save(path), or CheckpointManager; the functions of torch.distributed.checkpoint; for that part, "
            "sharded_state_dict(). (Learning rates and the like are in param_groups.)"
        )
    return _with_hooks(optimizer, lambda: _copy(optimizer, whole))


def sharded_state_dict(optimizer: RAdam, shards: Shards) -> dict[str, Any]:
    """See ShardedRAdam.sharded_state_dict."""
    follow_groups(optimizer, shards)
    return _with_hooks(optimizer, lambda: _as_dict(optimizer, local_state(optimizer, shards)))


def local_state(optimizer: RAdam, shards: Shards) -> State:
    """This rank's part of the state: live views, at several ranks as range tensors."""
    state: State = dict(optimizer.state)
    for flat in shards.flats:
        for slot, param in enumerate(flat.params):
            tensors = flat.range_tensors(slot) if shards.transport.world_size > 1 else {}
            own = {**without_numpy(optimizer.state[param], "state"), **tensors}
            state[param] = {**own, "step": export_step(own["step"])} if "step" in own else own
    return state


def _gather_for_torch(optimizer: RAdam, shards: Shards, on_rank_0: bool) -> State:
    """Collective: whole tensors, on all ranks, or on torch's rank 0; it then drops what the others return."""
    what = f"state_dict() for torch, with full_state_dict=True, {shards.when}"
    if not on_rank_0:
        return _gather(optimizer, shards, what, None, None, dict) or {}
    if 0 not in shards.ranks():
        return local_state(optimizer, shards)
    whole = _gather(optimizer, shards, what, 0, _CPU, dict)
    return local_state(optimizer, shards) if whole is None else whole


def _as_dict(optimizer: RAdam, state: Mapping[Tensor, Any]) -> dict[str, Any]:
    """State by parameter in torch's format, with the param groups as they are now."""
    kept = {param: own for param, own in state.items() if not is_left_alone(param, own)}
    return {"state": index_state(kept, optimizer.param_groups), "param_groups": pack_groups(optimizer.param_groups)}


def _copy(optimizer: RAdam, state: Mapping[Tensor, Any]) -> dict[str, Any]:
    """The same, of which nothing changes later but the tensors of ``state``."""
    copies = {key: dict(own) if isinstance(own, dict) else own for key, own in state.items()}
    return {**_as_dict(optimizer, copies), "param_groups": plain_groups(optimizer.param_groups)}


def _with_hooks(optimizer: RAdam, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    made = make()
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post_hook(optimizer, made)
        made = made if replaced is None else replaced
    return made
