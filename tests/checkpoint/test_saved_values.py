"""What users keep beside weights and moments comes back as it was, or is an error at once when it is saved."""

from __future__ import annotations

import io
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.nesting import flatten_nested, leaves_of, nest
from sharded_radam.checkpoint.format.verification import verify
from sharded_radam.state.values import plain, without_numpy
from tests.ranks import WORLD_SIZES, run

pytestmark = pytest.mark.quick

VALUES: tuple[Any, ...] = (
    None,
    True,
    7,
    2.5,
    1 + 2j,
    "text",
    b"\x00\xff",
    (),
    [],
    {},
    (1, "a", None),
    [1, [2, [3]]],
    {1, 2},
    {"a": 1},
    {"a": {"b": {}}},
    {"layer": {3: "x", (1, 2): "y", None: "z", "3": "w"}},
    {"a.b": 1, "a": {"b": 2}},
    OrderedDict(b=1, a=OrderedDict(c=2)),
    Counter(a=2),
    torch.float16,
    torch.tensor(-0.0),
    torch.arange(5),
    torch.zeros(0, 3),
    {"t": torch.eye(2), "list": [torch.ones(2), 3, {"k": torch.tensor(4)}], "none": None},
    {"t": [torch.ones(1, dtype=torch.bfloat16), {}]},
    (torch.ones(2), [torch.zeros(1)]),
)


def same(one: Any, other: Any) -> bool:
    """Equal in value and in all types; a dict's keys may be in another order."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.tolist() == other.tolist()
            and same_sign(one, other)
        )
    if isinstance(one, dict):
        keys, others = [*map(repr, one)], [*map(repr, other)]
        in_order = keys == others or (type(one) is dict and sorted(keys) == sorted(others))
        return in_order and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def same_sign(one: Tensor, other: Tensor) -> bool:
    return one.dtype == torch.bool or bool((torch.signbit(one) == torch.signbit(other)).all())


def assert_all_same(found: Any, wanted: Any, what: object = "") -> None:
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert same(one, other), (what, number, one, other)


# A model's extra state


class Keeping(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.zeros(3))

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


def keeping(values: Any) -> Any:
    return nn.ModuleList(Keeping(value) for value in values)


def save_extra_state(rank: int, world_size: int, folder: str) -> None:
    # Other ranks have other values, of other types: rank 0's are saved, as its buffers are.
    values = VALUES if rank == 0 else VALUES[::-1]
    CheckpointManager(folder).save(world_size, model=keeping(values))


def load_extra_state(rank: int, world_size: int, folder: str, saved_at: int) -> None:
    for new in ({}, {"other": {"keys": torch.ones(2)}}, torch.ones(7), None):
        model = keeping([deepcopy(new) for _ in VALUES])
        CheckpointManager(folder).load(saved_at, model=model)
        assert_all_same([module.value for module in model], VALUES, (rank, world_size, new))


@pytest.mark.parametrize("saved_at", WORLD_SIZES)
def test_extra_state(tmp_path: Path, saved_at: int) -> None:
    run(save_extra_state, saved_at, str(tmp_path))
    verify(read_index(tmp_path / f"step_{saved_at}"))
    for world_size in {1, saved_at, 3}:
        run(load_extra_state, world_size, str(tmp_path), saved_at)


def test_extra_state_that_torch_saved(tmp_path: Path) -> None:
    """Whose parts have names with dots; torch itself loads what it can from ours."""
    value = {"a": {"b": torch.arange(3), "c": 1}, "d": [torch.ones(2), "x"]}
    dcp_save({"model": keeping([value]).state_dict()}, checkpoint_id=tmp_path / "step_1")
    model = keeping([{}])
    CheckpointManager(tmp_path).load(1, model=model)
    assert_all_same([model[0].value], [value])
    CheckpointManager(tmp_path).save(2, model=model)
    into = {
        "model": keeping(
            [{"a": {"b": torch.zeros(3, dtype=torch.long), "c": 0}, "d": [torch.zeros(2), ""]}]
        ).state_dict()
    }
    dcp_load(into, checkpoint_id=tmp_path / "step_2")
    assert_all_same([into["model"]["0._extra_state"]], [value])


def test_strict(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    manager.save(1, model=keeping([{"a": 1}]))
    with pytest.raises(CheckpointError, match=r"2 missing in the checkpoint: model\.1\._extra_state, model\.1\.weight"):
        manager.load(1, model=keeping([1, 2]))
    model = keeping([1, 2])
    manager.load(1, model=model, strict=False)
    assert_all_same([module.value for module in model], [{"a": 1}, 2])
    manager.save(2, model=nn.ModuleList([nn.Linear(3, 1, bias=False)]))
    with pytest.raises(CheckpointError, match=r"1 missing in the checkpoint: model\.0\._extra_state; 1 mismatched"):
        manager.load(2, model=keeping([1]))


# What users keep in groups and in the state of parameters


def build(fill: bool, kind: Callable[..., Any] = ShardedRAdam) -> tuple[Any, Any]:
    """A model and an optimizer; the first one of two groups has values, and so have the parameters' states."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 5))
    named = [*model.named_parameters()]
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    optimizer = kind(groups, lr=0.25)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    if fill:
        for number, value in enumerate(VALUES):
            optimizer.param_groups[0][f"value {number}"] = deepcopy(value)
        optimizer.param_groups[1]["meta"] = {"layer": 3}
        for name, param in named:
            optimizer.state[param] |= own_state(name, param)
    return model, optimizer


