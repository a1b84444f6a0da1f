"""What users do to groups, state and parameters between steps takes effect as with torch.optim.RAdam."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from sharded_radam import ShardedRAdam
from tests.ranks import WORLD_SIZES, run
from tests.sides import SHAPES, Side, compare

MODES: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, gloo": {"transport": "gloo"},
    "DDP, no views": {"parameters_as_bucket_view": False},
    "sharded": {"shard_gradients": True},
    "sharded, gloo": {"shard_gradients": True, "transport": "gloo"},
    "shared parameters": {"shard_gradients": True, "share_parameters": True},
}


def append_parameter(side: Side) -> None:
    side.groups[0]["params"].append(side.new(5, 6))


def append_group(side: Side) -> None:
    side.groups.append({**side.groups[1], "params": [side.new(5, 6), side.new(2)], "lr": 0.05})


def remove_parameter(side: Side) -> None:
    gone = side.groups[1]["params"].pop(1)
    side.optimizer.state.pop(gone, None)


def remove_group(side: Side) -> None:
    del side.groups[0]


def remove_all_but_one(side: Side) -> None:
    del side.groups[1]
    del side.groups[0]["params"][1:]


def without_parameters(side: Side) -> None:
    """A step in which all groups are empty, and then one without groups."""
    kept = [[*group["params"]] for group in side.groups]
    for group in side.groups:
        group["params"] = []
    side.optimizer.step()
    groups = [*side.groups]
    side.groups.clear()
    side.optimizer.step()
    side.groups.extend(groups)
    for group, params in zip(side.groups, kept, strict=True):
        group["params"] = params


def sort_groups(side: Side) -> None:
    side.groups.sort(key=lambda group: -group["lr"])


def assign_groups(side: Side) -> None:
    """As Lightning's BaseFinetuning does on resume."""
    side.optimizer.param_groups = [{**group, "params": [*group["params"]]} for group in side.groups]
    side.optimizer.param_groups.append({**side.groups[0], "params": (side.new(11),)})


def sort_parameters(side: Side) -> None:
    side.groups[1]["params"].sort(key=lambda param: -param.numel())


def move_parameter(side: Side) -> None:
    side.groups[0]["params"].append(side.groups[1]["params"].pop(0))


def replace_parameter(side: Side) -> None:
    at = next(at for at, param in enumerate(side.params) if param is side.groups[0]["params"][0])
    new = Parameter(torch.full((3, 5), 0.7))
    side.optimizer.state.pop(side.params[at], None)
    side.params[at] = side.groups[0]["params"][0] = new


def edit_options(side: Side) -> None:
    side.groups[0].update(lr=0.3, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.2, decoupled_weight_decay=True)
    side.groups[-1]["maximize"] = True


def prune(side: Side) -> None:
    """As gaussian splatting prunes: the rows of a mask, of the parameter and of its moments."""
    old = side.groups[0]["params"][0]
    mask = torch.arange(len(old)) % 3 != 1
    state = side.state_of(old)
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind] = state[kind][mask]
    side.optimizer.state.pop(old, None)
    new = Parameter(old.detach()[mask].clone())
    side.groups[0]["params"][0] = new
    side.optimizer.state[new] = state
    side.params[next(at for at, param in enumerate(side.params) if param is old)] = new


def densify(side: Side) -> None:
    """As gaussian splatting appends rows, whose moments are zero."""
    old = side.groups[0]["params"][0]
    more = torch.full((4, *old.shape[1:]), 0.25)
    state = side.state_of(old)
    for kind in ("exp_avg", "exp_avg_sq"):
        state[kind] = torch.cat([state[kind], torch.zeros_like(more)])
    side.optimizer.state.pop(old, None)
    new = Parameter(torch.cat([old.detach(), more]))
    side.groups[0]["params"][0] = new
    side.optimizer.state[new] = state
    side.params[next(at for at, param in enumerate(side.params) if param is old)] = new


def set_whole_moments(side: Side) -> None:
    param = side.params[0]
    state = side.state_of(param)
    side.optimizer.state[param] = {**state, "exp_avg": state["exp_avg"] * 0.5}


def clear_state(side: Side) -> None:
    side.optimizer.state.clear()


def delete_state(side: Side) -> None:
    del side.optimizer.state[side.params[2]]


def zero_one_step(side: Side) -> None:
    side.optimizer.state[side.params[0]]["step"].zero_()


def add_to_all_steps(side: Side) -> None:
    for state in side.optimizer.state.values():
        state["step"] += 3


def assign_data_of_steps(side: Side) -> None:
    for state in side.optimizer.state.values():
        state["step"].data = torch.tensor(1.0)


def replace_step(side: Side) -> None:
    side.optimizer.state[side.params[3]]["step"] = torch.tensor(2.0)


