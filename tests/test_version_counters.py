"""Whatever writes to a parameter increments its version counter, so that autograd raises where it does with RAdam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_radam import ShardedRAdam
from tests.ranks import WORLD_SIZES, run

pytestmark = pytest.mark.quick

TRANSPORTS = ("gloo", "native", "shared_memory")
SMALL = 1e-4
"""MiB: several buckets."""

DDP: list[dict[str, Any]] = [
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"parameters_as_bucket_view": False},
    {"share_parameters": True, "transport": "shared_memory"},
    *({"transport": transport} for transport in TRANSPORTS),
]
SHARDED: list[dict[str, Any]] = [{"shard_gradients": True, "transport": transport} for transport in TRANSPORTS]


def net() -> nn.ModuleDict:
    torch.manual_seed(0)
    sizes = {"used": (5, 7), "unused": (5, 7), "generator": (7, 5)}
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


def versions(module: nn.Module) -> list[int]:
    return [param._version for param in module.parameters()]


def step_between_forward_and_backward(optimizer: torch.optim.Optimizer, model: nn.ModuleDict) -> Tensor:
    """The discriminator steps while the generator's graph waits for its backward; returns the generator's loss."""
    fake = model["generator"](torch.ones(2, 7))
    score: Tensor = model["used"](fake).sum()
    model["used"](fake.detach()).square().sum().backward()
    optimizer.step()
    return score


def check_config(options: dict[str, Any], overlap: bool, world_size: int) -> None:
    model = net()
    if world_size == 1:
        options = {key: value for key, value in options.items() if key not in ("transport", "share_parameters")}
    params = [*model["used"].parameters(), *model["unused"].parameters()]
    optimizer = ShardedRAdam(params, lr=0.1, bucket_cap_mb=SMALL, **options)
    if overlap:
        optimizer.overlap_forward(model)
    for _ in range(2):  # the second with overlap: parameters arrive while they are read
        used, unused = versions(model["used"]), versions(model["unused"])
        score = step_between_forward_and_backward(optimizer, model)
        assert all(now > before for now, before in zip(versions(model["used"]), used, strict=True)), options
        assert versions(model["unused"]) == unused, options
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            score.backward()  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        model["unused"](torch.ones(2, 5)).sum().backward()  # no step has touched it
        optimizer.zero_grad()


def check_modes(rank: int, world_size: int) -> None:
    for options in DDP + SHARDED:
        check_config(options, False, world_size)
    if world_size > 1:
        for transport in TRANSPORTS:
            check_config({"transport": transport}, True, world_size)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_step_between_forward_and_backward_raises(world_size: int) -> None:
    run(check_modes, world_size)


def test_radam_raises_there_too() -> None:
    model = net()
    score = step_between_forward_and_backward(torch.optim.RAdam(model["used"].parameters(), lr=0.1), model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()  # type: ignore[no-untyped-call]


def check_broadcast(rank: int, world_size: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    out = model(torch.randn(4, 3)).sum()
    before = versions(model)
    optimizer = ShardedRAdam(model.parameters(), shard_gradients=True, module=model)
    assert all(now > version for now, version in zip(versions(model), before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    buffers = [buffer._version for buffer in model.buffers()]
    optimizer.broadcast_buffers(model)
    assert all(buffer._version > version for buffer, version in zip(model.buffers(), buffers, strict=True))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_rank_0_broadcasts_is_a_write(world_size: int) -> None:
    run(check_broadcast, world_size)