def own_state(name: str, param: Tensor) -> dict[str, Any]:
    slow = torch.arange(param.numel(), dtype=torch.float64).view(param.shape)
    values = {f"value {number}": deepcopy(value) for number, value in enumerate(VALUES)} if name == "1.weight" else {}
    return {
        "slow": slow,
        "slow.count": torch.tensor(3),
        "flags": slow > 3,
        "who": {"name": name, "t": slow[:1]},
        **values,
    }


def check_own(model: nn.Module, optimizer: Any, only_tensors: bool = False) -> None:
    for name, param in model.named_parameters():
        found = {key: value for key, value in optimizer.state[param].items() if key not in MOMENTS}
        wanted = own_state(name, param)
        if only_tensors:  # torch's own RAdam casts them to the parameter's dtype, and breaks text
            assert found.keys() == wanted.keys()
            assert torch.equal(found["slow"], wanted["slow"].float())
            continue
        assert found.keys() == wanted.keys(), (name, found.keys(), wanted.keys())
        assert_all_same([found[key] for key in wanted], wanted.values(), name)
    first, second = optimizer.param_groups
    assert_all_same([first[f"value {number}"] for number in range(len(VALUES))], VALUES)
    assert second["meta"] == {"layer": 3}
    assert "meta.layer" not in second


MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_own(rank: int, world_size: int, folder: str) -> None:
    model, optimizer = build(fill=True)
    path = Path(folder, str(world_size))
    if rank:  # of what is not shaped as the parameter, rank 0's counts
        optimizer.state[model[0].bias]["who"] = ["another"]
        optimizer.param_groups[1]["meta"] = rank
    CheckpointManager(folder).save(world_size, model=model, optimizer=optimizer)
    optimizer.save(path / "optimizer")
    consolidated = optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        torch.save(consolidated, path / "consolidated.pt")
        optimizer.state[model[0].bias]["slow"] += 1
        check_consolidated(consolidated)


def check_consolidated(saved: Any) -> None:
    assert torch.equal(saved["state"][1]["slow"], torch.arange(7, dtype=torch.float64)), "it must be a copy"


def load_own(_rank: int, _world_size: int, folder: str, saved_at: int) -> None:
    path = Path(folder, str(saved_at))
    model, optimizer = build(fill=False)
    optimizer.state[model[0].bias]["gone"] = 1
    CheckpointManager(folder).load(saved_at, model=model, optimizer=optimizer)
    check_own(model, optimizer)
    model, optimizer = build(fill=False)
    optimizer.load(path / "optimizer")
    check_own(model, optimizer)
    saved = torch.load(path / "consolidated.pt", weights_only=True)
    model, optimizer = build(fill=False)
    optimizer.load_state_dict(saved)
    check_own(model, optimizer)
    model[0].bias.grad = torch.ones(7)
    optimizer.step()
    check_own(model, optimizer)
    check_own(*deepcopy((model, optimizer)))
    optimizer.state[model[0].bias]["slow"].zero_()
    check_consolidated(saved)
    model, optimizer = build(False, torch.optim.RAdam)
    optimizer.load_state_dict(saved)
    check_own(model, optimizer, only_tensors=True)


@pytest.mark.parametrize("saved_at", WORLD_SIZES)
def test_in_groups_and_state(tmp_path: Path, saved_at: int) -> None:
    (tmp_path / str(saved_at)).mkdir()
    run(save_own, saved_at, str(tmp_path))
    for world_size in {1, saved_at, 3}:
        run(load_own, world_size, str(tmp_path), saved_at)


