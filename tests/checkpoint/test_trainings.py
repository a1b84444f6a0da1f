"""CheckpointManager with several models, optimizers and schedulers; loading is all or nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR, LinearLR, MultiStepLR, SequentialLR

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint import objects, undo
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.verification import verify
from tests.cases import assert_same, set_grads
from tests.ranks import WORLD_SIZES, run

Muon: Any = getattr(torch.optim, "Muon", None)  # from torch 2.9 on


def net(seed: int, width: int = 11) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, width), nn.BatchNorm1d(width), nn.Linear(width, 7))


def values(thing: Any) -> Any:
    """Tensors, and what has them, as plain values that can be compared."""
    if isinstance(thing, Tensor):
        return (str(thing.dtype), tuple(thing.shape), [str(x) for x in thing.detach().double().reshape(-1).tolist()])
    if isinstance(thing, dict):
        return {key: values(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [type(thing).__name__, *map(values, thing)]
    return thing


def state_of(optimizer: Any) -> Any:
    """The state in this rank, groups included."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return values([[dict(optimizer.state.get(param, {})) for param in params], groups])


# A GAN: two of all


class Gan:
    def __init__(self) -> None:
        self.g, self.d = net(1), net(2, 13)
        self.opt_g = ShardedRAdam(self.g.parameters(), lr=0.01, foreach=True, bucket_cap_mb=1e-3)
        self.opt_d = ShardedRAdam(self.d.parameters(), lr=0.02, foreach=True, bucket_cap_mb=2e-3)
        self.schedules = [
            MultiStepLR(self.opt_g, [2, 4, 6]),
            SequentialLR(self.opt_d, [LinearLR(self.opt_d), LambdaLR(self.opt_d, lambda step: 0.9**step)], [3]),
        ]

    def parts(self) -> dict[str, Any]:
        return {
            "model": {"g": self.g, "d": self.d},
            "optimizer": {"g": self.opt_g, "d": self.opt_d},
            "scheduler": self.schedules,
        }

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            noise = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
            for optimizer, sign in ((self.opt_g, 1), (self.opt_d, -1)):
                self.opt_g.zero_grad()
                self.opt_d.zero_grad()
                (sign * self.d(self.g(noise)).square().mean()).backward()
                optimizer.step()
            for schedule in self.schedules:
                schedule.step()

    def tensors(self) -> list[Tensor]:
        return [tensor.clone() for model in (self.g, self.d) for tensor in model.state_dict().values()]


def check_gan(rank: int, world_size: int, folder: str, save: bool) -> list[Tensor]:
    gan, manager = Gan(), CheckpointManager(folder)
    if save:
        gan.steps(1, 3)
        manager.save(3, **gan.parts())
    else:
        gan.steps(7, 8)  # what is there is replaced
        restored = manager.load_latest(**gan.parts())
        assert restored is not None
        assert restored.optimizer is None
        assert {name: report.loaded for name, report in restored.optimizers.items()} == {"g": 6, "d": 6}
        assert {report.step for report in restored.optimizers.values()} == {3}
        assert gan.opt_g.param_groups[0]["lr"] == pytest.approx(0.001)
    gan.steps(4, 7)
    return gan.tensors()


@pytest.mark.quick
@pytest.mark.parametrize("saved_at", WORLD_SIZES)
def test_two_of_all(tmp_path: Path, saved_at: int) -> None:
    wanted = run(check_gan, saved_at, str(tmp_path), True)[0]
    index = read_index(tmp_path / "step_3")
    verify(index)
    assert {"model.g.0.weight", "model.d.1.running_mean", "optim.g.state.2.bias.exp_avg"} <= index.tensors.keys()
    assert {"scheduler.0", "scheduler.1", "optim.d.param_groups.0.lr"} <= index.objects.keys()
    for world_size in WORLD_SIZES:
        for result in run(check_gan, world_size, str(tmp_path), False):
            assert_same(result, wanted, world_size)


