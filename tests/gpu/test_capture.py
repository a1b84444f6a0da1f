"""CUDA graphs, whose replay is what eager steps are; and steps that never wait for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from tests.cases import STEPS, assert_same, make_params
from tests.gpu.device import DTYPES, GROUPS, IS_CUDA, SMALL, give_grads, needs_compiler, only_cuda
from tests.gpu.training import inputs, make_model
from tests.ranks import DEVICE, run

COMPILED = [needs_compiler, pytest.mark.timeout(600)]

CAPTURABLE: list[Any] = [
    pytest.param({}, id="capturable"),
    pytest.param({"fused": True}, id="fused"),
    pytest.param({"compiled": True}, id="compiled", marks=COMPILED),
]

WARM_UPS = 3


class Captured:
    """A capturable optimizer, whose steps are replayed once there is a graph."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        self.params = make_params(dtype, device=DEVICE)
        self.lr = torch.full((), 0.01, device=DEVICE)
        self.optimizer = ShardedRAdam(self.params, lr=self.lr, capturable=True, **options)
        self.graph: Any = None

    def take(self, grads: list[Tensor | None], lr: float) -> None:
        """Into the memory that the graph reads."""
        self.lr.fill_(lr)
        for param, grad in zip(self.params, grads, strict=True):
            if param.grad is None:
                param.grad = torch.empty_like(param)
            assert grad is not None
            param.grad.copy_(grad)

    def capture(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # NCCL has a thread that looks at events
            self.optimizer.step()

    def step(self) -> None:
        if self.graph is None:
            self.optimizer.step()
        else:
            self.graph.replay()


def check_replay(_rank: int, _world_size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Warm-ups on a stream of their own, as capture wants them; lr and gradients change from step to step."""
    captured, eager = Captured(dtype, **options), Captured(dtype, **options)
    sources, reference = make_params(dtype, device=DEVICE), make_params(dtype, device=DEVICE)
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for step in range(1, STEPS + 1):
        give_grads(sources, reference, step, ())
        grads, lr = [param.grad for param in sources], 0.01 / step
        eager.take(grads, lr)
        eager.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream) if step <= WARM_UPS else torch.cuda.stream(None):
            captured.take(grads, lr)
            captured.step()
        torch.cuda.current_stream().wait_stream(stream)
        assert_same(captured.params, eager.params, (dtype, step))
        if step == WARM_UPS:
            captured.capture()
    for param, other in zip(captured.params, eager.params, strict=True):
        for kind, value in captured.optimizer.state[param].items():
            assert torch.equal(value, eager.optimizer.state[other][kind]), kind
        assert captured.optimizer.state[param]["step"] == STEPS
    captured.graph.reset()  # before its process group is destroyed
    captured.graph = None
    for side in (captured, eager):
        side.step()
    assert_same(captured.params, eager.params, "one eager step more")


@only_cuda("graphs are CUDA's")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", CAPTURABLE)
def test_replay_is_eager(options: dict[str, Any], dtype: torch.dtype) -> None:
    check_replay(0, 1, dtype, options)


@only_cuda("graphs are CUDA's")
@pytest.mark.parametrize(("backend", "world_size"), [group for group in GROUPS if group.values[0] == "nccl"])
def test_replay_of_collectives(backend: str, world_size: int) -> None:
    options = {"transport": "native", "bucket_cap_mb": SMALL}
    run(check_replay, world_size, torch.float32, options, backend=backend)


# Waiting


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    if IS_CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if IS_CUDA:
            torch.cuda.set_sync_debug_mode("default")


capturable = only_cuda("RAdam's capturable=True is not for CPUs")
STEPPING: list[Any] = [
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"foreach": False}, id="for-loop"),
    pytest.param({"fused": True}, id="fused"),
    pytest.param({"compiled": True}, id="compiled", marks=COMPILED),
    pytest.param({"capturable": True}, id="capturable", marks=capturable),
    pytest.param({"capturable": True, "fused": True}, id="capturable-fused", marks=capturable),
    pytest.param({"capturable": True, "compiled": True}, id="capturable-compiled", marks=[capturable, *COMPILED]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", STEPPING)
def test_no_step_waits_for_the_device(flags: dict[str, Any], dtype: torch.dtype) -> None:
    """On the CPU nothing does. With sharded gradients nor do backward and clipping."""
    params = make_params(dtype, device=DEVICE)
    optimizer = ShardedRAdam(params, weight_decay=0.1, **flags)
    for step in range(1, 9):
        give_grads(params, [Parameter(param.detach()) for param in params], step, ())
        with waiting_is_an_error():
            optimizer.step()
    model = make_model(dtype)
    optimizer = ShardedRAdam(model.parameters(), shard_gradients=True, **flags)
    for step in range(8):
        batch = inputs(0, step, dtype)
        with waiting_is_an_error():
            model(batch).sum().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()


@only_cuda("nothing waits for a device")
def test_the_check_itself_can_fail() -> None:
    value = torch.ones(1, device=DEVICE)
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        value.item()
