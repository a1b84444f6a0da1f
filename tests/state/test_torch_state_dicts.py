"""torch's own functions for state dicts, in all their options, give and load what they do for torch.optim.RAdam."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sharded_radam import ShardedRAdam
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.compat import VERSION
from tests.cases import assert_same, quietly, set_grads
from tests.ranks import WORLD_SIZES, run

SAVED_AT, END = 6, 7


class Model(nn.Module):
    """A weight in two places, a frozen layer, and sizes that do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(11, 7), nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.body, self.scale = nn.Linear(7, 31), nn.Parameter(torch.ones(()))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.frozen(self.embed(tokens)))) * self.scale + self.body.weight.sum()


def one_group(model: Model) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def two_groups(model: Model) -> list[dict[str, Any]]:
    body = list(model.body.parameters())
    others = [param for param in model.parameters() if all(param is not other for other in body)]
    return [{"params": others}, {"params": body, "lr": 0.05, "weight_decay": 0.1}]


def turned(model: Model) -> list[dict[str, Any]]:
    """The groups and the parameters in them in another order."""
    return [{"params": group["params"][::-1], "lr": 0.5} for group in two_groups(model)[::-1]]


Pair = tuple[Model, torch.optim.Optimizer]


def pair(ours: bool, groups: Callable[[Model], list[dict[str, Any]]] = two_groups) -> Pair:
    model = Model()
    if ours:
        return model, ShardedRAdam(groups(model), lr=0.02, foreach=True, bucket_cap_mb=5e-4)
    return model, torch.optim.RAdam(groups(model), lr=0.02, foreach=True)


def train(both: Pair, first: int, last: int) -> None:
    model, optimizer = both
    for step in range(first, last + 1):
        set_grads([param for param in model.parameters() if param.requires_grad], step)
        optimizer.step()
    optimizer.zero_grad()


