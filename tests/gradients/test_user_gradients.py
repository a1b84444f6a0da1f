"""What users do to gradients between backward and step, with sharded gradients beside DDP with torch.optim.RAdam."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

import sharded_radam
from sharded_radam import ShardedRAdam
from sharded_radam.gradients.grad_shard import GradShard
from tests.cases import assert_same
from tests.gradients.test_gradients import OPTIONS, SMALL, Case, Training, compare, failing, train
from tests.gradients.test_sharded import train_scaled
from tests.ranks import WORLD_SIZES, run

TRANSPORTS = ("gloo", "shared_memory")


def transports(world_size: int) -> tuple[str | None, ...]:
    return TRANSPORTS if world_size > 1 else (None,)


def params_of(training: Training) -> list[nn.Parameter]:
    return list(training.net.parameters())


# Dropping


def zeroed_by_the_model(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step, heads=(step % 2,))


def zeroed_by_the_model_to_zeros(training: Training, step: int) -> None:
    training.model.zero_grad(set_to_none=False)
    training.backward(step, heads=(0, 1) if step < 3 else (0,))


def set_to_none_by_hand(training: Training, step: int) -> None:
    for param in params_of(training):
        param.grad = None
    training.backward(step)


def some_dropped_before_the_step(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    for param in params_of(training)[step % 3 :: 3]:
        param.grad = None


def dropped_after_clipping(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    training.clip(1e9, 2.0)
    training.net.trunk.zero_grad()


def some_kept(training: Training, step: int) -> None:
    """Half of the parameters keep their gradients over steps, and backward adds to them."""
    for param in params_of(training)[::2]:
        param.grad = None
    training.backward(step)


def never_zeroed(training: Training, step: int) -> None:
    if step != 3:
        training.backward(step)  # the fourth step has the gradients of the third


def kept_in_no_sync(training: Training, step: int) -> None:
    """What no_sync adds goes to gradients that were kept, too."""
    with training.no_sync():
        training.backward(step, 0)
    training.backward(step, 1)


def failed_and_zeroed_by_the_model(training: Training, step: int) -> None:
    if training.ours and step in (0, 3):
        with failing(training.net.twice), contextlib.suppress(ZeroDivisionError):
            training.backward(step, part=7)
    training.model.zero_grad()
    training.backward(step)


# Changing


def changed_in_place(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    for index, param in enumerate(params_of(training)):
        if param.grad is None:
            continue
        if index % 3 == 0:
            param.grad *= 0.5
        elif index % 3 == 1:
            param.grad.masked_fill_(param.detach() > 0, 0.0)
        else:
            param.grad.add_(param.detach(), alpha=0.01)


def clipped_by_value(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    nn.utils.clip_grad_value_(params_of(training), 1e-3)


def clipped_by_value_by_ours(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    if training.ours:
        training.sharded.clip_grad_value_(1e-3)
    else:
        nn.utils.clip_grad_value_(params_of(training), 1e-3)


def clipped_with_norm(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    nn.utils.clip_grads_with_norm_(params_of(training), 0.5, torch.tensor(2.0))


def mapped(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    if training.ours:
        training.sharded.map_grads_(lambda param, elements, grad: grad * (0.5 if param.dim() == 1 else 2.0))
    else:
        for param in params_of(training):
            if param.grad is not None:
                param.grad *= 0.5 if param.dim() == 1 else 2.0


def assigned_after_backward(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    training.net.trunk.weight.grad = torch.full_like(training.net.trunk.weight, 0.01 * step)


def hooks_registered_later(training: Training, step: int) -> None:
    if step == 0:
        for param in params_of(training)[::2]:
            param.register_post_accumulate_grad_hook(halve)  # type: ignore[no-untyped-call]
    training.model.zero_grad()
    training.backward(step)


def halve(param: Tensor) -> None:
    assert param.grad is not None
    param.grad *= 0.5


def changed_by_a_step_pre_hook(training: Training, step: int) -> None:
    if step == 0:

        def negate(*_: Any) -> None:
            for param in params_of(training):
                if param.grad is not None:
                    param.grad.neg_()

        training.optimizer.register_step_pre_hook(negate)
    training.model.zero_grad()
    training.backward(step)


EXACT: tuple[Case, ...] = (
    *(zeroed_by_the_model, zeroed_by_the_model_to_zeros, set_to_none_by_hand, some_dropped_before_the_step),
    *(failed_and_zeroed_by_the_model, changed_in_place, clipped_by_value, clipped_by_value_by_ours, clipped_with_norm),
    *(mapped, assigned_after_backward, hooks_registered_later, changed_by_a_step_pre_hook, dropped_after_clipping),
)
"""Equal to the bit at 1 and 2 ranks."""

BOUNDED: tuple[Case, ...] = (some_kept, never_zeroed, kept_in_no_sync)
"""DDP reduces what was reduced before once more."""


def check_habits(rank: int, world_size: int) -> None:
    for number, case in enumerate(EXACT + BOUNDED):
        theirs = train(Training(False, None, rank), case, steps=5, zeroes=False)
        # Each case with both transports at 2 ranks, with one of them at 3 and the other at 4.
        for transport in transports(world_size) if world_size <= 2 else (TRANSPORTS[(number + world_size) % 2],):
            ours = train(Training(True, transport, rank), case, steps=5, zeroes=False)
            compare(ours, theirs, case in EXACT and world_size <= 2, (case.__name__, transport))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_habits_do_what_they_do_with_ddp(world_size: int) -> None:
    run(check_habits, world_size, timeout=190)


# Reading


def check_reading(rank: int, world_size: int) -> None:
    for transport in transports(world_size):
        theirs, ours = Training(False, None, rank), Training(True, transport, rank)
        for training in (theirs, ours):
            training.backward(0, heads=(rank % 2,))
        for param, reference in zip(params_of(ours), params_of(theirs), strict=True):
            whole = ours.sharded.full_grad(param)
            if reference.grad is None:
                assert whole is None
                continue
            assert whole is not None
            assert whole.stride() == param.stride()
            torch.testing.assert_close(whole, reference.grad, rtol=1e-5, atol=1e-7)
            assert isinstance(param.grad, GradShard)
        for read in (
            lambda params: nn.utils.clip_grad_norm_(params, 1.0),
            lambda params: nn.utils.get_total_norm([param.grad for param in params if param.grad is not None]),
            lambda params: params[0].grad.abs(),
            lambda params: params[0].grad.clone(),
            lambda params: torch.stack([params[0].grad]),
        ):
            with pytest.raises(RuntimeError, match=r"it is sharded, and this rank has .* optimizer\.clip_grad_norm_"):
                read(params_of(ours))
        with pytest.raises(ValueError, match="is not one of this optimizer's"):
            ours.sharded.full_grad(Parameter(torch.ones(2)))
        ours.optimizer.step()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_whole_gradients_can_be_read_and_parts_cannot(world_size: int) -> None:
    run(check_reading, world_size)


def check_pieces(rank: int, world_size: int) -> None:
    """Every element once, with its place; halves and complex numbers too."""
    weights = [Parameter(torch.randn(5, 7)), Parameter(torch.randn(9, dtype=torch.complex64))]
    weights += [Parameter(torch.randn(33).bfloat16())]
    for sharded in (True, False):
        optimizer = ShardedRAdam(weights, shard_gradients=sharded, bucket_cap_mb=SMALL / 64)
        for param in weights:
            param.grad = torch.arange(param.numel()).view(param.shape).to(param.dtype)
        seen: dict[int, list[int]] = {id(param): [] for param in weights}

        def note(param: Tensor, elements: range, grad: Tensor, seen: dict[int, list[int]] = seen) -> None:
            seen[id(param)] += elements
            assert torch.equal(grad.real.float(), torch.tensor(elements).float())
            grad.add_(1)

        optimizer.map_grads_(note)
        everywhere = optimizer._shards.transport.all_gather_objects([seen[id(param)] for param in weights])
        for index, param in enumerate(weights):
            elements = sorted(e for each in everywhere for e in each[index])
            assert elements == sorted([*range(param.numel())] * (1 if sharded else world_size))
            whole = optimizer.full_grad(param)
            assert whole is not None
            assert whole.dtype == param.dtype
            assert torch.equal(whole, torch.arange(1, param.numel() + 1).view(param.shape).to(param.dtype))
        optimizer.zero_grad()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_pieces_are_all_elements_once(world_size: int) -> None:
    run(check_pieces, world_size)


# Several optimizers


def check_one_norm(rank: int, world_size: int) -> None:
    def build(sharded: bool, plain: bool = False) -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        nets = [nn.Linear(9, 7) for _ in range(3)]
        first: type = torch.optim.RAdam if plain else ShardedRAdam
        options: dict[str, Any] = {"shard_gradients": True} if sharded else {}
        optimizers = [first(nets[0].parameters(), **options), first(nets[1].parameters(), **options)]
        return list(nets), [*optimizers, torch.optim.SGD(nets[2].parameters())]

    for sharded in (False, True):
        nets, optimizers = build(sharded)
        reference, _ = build(False, plain=True)
        for net in (*nets, *reference):
            net(torch.arange(18.0).view(2, 9)).square().sum().backward()
        params = [param for net in reference for param in net.parameters()]
        for max_norm, norm_type in ((3.0, 2.0), (1.0, float("inf")), (1e9, 1.0)):
            wanted = nn.utils.clip_grad_norm_(params, max_norm, norm_type)
            norm = sharded_radam.clip_grad_norm_(optimizers, max_norm, norm_type)
            torch.testing.assert_close(norm, wanted.to(norm.dtype), rtol=1e-5 if sharded else 0, atol=0)
            found = [optimizers[0].full_grad(param) for param in nets[0].parameters()]  # type: ignore[attr-defined]
            for one, other in zip(found, reference[0].parameters(), strict=True):
                torch.testing.assert_close(one, other.grad, rtol=1e-5 if sharded else 0, atol=0)
        next(nets[2].parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=r"the norm of order 2\.0 of the gradients is nan"):
            sharded_radam.clip_grad_norm_(optimizers, 1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_norm_over_several_optimizers(world_size: int) -> None:
    run(check_one_norm, world_size)


def check_shared_parameters(rank: int, world_size: int) -> None:
    for transport in transports(world_size):
        torch.manual_seed(0)
        net, reference = nn.Linear(17, 3), nn.Linear(17, 3)
        reference.load_state_dict(net.state_dict())
        options: dict[str, Any] = {"shard_gradients": True, "transport": transport, **OPTIONS}
        first, second = (ShardedRAdam(net.named_parameters(), **options) for _ in range(2))
        theirs = [torch.optim.RAdam(reference.parameters(), **OPTIONS) for _ in range(2)]
        # Phases, and turns: whose zero_grad() came before the backward pass has its gradients.
        for index in (1, 1, 0, 0, 0, 1, 0, 1):
            for model, optimizer in ((net, (first, second)[index]), (reference, theirs[index])):
                optimizer.zero_grad()
                model(torch.ones(2, 17)).square().sum().backward()
                optimizer.step()
            assert_same(net.parameters(), reference.parameters(), (transport, index))
        second.zero_grad()
        net(torch.ones(2, 17)).square().sum().backward()
        before = [param.detach().clone() for param in net.parameters()]
        with pytest.raises(RuntimeError, match="'weight' is sharded by another optimizer"):
            first.step()
        assert_same(net.parameters(), before)
        second.step()
        dist.barrier()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_optimizers_that_share_parameters(world_size: int) -> None:
    run(check_shared_parameters, world_size)


# More


def check_new_group(rank: int, world_size: int) -> None:
    """A group that comes between backward and step brings its gradient, and the others keep theirs."""
    for transport in transports(world_size):
        results = []
        for ours in (True, False):
            torch.manual_seed(0)
            trunk, head = nn.Linear(17, 9), nn.Linear(9, 3)
            optimizer: torch.optim.Optimizer = torch.optim.RAdam(trunk.parameters(), **OPTIONS)
            if ours:
                optimizer = ShardedRAdam(trunk.parameters(), shard_gradients=True, transport=transport, **OPTIONS)
            for step in range(4):
                optimizer.zero_grad()
                head.zero_grad()
                head(trunk(torch.full((2, 17), 1.0 + step))).square().sum().backward()
                if step == 1:
                    optimizer.add_param_group({"params": head.parameters()})
                optimizer.step()
            results.append([p.detach().clone() for p in (*trunk.parameters(), *head.parameters())])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0 if world_size <= 2 else 1e-5, atol=0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_group_that_comes_between_backward_and_step(world_size: int) -> None:
    run(check_new_group, world_size)


def dropped_by_the_model(training: Training, step: int) -> None:
    training.model.zero_grad()
    training.backward(step)
    training.model.zero_grad()


def check_torchs_scaler(rank: int, world_size: int) -> None:
    bad = (world_size - 1, 3)
    for transport in transports(world_size):
        for clip in (False, True):
            (found, scales), (wanted, their_scales) = (
                train_scaled(Training(ours, transport, rank), bad, clip, torch.amp.GradScaler, 5, dropped_by_the_model)
                for ours in (True, False)
            )
            assert scales == their_scales
            assert scales[3] == 2.0**9
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_torchs_own_grad_scaler(world_size: int) -> None:
    run(check_torchs_scaler, world_size)


def check_switch_of_ddp(rank: int, world_size: int) -> None:
    """Accumulation by DDP's attribute is that of ``no_sync``: the same bits, and as few collectives."""
    sides = []
    for by_attribute in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 70), nn.Tanh(), nn.Linear(70, 3))
        optimizer = ShardedRAdam(model.parameters(), shard_gradients=True, module=model, bucket_cap_mb=1e-3)
        for step in range(9):
            syncs = step % 3 == 2
            if by_attribute:
                model.require_backward_grad_sync = syncs  # type: ignore[assignment]
            with contextlib.nullcontext() if syncs or by_attribute else optimizer.no_sync():
                generator = torch.Generator().manual_seed(world_size * step + rank)
                model(torch.randn(4, 5, generator=generator)).square().mean().backward()
            if syncs:
                optimizer.step()
                optimizer.zero_grad()
        sides.append((list(model.parameters()), optimizer.stats().collectives))
    assert_same(sides[0][0], sides[1][0])
    assert sides[0][1] == sides[1][1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_require_backward_grad_sync(world_size: int) -> None:
    run(check_switch_of_ddp, world_size)


def test_a_graph_of_gradients_is_kept_out_of_them() -> None:
    """backward(create_graph=True) adds out of place."""
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        optimizer: torch.optim.Optimizer = torch.optim.RAdam(net.parameters(), **OPTIONS)
        if ours:
            optimizer = ShardedRAdam(net.parameters(), shard_gradients=True, **OPTIONS)
        for _ in range(3):
            for _ in range(2):
                net(torch.ones(2, 5)).square().sum().backward(create_graph=True)
            optimizer.step()
            net.zero_grad()
        results.append([param.detach().clone() for param in net.parameters()])
    assert_same(*results)


def test_gradient_shards_are_not_pickled() -> None:
    net = nn.Linear(5, 3)
    optimizer = ShardedRAdam(net.named_parameters(), shard_gradients=True)
    net(torch.ones(2, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="pickling of the gradient of 'weight'"):
        torch.save(net.weight.grad, "/dev/null")
    assert repr(net.weight.grad) == "GradShard('weight', (3, 5), 15 of 15 elements here)"
    optimizer.step()
