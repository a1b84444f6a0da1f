from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sharded_radam import radam as ours
from sharded_radam.compat import VERSION
from sharded_radam.radam import Engine, Hyperparameters, Operands, fused_terms, scalars, update_
from tests.cases import HYPERPARAMETERS, STEPS, reference_radam

pytestmark = pytest.mark.quick

ENGINES: tuple[Engine, ...] = ("for-loop", "foreach", "fused")
NUMEL = 1031
FUSED_ULPS = 2
"""Between the fused engine and torch's foreach after 13 steps, in units of eps times the largest element, or 1 if that
is more. Measured over HYPERPARAMETERS: 0.25 for lr = 1e-3, 0.9 for lr = 0.5 (sharded_radam/README.md, "Guarantees")."""


def hyperparameters(**changes: Any) -> Hyperparameters:
    beta1, beta2 = changes.pop("betas", (0.9, 0.999))
    base = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False, "maximize": False}
    return Hyperparameters(beta1=beta1, beta2=beta2, **{**base, **changes})


def gradient(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(NUMEL, generator=generator, dtype=torch.float64).to(dtype)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, 2, NUMEL, dtype=torch.float64).to(dtype)


def train(engine: Engine, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    param = start(dtype)
    moments = torch.zeros(NUMEL, dtype=dtype), torch.zeros(NUMEL, dtype=dtype)
    for step in range(1, STEPS + 1):
        update_([Operands(param, gradient(step, dtype), *moments)], engine, step, hyperparameters(**changes))
    return [param, *moments]


def torch_train(foreach: bool, changes: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    param = torch.nn.Parameter(start(dtype))
    optimizer = torch.optim.RAdam([param], foreach=foreach, **changes)
    for step in range(1, STEPS + 1):
        param.grad = gradient(step, dtype)
        optimizer.step()
    return [param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]]


@pytest.mark.parametrize("changes", HYPERPARAMETERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_engines_against_torch_and_the_equation(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """for-loop and foreach have torch's bits. fused: what the equation in float64 leaves of it, as torch's does."""
    exact = reference_radam(start(dtype), [gradient(step, dtype) for step in range(1, STEPS + 1)], **changes)
    of_torch = torch_train(True, changes, dtype)
    assert all(map(torch.equal, train("foreach", changes, dtype), of_torch))
    assert all(map(torch.equal, train("for-loop", changes, dtype), torch_train(False, changes, dtype)))
    fused = train("fused", changes, dtype)
    for one, other in zip(fused, of_torch, strict=True):
        unit = torch.finfo(dtype).eps * max(1.0, float(other.abs().max()))
        assert (one.double() - other.double()).abs().max() <= FUSED_ULPS * unit
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    for result in (fused[0], of_torch[0]):
        assert (result.double() - exact).abs().max() <= bound * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("engine", ENGINES)
def test_cuts_at_multiples_of_the_alignment_do_not_show(engine: Engine) -> None:
    whole = train(engine, {"weight_decay": 0.1})
    param, moments = start(), (torch.zeros(NUMEL), torch.zeros(NUMEL))
    cuts = [0, 64, 320, 576, 1024, NUMEL]
    for step in range(1, STEPS + 1):
        tensors = (param, gradient(step), *moments)
        pieces = [Operands(*(t[a:b] for t in tensors)) for a, b in itertools.pairwise(cuts)]
        update_(pieces, engine, step, hyperparameters(weight_decay=0.1))
    assert all(map(torch.equal, [param, *moments], whole))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("foreach", {}), train("for-loop", {})
    monkeypatch.setattr(ours, "CPU_CHUNK_NUMEL", 100)
    assert all(map(torch.equal, train("foreach", {}), whole[0]))
    assert all(map(torch.equal, train("for-loop", {}), whole[1]))


def test_batches_hold_every_element_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "CPU_CHUNK_NUMEL", 100)
    base = torch.arange(777.0)
    pieces = [Operands(*[base[a:b]] * 4) for a, b in [(0, 3), (3, 3), (3, 250), (250, 350), (350, 777)]]
    batches = list(ours._batches(pieces))
    assert [sum(p.param.numel() for p in batch) for batch in batches] == [100] * 7 + [77]
    assert torch.equal(torch.cat([p.exp_avg_sq for batch in batches for p in batch]), base)


@pytest.mark.parametrize("beta2", [0.5, 0.6, 0.9, 0.99, 0.999, 0.9995, 0.9999, 0.99999])
def test_rectification_begins_at_step_6_or_never(beta2: float) -> None:
    begins = [step for step in range(1, 40) if scalars(step, 0.9, beta2).rect is not None]
    assert begins == ([] if beta2 <= 0.6 else list(range(6, 40)))


def test_scalars_are_float64() -> None:
    """In float32, as in torch's capturable path, r_t is off by 0.6 % at step 6."""
    rect = scalars(6, 0.9, 0.999).rect
    assert rect is not None
    t = torch.tensor(6.0)
    rho_inf = 2 / (1 - 0.999) - 1
    rho = float(rho_inf - 2 * t * 0.999**t / (1 - 0.999**t))
    in_float32 = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    assert rect == pytest.approx(0.0258211, rel=1e-5)
    assert abs(in_float32 / rect - 1) > 0.003


@pytest.mark.parametrize("engine", ["for-loop", "fused"])
def test_zero_gradients_and_zero_eps_stay_finite_while_unrectified(engine: Engine) -> None:
    """torch's foreach gives NaN here: sqrt(0) / -0.0. In the rectified phase 0 / 0 is NaN for all of them."""
    param, moments = torch.linspace(-1, 1, 100), (torch.zeros(100), torch.zeros(100))
    grad = torch.where(torch.arange(100) % 2 == 0, 0.0, 1.0)
    before = param.clone()
    for step in range(1, 6):
        update_([Operands(param, grad, *moments)], engine, step, hyperparameters(eps=0.0))
    assert torch.equal(param[::2], before[::2])
    assert param.isfinite().all()
    assert (param[1::2] < before[1::2]).all()


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e6, 1e12])
def test_unrectified_fused_steps_for_gradients_of_any_size(scale: float) -> None:
    """Where Adam's denominator is made a huge power of two, sqrt(v) must vanish beside it, and nothing overflow."""
    param, moments = torch.linspace(-1, 1, NUMEL), (torch.zeros(NUMEL), torch.zeros(NUMEL))
    expected = reference_radam(param, [gradient(s) * scale for s in range(1, 6)])
    for step in range(1, 6):
        update_([Operands(param, gradient(step) * scale, *moments)], "fused", step, hyperparameters())
    assert (param.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_half_precision_is_updated_in_fp32(engine: Engine, dtype: torch.dtype) -> None:
    """The master does what an fp32 parameter does with the same gradients; the parameter is the master, rounded."""
    master = torch.linspace(-2, 2, NUMEL).to(dtype).float()
    param, moments = master.to(dtype), (torch.zeros(NUMEL), torch.zeros(NUMEL))
    alone, alone_moments = master.clone(), (torch.zeros(NUMEL), torch.zeros(NUMEL))
    for step in range(1, STEPS + 1):
        grad = gradient(step).to(dtype)
        update_([Operands(param, grad, *moments, master)], engine, step, hyperparameters())
        update_([Operands(alone, grad.float(), *alone_moments)], engine, step, hyperparameters())
    assert torch.equal(master, alone)
    assert torch.equal(param, master.to(dtype))
    assert all(map(torch.equal, moments, alone_moments))


def test_master_follows_a_changed_parameter() -> None:
    master = torch.full((4,), 1.001)
    param = master.bfloat16()
    param[1] = 3.0
    param[2] = float("nan")
    ours.follow_(master, param)
    torch.testing.assert_close(master, torch.tensor([1.001, 3.0, float("nan"), 1.001]), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("changes", HYPERPARAMETERS, ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("engine", ["foreach", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_capturable_against_the_equation(
    changes: dict[str, Any], tensor_lr: bool, engine: Engine, dtype: torch.dtype
) -> None:
    """The arithmetic of capturable steps runs on any device; on CUDA it is only checked for syncs."""
    param = start(dtype)
    expected = reference_radam(param, [gradient(step, dtype) for step in range(1, STEPS + 1)], **changes)
    moments, step = (torch.zeros_like(param), torch.zeros_like(param)), torch.zeros((), dtype=torch.float64)
    hyper = hyperparameters(**changes)
    if tensor_lr:
        hyper = hyperparameters(**{**changes, "lr": torch.tensor([changes.get("lr", 1e-3)], dtype=torch.float64)})
    for number in range(1, STEPS + 1):
        step.add_(1)
        update_([Operands(param, gradient(number, dtype), *moments)], engine, step, hyper)
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    assert (param.double() - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("engine", ["foreach", "fused"])
def test_capturable_with_zero_eps_and_half_precision(engine: Engine) -> None:
    param, moments = torch.linspace(-1, 1, 100), (torch.zeros(100), torch.zeros(100))
    one = torch.ones((), dtype=torch.float64)
    update_([Operands(param, torch.zeros(100), *moments)], engine, one, hyperparameters(eps=0.0))
    assert torch.equal(param, torch.linspace(-1, 1, 100))
    master = torch.linspace(-1, 1, 100)
    half = master.bfloat16()
    grad = torch.ones(100).bfloat16()
    update_([Operands(half, grad, *moments, master)], engine, one, hyperparameters(weight_decay=0.1))
    assert torch.equal(half, master.bfloat16())
    assert not torch.equal(master, torch.linspace(-1, 1, 100))


def test_capturable_fused_steps_have_the_bits_of_others() -> None:
    """The kernel that is of the other kind of step changes nothing, not even moments."""
    tensors = [[start(), torch.zeros(NUMEL), torch.zeros(NUMEL)] for _ in range(2)]
    for number in range(1, STEPS + 1):
        on_device = torch.tensor(number, dtype=torch.float64)
        for is_on_device, (param, *moments) in enumerate(tensors):
            step = on_device if is_on_device else number
            update_([Operands(param, gradient(number), *moments)], "fused", step, hyperparameters(weight_decay=0.1))
        assert all(map(torch.equal, *tensors))


# The fused kernel of CUDA


def kernel_of_cuda(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: float, eps: float) -> Tensor:
    """What torch 2.11's does in a step without bias: in fp32, with betas in fp32 and products rounded once (fma)."""
    beta1, beta2 = (torch.tensor(beta, dtype=torch.float32).double() for beta in (0.9, 0.999))
    square = (grad * grad).double()
    exp_avg.copy_((beta1 * exp_avg.double() + (grad.double() - beta1 * grad.double()).float().double()).float())
    exp_avg_sq.copy_((beta2 * exp_avg_sq.double() + (square - beta2 * square).float().double()).float())
    return torch.tensor(lr).float() * exp_avg / (exp_avg_sq.sqrt() + torch.tensor(eps).float())


@pytest.mark.parametrize(("betas_of", "bound"), [("cuda", 3e-7), ("cpu", None)])
def test_corrections_follow_from_the_betas_that_the_kernel_has(betas_of: str, bound: float | None) -> None:
    """Median relative error of the update at step 6. With the exact betas, as on CPU, it is 60 times as much."""
    hyper, numel = hyperparameters(), 256
    param, exp_avg, exp_avg_sq = torch.zeros(numel), torch.zeros(numel), torch.zeros(numel)
    exact, grads = torch.zeros(numel, dtype=torch.float64), [gradient(step)[:numel] for step in range(1, 7)]
    for step, grad in enumerate(grads, start=1):
        terms = fused_terms(step, hyper, torch.float32, betas_of)
        update = kernel_of_cuda(param, grad, exp_avg, exp_avg_sq, float(terms.lr), terms.eps)
    exact = reference_radam(exact, grads[:5]) - reference_radam(exact, grads)
    error = float(((update.double() - exact) / exact).abs().median())
    if VERSION < (2, 11):
        pytest.skip("CUDA's kernel has betas in double here")
    assert error <= bound if bound is not None else error > 5e-6


@pytest.mark.skipif(VERSION < (2, 11), reason="CUDA's kernel has betas in double here")
def test_a_beta_that_is_1_in_the_kernel_is_refused() -> None:
    hyper = hyperparameters(betas=(0.9, 1 - 1e-8))
    with pytest.raises(ValueError, match=r"in float32, where one of them is 1\. Expected betas of at most"):
        fused_terms(1, hyper, torch.float32, "cuda")
    assert fused_terms(1, hyper, torch.float64, "cuda") == fused_terms(1, hyper, torch.float64, "cpu")


def test_a_fused_step_makes_no_tensor() -> None:
    operands = [Operands(*(torch.zeros(64) for _ in range(4))) for _ in range(5)]
    endless = ours.endless(torch.device("cpu"))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        update_(operands, "fused", 7, hyperparameters(weight_decay=0.1, decoupled_weight_decay=True), endless)
    found = {event.key for event in profiled.key_averages() if event.key.startswith("aten::")}
    assert found == {"aten::_fused_adamw_", "aten::item", "aten::_local_scalar_dense"}  # a number of the host is read


@pytest.mark.parametrize(
    ("device_type", "dtype", "engine"),
    [
        ("cpu", torch.float32, "fused"),
        ("cpu", torch.bfloat16, "fused"),
        ("cpu", torch.complex64, "fused"),
        ("cuda", torch.float32, "foreach"),
        ("cuda", torch.float64, "foreach"),
        ("cuda", torch.complex64, "foreach"),
        ("cuda", torch.bfloat16, "fused"),
        ("cuda", torch.float16, "fused"),
        ("mps", torch.float16, "foreach"),
    ],
    ids=str,
)
def test_default_engine(device_type: str, dtype: torch.dtype, engine: str) -> None:
    assert ours.default_engine(device_type, dtype) == engine
