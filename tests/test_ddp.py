"""Whole training under DistributedDataParallel, beside torch.optim.RAdam."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import ShardedRAdam, uneven_inputs
from tests.cases import assert_same
from tests.ranks import WORLD_SIZES, run


class Net(nn.Module):
    """Convolution in channels_last, an LSTM, tied weights, and a layer that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.lstm = nn.LSTM(5, 17, batch_first=True)
        self.head = nn.Linear(17, 17)
        self.tied = nn.Linear(17, 17, bias=False)
        self.tied.weight = self.head.weight
        self.unused = nn.Linear(7, 7)
        self.out = nn.Linear(17, 1)

    def forward(self, images: Tensor) -> Tensor:
        seen = self.norm(self.conv(images)).flatten(2).transpose(1, 2)
        states, _ = self.lstm(seen)
        result: Tensor = self.out(self.tied(torch.tanh(self.head(states[:, -1]))))
        return result


def make_model() -> DistributedDataParallel:
    torch.manual_seed(3)
    model = Net()
    model.conv = model.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return DistributedDataParallel(model, find_unused_parameters=True)


def batch(rank: int, step: int, part: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 10 * part + rank)
    images = torch.randn(4, 3, 6, 6, generator=generator)
    return images, images.mean(dim=(1, 2, 3)).unsqueeze(1)


def train(
    rank: int,
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    steps: int = 10,
    accumulate: int = 1,
    clip: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    scheduler: Any = None,
    spoil: Callable[[int], bool] = lambda _: False,
) -> list[float]:
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            images, targets = batch(rank, step, part)
            if spoil(step):
                images = images * float("inf")
            last = part == accumulate - 1
            with contextlib.nullcontext() if last else model.no_sync():
                with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
                    loss = nn.functional.mse_loss(model(images).float(), targets)
                (scaler.scale(loss) if scaler else loss).backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer) if scaler else optimizer.step()
        if scaler:
            scaler.update()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate": 3},
    "clipping": {"clip": 0.05},
    "scaler": {"scaler": True},
    "scaler and clipping": {"scaler": True, "clip": 0.05, "accumulate": 2},
}


def check_training(rank: int, _world_size: int) -> None:
    for name, options in RUNS.items():
        results = []
        for make in (ShardedRAdam, torch.optim.RAdam):
            model = make_model()
            flags: dict[str, Any] = {"bucket_cap_mb": 1e-3} if make is ShardedRAdam else {}
            optimizer = make(model.parameters(), lr=0.02, weight_decay=0.01, foreach=True, **flags)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if options.get("scaler") else None
            losses = train(rank, model, optimizer, scheduler=scheduler, **{**options, "scaler": scaler})
            results.append((losses, [param.detach().clone() for param in model.parameters()]))
        assert results[0][0] == results[1][0], name
        assert_same(results[0][1], results[1][1], name)
        assert len(set(results[0][0])) > 5, name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_training_equals_that_with_radam(world_size: int) -> None:
    run(check_training, world_size)


def check_order_of_wrapping(rank: int, _world_size: int) -> None:
    """The optimizer may be built before DDP as well as after it, with gradients that are views or not."""
    results = []
    for first in ("ddp", "optimizer"):
        for as_view in (False, True):
            torch.manual_seed(3)
            net = nn.Linear(5, 3)
            if first == "ddp":
                model = DistributedDataParallel(net, gradient_as_bucket_view=as_view)
                optimizer = ShardedRAdam(model.parameters(), lr=0.1)
            else:
                optimizer = ShardedRAdam(net.parameters(), lr=0.1)
                model = DistributedDataParallel(net, gradient_as_bucket_view=as_view)
            for step in range(8):
                optimizer.zero_grad()
                model(batch(rank, step)[0].flatten()[:20].view(4, 5)).square().mean().backward()
                optimizer.step()
            results.append([param.detach().clone() for param in net.parameters()])
    for result in results[1:]:
        assert_same(results[0], result)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_order_of_wrapping(world_size: int) -> None:
    run(check_order_of_wrapping, world_size)