def test_torch_reads_several(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

    gan = Gan()
    gan.steps(1, 3)
    CheckpointManager(tmp_path).save(3, **gan.parts())
    plain = net(5)
    optimizer = torch.optim.RAdam(plain.parameters(), foreach=True)
    state: dict[str, Any] = {
        "model": {"g": get_model_state_dict(plain)},
        "optim": {"g": get_optimizer_state_dict(plain, optimizer)},
    }
    dcp_load(state, checkpoint_id=tmp_path / "step_3")
    set_model_state_dict(plain, state["model"]["g"])
    set_optimizer_state_dict(plain, optimizer, state["optim"]["g"])
    for ours, theirs in zip(gan.g.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(gan.opt_g.state[ours]["exp_avg_sq"], optimizer.state[theirs]["exp_avg_sq"])
    assert optimizer.param_groups[0]["lr"] == gan.opt_g.param_groups[0]["lr"]


# Optimizers of other kinds


def hidden(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.dim() == 2]


OTHERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(
        [{"params": params[:1], "lr": torch.tensor(0.25), "note": {1: ("a", [])}}, {"params": params[1:]}], amsgrad=True
    ),
    "asgd": lambda params: torch.optim.ASGD(params),
    "rprop": lambda params: torch.optim.Rprop(params),
    "adagrad": lambda params: torch.optim.Adagrad(params, initial_accumulator_value=0.5),
    "lbfgs": lambda params: torch.optim.LBFGS(params, history_size=3),
    **({"muon": lambda params: Muon(params, lr=0.1)} if Muon else {}),
}


def of_all_kinds() -> tuple[nn.Module, dict[str, Any]]:
    """RAdam beside each of the others, which have the weights of matrices."""
    model = nn.ModuleDict({kind: net(at) for at, kind in enumerate(OTHERS)})
    optimizers = {kind: make(hidden(model[kind])) for kind, make in OTHERS.items()}
    vectors = [(name, param) for name, param in model.named_parameters() if param.dim() != 2]
    return model, {**optimizers, "rest": ShardedRAdam(vectors, bucket_cap_mb=1e-3)}


def advance(model: nn.Module, optimizers: Iterable[Any], first: int, last: int) -> None:
    for step in range(first, last + 1):
        set_grads(model.parameters(), step)
        for optimizer in optimizers:
            optimizer.step((lambda: 0.0) if isinstance(optimizer, torch.optim.LBFGS) else None)


def check_others(rank: int, world_size: int, folder: str, save: bool) -> list[Any]:
    """Values come back as they were, of rank 0 where ranks differ; with names and without."""
    model, optimizers = of_all_kinds()
    parts: dict[str, Any] = {"optimizer": optimizers}
    manager = CheckpointManager(folder)
    if save:
        advance(model, optimizers.values(), 1, 3)
        optimizers["sgd"].param_groups[0]["lr"] *= 1 + rank
        manager.save(1, model=model, **parts)
        manager.save(2, **parts)
        return [state_of(optimizer) for kind, optimizer in optimizers.items() if kind != "rest"]
    choices: list[tuple[int, dict[str, Any]]] = [(1, {"model": model}), (2, {})]
    for number, with_model in choices:
        advance(model, optimizers.values(), 5, 6)
        restored = manager.load(number, **parts, **with_model)
        assert {restored.optimizers[kind].loaded for kind in OTHERS} == {2}
        assert [restored.optimizers[kind].step for kind in ("sgd", "adamw", "asgd")] == [0, 3, 3]
        found = [state_of(optimizer) for kind, optimizer in optimizers.items() if kind != "rest"]
        advance(model, optimizers.values(), 4, 4)  # it goes on
    return found


@pytest.mark.parametrize("saved_at", [1, 3])
def test_optimizers_of_other_kinds(tmp_path: Path, saved_at: int) -> None:
    wanted = run(check_others, saved_at, str(tmp_path), True)[0]
    verify(read_index(tmp_path / "step_1"))
    for world_size in (1, 2, 4):
        for result in run(check_others, world_size, str(tmp_path), False):
            assert result == wanted


def test_what_of_another_optimizer_cannot_be_saved(tmp_path: Path) -> None:
    model = net(1)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight] = {3: 4}  # type: ignore[index]
    with pytest.raises(CheckpointError, match="TypeError: 3 in the state of an optimizer: expected texts as keys"):
        CheckpointManager(tmp_path).save(1, optimizer=optimizer)
    optimizer.state["global"] = {"calls": 4}
    del optimizer.state[model[0].weight]  # type: ignore[index]
    CheckpointManager(tmp_path).save(1, optimizer=optimizer)
    other: Any = torch.optim.SGD(net(2).parameters(), lr=0.3)
    CheckpointManager(tmp_path).load(1, optimizer=other)
    assert other.state["global"] == {"calls": 4}
    with pytest.raises(CheckpointError, match="optimizer is a Linear, expected a ShardedRAdam or another"):
        CheckpointManager(tmp_path).save(2, optimizer=nn.Linear(1, 1))