def scale_moments_in_place(side: Side) -> None:
    for state in side.optimizer.state.values():
        state["exp_avg"].mul_(0.5)


def assign_data_of_moments(side: Side) -> None:
    for state in side.optimizer.state.values():
        state["exp_avg"].data = state["exp_avg"] * 0.5


def vector_of_parameters(side: Side) -> None:
    vector = parameters_to_vector(side.params).detach() * 0.5
    vector_to_parameters(vector, side.params)
    side.kept = vector  # RAdam writes into it


def assign_rows_of_others(side: Side) -> None:
    side.kept = torch.ones(8, 9)
    side.params[0].data = side.kept[1:]


def assign_other_strides(side: Side) -> None:
    side.params[0].data = torch.ones(9, 7).t()


def share_memory(side: Side) -> None:
    for param in side.params:
        param.share_memory_()  # type: ignore[no-untyped-call]


def assign_with_gaps(side: Side) -> None:
    side.kept = torch.ones(7, 20)
    side.params[0].data = side.kept[:, ::2][:, :9]


def swap_tensors(side: Side) -> None:
    other = Parameter(torch.full((7, 9), 0.1))
    torch.utils.swap_tensors(side.params[0], other)  # type: ignore[no-untyped-call]


def freeze_and_thaw(side: Side) -> None:
    side.params[0].requires_grad_(not side.params[0].requires_grad)


EDITS = {
    edit.__name__: edit
    for edit in (
        *(append_parameter, append_group, remove_parameter, remove_group, remove_all_but_one, sort_groups),
        *(assign_groups, sort_parameters, move_parameter, replace_parameter, edit_options, prune, densify),
        *(set_whole_moments, clear_state, delete_state, zero_one_step, add_to_all_steps, replace_step),
        *(assign_data_of_steps, without_parameters),
        *(scale_moments_in_place, assign_data_of_moments, vector_of_parameters, assign_rows_of_others),
        *(assign_other_strides, assign_with_gaps, share_memory, swap_tensors, freeze_and_thaw),
    )
}

OF_MEMORY = {
    *("vector_of_parameters", "assign_rows_of_others", "assign_other_strides", "assign_with_gaps"),
    *("share_memory", "swap_tensors"),
}
"""What gives a rank memory of its own, which share_parameters=True is there to avoid."""


def train(sides: tuple[Side, Side], steps: range, what: object) -> None:
    for seed in steps:
        for side in sides:
            side.backward(seed)
            side.optimizer.step()
    compare(*sides, what)


def check_edits(rank: int, world_size: int, mode: str) -> None:
    for name, edit in EDITS.items():
        options = MODES[mode]
        if options.get("share_parameters") and name in OF_MEMORY:
            continue
        if options.get("shard_gradients") and name == "swap_tensors":  # torch refuses: hooks know the parameter
            continue
        sides = Side(ShardedRAdam, bucket_cap_mb=1e-3, **options), Side(torch.optim.RAdam)
        train(sides, range(3), name)
        for side in sides:
            edit(side)
        train(sides, range(3, 6), name)
        consolidated = sides[0].optimizer.consolidate_state_dict()
        if rank == 0 and name not in ("remove_group", "remove_all_but_one"):  # RAdam's state_dict() is a KeyError then
            assert consolidated["state"].keys() == sides[1].optimizer.state_dict()["state"].keys(), name
        for side in sides:
            edit_options(side)
        train(sides, range(6, 8), name)


MODES_OF = {
    1: ("DDP", "DDP, no views", "sharded"),
    2: tuple(MODES),
    3: ("DDP, gloo", "sharded", "shared parameters"),
    4: ("DDP", "sharded, gloo"),
}
"""By world size: each mode at two of them and more."""


@pytest.mark.parametrize(
    ("world_size", "mode"),
    [
        pytest.param(w, mode, marks=[pytest.mark.quick] * ((w, mode) == (2, "sharded")))
        for w in WORLD_SIZES
        for mode in MODES_OF[w]
    ],
)
def test_edits_take_effect_as_with_radam(world_size: int, mode: str) -> None:
    run(check_edits, world_size, mode)


