"""differentiable=True: autograd runs through a step, also through the gather."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from tests.cases import STEPS, make_params, missing_at, set_grads
from tests.ranks import WORLD_SIZES, run

FLAGS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
)


def steps(param: Tensor, lr: Tensor, grads: Tensor, *, flags: dict[str, Any]) -> Tensor:
    """Two parameters of several shards that take steps, as a function of their values, lr and each step's gradients."""
    params = [param.clone(), param[:3].t().clone()]
    optimizer = ShardedRAdam(params, lr=lr, differentiable=True, betas=(0.8, 0.9), bucket_cap_mb=1e-3, **flags)
    for grad in grads:
        params[0].grad, params[1].grad = grad, grad[:3].t()
        optimizer.step()
    return torch.cat([p.reshape(-1) for p in params])


def check_gradients(_rank: int, _world_size: int) -> None:
    torch.manual_seed(0)
    param, lr = torch.randn(9, 15, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    grads = torch.randn(7, 9, 15, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (param, lr, grads)]
    for flags in FLAGS:
        assert torch.autograd.gradcheck(lambda *args: steps(*args, flags=flags), inputs, fast_mode=True)  # noqa: B023
    few = [param, lr, grads[:6].detach().requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda *args: steps(*args, flags=FLAGS[1]), few, fast_mode=True)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradcheck_through_steps(world_size: int) -> None:
    run(check_gradients, world_size)


def check_slow_gradcheck(_rank: int, _world_size: int) -> None:
    """Every entry of the Jacobian, for one step."""
    torch.manual_seed(0)
    inputs = [torch.randn(70, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lr = torch.tensor(0.1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p, g: steps(p.view(7, 10), lr, g.view(1, 7, 10), flags={}), inputs)


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradcheck_of_one_step(world_size: int) -> None:
    run(check_slow_gradcheck, world_size)


def check_moments(rank: int, world_size: int) -> None:
    """Through the moments that a user puts into the state, which a step replaces."""
    torch.manual_seed(0)
    start, grad, moment = (torch.randn(5, 40, dtype=torch.float64) for _ in range(3))
    exp_avg_sq = torch.rand(5, 40, dtype=torch.float64, requires_grad=True)
    param = start.clone()
    optimizer = ShardedRAdam([param], differentiable=True)
    own = optimizer.state[param]["exp_avg_sq"].numel()
    mine = exp_avg_sq if world_size == 1 else exp_avg_sq.reshape(-1)[:own]
    optimizer.state[param]["exp_avg_sq"] = mine
    optimizer.state[param]["step"] = torch.tensor(10.0)
    param.grad = grad
    optimizer.step()
    param.sum().backward()  # type: ignore[no-untyped-call]
    assert exp_avg_sq.grad is not None
    assert bool(exp_avg_sq.grad.any()) == (own > 0)
    assert optimizer.state[param]["exp_avg_sq"].requires_grad
    del moment, rank


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_through_the_state(world_size: int) -> None:
    run(check_moments, world_size)


def check_values(rank: int, _world_size: int) -> None:
    """The values are those of RAdam; complex and half parameters and missing gradients work, and so does saving."""
    for dtype in (torch.float32, torch.complex64, torch.bfloat16):
        ours, theirs = make_params(dtype), make_params(dtype)
        ours_values = [param.detach() for param in ours]
        sharded = ShardedRAdam(ours_values, differentiable=True, weight_decay=0.1, bucket_cap_mb=1e-3)
        radam = torch.optim.RAdam(theirs, foreach=False, weight_decay=0.1)
        for step in range(1, STEPS + 1):
            set_grads(theirs, step, missing_at(step))
            for param, other in zip(ours_values, theirs, strict=True):
                param.grad = other.grad
            sharded.step()
            radam.step()
        if dtype != torch.bfloat16:
            assert all(torch.equal(a, b) for a, b in zip(ours_values, theirs, strict=True))
        saved = sharded.consolidate_state_dict()
        if saved is not None and dtype != torch.bfloat16:
            for index, param in enumerate(theirs):
                if param in radam.state:
                    assert torch.equal(saved["state"][index]["exp_avg"], radam.state[param]["exp_avg"])
        assert (saved is None) == (rank != 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_values(world_size: int) -> None:
    run(check_values, world_size)


def test_leaves_that_require_grad_are_an_error_as_in_radam() -> None:
    for make in (torch.optim.RAdam, ShardedRAdam):
        param = Parameter(torch.ones(3))
        optimizer = make([param], differentiable=True)
        param.grad = torch.ones(3)
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            optimizer.step()