def compare(ours: Any, theirs: Any, at: str = "") -> None:
    """Equal values of equal types, whole and plain."""
    assert type(ours) is type(theirs), at
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), at
        for key in ours:
            compare(ours[key], theirs[key], f"{at}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), at
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            compare(one, other, f"{at}.{index}")
    elif isinstance(ours, Tensor):
        assert (ours.dtype, ours.device, ours.stride()) == (theirs.dtype, theirs.device, theirs.stride()), at
        assert torch.equal(ours, theirs), at
    else:
        assert ours == theirs, at


def options(**chosen: bool) -> list[StateDictOptions]:
    """All options that go together, with those that are given."""
    names = ["full_state_dict", "cpu_offload", "flatten_optimizer_state_dict", "broadcast_from_rank0"]
    if VERSION < (2, 11):  # older releases flatten a tied parameter under both names, and cannot take that back
        chosen["flatten_optimizer_state_dict"] = False
    free = [name for name in names if name not in chosen]
    every: list[dict[str, Any]] = [
        {**chosen, **dict(zip(free, flags, strict=True))}
        for flags in itertools.product([False, True], repeat=len(free))
    ]
    return [StateDictOptions(**each) for each in every if each["full_state_dict"] or not each["broadcast_from_rank0"]]


def check_getting(rank: int, world_size: int) -> None:
    pairs = [pair(True), pair(False)]
    for both in pairs:
        train(both, 1, SAVED_AT)
    for chosen in options(full_state_dict=True):
        ours, theirs = (get_optimizer_state_dict(model, optimizer, options=chosen) for model, optimizer in pairs)
        compare(ours, theirs, str(chosen))
        assert bool(ours) == (rank == 0 or not chosen.cpu_offload)
        both_ours, both_theirs = (get_state_dict(model, optimizer, options=chosen) for model, optimizer in pairs)
        compare(both_ours, both_theirs, str(chosen))
    for chosen in options(full_state_dict=False):
        ours, theirs = (get_optimizer_state_dict(model, optimizer, options=chosen) for model, optimizer in pairs)
        assert ours.keys() == theirs.keys()
        kinds = {type(leaf) for leaf in torch.utils._pytree.tree_leaves(ours)} - {Tensor}
        assert (RangeTensor in kinds) == (world_size > 1)


@pytest.mark.quick
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_torch_gets(world_size: int) -> None:
    run(check_getting, world_size)


def load_into(both: Pair, start: Pair, saved: Any, chosen: StateDictOptions) -> list[Tensor]:
    """Load, and train on from the weights of ``start``."""
    model, optimizer = both
    with torch.no_grad():
        for param, value in zip(model.parameters(), start[0].parameters(), strict=True):
            param.copy_(value)
    set_optimizer_state_dict(model, optimizer, saved, options=chosen)
    train(both, SAVED_AT + 1, END)
    return [param.detach().clone() for param in model.parameters()]


def check_setting(rank: int, world_size: int) -> None:
    saved = {ours: pair(ours) for ours in (True, False)}
    for both in saved.values():
        train(both, 1, SAVED_AT)
    for chosen in options(cpu_offload=False):
        dicts = {ours: get_optimizer_state_dict(*both, options=chosen) for ours, both in saved.items()}
        # torch cannot take back what is both full and flattened, but for without the latter option.
        taken = replace(chosen, flatten_optimizer_state_dict=False) if chosen.full_state_dict else chosen
        for groups in (two_groups, one_group, turned):
            if chosen.flatten_optimizer_state_dict and groups is one_group:
                continue  # torch refuses groups that differ
            other = pair(False, groups)
            wanted = load_into(other, saved[False], copy.deepcopy(dicts[False]), taken)
            for source in (True, False):
                if world_size > 1 and source and not chosen.full_state_dict and groups is not two_groups:
                    continue  # parts are for the layout that they are from
                here = copy.deepcopy(dicts[source]) if rank == 0 or not chosen.broadcast_from_rank0 else {}
                loaded = pair(True, groups)
                assert_same(load_into(loaded, saved[True], here, taken), wanted, (str(chosen), groups.__name__, source))
                for ours, theirs in zip(loaded[1].param_groups, other[1].param_groups, strict=True):
                    assert {**ours, "params": 0} == {**theirs, "params": 0}, (str(chosen), groups.__name__, source)


@pytest.mark.quick
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_torch_sets(world_size: int) -> None:
    run(check_setting, world_size)


def check_frozen(_rank: int, _world_size: int, folder: str) -> None:
    """Checkpoints of torch.optim.RAdam, which has no state of frozen parameters, and ours into it."""
    for saver, loader in ((False, True), (True, False), (True, True)):
        for later in (False, True):  # also frozen after it was trained
            wanted = pair(saver)
            train(wanted, 1, SAVED_AT)
            wanted[0].body.requires_grad_(not later)
            path = Path(folder, f"{saver}-{loader}-{later}")
            quietly(dcp_save, {"optim": get_optimizer_state_dict(*wanted)}, checkpoint_id=path)
            loaded = pair(loader)
            loaded[0].body.requires_grad_(not later)
            target = {"optim": get_optimizer_state_dict(*loaded)}
            quietly(dcp_load, target, checkpoint_id=path)
            found = load_into(loaded, wanted, target["optim"], StateDictOptions())
            train(wanted, SAVED_AT + 1, END)
            assert_same(found, wanted[0].parameters(), path)


@pytest.mark.quick
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_frozen_parameters(tmp_path: Path, world_size: int) -> None:
    run(check_frozen, world_size, str(tmp_path))


def check_half(_rank: int, _world_size: int) -> None:
    """What RAdam has for half precision, nested or flattened, has no masters: they round to the parameters."""
    for flatten in (False, True) if VERSION >= (2, 11) else (False,):  # older: KeyError for what a flattened dict lacks
        models = [nn.Linear(5, 31).bfloat16() for _ in range(2)]
        for model in models:
            nn.init.constant_(model.weight, 0.5)
            nn.init.constant_(model.bias, 0.25)
        plain, ours = torch.optim.RAdam(models[0].parameters()), ShardedRAdam(models[1].parameters())
        for optimizer, model in ((plain, models[0]), (ours, models[1])):
            set_grads(model.parameters(), 1)
            optimizer.step()
        chosen = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=flatten)
        saved = get_optimizer_state_dict(models[0], plain, options=chosen)
        set_optimizer_state_dict(models[1], ours, saved, options=StateDictOptions(full_state_dict=True))
        whole = ours.consolidate_state_dict(to=0)
        for index, param in enumerate(models[1].parameters()):
            if whole is not None:
                assert torch.equal(whole["state"][index]["master"].bfloat16(), param.detach())
                moment = plain.state[[*models[0].parameters()][index]]["exp_avg"]
                assert torch.equal(whole["state"][index]["exp_avg"], moment.float())


@pytest.mark.quick
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_half_precision(world_size: int) -> None:
    run(check_half, world_size)


def check_groups_of_ranks(rank: int, _world_size: int) -> None:
    """An optimizer on ranks 1 and 2, and one on ranks 2 and 0: torch's rank 0 may be any of its group, or none."""
    groups = [dist.new_group(members) for members in ((1, 2), (2, 0))]  # in whatever order
    for group in groups:
        if rank not in dist.get_process_group_ranks(group):
            continue
        model = Model()
        optimizer = ShardedRAdam(two_groups(model), lr=0.02, foreach=True, process_group=group)
        other = pair(False)
        train((model, optimizer), 1, SAVED_AT)
        train(other, 1, SAVED_AT)
        for chosen in options(full_state_dict=True, broadcast_from_rank0=False):
            found, wanted = (
                get_optimizer_state_dict(model, optimizer, options=chosen),
                get_optimizer_state_dict(*other, options=chosen),
            )
            compare(found, wanted, str(chosen))


@pytest.mark.quick
def test_groups_of_ranks() -> None:
    run(check_groups_of_ranks, 3)
