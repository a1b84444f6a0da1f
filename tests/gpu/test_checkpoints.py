"""Saves in the background, whose tensors change on the device meanwhile, and loads at other numbers of ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_radam import CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint import save as saving
from tests.cases import assert_same
from tests.gpu.device import GROUPS, SMALL
from tests.gpu.training import inputs, make_model
from tests.ranks import DEVICE, run

SAVED_AT, STEPS = 6, 10
DTYPES = (torch.float32, torch.bfloat16)


def build(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, ShardedRAdam]:
    """Each rank trains on the same batches, so that ranks may be any number."""
    model = make_model(dtype)
    params = model.named_parameters()
    return model, ShardedRAdam(params, lr=0.05, bucket_cap_mb=SMALL, shard_gradients=True, foreach=True, **options)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    batch = inputs(0, number, next(model.parameters()).dtype)
    batch = batch.bfloat16().to(batch.dtype)
    model(batch).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model: nn.Module, optimizer: ShardedRAdam) -> list[Tensor]:
    """Weights and moments, on the CPU, whole on every rank."""
    params = [*model.parameters()]
    state = [value for param in params for value in optimizer.full_state(param).values()]
    return [tensor.detach().to("cpu", copy=True) for tensor in (*params, *state)]


@contextmanager
def held_writes() -> Iterator[threading.Event]:
    """Nothing is written before somebody says so."""
    go, write = threading.Event(), saving.Save.write

    def held(self: saving.Save) -> saving.SaveReport:
        assert go.wait(60)
        return write(self)

    with mock.patch.object(saving.Save, "write", held):
        yield go


def save(rank: int, world_size: int, folder: str) -> list[list[Tensor]]:
    """What was saved, and what came of it."""
    results = []
    for dtype in DTYPES:
        model, optimizer = build(dtype)
        with CheckpointManager(f"{folder}/{dtype}") as manager, held_writes() as go:
            for number in range(STEPS):
                if number == SAVED_AT:
                    results.append(values(model, optimizer))
                    manager.save(number, model=model, optimizer=optimizer, blocking=False)
                step(model, optimizer, number)
            results.append(values(model, optimizer))
            go.set()
        if world_size > 1:
            dist.barrier()
        assert_same(load(rank, world_size, folder, dtype), results[-1], dtype)
        if dtype == torch.float32:
            consolidated = optimizer.consolidate_state_dict(to=world_size - 1)
            if consolidated is not None:
                check_radam(model, consolidated, optimizer)
    return results


def load(_rank: int, _world_size: int, folder: str, dtype: torch.dtype) -> list[Tensor]:
    """Into new ones, and to the end of the same training."""
    model, optimizer = build(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    with CheckpointManager(f"{folder}/{dtype}") as manager:
        restored = manager.load_latest(model=model, optimizer=optimizer)
    assert restored is not None
    assert {param.device.type for param in model.parameters()} == {DEVICE.type}
    for number in range(restored.step, STEPS):
        step(model, optimizer, number)
    return values(model, optimizer)


def check_radam(model: nn.Module, consolidated: dict[str, Any], optimizer: ShardedRAdam) -> None:
    """torch's own takes the consolidated state onto the device."""
    radam = torch.optim.RAdam([param.detach().clone().requires_grad_() for param in model.parameters()])
    radam.load_state_dict(consolidated)
    for state in radam.state.values():
        assert state["exp_avg"].device.type == DEVICE.type
    for param in radam.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    radam.step()


@pytest.mark.parametrize(("backend", "world_size"), GROUPS)
def test_saving_in_the_background(backend: str, world_size: int, tmp_path: Path) -> None:
    everywhere = run(save, world_size, str(tmp_path), backend=backend)
    for results in everywhere[1:]:
        for one, other in zip(results, everywhere[0], strict=True):
            assert_same(one, other)
    for dtype, saved, ended in zip(DTYPES, everywhere[0][::2], everywhere[0][1::2], strict=True):
        assert not torch.equal(saved[0], ended[0])
        assert_same(load(0, 1, str(tmp_path), dtype), ended, dtype)
