"""The compiled engine: close to the others, equal to the bit at every world size, one compilation for all steps."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from sharded_radam import ShardedRAdam, compiled
from sharded_radam.compiled import compile_for, compiled_update_
from sharded_radam.dtypes import HALF_DTYPES, wide
from sharded_radam.radam import Operands, update_
from tests.cases import STEPS, assert_same, make_params, missing_at, set_grads
from tests.ranks import WORLD_SIZES, run
from tests.test_radam import hyperparameters

pytestmark = [
    pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs g++ or clang++, not here"
    ),
    pytest.mark.timeout(600),
]

CPU = torch.device("cpu")


def unit(like: Tensor) -> float:
    return torch.finfo(like.dtype).eps * max(1.0, float(like.abs().max()))


# The kernel


def operands(dtype: torch.dtype, numel: int) -> Operands:
    param = torch.randn(numel, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    exp_avg, exp_avg_sq = (torch.zeros(numel, dtype=wide(dtype)) for _ in range(2))
    master = param.to(wide(dtype)) if dtype in HALF_DTYPES else None
    return Operands(param, param.clone(), exp_avg, exp_avg_sq, master)


FORMS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "lr": 0.5},
    {"betas": (0.1, 0.2), "eps": 0.25},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_close_to_torchs_foreach_over_the_switch_of_rho(dtype: torch.dtype) -> None:
    for number, changes in enumerate(FORMS if dtype in (torch.float32, torch.bfloat16) else FORMS[:1]):
        hyper = hyperparameters(**changes)
        ours, theirs = operands(dtype, 1024), operands(dtype, 1024)
        for step in range(1, STEPS + 1):
            grad = torch.randn(1024, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
            number_of_step = torch.tensor(float(step), dtype=torch.float64) if number % 2 else step
            compiled_update_([ours._replace(grad=grad)], number_of_step, hyper)
            update_([theirs._replace(grad=grad)], "foreach", step, hyper)
        for one, other in zip(ours[2:], theirs[2:], strict=True):
            if one is not None and other is not None:
                assert (one - other).abs().max() <= 2 * unit(other)
        exact = (ours.param, theirs.param) if ours.master is None else (ours.param, ours.master.to(dtype))
        assert (exact[0] - exact[1]).abs().max() <= (2 * unit(exact[1]) if ours.master is None else 0)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_a_master_stays_wherever_it_rounds_to_its_parameter(dtype: torch.dtype) -> None:
    """Ties, neighbours of ties, subnormal numbers, what overflows. Everywhere else it becomes the parameter."""
    values = torch.cat([torch.randn(500) * 10.0**power for power in (-8, -6, -3, 0, 3)])
    values = torch.cat(
        [values, torch.tensor([0.0, -0.0, 65519.0, 65520.0, -1e5, 3.39e38, float("inf"), -float("inf")])]
    )
    params = values.to(dtype)
    neighbours = (params.view(torch.int16) + 1).view(dtype).float()
    ties = (params.float() + neighbours) / 2
    up, down = torch.tensor(float("inf")), torch.tensor(-float("inf"))
    for masters in (values, values * 1.01, ties, torch.nextafter(ties, up), torch.nextafter(ties, down)):
        known = ~masters.isnan()
        kept = compiled._rounds_to(masters, params)
        assert torch.equal(kept[known], (masters.to(dtype) == params)[known])

    hyper = hyperparameters(lr=0.0)
    numel = params.numel() // 64 * 64
    compile_for(dtype, dtype, CPU, hyper, False)
    for masters in (values[:numel], values[:numel] * 1.01):
        given = masters.clone()
        given_to = Operands(params[:numel].clone(), params[:numel], torch.zeros(numel), torch.zeros(numel), given)
        compiled_update_([given_to], 1, hyper)
        assert torch.equal(given, torch.where(masters.to(dtype) == params[:numel], masters, params[:numel].float()))


def test_nothing_is_compiled_anew() -> None:
    """Not for another step, length, lr, betas, eps or decay, nor under autocast."""
    hyper = hyperparameters(weight_decay=0.1)
    compile_for(torch.float32, torch.float32, CPU, hyper, False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, 12):
            changed = hyperparameters(
                weight_decay=0.1 / step, lr=1e-3 / step, betas=(0.9 - step / 100, 0.99), eps=1e-8 * step
            )
            with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 0):
                compiled_update_([operands(torch.float32, 64 * step)], step, changed)


# The optimizer

OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"weight_decay": 0.1}),
    (torch.bfloat16, {"weight_decay": 0.1}),
    (torch.float32, {"weight_decay": 0.1, "eps": 0.0}),
    (torch.float32, {"weight_decay": 0.1, "eps": 1e-50}),  # which is 0 in fp32
    (torch.complex64, {"weight_decay": 0.1}),
]


def train(dtype: torch.dtype, options: dict[str, Any], shards: bool, cap: float) -> list[Tensor]:
    """The parameters in the end; padding must be zero."""
    params = make_params(dtype)
    optimizer = ShardedRAdam(params, compiled=True, bucket_cap_mb=cap, shard_gradients=shards, **options)
    for step in range(1, STEPS + 1):
        set_grads(params, step, missing_at(step))
        if shards:
            grads = [param.grad for param in params]
            optimizer.zero_grad()
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad  # as it is, which all ranks have
        optimizer.step()
    for flat in optimizer._shards.flats:
        padding = [at for part in flat.plan.padding(flat.rank) for at in part]
        assert not any(tensor[padding].any() for tensor in flat.state.values())
        is_used = torch.zeros(flat.plan.numel, dtype=torch.bool)
        for slot in flat.plan.slots:
            is_used[slot.start : slot.start + slot.numel] = True
        assert not flat.buffer[~is_used].any()
        assert flat.buffer.isfinite().all()
    return [param.detach().clone() for param in params]


def results(_rank: int, world_size: int, caps: list[float]) -> list[list[Tensor]]:
    for dtype, options in OPTIONS:  # not while another rank waits
        for grad in {dtype, wide(dtype)}:
            compile_for(dtype, grad, CPU, hyperparameters(**options), False)
    found = []
    for dtype, options in OPTIONS:
        for cap in caps:
            whole, sharded = (train(dtype, options, shards, cap) for shards in (False, True))
            if world_size != 3:  # the mean of three equal gradients is another one in the last bit
                assert_same(whole, sharded, (dtype, cap))
            found.append(whole)
    return found


def test_bit_equal_at_every_world_size_and_close_to_radam() -> None:
    alone = run(results, 1, [25.0])[0]
    for world_size in WORLD_SIZES[1:]:
        for ranks_result in run(results, world_size, [1e-3]):
            for one, other in zip(ranks_result, alone, strict=True):
                assert_same(one, other, world_size)
    for (dtype, options), ours in zip(OPTIONS, alone, strict=True):
        if dtype not in HALF_DTYPES:
            theirs = make_params(dtype)
            radam = torch.optim.RAdam(theirs, foreach=True, **options)
            for step in range(1, STEPS + 1):
                set_grads(theirs, step, missing_at(step))
                radam.step()
            for one, other in zip(ours, theirs, strict=True):
                if one.numel():
                    real = torch.view_as_real(other.detach()) if other.is_complex() else other.detach()
                    assert (one - other).abs().max() <= 3 * unit(real)


def test_default_device_and_copies() -> None:
    params = make_params()
    optimizer = ShardedRAdam(params, compiled=True)
    other_params, other = copy.deepcopy((params, optimizer))
    for each, its_params in ((optimizer, params), (other, other_params)):
        set_grads(its_params, 1)
        with torch.device("meta"):
            each.step()
    assert_same(params, other_params)
    assert not torch.equal(params[0], make_params()[0])


def check_infinite_gradients(_rank: int, _world_size: int) -> None:
    """What they make of parameters goes with the next dict; what they made of padding would stay for ever."""
    hyper = hyperparameters()
    compile_for(torch.float32, torch.float32, CPU, hyper, False)
    params = make_params()
    optimizer = ShardedRAdam(params, compiled=True, shard_gradients=True, bucket_cap_mb=1e-3)
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    assert optimizer.clip_grad_norm_(1.0).isinf()
    optimizer.step()
    assert params[0].isnan().all()
    for flat in optimizer._shards.flats:
        padding = [at for part in flat.plan.padding(flat.rank) for at in part]
        assert not any(tensor[padding].any() for tensor in flat.state.values())
    optimizer.zero_grad()
    for param in params:
        param.grad = torch.ones_like(param)
    numel = sum(param.numel() for param in params)
    torch.testing.assert_close(optimizer.grad_norm(), torch.tensor(float(numel), dtype=torch.float64).sqrt())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_padding_outlives_gradients_that_are_infinite(world_size: int) -> None:
    run(check_infinite_gradients, world_size)


def operations(num_params: int, **flags: Any) -> Counter[str]:
    """Of torch, in clipping and a step with sharded gradients."""
    params = [Parameter(torch.ones(7)) for _ in range(num_params)]
    optimizer = ShardedRAdam(params, shard_gradients=True, **flags)
    for _ in range(2):
        optimizer.zero_grad()
        torch.stack([(param * param).sum() for param in params]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.grad_norm()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
    return Counter(event.name for event in profiler.events() if event.name.startswith("aten::"))


@pytest.mark.parametrize("flags", [{"compiled": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_as_many_operations_for_500_parameters_as_for_5(flags: dict[str, Any]) -> None:
    few = operations(5, **flags)
    assert few.total() > 5
    assert operations(500, **flags) == few


# Errors


@pytest.mark.parametrize("other", [{"fused": True}, {"foreach": True}, {"differentiable": True}], ids=str)
def test_it_excludes_other_engines(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="compiled=True excludes"):
        ShardedRAdam([Parameter(torch.ones(3))], compiled=True, **other)


def check_no_compiler(rank: int, world_size: int) -> None:
    known: set[Any] = set()
    broken = mock.patch.object(compiled, "_compiled", side_effect=OSError("no g++"))
    with mock.patch.object(compiled, "_known", known), broken if rank == world_size - 1 else mock.MagicMock():
        params = [Parameter(torch.ones(3))]
        with pytest.raises(
            RuntimeError, match=r"made no update for torch.float32 on cpu.*no g\+\+.*Expected a compiler"
        ):
            ShardedRAdam(params, compiled=True)
    if world_size > 1:
        dist.barrier()
    ShardedRAdam(params).step()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_one_rank_cannot_compile_is_an_error_on_all(world_size: int) -> None:
    run(results, 1, [25.0])
    run(check_no_compiler, world_size)


def test_a_machine_without_a_compiler(tmp_path: Path) -> None:
    environment = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    program = (
        "import torch; from sharded_radam import ShardedRAdam\n"
        "ShardedRAdam([torch.nn.Parameter(torch.ones(3))], compiled=True)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "RuntimeError: compiled=True: torch.compile made no update for torch.float32 on cpu" in done.stderr
    assert "apt install g++" in done.stderr