def test_another_optimizer_that_does_not_fit(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path)
    model = net(1)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    advance(model, [optimizer], 1, 1)
    manager.save(1, optimizer=optimizer)
    wider = net(1, 12)
    other = torch.optim.SGD([*wider.named_parameters(), ("more", nn.Parameter(torch.ones(2)))], lr=0.7, momentum=0.9)
    advance(wider, [other], 2, 2)
    before = state_of(other)
    with pytest.raises(CheckpointError, match=r"1 missing in the checkpoint: more; 5 mismatched: 0.weight \(mom"):
        manager.load(1, optimizer=other)
    assert state_of(other) == before
    report = manager.load(1, optimizer=other, strict=False).optimizer
    assert report is not None
    assert (report.loaded, report.parameters) == (1, 7)
    assert torch.equal(other.state[wider[2].bias]["momentum_buffer"], optimizer.state[model[2].bias]["momentum_buffer"])  # type: ignore[index]
    assert values(dict(other.state[wider[0].weight])) == before[1][1]  # type: ignore[index]


# Which ones are there


def check_several(rank: int, world_size: int, folder: str) -> None:
    place = Path(folder, str(world_size))
    manager, gan = CheckpointManager(place), Gan()
    gan.steps(1, 2)
    parts = gan.parts()
    manager.save(1, **parts)
    manager.save(2, model=gan.g, optimizer=gan.opt_g, scheduler=gan.schedules[0])

    def refused(match: str, step: int, **parts: Any) -> None:
        before = values([*gan.tensors(), *map(state_of, (gan.opt_g, gan.opt_d))])
        with pytest.raises(CheckpointError, match=match):
            manager.load(step, **parts)
        assert values([*gan.tensors(), *map(state_of, (gan.opt_g, gan.opt_d))]) == before

    refused(r"14 missing in the checkpoint|missing in the checkpoint: model.g.0.bias", 2, model=parts["model"])
    refused("has no optimizer under 'optim.g', only under .'optim'.", 2, optimizer=parts["optimizer"])
    refused("has no optimizer under 'optim', only under .'optim.d', 'optim.g'.", 1, optimizer=gan.opt_g)
    refused("has no scheduler: load without scheduler=", 1, scheduler=gan.schedules[0])
    refused("has no scheduler.2: load without scheduler=", 1, scheduler=[*gan.schedules, gan.schedules[0]])
    refused(r"missing in the checkpoint: model.0.bias, .*unexpected in the checkpoint: model.d.0.bias", 1, model=gan.g)
    refused(r"9 unexpected in the checkpoint: model.d.0.bias, model.d", 1, model={"g": gan.g})
    refused(
        r"1 unexpected in the checkpoint: optim.d. Expected all", 1, model=parts["model"], optimizer={"g": gan.opt_g}
    )
    refused(r"1 unexpected in the checkpoint: scheduler.1. Expected all", 1, scheduler=gan.schedules[:1])
    refused(r"'a.b' as a name in model: expected texts without dots", 1, model={"a.b": gan.g})
    refused(r"model.x is a int, expected a torch.nn.Module", 1, model={"x": 3})
    other = Gan()
    some: dict[str, Any] = {"model": {"g": other.g}, "optimizer": {"g": other.opt_g}, "scheduler": other.schedules[:1]}
    restored = manager.load(1, **some, strict=False)
    assert list(restored.optimizers) == ["g"]
    assert_same(other.tensors()[:9], gan.tensors()[:9])
    manager.load(1)  # a kind that is left out is not missed
    with pytest.raises(CheckpointError, match=r": TypeError: model.g is a NoneType"):
        manager.save(3, model={"g": None})
    # A model that has the others in it has the same names.
    together = nn.ModuleDict({"g": net(8), "d": net(9, 13)})
    manager.load(1, model=together)
    assert_same(list(together.state_dict().values()), gan.tensors())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_which_there_are(tmp_path: Path, world_size: int) -> None:
    run(check_several, world_size, str(tmp_path))