def check_return(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """Groups that are taken out, and put back later: they find their state, wherever it is cut."""
    sides = Side(ShardedRAdam, bucket_cap_mb=1e-3, **options), Side(torch.optim.RAdam)
    train(sides, range(3), "before")
    for side in sides:
        side.kept = side.groups.pop(0)
        append_parameter(side)
    train(sides, range(3, 6), "without")
    copies = [copy.deepcopy(side) for side in sides]
    for side in (*sides, *copies):
        side.groups.insert(1, side.kept)
        side.groups[1]["params"].append(side.groups[0]["params"].pop(0))
    train(sides, range(6, 9), "back")
    if not options.get("share_parameters"):
        train((copies[0], copies[1]), range(6, 9), "back in the copy")
        compare(sides[0], copies[1], "the copy and the original")


@pytest.mark.quick
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_find_their_state_when_they_come_back(world_size: int) -> None:
    for options in ({}, {"shard_gradients": True}):
        run(check_return, world_size, options)


def check_between(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """Between backward and step, gradients stay with their parameters; also of a backward pass that had begun."""
    sides = Side(ShardedRAdam, bucket_cap_mb=1e-3, **options), Side(torch.optim.RAdam)
    train(sides, range(2), "before")
    for edit in (move_parameter, remove_parameter, sort_groups, append_parameter, assign_groups):
        for side in sides:
            side.backward(7)
            edit(side)
            side.optimizer.step()
        compare(*sides, edit.__name__)
    train(sides, range(8, 10), "after")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_edits_between_backward_and_step(world_size: int) -> None:
    for options in ({}, {"shard_gradients": True}, {"shard_gradients": True, "transport": "gloo"}):
        if world_size > 1 or "transport" not in options:
            run(check_between, world_size, options)


def check_half(rank: int, world_size: int) -> None:
    """Masters move along: the weights are those of a run without edits, and of RAdam in fp32, rounded."""
    params = [[Parameter(torch.full(shape, 0.7, dtype=torch.bfloat16)) for shape in ((70, 9), (33,))] for _ in range(2)]
    edited, plain = (ShardedRAdam(each, lr=1e-3, bucket_cap_mb=1e-3) for each in params)
    for step in range(12):
        for each, optimizer in zip(params, (edited, plain), strict=True):
            for param in each:
                param.grad = torch.full_like(param, 0.01 * (step + 1))
            optimizer.step()
        if step % 3 == 2:
            edited.param_groups[0]["params"].reverse()
    for own, param in zip(*params, strict=True):
        assert torch.equal(own, param)
        for kind, value in edited.full_state(own).items():
            assert torch.equal(value, plain.full_state(param)[kind]), kind


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_masters_move_along(world_size: int) -> None:
    run(check_half, world_size)


def surgery(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    """A layer is replaced; its parameters take the places of the old ones in the group."""
    model[0] = nn.Linear(3, 4)
    nn.init.constant_(model[0].get_parameter("weight"), 0.2)
    nn.init.constant_(model[0].get_parameter("bias"), 0.1)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def untie(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[3].weight = Parameter(model[1].get_parameter("weight").detach().clone())
    optimizer.add_param_group({"params": [model[3].get_parameter("weight")]})


def check_models(rank: int, world_size: int, options: dict[str, Any]) -> None:
    for change in (surgery, untie):
        sides: list[tuple[nn.Sequential, Any]] = []
        builds: list[Callable[..., Any]] = [partial(ShardedRAdam, **options), torch.optim.RAdam]
        for build in builds:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            model[3].weight = model[1].get_parameter("weight")
            sides.append((model, build(model.parameters(), foreach=True)))
        for step in range(6):
            for model, optimizer in sides:
                optimizer.zero_grad()
                if step == 3:
                    change(model, optimizer)
                model(torch.ones(2, 3)).square().sum().backward()
                optimizer.step()
            for own, param in zip(sides[0][0].parameters(), sides[1][0].parameters(), strict=True):
                assert torch.equal(own, param) or (world_size == 3 and torch.allclose(own, param)), (change, step)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weight_surgery_and_untied_weights(world_size: int) -> None:
    for options in ({}, {"shard_gradients": True}):
        run(check_models, world_size, options)


def check_remembered(rank: int, world_size: int) -> None:
    """As DDP's own mixed precision: the data is kept aside, and assigned before each step."""
    sides = Side(ShardedRAdam, bucket_cap_mb=1e-3), Side(torch.optim.RAdam)
    for when in ("from construction on", "later"):
        remembered = [[param.data.clone() for param in side.params] for side in sides]
        for seed in range(4):
            for side, datas in zip(sides, remembered, strict=True):
                for param in side.params:
                    param.data = param.data.clone()
                side.backward(seed)
                for param, data in zip(side.params, datas, strict=True):
                    param.data = data
                side.optimizer.step()
            compare(*sides, when)
            for own, data in zip(*remembered, strict=True):
                assert torch.equal(own, data)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_data_that_is_remembered(world_size: int) -> None:
    run(check_remembered, world_size)


def check_with_gaps(rank: int, world_size: int, options: dict[str, Any]) -> None:
    """Columns of one matrix, each a parameter, as PyTorch's own tests of optimizers have them."""
    bases, sides = [torch.ones(9, 20) for _ in range(2)], []
    builds: list[Callable[..., Any]] = [partial(ShardedRAdam, **options), torch.optim.RAdam]
    for base, build in zip(bases, builds, strict=True):
        params = [Parameter(base[:, :7]), Parameter(base[:, 7:8]), Parameter(base[:, 9::2].t())]
        sides.append((params, build(params, foreach=True)))
    for step in range(8):
        for params, optimizer in sides:
            optimizer.zero_grad()
            loss = torch.stack([(param * (step - 2)).sum() for param in params]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        assert torch.equal(*bases), step
        assert sides[0][0][0].data_ptr() == bases[0].data_ptr()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_parameters_with_gaps_in_memory(world_size: int) -> None:
    for options in ({}, {"shard_gradients": True}, {"parameters_as_bucket_view": False}):
        run(check_with_gaps, world_size, options)


def twice(side: Side) -> None:
    side.groups[0]["params"].append(side.params[-1])


def without_lr(side: Side) -> None:
    side.groups.append({"params": [side.new(3)]})


def a_set(side: Side) -> None:
    side.groups[0]["params"] = set(side.groups[0]["params"])


def no_tensor(side: Side) -> None:
    side.groups[0]["params"].append("w")


def of_another_shape(side: Side) -> None:
    side.optimizer.state[side.params[0]]["exp_avg"] = torch.zeros(5, 5)


WRONG: dict[Callable[[Side], None], str] = {
    twice: r"parameter '0\.2' of param group 0 is in group 1|in group 0, too",
    without_lr: r"param group 2 has no \['betas', .*'lr'.*\]: add it by add_param_group\(\)",
    a_set: "the parameters of group 0 are a set, which has no order",
    no_tensor: r"param group 0 has \['str'\] among its parameters",
    of_another_shape: r"loaded exp_avg of parameter '0\.0' has shape \(5, 5\)",
}


def check_wrong(rank: int, world_size: int, on: int | None) -> None:
    """The step raises on all ranks, before anything has changed; put right, training goes on."""
    for edit, text in WRONG.items():
        side = Side(ShardedRAdam, bucket_cap_mb=1e-3)
        side.backward(0)
        side.optimizer.step()
        before = [param.detach().clone() for param in side.params]
        groups, exp_avg = [{**group, "params": [*group["params"]]} for group in side.groups], None
        if on in (None, rank):
            exp_avg = side.optimizer.state[side.params[0]]["exp_avg"]
            edit(side)
            side.params = side.params[: len(SHAPES)]
        for param in side.params:
            param.grad = torch.ones_like(param)
        told = (
            text
            if on is None or edit is of_another_shape
            else "ranks do different things .*: following what was edited"
        )
        with pytest.raises((ValueError, TypeError, RuntimeError), match=told):
            side.optimizer.step()
        if on is None:
            assert all(map(torch.equal, side.params, before)), edit
        side.optimizer.param_groups = groups
        if exp_avg is not None:
            side.optimizer.state[side.params[0]]["exp_avg"] = exp_avg
        if on is None:
            side.optimizer.step()
            assert not torch.equal(side.params[0], before[0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_cannot_be_followed_raises_before_anything_has_changed(world_size: int) -> None:
    run(check_wrong, world_size, None)


def test_what_one_rank_alone_edits_raises_on_all() -> None:
    run(check_wrong, 2, 1)


def check_listed_twice(rank: int, world_size: int) -> None:
    params = [Parameter(torch.ones(5)), Parameter(torch.ones(3))]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = ShardedRAdam([*params, params[0]])
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"parameter '0\.2' is listed twice in param group 0"):
            optimizer.step()
    assert all(bool((param == 1).all()) for param in params)
    optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    assert all(bool((param != 1).all()) for param in params)
    optimizer.param_groups[0]["params"].append(params[1])
    with pytest.raises(ValueError, match=r"parameter '0\.2' is listed twice in param group 0"):
        optimizer.step()


@pytest.mark.quick
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_parameter_listed_twice_is_an_error_of_the_step(world_size: int) -> None:
    run(check_listed_twice, world_size)


def check_replaced_in_the_model_only(rank: int, world_size: int) -> None:
    """Nothing trains that nothing uses, also after other groups were laid out anew."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ShardedRAdam(model.named_parameters())
    model[1].bias = Parameter(torch.zeros(2))
    for new in ([], [Parameter(torch.ones(3))]):
        optimizer.param_groups[0]["params"] += new
        with pytest.raises(RuntimeError, match=r"'1\.bias' was replaced by another Parameter in Linear\.bias"):
            optimizer.step()
    optimizer.param_groups[0]["params"][3] = model[1].bias
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias", "0.4"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_parameter_that_was_replaced_in_the_model_only(world_size: int) -> None:
    run(check_replaced_in_the_model_only, world_size)
