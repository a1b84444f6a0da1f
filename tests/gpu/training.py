"""A model whose gradients are products of elements, so that they have the same bits whatever computes beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_radam import ShardedRAdam
from tests.gpu.device import SMALL, Stream, sleep, wait_for_device
from tests.ranks import DEVICE

NUMEL = 3001
"""Elements of a layer; no multiple of what shards are cut at."""


class Scale(nn.Module):
    """Multiplies by its weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((1 + 0.1 * torch.randn(NUMEL)).to(DEVICE, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def make_model(dtype: torch.dtype = torch.float32, layers: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Scale(dtype) for _ in range(layers)))


def inputs(rank: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(NUMEL, generator=generator).to(DEVICE, dtype)


def average_grads(model: nn.Module) -> None:
    """What DistributedDataParallel does."""
    for param in model.parameters():
        assert param.grad is not None
        dist.all_reduce(param.grad)
        param.grad.div_(dist.get_world_size())


def train(
    rank: int,
    steps: int,
    dtype: torch.dtype,
    shards: bool,
    overlap: bool,
    beside: Callable[[int], AbstractContextManager[Any]] = nullcontext,
) -> list[Tensor]:
    """Weights, their averages, which a stream of its own keeps, and the losses.

    While parameters arrive, the averages and the next forward read them on two streams.

    Args:
        rank: of this process.
        steps: how many.
        dtype: of the model.
        shards: whether gradients are sharded.
        overlap: whether parameters arrive during forward.
        beside: what is done while gradients are reduced and a step is taken, by its number.
    """
    model = make_model(dtype)
    optimizer = ShardedRAdam(
        model.parameters(), lr=0.05, transport="native", bucket_cap_mb=SMALL, shard_gradients=shards
    )
    if overlap:
        optimizer.overlap_forward(model)
    averages, losses = [param.detach().clone() for param in model.parameters()], []
    batches, reader = [inputs(rank, step, dtype) for step in range(steps)], Stream()
    for step, batch in enumerate(batches):
        loss = model(batch).sum()
        reader.join()  # what it reads is about to change
        losses.append(loss.detach())
        with beside(step):
            loss.backward()
            if not shards:
                average_grads(model)
            optimizer.step()
        optimizer.zero_grad()
        reader.follow()
        with reader.current(), torch.no_grad():
            torch._foreach_lerp_(averages, [param.detach() for param in model.parameters()], 0.1)
    reader.join()
    wait_for_device()
    optimizer.check_replicas()
    return [*(param.detach().clone() for param in model.parameters()), *averages, *losses]


class SlowBackward(torch.autograd.Function):
    """Passes a tensor on; its backward keeps the stream of its forward busy first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        sleep()
        return grads[0].clone()


def train_branches(rank: int, steps: int, streams: Sequence[Stream] | None) -> list[Tensor]:
    """Sharded gradients of branches, each of which runs on a stream of its own, one later than the other.

    Args:
        rank: of this process.
        steps: how many.
        streams: one for each branch; None for the current one.
    """
    model = make_model(layers=3)
    optimizer = ShardedRAdam(model.parameters(), lr=0.05, transport="native", bucket_cap_mb=SMALL, shard_gradients=True)
    for step in range(steps):
        batch, outputs = inputs(rank, step), []
        for number, layer in enumerate(model):
            stream = None if streams is None else streams[number]
            if stream is None:
                outputs.append(layer(batch))
                continue
            stream.follow()
            with stream.current():
                output = layer(batch)
                outputs.append(SlowBackward.apply(output) if number else output)  # type: ignore[no-untyped-call]
        for stream in streams or ():
            stream.join()
        torch.stack(outputs).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.clip_grad_value_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]