def check_overflow(rank: int, world_size: int) -> None:
    """inf on one rank: DDP spreads it, so every rank skips, backs the scale off, and goes on."""
    for bad in range(world_size):
        model = make_model()
        optimizer = ShardedRAdam(model.parameters(), lr=0.02, foreach=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        train(rank, model, optimizer, steps=2, scaler=scaler)
        before = [param.detach().clone() for param in model.parameters()]
        train(rank, model, optimizer, steps=1, scaler=scaler, spoil=lambda _, r=bad: rank == r)  # type: ignore[misc]
        assert_same(model.parameters(), before)
        assert scaler.get_scale() == 2.0**9
        assert {int(state["step"]) for state in optimizer.state.values()} <= {0, 2}
        train(rank, model, optimizer, steps=2, scaler=scaler)
        assert all(param.isfinite().all() for param in model.parameters())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_overflow_on_one_rank_skips_the_step_on_all(world_size: int) -> None:
    run(check_overflow, world_size)


def join_train(rank: int, make: Callable[..., torch.optim.Optimizer], join_optimizer: bool) -> tuple[list[Tensor], Any]:
    """Rank r has 4 + 3 r batches; the learning rate changes, on ranks with data only."""
    torch.manual_seed(3)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)))
    optimizer = make(model.parameters(), lr=0.05, foreach=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    joinables: list[Any] = [model, optimizer] if join_optimizer else [model]
    with Join(joinables):
        for step in range(4 + 3 * rank):
            optimizer.zero_grad()
            model(batch(rank, step)[0].flatten()[:20].view(4, 5)).square().mean().backward()
            optimizer.step()
            scheduler.step()
    return [param.detach().clone() for param in model.parameters()], optimizer


def check_join(rank: int, world_size: int) -> None:
    """Uneven inputs give what they give with RAdam under DDP, which a joined rank has nothing to do with."""
    ours, optimizer = join_train(rank, ShardedRAdam, join_optimizer=True)
    theirs, _ = join_train(rank, torch.optim.RAdam, join_optimizer=False)
    assert_same(ours, theirs)
    assert {int(state["step"]) for state in optimizer.state.values()} == {4 + 3 * (world_size - 1)}
    consolidated = optimizer.consolidate_state_dict(to=0)
    assert (consolidated is None) == (rank != 0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_uneven_inputs(world_size: int) -> None:
    run(check_join, world_size)


def check_messages_of_join(rank: int, world_size: int) -> None:
    """One for all gradients of a dtype, or of some MiB, whatever their number; and none while all ranks have data."""
    net = nn.Sequential(*(nn.Linear(7, 7, bias=bool(at % 2)) for at in range(20)), nn.Linear(7, 3).double())
    net[20].register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    model = DistributedDataParallel(net)
    for batch_bytes, messages in ((25 * 2**20, 2), (500, 8)):
        optimizer = ShardedRAdam(model.parameters(), lr=0.05)
        transport = optimizer._shards.transport
        with mock.patch.object(uneven_inputs, "BATCH_BYTES", batch_bytes), Join([model, optimizer]):
            for _ in range(3 + (rank == world_size - 1)):
                model(torch.ones(4, 7)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        collectives = optimizer.stats().collectives
        assert collectives.get("broadcast", 0) == messages * (world_size > 1), collectives
        assert transport.meter.received_bytes["broadcast"] in (0, sum(param.nbytes for param in net.parameters()))
        assert {int(state["step"]) for state in optimizer.state.values()} == {4}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_joined_ranks_get_gradients_in_few_messages(world_size: int) -> None:
    run(check_messages_of_join, world_size)


def check_join_leaves_no_gradients(rank: int, world_size: int) -> None:
    """Gradients are dropped after each step, so one that was left behind by a joined rank would be added to."""

    def loss(model: nn.Module, of: int, epoch: int, step: int) -> Tensor:
        found: Tensor = model(batch(of, step + 9 * epoch)[0].flatten()[:20].view(4, 5)).square().mean()
        return found

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3))
    reference = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    optimizer = ShardedRAdam(wrapped.parameters(), lr=0.05, foreach=True)
    radam = torch.optim.RAdam(reference.parameters(), lr=0.05, foreach=True)
    for epoch in range(2):
        with Join([wrapped, optimizer]):
            for step in range(2 + rank):
                loss(wrapped, rank, epoch, step).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
        assert all(param.grad is None for param in model.parameters())
        for step in range(1 + world_size):
            with_data = [of for of in range(world_size) if step < 2 + of]
            sum(loss(reference, of, epoch, step) / world_size for of in with_data).backward()  # type: ignore[union-attr]
            radam.step()
            radam.zero_grad()
        for ours, right in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_uneven_inputs_leave_no_gradients_behind(world_size: int) -> None:
    run(check_join_leaves_no_gradients, world_size)


def check_join_terminates(rank: int, world_size: int) -> None:
    model = DistributedDataParallel(nn.Linear(5, 3))
    optimizer = ShardedRAdam(model.parameters())
    with pytest.raises(RuntimeError, match=r"exhausted all inputs|Detected at least one rank that exhausted inputs"):
        uneven(rank, world_size, model, optimizer)


def uneven(rank: int, world_size: int, model: DistributedDataParallel, optimizer: ShardedRAdam) -> None:
    with Join([model, optimizer], throw_on_early_termination=True):
        for _ in range(2 + (rank == world_size - 1)):
            model(torch.ones(4, 5)).sum().backward()
            optimizer.step()


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_uneven_inputs_may_be_an_error(world_size: int) -> None:
    run(check_join_terminates, world_size)


def check_save_between_backward_and_step(rank: int, _world_size: int) -> None:
    """Saving with gradients set, before any step, or in the middle of accumulation changes nothing."""
    results = []
    for save in (True, False):
        model = make_model()
        optimizer = ShardedRAdam(model.parameters(), lr=0.02, foreach=True)
        for step in range(4):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(batch(rank, step)[0]), batch(rank, step)[1]).backward()  # type: ignore[no-untyped-call]
            if save:
                optimizer.consolidate_state_dict(to=0)
                optimizer.sharded_state_dict()
            optimizer.step()
        results.append([param.detach().clone() for param in model.parameters()])
    assert_same(*results)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_saving_does_not_disturb_training(world_size: int) -> None:
    run(check_save_between_backward_and_step, world_size)