def check_shared(rank: int, world_size: int, folder: str) -> None:
    """One parameter in two models and optimizers; an optimizer of parameters of two models; nested names."""

    def build() -> tuple[dict[str, Any], list[Any]]:
        torch.manual_seed(4)
        body = nn.Linear(5, 5)
        one, two = nn.Sequential(body, nn.Linear(5, 2)), nn.Sequential(body, nn.Linear(5, 3))
        optimizers = [
            ShardedRAdam(one.parameters(), bucket_cap_mb=1e-3, parameters_as_bucket_view=False),
            torch.optim.AdamW(two.parameters()),
            ShardedRAdam([*two[1].parameters(), *one[1].parameters()], lr=0.5),
        ]
        names = {"heads": {"one": optimizers[0], "two": optimizers[1]}, "both": optimizers[2]}
        return {"model": {"heads": {"one": one, "two": two}}, "optimizer": names}, optimizers

    parts, optimizers = build()
    for at, optimizer in enumerate(optimizers):
        set_grads([param for group in optimizer.param_groups for param in group["params"]], at)
        optimizer.step()
    place = Path(folder, str(world_size))
    CheckpointManager(place).save(1, **parts)
    index = read_index(place / "step_1")
    assert {
        "optim.both.state.heads.two.1.bias.exp_avg",
        "optim.heads.two.state.0.weight.exp_avg",
    } <= index.tensors.keys()
    again, loaded = build()
    CheckpointManager(place).load(1, **again)
    assert [state_of(optimizer) for optimizer in loaded] == [state_of(optimizer) for optimizer in optimizers]
    for name in ("one", "two"):
        ours, theirs = (p["model"]["heads"][name].state_dict() for p in (again, parts))
        assert values(ours) == values(theirs)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_shared_parameters_and_nested_names(tmp_path: Path, world_size: int) -> None:
    run(check_shared, world_size, str(tmp_path))


# All or nothing


class Extra(nn.Module):
    """With extra state in an object that it changes in place, and a buffer that it exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3, 5), 7.0))
        self.register_buffer("seen", torch.zeros(4))
        self.seen: Tensor
        self.history: list[int] = [0]
        self.fails = False

    def get_extra_state(self) -> dict[str, Any]:
        return {"history": list(self.history), "what": (1, 2)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.history.clear()
        self.seen = self.seen + 1
        if self.fails and state["history"] == [0, 2]:
            raise KeyError("extra")
        self.history.extend(state["history"])


class Failing:
    """State that is half loaded when it fails, as it does with that of ``All(2, ...)``."""

    def __init__(self, at: int) -> None:
        self.at, self.inner, self.fails = at, {"at": at}, False

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "inner": self.inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        random.random()
        torch.rand(3)
        self.at = state["at"]
        self.inner.update(state["inner"])
        if self.fails and state["at"] in (2, 20):
            raise RuntimeError("half way")


class All:
    """A training with one of everything."""

    def __init__(self, seed: int, steps: int) -> None:
        self.model = nn.ModuleDict({"net": net(seed), "extra": Extra()})
        self.plain = net(seed + 1)
        self.ours = ShardedRAdam(self.model.named_parameters(), lr=0.1 * seed, bucket_cap_mb=1e-3)
        self.other: Any = torch.optim.AdamW(self.plain.parameters(), lr=0.2 * seed)
        self.schedulers: list[Any] = [
            LambdaLR(self.ours, lambda step: 0.5**step),
            SequentialLR(self.other, [LinearLR(self.other), MultiStepLR(self.other, [2])], [2]),
            Failing(seed),
        ]
        self.data = Failing(10 * seed)
        extra: Any = self.model["extra"]
        extra.history.append(seed)
        for step in range(1, steps + 1):
            set_grads([*self.model.parameters(), *self.plain.parameters()], step)
            self.ours.step()
            self.other.step()
            for scheduler in self.schedulers[:2]:
                scheduler.step()

    def parts(self) -> dict[str, Any]:
        return {
            "model": {"a": self.model, "b": self.plain},
            "optimizer": {"a": self.ours, "b": self.other},
            "scheduler": self.schedulers,
            "data": self.data,
        }

    def everything(self) -> Any:
        found = [self.model.state_dict(), self.plain.state_dict(), [s.state_dict() for s in self.schedulers]]
        generators = [torch.get_rng_state(), random.getstate()]
        return deepcopy(values([found, self.data.state_dict(), state_of(self.ours), state_of(self.other), generators]))


def fail_in_hook(*_: Any) -> None:
    raise ValueError("hook")


def add_hook(thing: Any) -> None:
    thing.register_load_state_dict_post_hook(fail_in_hook)


FAILURES: dict[str, tuple[Callable[[All], Any], str]] = {
    "scheduler": (lambda it: setattr(it.schedulers[2], "fails", True), "scheduler.2 .*RuntimeError: half way"),
    "data": (lambda it: setattr(it.data, "fails", True), "data .*RuntimeError: half way"),
    "extra state": (lambda it: setattr(it.model["extra"], "fails", True), "model.a .*KeyError: 'extra'"),
    "hook": (lambda it: add_hook(it.plain), "model.b .*ValueError: hook"),
    "optimizer": (
        lambda it: add_hook(it.other),
        "optimizer.b .*ValueError: hook",
    ),
    "kind": (lambda it: it.schedulers.__setitem__(0, it.schedulers[1]), "scheduler.0 .*KeyError: '_schedulers'"),
}


def check_all_or_nothing(rank: int, world_size: int, folder: str) -> None:
    place = Path(folder, str(world_size))
    manager = CheckpointManager(place)
    saved = All(2, 3)
    wanted = saved.everything()
    manager.save(1, **saved.parts())
    for victim in sorted({0, world_size - 1}):
        for name, (make_fail, text) in FAILURES.items():
            there = All(3, 5)
            torch.manual_seed(100 + rank)
            if rank == victim:
                make_fail(there)
            before = there.everything()
            with pytest.raises(CheckpointError, match=text) as caught:
                manager.load(1, **there.parts())
            texts: list[Any] = [None] * world_size
            dist.all_gather_object(texts, str(caught.value))
            assert set(texts) == {str(caught.value)}
            assert f"rank {victim}: " in texts[0]
            after = there.everything()
            assert after == before, (name, victim)
            # The optimizers go on from what they had.
            control = All(3, 5)
            for one in (there, control):
                set_grads([*one.model.parameters(), *one.plain.parameters()], 6)
                one.ours.step()
                one.other.step()
            assert values([*there.model.parameters(), *there.plain.parameters()]) == values(
                [*control.model.parameters(), *control.plain.parameters()]
            )
    there = All(3, 5)
    manager.load(1, **there.parts())
    manager.load(1)  # making one has drawn random numbers
    assert torch.equal(there.model["extra"].seen, torch.ones(4))  # type: ignore[arg-type]
    there.model["extra"].seen = torch.zeros(4)
    assert there.everything() == wanted


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_loading_is_all_or_nothing(tmp_path: Path, world_size: int) -> None:
    run(check_all_or_nothing, world_size, str(tmp_path))


class SetsTheRate:
    """A schedule that sets the rate when it is loaded, as some do: the groups must be those of the checkpoint then."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.optimizer.param_groups[0]["lr"] == 0.3
        self.optimizer.param_groups[0]["lr"] = 0.7