def check_by_torch(_rank: int, world_size: int, folder: str) -> None:
    """torch's functions load into what is there, so a new optimizer needs the same keys."""
    path = Path(folder, str(world_size))
    model, optimizer = build(fill=False)
    own = {name: own_state(name, param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        optimizer.state[param] |= {"slow": own[name]["slow"], "meta": {"at": {"layer": 3}}}
    optimizer.param_groups[1]["meta"] = {"layer": 3}
    dcp_save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path)
    optimizer.save(path.with_name(f"ours {world_size}"))
    for saved in (path, path.with_name(f"ours {world_size}")):
        model, optimizer = build(fill=False)
        for param in model.parameters():
            optimizer.state[param] |= {
                "slow": torch.zeros_like(param, dtype=torch.float64),
                "meta": {"at": {"layer": 0}},
            }
        optimizer.param_groups[1]["meta"] = {"layer": 0}
        state = {"optim": get_optimizer_state_dict(model, optimizer)}
        dcp_load(state, checkpoint_id=saved)
        set_optimizer_state_dict(model, optimizer, state["optim"])
        loaded_by_us, other = build(fill=False)
        other.load(saved)
        for one, of in ((optimizer, model), (other, loaded_by_us)):
            for name, param in of.named_parameters():
                assert same(one.state[param]["slow"], own[name]["slow"])
                assert one.state[param]["meta"] == {"at": {"layer": 3}}
            assert one.param_groups[1]["meta"] == {"layer": 3}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_by_torch(tmp_path: Path, world_size: int) -> None:
    run(check_by_torch, world_size, str(tmp_path))


def test_keys_that_are_no_parameters() -> None:
    """torch keeps them, and the state of parameters that take no part."""
    numbers = nn.Parameter(torch.arange(3), requires_grad=False)
    optimizer: Any = ShardedRAdam([nn.Parameter(torch.ones(2)), numbers])
    optimizer.state["count"] = {"of all": 4}
    optimizer.state[numbers] |= {"step": torch.zeros(()), "seen": [1]}
    saved = optimizer.consolidate_state_dict()
    assert saved is not None
    assert saved["state"]["count"] == {"of all": 4}
    other = nn.Parameter(torch.arange(3), requires_grad=False)
    new: Any = ShardedRAdam([nn.Parameter(torch.ones(2)), other])
    new.load_state_dict(saved)
    assert new.state["count"] == {"of all": 4}
    assert new.state[other]["seen"] == [1]


# What cannot be saved


class Unknown:
    pass


def cannot_be_saved() -> list[Any]:
    own: list[Any] = []
    own.append(own)
    return [lambda: 0, sys.stdout, Unknown(), {"deep": [Unknown()]}, torch.eye(2).to_sparse(), own, {torch.ones(1): 1}]


def check_refused(rank: int, world_size: int, folder: str) -> None:
    manager = CheckpointManager(folder)
    for number, bad in enumerate(cannot_be_saved()):
        for place in NAMES if number < 2 else ("extra", "group"):
            model, optimizer = build(fill=False)
            model.append(Keeping(bad if place == "extra" else None))
            arguments: dict[str, Any] = {"model": model, "optimizer": optimizer}
            if place in ("user", "data"):
                arguments[place] = {"f": bad}
            elif place == "scheduler":
                arguments[place] = Scheduler(bad)
            elif place == "group":
                optimizer.param_groups[1]["f"] = bad
            elif place == "state" and rank in (0, world_size - 1):  # one other rank is enough
                optimizer.state[model[1].weight]["f"] = bad
            with pytest.raises(CheckpointError) as caught:
                manager.save(1, blocking=False, **arguments)  # not to be found out in the background
            assert NAMES[place] in str(caught.value), str(caught.value)
            if place in ("group", "state"):
                with pytest.raises(CheckpointError, match=r"which cannot be saved|contains itself|as a key"):
                    optimizer.save(Path(folder, "x"))
            if place == "group":
                with pytest.raises(ValueError, match=r"param_groups\.1\.f"):
                    optimizer.consolidate_state_dict()
    assert not [*Path(folder).iterdir()]
    manager.close()


class Scheduler:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"f": self.value}


NAMES = {
    "user": "user['f']",
    "data": "data['f']",
    "scheduler": "scheduler['f']",
    "extra": "model.2._extra_state",
    "group": "param_groups.1.f",
    "state": "optim.state.1.weight.f",
}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_cannot_be_saved_is_an_error_at_once(tmp_path: Path, world_size: int) -> None:
    run(check_refused, world_size, str(tmp_path))


