"""CUDA without a GPU: fake tensors, on which reading a value from the device is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn import Parameter
from torch.testing._internal.distributed.fake_pg import FakeStore

from sharded_radam import ShardedRAdam, compiled
from sharded_radam.buckets.counters import Cohort
from sharded_radam.compat import VERSION
from sharded_radam.radam import Form, Hyperparameters, equation, terms_on_device, terms_on_host
from sharded_radam.step import engine_of
from sharded_radam.transport import Transport

pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
    pytest.mark.skipif(VERSION < (2, 11), reason="torch 2.8 has no collectives of fake CUDA tensors"),
]


@pytest.fixture(autouse=True)
def fused_kernel_of_fake_tensors() -> Iterator[None]:
    """That of an lr on the device, which torch lacks; as with an lr on the host, nothing is to be done."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_adam_.tensor_lr", "Meta"):
        library.impl("_fused_adam_.tensor_lr", lambda *_, **__: None, "Meta")
    yield
    library._destroy()


@pytest.fixture(params=[1, 2, 4])
def world_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A group of the fake backend, which takes all collectives and sends nothing; so objects come from here."""
    monkeypatch.setattr(Transport, "all_gather_objects", lambda self, item: [item] * self.world_size)
    # torch's own of these ask the GPU what it can do.
    monkeypatch.setattr(Transport, "broadcast", lambda self, tensor, source=0: None)
    monkeypatch.setattr(Transport, "all_reduce", lambda self, tensor, op: tensor)
    monkeypatch.setattr("sharded_radam.step._is_check_due", lambda *_: False)  # it reads what it compares
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def fake_cuda_step(dtype: torch.dtype, steps: int = 7, tensor_lr: bool = False, **flags: Any) -> ShardedRAdam:
    with FakeTensorMode():
        params = [Parameter(torch.zeros(shape, device="cuda", dtype=dtype)) for shape in [(70, 9), (3,), (500,)]]
        optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, **flags)
        if tensor_lr:  # not at construction, where RAdam itself reads its value
            optimizer.param_groups[0]["lr"] = torch.zeros((), device="cuda")
        for step in range(steps):
            for index, param in enumerate(params):
                lacks = flags.get("capturable") and index == 0 and step % 2 == 0
                param.grad = None if lacks else torch.zeros_like(param)
            optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "foreach": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True, "fused": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_capturable_step_never_waits_for_the_device(
    world_size: int, dtype: torch.dtype, flags: dict[str, Any], tensor_lr: bool
) -> None:
    optimizer = fake_cuda_step(dtype, tensor_lr=tensor_lr, capturable=True, **flags)
    (flat,) = optimizer._shards.flats
    assert optimizer._shards.transport.name == ("native" if world_size > 1 else "none")
    assert len(set(flat.counters._known_classes())) == 2  # parameters with the same gradients are updated together
    for state in optimizer.state.values():
        assert (state["step"].device.type, state["step"].dtype) == ("cuda", torch.float64)
    assert {tensor.device.type for tensor in (flat.buffer, *flat.state.values())} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_step_on_cuda_never_waits_for_the_device(
    world_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts are on the host without capturable; here fake as well, so that their values must come from the test."""
    steps = iter(range(1, 20))
    monkeypatch.setattr(
        "sharded_radam.buckets.counters.Counters.add_step",
        lambda _counters, has_grad, capturable: [Cohort(next(steps), frozenset(range(len(has_grad) - capturable)))],
    )
    optimizer = fake_cuda_step(dtype, fused=True)
    assert engine_of(optimizer, optimizer._shards, optimizer._shards.flats[0]) == "fused"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [Form(False, False, False), Form(True, False, True), Form(True, True, False)])
@pytest.mark.parametrize("on_device", [False, True])
def test_what_is_compiled_for_cuda_never_waits_for_the_device(dtype: torch.dtype, form: Form, on_device: bool) -> None:
    """Before it is compiled. The numbers of a step are on the host, or on the device if capturable."""
    hyper = Hyperparameters(1e-3, 0.9, 0.999, 1e-8, 0.1, form.is_decoupled, form.maximize)
    with FakeTensorMode():
        param, *others = (torch.zeros(128, dtype=each, device="cuda") for each in (dtype, *[torch.float32] * 3))
        find_terms: Any = terms_on_device if on_device else terms_on_host
        step = torch.ones((), dtype=torch.float64, device="cuda") if on_device else 7
        terms = compiled._as_tensors(find_terms(step, hyper, torch.float32), torch.float32)
        wide = param
        if dtype != torch.float32:
            wide = torch.where(compiled._rounds_to(others[2], param), others[2], param.to(torch.float32))
        updated = equation(wide, param.to(torch.float32), others[0], others[1], terms, form)
    assert (updated.device.type, updated.dtype) == ("cuda", torch.float32)


@pytest.mark.parametrize(
    ("dtype", "flags", "engine"),
    [
        (torch.float32, {}, "foreach"),
        (torch.float32, {"fused": False}, "foreach"),
        (torch.float32, {"foreach": False}, "for-loop"),
        (torch.bfloat16, {}, "fused"),
        (torch.bfloat16, {"fused": False}, "foreach"),
        (torch.bfloat16, {"foreach": True}, "foreach"),
    ],
    ids=str,
)
def test_engine_on_cuda(dtype: torch.dtype, flags: dict[str, Any], engine: str) -> None:
    """fp32: RAdam's own choice."""
    optimizer = fake_cuda_step(dtype, steps=0, **flags)
    assert engine_of(optimizer, optimizer._shards, optimizer._shards.flats[0]) == engine


def test_the_check_itself_can_fail() -> None:
    with FakeTensorMode():
        value = torch.zeros((), device="cuda")
        with pytest.raises(DataDependentOutputException):
            value.item()


def fake_cuda_backward(steps: int, **flags: Any) -> ShardedRAdam:
    """Gradients come as from backward, which torch does not run on fake CUDA tensors without CUDA."""
    with FakeTensorMode():
        params = [Parameter(torch.zeros(shape, device="cuda")) for shape in [(70, 9), (3,), (500,), (64, 3)]]
        optimizer = ShardedRAdam(params, bucket_cap_mb=1e-3, shard_gradients=True, capturable=True, **flags)
        optimizer.overlap_forward(torch.nn.ParameterList(params))
        gradients = optimizer._shards.gradients
        assert gradients is not None
        for step in range(steps):
            optimizer.zero_grad()
            with optimizer.no_sync() if step == 3 else contextlib.nullcontext():
                for slot in reversed(range(len(params))):
                    params[slot].grad = torch.zeros_like(params[slot])
                    gradients.arrive((0, slot))
            gradients.settle()
            assert step in (0, 3) or all(shard.sending is None for shard in gradients.places.shards[0])
            assert optimizer.clip_grad_norm_(1.0).device.type == "cuda"
            optimizer.step()
    return optimizer


def test_sharded_gradients_on_cuda_never_wait_for_the_device(world_size: int) -> None:
    optimizer = fake_cuda_backward(7)
    gradients = optimizer._shards.gradients
    assert gradients is not None
    assert optimizer._shards.transport.name == ("native" if world_size > 1 else "none")
    assert {total.device.type for total in gradients.sums.totals} == {"cuda"}
