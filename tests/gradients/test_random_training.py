"""Random models, and random schedules of forward, backward, no_sync and step, beside DDP and torch.optim.RAdam."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import ShardedRAdam
from tests.gradients.test_gradients import OPTIONS, compare
from tests.ranks import run


@dataclass(frozen=True)
class Backward:
    """Which branches each of up to four ranks uses, in this order; whether gradients are synchronised."""

    branches: tuple[tuple[int, ...], ...]
    sync: bool


@dataclass(frozen=True)
class Example:
    """A model, and what is done with it in each step."""

    world_size: int
    transport: str | None
    bucket_cap_mb: float
    widths: tuple[int, ...]
    tied: bool
    steps: tuple[tuple[Backward, ...], ...]
    frozen: tuple[frozenset[int], ...]


class Model(nn.Module):
    """A trunk that every forward uses, and branches of which it uses some, in any order, also twice."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 5)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 5)) for width in example.widths
        )
        if example.tied:
            self.branches[-1] = self.branches[0]

    def forward(self, x: Tensor, branches: tuple[int, ...]) -> Tensor:
        x = self.trunk(x)
        for branch in branches:
            x = x + self.branches[branch](x)
        return x.square().mean()


@st.composite
def examples(draw: st.DrawFn) -> Example:
    world_size = draw(st.integers(1, 4))
    widths = draw(st.lists(st.integers(1, 70), min_size=1, max_size=5))
    some = st.lists(st.integers(0, len(widths) - 1), max_size=6).map(tuple)
    same = some.map(lambda branches: (branches,) * 4)
    backward = st.builds(Backward, same | st.tuples(some, some, some, some), st.just(True))
    held = st.builds(Backward, same | st.tuples(some, some, some, some), st.just(False))
    step = st.tuples(st.lists(held, max_size=2), st.lists(backward, min_size=1, max_size=2))
    num_steps = draw(st.integers(1, 7))
    return Example(
        world_size,
        draw(st.sampled_from(["gloo", "native", "shared_memory"])),
        draw(st.sampled_from([1e-4, 1e-3, 1.0])),
        tuple(widths),
        draw(st.booleans()),
        tuple((*first, *then) for first, then in (draw(step) for _ in range(num_steps))),
        tuple(draw(st.frozensets(st.integers(0, len(widths) - 1), max_size=1)) for _ in range(num_steps)),
    )


def train(rank: int, example: Example, ours: bool) -> list[list[Tensor]]:
    torch.manual_seed(0)
    net = Model(example)
    model: nn.Module = net
    if ours:
        options = {"transport": example.transport, "bucket_cap_mb": example.bucket_cap_mb, **OPTIONS}
        optimizer: torch.optim.Optimizer = ShardedRAdam(net.parameters(), shard_gradients=True, **options)
    else:
        model = DistributedDataParallel(net, find_unused_parameters=True)
        optimizer = torch.optim.RAdam(net.parameters(), **OPTIONS)
    found = []
    for step, backwards in enumerate(example.steps):
        for index, branch in enumerate(net.branches):
            branch.requires_grad_(index not in example.frozen[step])
        optimizer.zero_grad()
        for part, backward in enumerate(backwards):
            x = torch.randn(3, 5, generator=torch.Generator().manual_seed(100 * step + 10 * part + rank))

            def propagate(x: Tensor = x, backward: Backward = backward) -> None:
                model(x, backward.branches[rank]).backward()

            if backward.sync:
                propagate()
            else:
                with optimizer.no_sync() if isinstance(optimizer, ShardedRAdam) else model.no_sync():  # type: ignore[operator]
                    propagate()
        optimizer.step()
        found.append([param.detach().clone() for param in net.parameters()])
    return found


def check(rank: int, world_size: int, example: Example) -> None:
    once = all(sum(backward.sync for backward in backwards) == 1 for backwards in example.steps)
    compare(train(rank, example, True), train(rank, example, False), once and world_size <= 2, example)


@pytest.mark.timeout(600)
@hypothesis.settings(
    max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True, database=None
)
@hypothesis.given(examples())
def test_random_training_equals_ddp(example: Example) -> None:
    run(check, example.world_size, example)
