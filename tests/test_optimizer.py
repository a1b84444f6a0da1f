"""What a user of torch.optim.RAdam does with an optimizer, on one process without a process group."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import logging
import pickle
import re
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import RAdam
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from sharded_radam import ShardedRAdam
from sharded_radam.arguments import Options
from sharded_radam.step import engine_of
from tests.cases import STEPS, assert_same, make_params, set_grads


def pair(**flags: Any) -> tuple[ShardedRAdam, list[Parameter], RAdam, list[Parameter]]:
    """Ours and RAdam on equal parameters, both with the foreach engine, so that bits can be compared."""
    ours, theirs = make_params(), make_params()
    return ShardedRAdam(ours, foreach=True, **flags), ours, RAdam(theirs, foreach=True, **flags), theirs


def both_step(steps: int, *optimizers_and_params: Any, first: int = 1) -> None:
    for step in range(first, first + steps):
        for optimizer, params in zip(optimizers_and_params[::2], optimizers_and_params[1::2], strict=True):
            set_grads(params, step)
            optimizer.step()


def test_signature_extends_that_of_radam() -> None:
    ours, theirs = inspect.signature(ShardedRAdam).parameters, inspect.signature(RAdam).parameters
    for name, parameter in theirs.items():
        assert (ours[name].default, ours[name].kind) == (parameter.default, parameter.kind)
    positional = [name for name, parameter in ours.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for method in ("step", "zero_grad", "add_param_group", "state_dict", "load_state_dict"):
        names = list(inspect.signature(getattr(RAdam, method)).parameters)
        assert list(inspect.signature(getattr(ShardedRAdam, method)).parameters) == names
    assert ShardedRAdam(make_params()).param_groups[0].keys() == RAdam(make_params()).param_groups[0].keys()
    assert ShardedRAdam(make_params()).defaults == RAdam(make_params()).defaults


def one() -> Parameter:
    return Parameter(torch.ones(3))


BAD_INPUT: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "lr": lambda make: make([one()], lr=-1.0),
    "tensor lr": lambda make: make([one()], lr=torch.ones(2)),
    "eps": lambda make: make([one()], eps=-1e-8),
    "beta1": lambda make: make([one()], betas=(1.0, 0.9)),
    "beta2": lambda make: make([one()], betas=(0.9, -0.1)),
    "weight_decay": lambda make: make([one()], weight_decay=-0.1),
    "a tensor": lambda make: make(one()),
    "nothing": lambda make: make([]),
    "a set": lambda make: make([{"params": {one()}}]),
    "no tensors": lambda make: make([1, 2]),
    "non-leaf": lambda make: make([one() * 2]),
    "names missing": lambda make: make([("a", one()), one()]),
    "group without names": lambda make: make([{"params": [("a", one())]}, {"params": [one()]}]),
    "twice": lambda make: (lambda p: make([{"params": [p]}, {"params": [p]}]))(one()),
}


@pytest.mark.parametrize("case", BAD_INPUT, ids=str)
def test_refuses_what_radam_refuses(case: str) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        BAD_INPUT[case](RAdam)
    with pytest.raises(type(theirs.value), match=re.escape(str(theirs.value))):
        BAD_INPUT[case](ShardedRAdam)


def test_refuses_flags_that_exclude_each_other() -> None:
    for flags in ({"fused": True, "foreach": True}, {"fused": True, "differentiable": True}):
        with pytest.raises(ValueError, match="fused=True excludes"):
            ShardedRAdam([one()], **flags)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differentiable=True excludes foreach=True"):
        ShardedRAdam([one()], foreach=True, differentiable=True)
    with pytest.raises(ValueError, match="bucket_cap_mb"):
        ShardedRAdam([one()], bucket_cap_mb=0)
    with pytest.raises(ValueError, match=r"If capturable=True.*'0\.0' is on cpu"):
        ShardedRAdam([one()], capturable=True)
    with pytest.raises(ValueError, match="transport='tcp'"):
        ShardedRAdam([one()], transport="tcp")
    with pytest.raises(ValueError, match=r"fused=True.*meta"):
        ShardedRAdam([Parameter(torch.ones(3, device="meta"))], fused=True)


def test_refuses_parameters_that_share_memory() -> None:
    base = torch.ones(4, 6)
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        ShardedRAdam([("a", Parameter(base)), ("b", Parameter(base[1:3]))])
    with pytest.raises(ValueError, match="'a' and 'b' share memory"):
        ShardedRAdam([("a", Parameter(base[:, :3])), ("b", Parameter(base[:, 2:4]))])
    with pytest.raises(ValueError, match=r"'a'.*several elements in one place of memory"):
        ShardedRAdam([("a", Parameter(torch.ones(1).expand(5)))])
    with pytest.raises(ValueError, match="layout"):
        ShardedRAdam([Parameter(torch.ones(3, 3).to_sparse())])
    with pytest.raises(ValueError, match="float8"):
        ShardedRAdam([Parameter(torch.ones(3).to(torch.float8_e4m3fn))])
    for as_views in (True, False):
        base = torch.ones(4, 6)
        parts = [Parameter(base[:, :3]), Parameter(base[:, 3:5])]
        optimizer = ShardedRAdam(parts, parameters_as_bucket_view=as_views)
        for part in parts:
            part.grad = torch.ones_like(part)
        optimizer.step()
        assert (base[:, :5] < 1).all()
        assert (base[:, 5:] == 1).all()


def test_integer_parameters_are_left_alone() -> None:
    quantized = Parameter(torch.arange(5, dtype=torch.int8), requires_grad=False)
    params = [one(), quantized]
    optimizer = ShardedRAdam(params)
    params[0].grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(quantized, torch.arange(5, dtype=torch.int8))
    assert optimizer.state_dict()["state"].keys() == {0}
    RAdam(params).load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())


def test_names_groups_and_generators() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ShardedRAdam(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    groups: list[dict[str, Any]] = [
        {"params": iter(()), "lr": 0.1},
        {"params": model[0].parameters(), "weight_decay": 0.5},
        {"params": model[1].weight},
    ]
    optimizer = ShardedRAdam(groups)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2, 1]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.5, 0]
    optimizer.step()
    assert str(optimizer).startswith("ShardedRAdam (\nParameter Group 0\n")
    assert str(optimizer).replace("ShardedRAdam", "RAdam") == str(
        RAdam([dict(group) for group in optimizer.param_groups])
    )


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    sharded, ours, radam, theirs = pair()

    def closure(optimizer: torch.optim.Optimizer, params: list[Parameter]) -> Tensor:
        optimizer.zero_grad()
        loss = sum(((p - 1) ** 2).sum() for p in params)
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(STEPS):
        mine = sharded.step(lambda: closure(sharded, ours))  # type: ignore[arg-type, return-value]
        other = radam.step(lambda: closure(radam, theirs))
        assert torch.equal(mine, other)  # type: ignore[arg-type]
    assert_same(ours, theirs)
    assert sharded.step() is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = make_params()
    for optimizer in (ShardedRAdam(params), ShardedRAdam(make_params(), foreach=True)):
        set_grads(optimizer.param_groups[0]["params"], 1)
        optimizer.zero_grad(set_to_none=set_to_none)
        for param in optimizer.param_groups[0]["params"]:
            assert param.grad is None if set_to_none else not param.grad.any()


def test_step_without_gradients_changes_nothing() -> None:
    params = make_params()
    optimizer = ShardedRAdam(params, weight_decay=0.5)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert_same(params, before)
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_zero_gradients_without_decay_change_nothing() -> None:
    params = make_params()
    optimizer = ShardedRAdam(params)
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    for _ in range(8):
        optimizer.step()
    assert_same(params, before)


def test_parameters_without_gradient_are_skipped_and_thaw_later() -> None:
    sharded, ours, radam, theirs = pair(weight_decay=0.1)
    for step in range(1, 20):
        frozen = {1, 5} if step < 8 else {0} if step < 12 else set()
        for params in (ours, theirs):
            set_grads(params, step, frozen)
            for index, param in enumerate(params):
                param.requires_grad_(index not in frozen)
        sharded.step()
        radam.step()
    assert_same(ours, theirs)
    steps = [int(sharded.state[param]["step"]) for param in ours]
    assert steps == [int(radam.state[param]["step"]) for param in theirs]
    assert sorted(set(steps)) == [12, 15, 19]


def test_tied_parameters_count_once() -> None:
    tied, other = one(), one()
    model = nn.Module()
    model.a, model.b, model.c = tied, tied, other
    optimizer = ShardedRAdam(model.parameters())
    assert len(optimizer.state) == 2
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = ShardedRAdam([tied, tied, other])
    tied.grad = other.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"parameter '0\.1' is listed twice in param group 0"):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["params"] == [0, 0, 2]
    optimizer.load_state_dict(optimizer.state_dict())


def test_sparse_gradients_are_refused_as_by_radam() -> None:
    for optimizer_class in (RAdam, ShardedRAdam):
        embedding = nn.Embedding(5, 3, sparse=True)
        optimizer = optimizer_class(embedding.parameters())
        embedding(torch.tensor([1, 2])).sum().backward()
        before = embedding.weight.detach().clone()
        with pytest.raises(RuntimeError, match="RAdam does not support sparse gradients"):
            optimizer.step()
        assert torch.equal(embedding.weight, before)


def test_add_param_group_after_steps() -> None:
    sharded, ours, radam, theirs = pair()
    both_step(7, sharded, ours, radam, theirs)
    more, more_of_theirs = make_params()[:3], make_params()[:3]
    sharded.add_param_group({"params": more, "lr": 0.1, "betas": (0.8, 0.9)})
    radam.add_param_group({"params": more_of_theirs, "lr": 0.1, "betas": (0.8, 0.9)})
    both_step(9, sharded, [*ours, *more], radam, [*theirs, *more_of_theirs], first=8)
    assert_same([*ours, *more], [*theirs, *more_of_theirs])
    with pytest.raises(ValueError, match="share memory"):
        sharded.add_param_group({"params": [Parameter(more[0].detach())]})
    assert len(sharded.param_groups) == 2
    both_step(1, sharded, [*ours, *more], radam, [*theirs, *more_of_theirs], first=17)
    assert_same([*ours, *more], [*theirs, *more_of_theirs])


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=30),
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=0),
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer, [LinearLR(optimizer, 0.1), LambdaLR(optimizer, lambda step: 0.5**step)], milestones=[5]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05)], ids=["float", "tensor"])
def test_lr_schedulers(name: str, lr: float | Tensor) -> None:
    sharded, ours, radam, theirs = pair(lr=copy.deepcopy(lr))
    schedulers = [SCHEDULERS[name](optimizer) for optimizer in (sharded, radam)]
    for step in range(1, 21):
        both_step(1, sharded, ours, radam, theirs, first=step)
        for scheduler in schedulers:
            scheduler.step() if isinstance(scheduler, LRScheduler) and name != "ReduceLROnPlateau" else scheduler.step(
                1.0
            )
    assert_same(ours, theirs)
    assert float(sharded.param_groups[0]["lr"]) == float(radam.param_groups[0]["lr"]) != 0.05
    assert sharded.param_groups[0]["betas"] == radam.param_groups[0]["betas"]


def test_step_hooks() -> None:
    params = make_params()
    optimizer, calls = ShardedRAdam(params), []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    optimizer.step()
    assert calls == ["global pre", "pre", "post", "global post"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(calls) == 4


def test_state_dict_hooks() -> None:
    optimizer = ShardedRAdam(make_params())
    calls: list[object] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save pre"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: calls.append(("load pre", saved.pop("note"))))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load post"))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert saved["note"] == 1
    assert calls == ["save pre", ("load pre", 1), "load post"]
    optimizer.consolidate_state_dict()
    assert optimizer.state_dict()["note"] == 1


def test_deepcopy() -> None:
    sharded, ours, radam, theirs = pair()
    both_step(7, sharded, ours, radam, theirs)
    copied, copied_params = copy.deepcopy((sharded, ours))
    both_step(6, copied, copied_params, radam, theirs, first=8)
    assert_same(copied_params, theirs)
    public = {name for name in vars(sharded) if not name.startswith("_")}
    assert public == {name for name in vars(copied) if not name.startswith("_")}
    radam_again, again = RAdam(make_params(), foreach=True), make_params()
    radam_again = RAdam(again, foreach=True)
    both_step(7, radam_again, again)
    assert_same(ours, again)


def test_pickle() -> None:
    sharded, ours, radam, theirs = pair()
    both_step(7, sharded, ours, radam, theirs)
    written = pickle.dumps((sharded, ours))
    unpickled, params = pickle.loads(written)
    both_step(6, unpickled, params, radam, theirs, first=8)
    assert_same(params, theirs)
    assert len(written) < 4 * 4 * sum(param.numel() for param in ours) + 60_000


def test_state_that_somebody_replaced_is_followed() -> None:
    """`optimizer.state.clear()` and tensors put into `optimizer.state` mean what they mean for RAdam."""
    sharded, ours, radam, theirs = pair()
    both_step(6, sharded, ours, radam, theirs)
    for optimizer, params in ((sharded, ours), (radam, theirs)):
        optimizer.state[params[1]]["exp_avg"] = torch.full_like(params[1], 0.5)
        optimizer.state[params[2]]["step"] = torch.tensor(100.0)
        del optimizer.state[params[5]]
        optimizer.state[params[0]] = {}
    both_step(3, sharded, ours, radam, theirs, first=7)
    assert_same(ours, theirs)
    for optimizer in (sharded, radam):
        optimizer.state = defaultdict(dict)
    both_step(8, sharded, ours, radam, theirs, first=10)
    assert_same(ours, theirs)


def test_setstate_of_a_living_optimizer() -> None:
    """An idiom to reset the state."""
    sharded, ours, radam, theirs = pair()
    both_step(7, sharded, ours, radam, theirs)
    for optimizer in (sharded, radam):
        optimizer.__setstate__({"state": defaultdict(dict), "param_groups": optimizer.param_groups})  # type: ignore[no-untyped-call]
    both_step(7, sharded, ours, radam, theirs, first=8)
    assert_same(ours, theirs)


def test_state_exists_from_construction() -> None:
    params = make_params()
    optimizer = ShardedRAdam(params)
    for param in params:
        state = optimizer.state[param]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert state["exp_avg"].shape == param.shape
        assert state["exp_avg"].stride() == param.stride()


def test_step_counter_passes_two_to_the_24() -> None:
    param = one()
    optimizer = ShardedRAdam([param])
    optimizer.state[param]["step"] = torch.tensor(2.0**24, dtype=torch.float64)
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    assert optimizer.state[param]["step"] == 2**24 + 3


def test_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="sharded_radam"):
        ShardedRAdam([Parameter(torch.ones(100, 10)), Parameter(torch.ones(64))])
    (record,) = caplog.records
    assert record.getMessage() == (
        "ShardedRAdam: ranks 1, parameters 2 (1064 elements), buckets 1, engine fused, transport none, "
        "state 8704 bytes per rank, replicated RAdam 8512 bytes"
    )


@pytest.mark.parametrize("flags", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_any_strides(flags: dict[str, Any], dtype: torch.dtype) -> None:
    """Autograd copies them; who assigns them does not: ``torch.autograd.grad(p.sum(), p)`` has strides of 0."""
    base = torch.arange(1.0, 129.0, dtype=dtype).view(16, 8) / 64
    grads = [
        base[:1, :1].expand(8, 8),
        base[::2],
        base[:8].t(),
        base[:8].flip(0).t(),
        base[:, 0].as_strided((8, 8), (1, 0)),
    ]
    ours = [Parameter(torch.ones(8, 8, dtype=dtype)) for _ in grads]
    theirs = [Parameter(torch.ones(8, 8, dtype=dtype)) for _ in grads]
    wanted = [grad.clone(memory_format=torch.contiguous_format) for grad in grads]
    optimizers = [ShardedRAdam(params, lr=0.1, **flags) for params in (ours, theirs)]
    for _ in range(7):
        for params, given in ((ours, grads), (theirs, wanted)):
            for param, grad in zip(params, given, strict=True):
                param.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    assert_same(ours, theirs)
    assert not torch.equal(ours[0], torch.ones(8, 8, dtype=dtype))


def test_options_that_an_older_version_pickled() -> None:
    pickled = object.__new__(Options)
    pickled.__setstate__([None, 25.0, True, False, False, 0])
    assert pickled == Options(None, 25.0, True, False, False, 0, compiled=False, reduce_dtype=None)
    assert pickle.loads(pickle.dumps(pickled)) == pickled


def test_engine_by_flags() -> None:
    def engine(**flags: Any) -> str:
        optimizer = ShardedRAdam([one()], **flags)
        return engine_of(optimizer, optimizer._shards, optimizer._shards.flats[0])

    assert engine() == "fused"
    assert engine(fused=True) == "fused"
    assert engine(fused=False) == "for-loop"
    assert engine(foreach=True) == "foreach"
    assert engine(foreach=False) == "for-loop"
    assert engine(differentiable=True) == "for-loop"


def test_warns_if_launched_without_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(UserWarning, match="WORLD_SIZE is 4, but torch.distributed is not initialised"):
        ShardedRAdam([one()])
    monkeypatch.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ShardedRAdam([one()])


def test_torch_save_of_parameters_and_state_has_their_size_only() -> None:
    """A view of a bucket would be saved with the whole bucket."""
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(1000, 100))]
    optimizer = ShardedRAdam(params)
    for tensor in (params[0].detach(), params[0], optimizer.state[params[0]]["exp_avg"]):
        file = io.BytesIO()
        torch.save(tensor, file)
        assert file.tell() < 3000
        assert tensor.untyped_storage().nbytes() == 12


def test_memory_is_freed_with_the_optimizer() -> None:
    """At once, by reference counts: nothing that it has knows of it."""
    ShardedRAdam([one()])  # torch keeps the frames of the first optimizer, in which it imports something
    gc.disable()
    try:
        for sharded in (False, True):
            params = make_params()
            optimizer = ShardedRAdam(params, shard_gradients=sharded)
            set_grads(params, 1)
            optimizer.step()
            optimizer.add_param_group({"params": [one()]})
            optimizer.state_dict()
            held: list[weakref.ref[Any]] = [weakref.ref(each) for each in (optimizer, *optimizer._shards.flats)]
            del optimizer
            assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()
