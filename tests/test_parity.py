"""The whole optimizer against torch.optim.RAdam, on the same gradients, at 1 to 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from tests.cases import HYPERPARAMETERS, STEPS, assert_same, make_params, missing_at, set_grads
from tests.ranks import WORLD_SIZES, run

pytestmark = pytest.mark.quick

CAPS = (25.0, 1e-3)
"""One bucket for all, and buckets that cut parameters."""


def groups_of(params: list[Parameter], hyper: dict[str, Any]) -> list[dict[str, Any]]:
    """Three groups, one of them with other hyperparameters, one with an empty parameter only."""
    return [
        {"params": params[:4]},
        {"params": params[4:5], "weight_decay": 0.2},
        {"params": params[5:], "lr": 3 * hyper.get("lr", 1e-3), "betas": (0.8, 0.99)},
    ]


def train(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int = STEPS) -> None:
    for step in range(1, steps + 1):
        set_grads(params, step, missing_at(step))
        optimizer.step()


def check_bit_equal(_rank: int, _world_size: int, foreach: bool) -> None:
    for number, hyper in enumerate(HYPERPARAMETERS):
        for dtype in (torch.float32, torch.float64, torch.complex64) if number < 3 else (torch.float32,):
            ours, theirs = make_params(dtype), make_params(dtype)
            cap, as_views = CAPS[number % 2], number % 3 != 2
            sharded = ShardedRAdam(
                groups_of(ours, hyper), foreach=foreach, bucket_cap_mb=cap, parameters_as_bucket_view=as_views, **hyper
            )
            radam = torch.optim.RAdam(groups_of(theirs, hyper), foreach=foreach, **hyper)
            train(sharded, ours)
            train(radam, theirs)
            assert_same(ours, theirs, (hyper, dtype))
            consolidated = sharded.consolidate_state_dict(to=0)
            if consolidated is not None:
                check_state(consolidated, radam.state_dict())


def check_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """The same, but that RAdam has nothing for parameters that never had a gradient, and we zeros."""
    assert ours["param_groups"] == theirs["param_groups"]
    for index, state in ours["state"].items():
        other = theirs["state"].get(index)
        if other is None:
            assert all(not tensor.any() for tensor in state.values())
            continue
        assert state.keys() == other.keys()
        for name in state:
            assert state[name].dtype == other[name].dtype
            assert torch.equal(state[name], other[name]), (index, name)
            assert state[name].stride() == other[name].stride()


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bit_equal_to_radam(world_size: int, foreach: bool) -> None:
    run(check_bit_equal, world_size, foreach)


def fused_results(_rank: int, _world_size: int, cap: float) -> list[list[Tensor]]:
    results = []
    for hyper in HYPERPARAMETERS:
        params = make_params()
        optimizer = ShardedRAdam(groups_of(params, hyper), fused=True, bucket_cap_mb=cap, **hyper)
        train(optimizer, params)
        results.append([param.detach().clone() for param in params])
    return results


def test_fused_is_bit_equal_between_world_sizes_and_close_to_radam() -> None:
    alone = run(fused_results, 1, CAPS[0])[0]
    for world_size in WORLD_SIZES:
        for cap in CAPS:
            for ranks_result in run(fused_results, world_size, cap):
                for one, other in zip(ranks_result, alone, strict=True):
                    assert_same(one, other, (world_size, cap))
    for hyper, result in zip(HYPERPARAMETERS, alone, strict=True):
        theirs = make_params()
        train(torch.optim.RAdam(groups_of(theirs, hyper), foreach=True, **hyper), theirs)
        for one, other in zip(result, theirs, strict=True):
            if other.numel():
                unit = torch.finfo(torch.float32).eps * max(1.0, float(other.detach().abs().max()))
                assert (one - other).abs().max() <= 2 * unit, hyper


def check_half(rank: int, world_size: int, name: str) -> None:
    """Half precision: every rank ends with the bits of fp32 training on the rounded gradients, rounded each step."""
    dtype: torch.dtype = getattr(torch, name)
    for flags in ({"foreach": True}, {"fused": True}, {"foreach": False}):
        params = make_params(dtype)
        masters = [Parameter(param.detach().float()) for param in params]
        optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, weight_decay=0.1, **flags)  # type: ignore[arg-type]
        reference = ShardedRAdam(masters, bucket_cap_mb=1e-3, weight_decay=0.1, **flags)  # type: ignore[arg-type]
        for step in range(1, STEPS + 1):
            set_grads(params, step, missing_at(step))
            for param, master in zip(params, masters, strict=True):
                master.grad = None if param.grad is None else param.grad.float()
            optimizer.step()
            reference.step()
        assert_same([master.to(dtype) for master in masters], params, flags)
        saved = optimizer.consolidate_state_dict(to=world_size - 1)
        assert (saved is None) == (rank != world_size - 1)
        for index, master in enumerate(masters) if saved else ():
            assert saved is not None
            state = saved["state"][index]
            assert torch.equal(state["master"], master)
            assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "master")} == {torch.float32}


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_half_precision(world_size: int, name: str) -> None:
    run(check_half, world_size, name)


def check_mixed_dtypes(_rank: int, _world_size: int) -> None:
    def make() -> list[Parameter]:
        dtypes = (torch.float32, torch.float64, torch.complex128, torch.float32)
        return [Parameter(p.detach().to(dtypes[i % 4])) for i, p in enumerate(make_params(torch.float32))]

    ours, theirs = make(), make()
    sharded = ShardedRAdam(ours, foreach=True, bucket_cap_mb=1e-3)
    radam = torch.optim.RAdam(theirs, foreach=True)
    train(sharded, ours)
    train(radam, theirs)
    assert_same(ours, theirs)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_mixed_dtypes(world_size: int) -> None:
    run(check_mixed_dtypes, world_size)


def check_tensor_lr(_rank: int, _world_size: int) -> None:
    for shape in ((), (1,)):
        ours, theirs = make_params(), make_params()
        sharded = ShardedRAdam(ours, lr=torch.full(shape, 0.01), foreach=True)
        radam = torch.optim.RAdam(theirs, lr=torch.tensor(0.01), foreach=True)  # torch 2.6 fails for (1,)
        train(sharded, ours)
        train(radam, theirs)
        assert_same(ours, theirs)
        fused = make_params()
        train(ShardedRAdam(fused, lr=torch.full(shape, 0.01), fused=True), fused)
        for one, other in zip(fused, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_tensor_lr(world_size: int) -> None:
    run(check_tensor_lr, world_size)


def check_padding(_rank: int, world_size: int) -> None:
    """No update touches padding: what is put there stays, and reaches no parameter."""
    for flags in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        params, clean = make_params(), make_params()
        optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, eps=0.0, **flags)  # type: ignore[arg-type]
        (flat,) = optimizer._shards.flats
        is_data = torch.zeros(flat.plan.numel, dtype=torch.bool)
        for slot in flat.plan.slots:
            is_data[slot.start : slot.start + slot.numel] = True
        flat.buffer[~is_data] = float("nan")
        train(optimizer, params)
        assert flat.buffer[~is_data].isnan().all()
        assert (~is_data).sum() > 64
        reference = ShardedRAdam(clean, bucket_cap_mb=1e-3, eps=0.0, **flags)  # type: ignore[arg-type]
        train(reference, clean)
        assert_same(params, clean)
        own = sum(piece.numel for piece in flat.plan.pieces(optimizer._shards.transport.rank))
        assert int((flat.state["exp_avg"] != 0).sum()) <= own
        assert world_size * flat.plan.local_numel == flat.plan.numel


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_padding_never_sees_an_update(world_size: int) -> None:
    run(check_padding, world_size)
