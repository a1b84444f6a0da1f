"""differentiable=True: autograd runs through a step, on one rank; several are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim import RAdam

from sharded_radam import ShardedRAdam
from tests.cases import STEPS, make_params, missing_at, set_grads
from tests.ranks import run

pytestmark = pytest.mark.quick

FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
)


def ours(params: list[Tensor], **flags: Any) -> ShardedRAdam:
    return ShardedRAdam(params, differentiable=True, bucket_cap_mb=1e-3, **flags)


def radam(params: list[Tensor], **flags: Any) -> RAdam:
    return RAdam(params, differentiable=True, **flags)


def steps(
    param: Tensor, lr: Tensor, grads: Tensor, *, flags: dict[str, Any], make: Callable[..., RAdam] = ours
) -> Tensor:
    """Two parameters of several buckets that take steps, as a function of their values, lr and all gradients."""
    params = [param.clone(), param[:3].t().clone()]
    optimizer = make(params, **{"lr": lr, "betas": (0.8, 0.9), **flags})
    for grad in grads:
        params[0].grad, params[1].grad = grad, grad[:3].t()
        optimizer.step()
    return torch.cat([p.reshape(-1) for p in params])


def inputs(num_steps: int) -> list[Tensor]:
    torch.manual_seed(0)
    param, lr = torch.randn(9, 15, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    grads = torch.randn(num_steps, 9, 15, dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (param, lr, grads)]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_gradcheck_through_steps(flags: dict[str, Any]) -> None:
    assert torch.autograd.gradcheck(lambda *args: steps(*args, flags=flags), inputs(7), fast_mode=True)


def test_second_derivatives() -> None:
    few = inputs(6)
    few[2] = few[2].detach()
    assert torch.autograd.gradgradcheck(lambda *args: steps(*args, flags=FLAGS[1]), few, fast_mode=True)


def test_gradcheck_of_one_step() -> None:
    """Every entry of the Jacobian."""
    torch.manual_seed(0)
    start, grad = (torch.randn(70, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lr = torch.tensor(0.1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p, g: steps(p.view(7, 10), lr, g.view(1, 7, 10), flags={}), [start, grad])


@pytest.mark.parametrize("num_steps", [1, 7])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_values_and_gradients_are_radams(flags: dict[str, Any], num_steps: int) -> None:
    """To the bit: in the parameters, lr, and each step's gradients."""
    results = []
    for make in (ours, radam):
        variables = inputs(num_steps)
        end = steps(*variables, flags=flags, make=make)
        results.append([end, *torch.autograd.grad(end.square().sum(), variables)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["beta1", "eps"])
def test_gradients_in_hyperparameters(name: str) -> None:
    """Those that torch's functional radam takes as tensors; the numbers of steps are those with which RAdam can."""

    def end(value: Tensor, make: Callable[..., RAdam] = ours) -> Tensor:
        flags = {"betas": (value, 0.9)} if name == "beta1" else {"eps": value}
        param, lr, grads = (tensor.detach() for tensor in inputs(1 if name == "beta1" else 7))
        return steps(param, lr, grads, flags=flags, make=make)

    values = [torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    found = [
        torch.autograd.grad(end(value, make).square().sum(), value)[0]
        for value, make in zip(values, (ours, radam), strict=True)
    ]
    assert torch.equal(*found)
    assert found[0]
    assert torch.autograd.gradcheck(end, values[:1])


def test_gradients_through_the_state() -> None:
    """Through the moments that a user puts into the state, which a step replaces."""
    torch.manual_seed(0)
    start, grad = (torch.randn(5, 40, dtype=torch.float64) for _ in range(2))
    exp_avg_sq = torch.rand(5, 40, dtype=torch.float64, requires_grad=True)
    found: list[Tensor] = []
    for make in (ours, radam):
        param = start.clone()
        optimizer = make([param])
        moment = exp_avg_sq if make is ours else exp_avg_sq.clone()
        optimizer.state[param] = {
            "step": torch.tensor(10.0),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": moment,
        }
        param.grad = grad
        optimizer.step()
        found += torch.autograd.grad(param.sum(), exp_avg_sq)
        assert optimizer.state[param]["exp_avg_sq"].requires_grad
    assert found[0].all()
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16], ids=str)
def test_values_with_missing_gradients(dtype: torch.dtype) -> None:
    """The values are those of RAdam; complex and half parameters work, and so do saving and loading."""
    ours_values, theirs = [param.detach() for param in make_params(dtype)], make_params(dtype)
    sharded = ours(ours_values, weight_decay=0.1)
    plain = RAdam(theirs, foreach=False, weight_decay=0.1)
    for step in range(1, STEPS + 1):
        set_grads(theirs, step, missing_at(step))
        for param, other in zip(ours_values, theirs, strict=True):
            param.grad = other.grad
        sharded.step()
        plain.step()
    saved = sharded.consolidate_state_dict()
    assert saved is not None
    again = ours([param.clone() for param in ours_values])
    again.load_state_dict(saved)
    for index, (param, other) in enumerate(zip(ours_values, theirs, strict=True)):
        state = saved["state"][index]
        loaded = again.state[again.param_groups[0]["params"][index]]
        assert all(torch.equal(loaded[key], state[key]) for key in ("exp_avg", "exp_avg_sq"))
        if dtype == torch.bfloat16:
            assert torch.equal(state["master"], param.float())
        else:
            assert torch.equal(param, other)
            assert other not in plain.state or torch.equal(state["exp_avg"], plain.state[other]["exp_avg"])


def test_leaves_that_require_grad_are_an_error_as_in_radam() -> None:
    for make in (RAdam, ShardedRAdam):
        param = Parameter(torch.ones(3))
        optimizer = make([param], differentiable=True)
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            optimizer.step()


def check_refusal(rank: int, world_size: int) -> None:
    """On every rank, also where only one asks for it; with a group of one's own it works."""
    for differentiable in (True, rank == world_size - 1):
        with pytest.raises(
            ValueError, match=rf"differentiable=True is for one rank, and here are {world_size}"
        ) as error:
            ShardedRAdam([torch.ones(3)], differentiable=differentiable)
        assert "Expected differentiable=False, or process_group=" in str(error.value)
    alone, _ = dist.new_subgroups(1)  # type: ignore[no-untyped-call]
    param = torch.ones(3)
    optimizer = ShardedRAdam([param], differentiable=True, process_group=alone, lr=0.1)
    param.grad = torch.full((3,), rank + 1.0)
    optimizer.step()
    torch.testing.assert_close(param, torch.ones(3) - 0.1 * (rank + 1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_are_refused(world_size: int) -> None:
    run(check_refusal, world_size)
