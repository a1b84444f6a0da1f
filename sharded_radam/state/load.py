"""Loading a state dict: all of it is read and checked first, then taken over."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch.optim import RAdam

from sharded_radam.buckets.flat import adopt_master
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.build import Shards, follow_groups
from sharded_radam.preflight import check_shardable
from sharded_radam.state.dicts import (
    Entry,
    check_groups,
    check_keys,
    merge_groups,
    other_state,
    read_entry,
    saved_state,
    users_own,
)
from sharded_radam.state.edits import set_counts
from sharded_radam.state.values import copied


class Loaded(NamedTuple):
    """A state dict that was checked: param groups, for each flat an entry a slot, and what users keep by other keys."""

    groups: list[dict[str, Any]]
    entries: list[list[Entry]]
    others: dict[Any, Any]


def load_state_dict(optimizer: RAdam, shards: Shards, state_dict: dict[str, Any]) -> None:
    """Collective: load a dict, with torch's hooks; nothing is changed if one rank's is wrong."""
    follow_groups(optimizer, shards)
    what = f"load_state_dict() {shards.when}"
    loaded = shards.transport.meeting.attempt(what, lambda: _read(optimizer, shards, state_dict))
    take_over(optimizer, shards, loaded.groups, loaded.entries)
    for key, value in loaded.others.items():
        optimizer.state[key] = deepcopy(value)
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _read(optimizer: RAdam, shards: Shards, state_dict: dict[str, Any]) -> Loaded:
    """Check all of a dict: its groups, state, and what users keep that is no parameter's of ours."""
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    check_keys(state_dict)
    saved_groups = state_dict["param_groups"]
    check_groups(optimizer.param_groups, saved_groups)
    by_param = saved_state(optimizer.param_groups, state_dict)
    entries = [
        [
            read_entry(spec.name, param, param.shape, flat.spans(slot), by_param[param])
            for slot, (param, spec) in enumerate(zip(flat.params, flat.specs, strict=True))
        ]
        for flat in shards.flats
    ]
    groups = merge_groups(optimizer.param_groups, saved_groups, optimizer.defaults)
    check_shardable(groups, bool(shards.options.fused))
    ours = {param for flat in shards.flats for param in flat.params}
    others = {key: value for key, value in other_state(by_param, state_dict).items() if key not in ours}
    return Loaded(groups, entries, others)


@torch.inference_mode(False)  # what is loaded takes steps later
@torch.no_grad()
def take_over(
    optimizer: RAdam, shards: Shards, groups: list[dict[str, Any]], entries: Sequence[Sequence[Entry | None]]
) -> int:
    """Let groups and entries that were checked before be the optimizer's; parameters without one keep their state.

    Returns:
        Of how many parameters, which are not of half precision, the weights are now the saved masters.
    """
    from_masters = 0
    shards.wait()
    for param in (param for flat in shards.parked for param in flat.params):
        optimizer.state.pop(param, None)
    optimizer.param_groups = groups
    shards.consolidated = None
    for flat, flat_entries in zip(shards.flats, entries, strict=True):
        counts = []
        for slot, (param, entry) in enumerate(zip(flat.params, flat_entries, strict=True)):
            if entry is not None:
                tensors = dict(entry.tensors or {})
                master = tensors.pop("master", None) if not flat.is_half else None
                if master is not None and not isinstance(master, RangeTensor):
                    from_masters += adopt_master(param, master)
                flat.set_state(slot, tensors)
                _take_over_own(optimizer.state[param], entry.own, param.device)
                optimizer.state[param].update(flat.local_state[slot])
            counts.append(float(optimizer.state[param]["step"]) if entry is None else entry.step)
        set_counts(optimizer, flat, counts)
    return from_masters


def _take_over_own(state: dict[Any, Any], own: dict[Any, Any], device: torch.device) -> None:
    """What a user keeps of a parameter; copied, unless it was loaded in place."""
    for key in users_own(state).keys() - own.keys():
        del state[key]
    for key, value in own.items():
        if key not in state or state[key] is not value:
            state[key] = copied(value, device)