def check_order(rank: int, world_size: int, folder: str) -> None:
    model = net(1)
    for number, make in enumerate((ShardedRAdam, torch.optim.RAdam)):
        optimizer = make(model.parameters(), lr=0.3)
        manager = CheckpointManager(Path(folder, f"{world_size}-{number}"))
        manager.save(1, model=model, optimizer=optimizer, scheduler=SetsTheRate(optimizer))
        loaded = make(model.parameters(), lr=0.1)
        manager.load(1, model=model, optimizer=loaded, scheduler=SetsTheRate(loaded))
        assert loaded.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_schedule_that_sets_the_rate_when_it_is_loaded(tmp_path: Path, world_size: int) -> None:
    run(check_order, world_size, str(tmp_path))


def test_a_copy_is_made_only_of_models_that_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[nn.Module] = []

    def remember(model: nn.Module) -> Callable[[], object]:
        copied.append(model)
        return undo.remember_model(model)

    monkeypatch.setattr(objects, "remember_model", remember)
    manager = CheckpointManager(tmp_path)
    extra, plain = Extra(), net(1)
    repeated = nn.Linear(2, 2)
    repeated.register_buffer("repeated", torch.zeros(1).expand(3))
    models = {"extra": extra, "plain": plain}
    manager.save(1, model=models, optimizer=ShardedRAdam(plain.parameters()), scheduler=Failing(1))
    manager.load(1, model=models, optimizer=ShardedRAdam(plain.parameters()), scheduler=Failing(2))
    assert copied == [extra]
    # torch itself cannot write to all tensors.
    manager.save(2, model={"a": plain, "b": repeated})
    with torch.no_grad():
        plain[0].weight.zero_()  # type: ignore[index]
        repeated.weight.zero_()
    with pytest.raises(CheckpointError, match=r"model.b could not be loaded, so all is as it was"):
        manager.load(2, model={"a": plain, "b": repeated})
    assert not plain[0].weight.any()  # type: ignore[index]
    assert not repeated.weight.any()