# numpy


def check_numpy(rank: int, world_size: int, folder: str) -> None:
    np = pytest.importorskip("numpy")
    path = Path(folder, str(world_size))
    model: Any = nn.Linear(3, 4)
    optimizer = ShardedRAdam(
        model.named_parameters(), lr=np.float64(0.5), betas=(np.float32(0.5), np.float64(0.75)), eps=np.float16(0.125)
    )
    optimizer.param_groups[0] |= {
        "flag": np.bool_(True),
        "text": np.str_("t"),
        "long": np.longdouble(0.5),
        "n": np.int8(3),
    }
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[model.bias] |= {
        "step": np.int64(9),
        "seen": {"at": (np.int32(4), np.float32(1.5))},
        "array": np.arange(6, dtype=">i4").reshape(2, 3)[:, ::-1],
        "flat": np.ones(4),
        "zero": np.array(2.5),
    }
    saved = optimizer.consolidate_state_dict(to=0)
    if saved is not None:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        assert_numbers(saved["param_groups"][0], saved["state"][1])
    optimizer.save(path / "ours", model=model)
    dcp_save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=path / "torch's")
    manager = CheckpointManager(path)
    model.get_extra_state = lambda: {"a": np.float64(2.0)}
    manager.save(1, model=model, optimizer=optimizer, user=(np.int64(1), np.ones(2)), data=np.float64(3.0))
    del model.get_extra_state
    for kind in ("ours", "torch's"):
        new = nn.Linear(3, 4)
        loaded = ShardedRAdam(new.named_parameters())
        loaded.load(path / kind)
        assert_numbers(loaded.param_groups[0], loaded.state[new.bias])
    restored = manager.load(1)
    assert_all_same([restored.user, restored.data], [(1, torch.ones(2, dtype=torch.float64)), 3.0])


def assert_numbers(group: dict[str, Any], state: dict[str, Any]) -> None:
    assert_all_same(
        [group[key] for key in ("lr", "betas", "eps", "flag", "text", "long", "n")],
        [0.5, (0.5, 0.75), 0.125, True, "t", 0.5, 3],
    )
    array = torch.tensor([[2, 1, 0], [5, 4, 3]], dtype=torch.int32)
    wanted = [{"at": (4, 1.5)}, array, torch.ones(4, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)]
    assert_all_same([state[key] for key in ("seen", "array", "flat", "zero")], wanted)
    assert float(state["step"]) == 9


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_numpy(tmp_path: Path, world_size: int) -> None:
    pytest.importorskip("numpy")
    run(check_numpy, world_size, str(tmp_path))


def test_arrays_that_are_no_tensors() -> None:
    np = pytest.importorskip("numpy")
    masked = np.ma.masked_array([1.0, 2.0], [True, False])
    for bad in (masked, np.array(["a"]), np.array([None]), np.zeros(2, np.longdouble), np.datetime64("2020-01-01")):
        with pytest.raises(ValueError, match=r"user\['x'\] is a (numpy|datetime)"):
            plain({"x": bad}, "user")
    assert without_numpy(masked, "x") is masked


# Parts


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_parts(value: Any) -> None:
    found = leaves_of(value)
    assert same(nest(found), value)
    assert found


TENSOR = torch.zeros(1)


def test_names_are_torchs() -> None:
    rng = random.Random(0)

    def value(depth: int) -> Any:
        kind = rng.choice(("dict", "list", "tuple", "tensor", "text")) if depth else "text"
        if kind == "dict":
            return {rng.choice((0, 1, "0", "a", "a.b", None)): value(depth - 1) for _ in range(rng.randint(0, 3))}
        inner = [value(depth - 1) for _ in range(rng.randint(0, 3))] if kind in ("list", "tuple") else []
        return {"list": inner, "tuple": (*inner,), "tensor": TENSOR, "text": "x"}[kind]

    compared = 0
    for _ in range(3000):
        nested = {"x": value(4), "y": value(3)}
        try:
            expected = flatten_state_dict(nested)
        except ValueError:  # two of one name
            with pytest.raises(ValueError, match="two values are named"):
                flatten_nested(nested)
        else:
            assert flatten_nested(nested) == expected
            compared += 1
    assert compared > 2000


def test_views_are_saved_without_what_they_are_views_of(tmp_path: Path) -> None:
    CheckpointManager(tmp_path).save(1, user=(torch.zeros(10**6)[:2],))
    assert sum(path.stat().st_size for path in (tmp_path / "step_1").iterdir()) < 10**5
