"""What ``save`` writes, the same call loads, whatever names there are; and torch's converters keep the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint.convert.consolidate import consolidate
from sharded_radam.checkpoint.format.index import read_index
from tests.cases import set_grads
from tests.ranks import run

Pairs = Iterable[Any]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)))


def wrapped() -> nn.Module:
    first, second = plain().children()
    compiled: Any = torch.compile(first)
    return nn.Sequential(compiled, checkpoint_wrapper(second))


def digits() -> nn.Module:
    return nn.ParameterList([nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(7))])


def last(params: Callable[[nn.Module], Pairs]) -> Callable[[nn.Module], Pairs]:
    """Of the last child only: its own names are not the model's."""
    return lambda model: params([*model.children()][-1])


def named(model: nn.Module) -> Pairs:
    return model.named_parameters()


def unnamed(model: nn.Module) -> Pairs:
    return model.parameters()


def with_prefix(prefix: str) -> Callable[[nn.Module], Pairs]:
    return lambda model: [(prefix + name, param) for name, param in model.named_parameters()]


def two_groups(model: nn.Module) -> Pairs:
    first, *rest = model.named_parameters()
    return [{"params": rest}, {"params": [first], "lr": 0.5}]


def two_unnamed_groups(model: nn.Module) -> Pairs:
    first, *rest = model.parameters()
    return [{"params": rest}, {"params": [first], "lr": 0.5}]


def tail_of_a_list(model: nn.Module) -> Pairs:
    """Names that are numbers, and not positions."""
    return [*model.named_parameters()][1:]


def names_of_its_own(model: nn.Module) -> Pairs:
    return [(f"its.own.{number}", param) for number, param in enumerate(model.parameters())]


ROWS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Pairs]]] = {
    "names": (plain, named),
    "no names": (plain, unnamed),
    "two groups": (plain, two_groups),
    "two groups without names": (plain, two_unnamed_groups),
    "a part": (plain, last(named)),
    "a part without names": (plain, last(unnamed)),
    "a part with a prefix": (plain, last(with_prefix("module."))),
    "module.": (plain, with_prefix("module.")),
    "_orig_mod.": (plain, with_prefix("_orig_mod.")),
    "module._orig_mod.": (plain, with_prefix("module._orig_mod.")),
    "_checkpoint_wrapped_module.": (plain, with_prefix("_checkpoint_wrapped_module.")),
    "wrapped modules": (wrapped, named),
    "wrapped modules without names": (wrapped, unnamed),
    "a wrapped part": (wrapped, last(named)),
    "numbers as names": (digits, named),
    "some numbers as names": (digits, tail_of_a_list),
    "names of its own": (plain, names_of_its_own),
}


def build(row: str, steps: int) -> tuple[nn.Module, ShardedRAdam]:
    make, params = ROWS[row]
    model = make()
    optimizer = ShardedRAdam(params(model), bucket_cap_mb=1e-4)
    for step in range(1, steps + 1):
        set_grads(model.parameters(), step)
        optimizer.step()
    return model, optimizer


def state_of(optimizer: Any) -> list[Any]:
    """By position, on every rank."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [{key: value.clone() for key, value in optimizer.state[param].items()} for param in params]


def assert_same_state(one: Any, other: Any, what: object) -> None:
    for ours, theirs in zip(state_of(one), state_of(other), strict=True):
        assert ours.keys() == theirs.keys(), what
        assert all(torch.equal(ours[key].double(), theirs[key].double()) for key in ours), what
    assert [group["lr"] for group in one.param_groups] == [group["lr"] for group in other.param_groups]


FEW = ("two groups without names", "a part with a prefix")
"""Rows for many ranks, whose number changes nothing but who writes what."""


def check_same_calls(rank: int, world_size: int, folder: str) -> None:
    for number, row in enumerate(ROWS if world_size < 8 else FEW):
        model, optimizer = build(row, 3)
        manager = CheckpointManager(Path(folder, "manager"))
        manager.save(number, model=model, optimizer=optimizer)
        optimizer.save(Path(folder, f"alone {number}"))
        has_names = all("param_names" in group for group in optimizer.param_groups)
        if not has_names:
            optimizer.save(Path(folder, f"model {number}"), model=model)
        # The last one loads by its own names what was saved by the model's.
        for call in ("manager", "alone", "of the manager's" if has_names else "model"):
            new, loaded = build(row, 1)
            if call == "manager":
                report = manager.load(number, model=new, optimizer=loaded).optimizer
            elif call == "alone":
                report = loaded.load(Path(folder, f"alone {number}"))
            elif call == "model":
                report = loaded.load(Path(folder, f"model {number}"), model=new)
            else:
                report = loaded.load(manager.folder / f"step_{number}")
            assert report is not None
            assert not report.differences()
            assert report.loaded == report.parameters
            assert_same_state(optimizer, loaded, (row, call))
        saved = optimizer.consolidate_state_dict(to=0)
        if rank == 0:
            out = Path(folder, f"{number}.pt")
            consolidate(read_index(manager.folder / f"step_{number}"), out)
            build_alone(row)[1].load_state_dict(torch.load(out, weights_only=True))
            assert saved is not None
            for at, entry in torch.load(out, weights_only=True)["state"].items():
                assert all(torch.equal(entry[kind], saved["state"][at][kind]) for kind in entry), row


def build_alone(row: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    make, params = ROWS[row]
    model = make()
    return model, torch.optim.RAdam(params(model))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_same_call_loads(tmp_path: Path, world_size: int) -> None:
    run(check_same_calls, world_size, str(tmp_path), timeout=180.0)


def save_rows(_rank: int, _world_size: int, folder: str) -> None:
    for number, row in enumerate(ROWS):
        build(row, 3)[1].save(Path(folder, str(number)))


@pytest.mark.quick
@pytest.mark.parametrize("saved_at", [1, 2, 3])
@pytest.mark.filterwarnings("ignore")
def test_converted_by_torch(tmp_path: Path, saved_at: int) -> None:
    """From a checkpoint to a file of RAdam, and from a file of RAdam to a checkpoint."""
    run(save_rows, saved_at, str(tmp_path))
    for number, row in enumerate(ROWS):
        _, optimizer = build(row, 3)
        file = tmp_path / f"{number}.pt"
        dcp_to_torch_save(tmp_path / str(number), file)
        _, radam = build_alone(row)
        radam.load_state_dict(torch.load(file, weights_only=False)["optim"])
        assert_same_state(optimizer, radam, row)
        torch.save(radam.state_dict(), file)
        torch_save_to_dcp(file, tmp_path / f"back {number}")
        _, loaded = build(row, 1)
        loaded.load(tmp_path / f"back {number}")
        assert_same_state(optimizer, loaded, row)


def test_another_call() -> None:
    _, optimizer = build("a part", 1)
    with pytest.raises(CheckpointError, match="are not the given model's"):
        optimizer.save("nowhere", model=nn.Linear(2, 2))
