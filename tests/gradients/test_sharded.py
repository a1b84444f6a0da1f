"""What users do with sharded gradients beside backward and step: clipping, scaling, counting, finding errors."""

from __future__ import annotations

import gc
import logging
import weakref
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import GradScaler, ShardedRAdam
from sharded_radam.buckets.flat import Flat
from sharded_radam.gradients.grad_shard import GradShard
from sharded_radam.gradients.schedule import Launch
from sharded_radam.transport.gloo import GlooReducer
from sharded_radam.transport.shared_memory import SharedMemoryReducer
from tests.cases import assert_same
from tests.gradients.test_gradients import OPTIONS, SMALL, TRANSPORTS, Case, Net, Training, images
from tests.ranks import WORLD_SIZES, run


def transports(world_size: int) -> tuple[str, ...]:
    return TRANSPORTS if world_size > 1 else TRANSPORTS[:1]


# Norms


def check_norms(rank: int, world_size: int) -> None:
    for transport in transports(world_size):
        ours, theirs = Training(True, transport, rank), Training(False, None, rank)
        for training in (ours, theirs):
            training.backward(0, heads=(0,))
        for norm_type in (1.0, 2.0, 3.0, float("inf"), 2):
            wanted = nn.utils.get_total_norm([p.grad for p in theirs.net.parameters() if p.grad is not None], norm_type)
            torch.testing.assert_close(ours.sharded.grad_norm(norm_type).float(), wanted, rtol=1e-5, atol=0)
        norm = ours.sharded.grad_norm().item()
        assert ours.sharded.clip_grad_norm_(norm / 3).item() == norm
        assert ours.sharded.grad_norm().item() == pytest.approx(norm / 3, rel=1e-4)
        assert ours.sharded.clip_grad_norm_(norm).item() == pytest.approx(norm / 3, rel=1e-4)
        assert ours.sharded.grad_norm().item() == pytest.approx(norm / 3, rel=1e-4)
        everywhere = ours.sharded._shards.transport.all_gather_objects(norm)
        assert everywhere == [norm] * world_size
        with pytest.raises(ValueError, match="norm_type=0: expected a number above 0"):
            ours.sharded.grad_norm(0)
        ours.optimizer.zero_grad()
        assert ours.sharded.grad_norm() == 0
        ours.backward(1)
        if rank == 0:
            ours.sharded._shards.gradients.sums.totals[0].narrow(0, 0, 1).fill_(float("nan"))  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=r"the norm of order 2\.0 of the gradients is nan"):
            ours.sharded.clip_grad_norm_(1.0, error_if_nonfinite=True)
    stage1 = ShardedRAdam(Net().parameters())
    assert stage1.grad_norm() == 0
    for group in stage1.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    numel = sum(param.numel() for group in stage1.param_groups for param in group["params"])
    assert stage1.clip_grad_norm_(1.0).item() == pytest.approx(numel**0.5)
    assert stage1.grad_norm().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_norms_are_torchs(world_size: int) -> None:
    run(check_norms, world_size)


# Scaling


def train_scaled(
    training: Training,
    bad: tuple[int, int] | None,
    clip: bool,
    kind: type[torch.amp.GradScaler] = GradScaler,
    steps: int = 7,
    begin: Case = lambda training, step: training.optimizer.zero_grad(),
) -> tuple[list[Tensor], list[float]]:
    """Parameters and scales; a rank's loss is infinite at a step, and each step begins so."""
    scaler = (kind if training.ours else torch.amp.GradScaler)("cpu", init_scale=2.0**10)
    scales = []
    for step in range(steps):
        begin(training, step)
        loss = training.model(images(training.rank, step) * (float("inf") if bad == (training.rank, step) else 1.0))
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(training.optimizer)
            training.clip(0.05, 2.0)
        scaler.step(training.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return training.params(), scales


def check_scaler(rank: int, world_size: int) -> None:
    last = world_size - 1
    for clip, bad in [(False, (r, 4)) for r in range(world_size)] + [(True, None), (True, (last, 4))]:
        wanted, their_scales = train_scaled(Training(False, None, rank), bad, clip)
        for transport in transports(world_size):
            ours = Training(True, transport, rank)
            found, scales = train_scaled(ours, bad, clip)
            assert scales == their_scales
            assert (scales[4] == 2.0**9) == (bad is not None)
            if world_size <= 2 and not clip:
                assert_same(found, wanted, (transport, bad))
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)
            steps = ours.optimizer.state[ours.net.trunk.weight]["step"]
            assert steps == 7 - (bad is not None)
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    scaler = GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    scaler.step(torch.optim.RAdam([param]))
    assert not torch.equal(param, torch.ones(3))
    scaler.update()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_grad_scaler(world_size: int) -> None:
    run(check_scaler, world_size)


# Dtypes in which gradients travel


def check_reduce_dtype(rank: int, world_size: int) -> None:
    """Sums are those of rounded gradients, in fp32 and in the order of the ranks; bytes are the dtype's."""
    for transport in transports(world_size):
        for dtype, reduce_dtype in [
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, None),
            (torch.bfloat16, torch.float32),
            (torch.float64, torch.float32),
        ]:
            params = [Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((70, 9), (300,), (5,))]
            optimizer = ShardedRAdam(
                params, transport=transport, shard_gradients=True, reduce_dtype=reduce_dtype, bucket_cap_mb=2e-3
            )
            sent = reduce_dtype or dtype
            grads = [
                [torch.randn(p.shape, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for p in params]
                for r in range(world_size)
            ]
            before = optimizer.stats().received_bytes.get("reduce_scatter", 0)
            terms = [(param * grad.to(dtype)).sum() for param, grad in zip(params, grads[rank], strict=True)]
            torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
            found = [optimizer.full_grad(param) for param in params]
            (flat,) = optimizer._shards.flats
            num_bytes = flat.buffer.numel() * sent.itemsize // world_size * (world_size - 1)
            assert optimizer.stats().received_bytes.get("reduce_scatter", 0) - before == num_bytes
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            for index, whole in enumerate(found):
                rounded = [each[index].to(dtype).to(sent).to(wide) for each in grads]
                wanted = torch.stack(rounded).sum(0) / world_size
                assert whole is not None
                tolerance = 1e-6 if dtype == torch.float32 or sent == torch.float32 else 1e-12
                if dtype == torch.bfloat16:  # full_grad rounds to the parameter's dtype
                    tolerance = 8e-3
                torch.testing.assert_close(whole.to(wide), wanted, rtol=tolerance, atol=tolerance)
            optimizer.step()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_travel_in_the_dtype_asked_for(world_size: int) -> None:
    run(check_reduce_dtype, world_size)


def check_overflow(_rank: int, world_size: int) -> None:
    """A gradient that is finite, but not in the dtype in which it travels."""
    for dtype in (torch.float32, torch.complex64):
        param = Parameter(torch.ones(70, dtype=dtype))
        optimizer = ShardedRAdam([("w", param)], shard_gradients=True, reduce_dtype=torch.half, check_gradients=True)
        (param * 1e5).abs().sum().backward()  # type: ignore[no-untyped-call]
        with pytest.raises(RuntimeError, match="gradients are not finite, before they were reduced, on rank 0: w"):
            optimizer.step()
        assert torch.equal(param, torch.ones(70, dtype=dtype))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_overflows_on_its_way_is_found(world_size: int) -> None:
    run(check_overflow, world_size)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "bfloat16"], ids=str)
def test_they_travel_in_floats(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"reduce_dtype=.*expected None or one of"):
        ShardedRAdam([Parameter(torch.ones(2))], shard_gradients=True, reduce_dtype=dtype)


# Memory, counts, order


def check_bytes(rank: int, world_size: int) -> None:
    """Gradients after backward: the own shard, and the buckets under way; ``.grad`` is released."""
    for transport in transports(world_size):
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(24)))
        optimizer = ShardedRAdam(model.parameters(), transport=transport, shard_gradients=True, bucket_cap_mb=0.5)
        numel = sum(param.numel() for param in model.parameters())
        gradients = optimizer._shards.gradients
        assert gradients is not None
        (flat,) = optimizer._shards.flats
        assert [total.nbytes for total in gradients.sums.totals] == [4 * flat.plan.local_numel]
        assert 4 * flat.plan.local_numel < 4 * numel / world_size * 1.05
        bucket, held, most = 4 * flat.plan.bucket_numel, Counter[str](), [0]
        assert reducer_bytes(gradients.sums.reducer, rank) <= 4 * bucket

        def count(param: Tensor, held: Counter[str] = held, most: list[int] = most, model: nn.Module = model) -> None:
            most[0] = max(most[0], sum(map(held_bytes, model.parameters())))

        for step in range(3):
            optimizer.zero_grad()
            most[0] = 0
            handles = [param.register_post_accumulate_grad_hook(count) for param in model.parameters()]  # type: ignore[no-untyped-call]
            model(torch.ones(2, 256)).mean().backward()
            for handle in handles:
                handle.remove()
            assert not any(map(held_bytes, model.parameters()))
            optimizer.step()
            # The last two wait for their hooks.
            assert most[0] <= 2 * bucket + 2 * 4 * 256 * 256, (transport, step, most[0])
            assert most[0] < 4 * numel / 4


def held_bytes(param: Tensor) -> int:
    """Memory of the local gradient."""
    local = [param.grad.sending, param.grad.fresh] if isinstance(param.grad, GradShard) else [param.grad]
    return sum(tensor.nbytes for tensor in local if tensor is not None)


def reducer_bytes(reducer: Any, rank: int) -> int:
    """Memory of the buckets under way."""
    if isinstance(reducer, GlooReducer):
        return sum(memory.nbytes for pair in reducer._slots for memory in pair)
    if isinstance(reducer, SharedMemoryReducer):
        return sum(memory.nbytes for memory in reducer._memory[rank])
    slots = getattr(reducer, "_slots", None) or [reducer._memory]
    return sum(memory.nbytes for memory in slots)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradient_bytes(world_size: int) -> None:
    run(check_bytes, world_size)


def check_counts(rank: int, world_size: int) -> None:
    """One reduction a bucket and backward, while backward runs, from the second one on in the order of arrival."""
    for transport in transports(world_size):
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64) for _ in range(9)]
        order = (4, 1, 7, 0, 8, 3, 2, 6, 5)  # of use, other than that of registration
        model = nn.ModuleList(layers)
        optimizer = ShardedRAdam(model.parameters(), shard_gradients=True, transport=transport, bucket_cap_mb=0.02)
        gradients, network = optimizer._shards.gradients, optimizer._shards.transport
        assert gradients is not None
        sent: list[Launch] = []
        send = gradients._send

        def sending(launch: Launch, sent: list[Launch] = sent, send: Any = send) -> None:
            sent.append(launch)
            send(launch)

        gathers: Counter[str] = Counter()
        gather = network.all_gather

        def gathering(bucket: Tensor, gathers: Counter[str] = gathers, gather: Any = gather) -> Any:
            gathers["all_gather"] += 1
            return gather(bucket)

        with mock.patch.object(gradients, "_send", sending):
            for step in range(4):
                optimizer.zero_grad()
                sent.clear()
                x = torch.ones(2, 64)
                for index in order:
                    x = torch.tanh(layers[index](x))
                x.sum().backward()  # type: ignore[no-untyped-call]
                in_backward = len(sent)
                buckets = optimizer._shards.flats[0].plan.num_buckets
                with mock.patch.object(network, "all_gather", gathering):
                    gathers.clear()
                    optimizer.step()
                # once more for agreeing on the order, after the first backward
                assert gathers["all_gather"] <= buckets + (2 if step == 0 else 0)
                if step:
                    assert in_backward == len(sent) == len(gradients.rounds.schedule.launches)
                    assert set(range(buckets)) == {launch.bucket for launch in sent}
                    come = {2 * layer + part: index for index, layer in enumerate(reversed(order)) for part in (0, 1)}
                    ready = [max(come[slot] for slot in launch.slots) for launch in sent]
                    assert ready == sorted(ready)
                    assert ready[0] < len(order) / 2
                    assert ready[-1] == len(order) - 1
                else:
                    assert len(sent) == buckets


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_launches_follow_the_order_of_arrival(world_size: int) -> None:
    run(check_counts, world_size)


def check_determinism(rank: int, world_size: int) -> None:
    for transport in transports(world_size):
        runs = []
        for _ in range(2):
            training = Training(True, transport, rank)
            for step in range(7):
                training.optimizer.zero_grad()
                training.backward(step, heads=((rank + step) % 2,))
                training.optimizer.step()
            runs.append(training.params())
        assert_same(runs[0], runs[1], transport)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_runs_are_equal_to_the_bit(world_size: int) -> None:
    run(check_determinism, world_size)


# Construction and errors


def check_broadcast(rank: int, world_size: int) -> None:
    """What ranks begin with is rank 0's, as in DistributedDataParallel."""
    torch.manual_seed(rank)
    net = Net()
    net.norm.running_mean.normal_()  # type: ignore[union-attr]
    halves = [Parameter(torch.randn(130).bfloat16()), Parameter(torch.randn(7, 3).t())]
    optimizer = ShardedRAdam([*net.parameters(), *halves], shard_gradients=True, module=net)
    torch.manual_seed(0)
    wanted = Net()
    wanted.norm.running_mean.normal_()  # type: ignore[union-attr]
    assert_same(net.parameters(), wanted.parameters())
    assert_same(net.buffers(), wanted.buffers())
    torch.testing.assert_close(halves[0].detach(), torch.randn(130).bfloat16())
    assert_same([halves[1].detach()], [torch.randn(7, 3).t()])
    master = next(flat for flat in optimizer._shards.flats if flat.is_half)
    assert torch.equal(master.state["master"].bfloat16(), master.buffer.chunk(world_size)[rank])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_and_buffers_are_rank_0s(world_size: int) -> None:
    run(check_broadcast, world_size)


def check_not_finite(rank: int, world_size: int) -> None:
    bad = world_size - 1
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("sharded_radam"), Lines(logging.ERROR)
    logger.addHandler(handler)
    for transport in transports(world_size):
        net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        named = net.named_parameters()
        optimizer = ShardedRAdam(named, shard_gradients=True, check_gradients=True, transport=transport)
        before = [param.detach().clone() for param in net.parameters()]
        for spoiled in (True, False):
            lines.clear()
            net(torch.full((2, 5), float("nan") if spoiled and rank == bad else 1.0)).sum().backward()
            if spoiled:
                names = "1.weight, 0.weight" if transport else ""
                with pytest.raises(
                    RuntimeError, match=rf"not finite, before they were reduced, on rank {bad}: .*weight"
                ):
                    optimizer.step()
                assert len(lines) == (2 if rank == bad else 0), (lines, names)
                assert all(f"on rank {bad} is not finite" in line for line in lines)
                assert_same(net.parameters(), before)
                optimizer.zero_grad()
            else:
                optimizer.step()
                assert not lines
                assert all(param.isfinite().all() for param in net.parameters())
    logger.removeHandler(handler)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_that_are_not_finite_are_named(world_size: int) -> None:
    run(check_not_finite, world_size)


def check_wrapped(rank: int, world_size: int) -> None:
    wrapped = DistributedDataParallel(nn.Linear(3, 3))
    message = "the model is wrapped in DistributedDataParallel"
    with pytest.raises(ValueError, match=message):
        ShardedRAdam(wrapped.parameters(), shard_gradients=True)
    ShardedRAdam(wrapped.parameters())
    net = nn.Linear(3, 3)
    optimizer = ShardedRAdam(net.parameters(), shard_gradients=True)
    with pytest.raises(ValueError, match=message):
        DistributedDataParallel(net)
    with pytest.raises(ValueError, match="Join works with DistributedDataParallel"):
        optimizer.join_hook()
    other = ShardedRAdam(nn.Linear(3, 3).parameters(), shard_gradients=True)
    with pytest.raises(ValueError, match=message):
        other.add_param_group({"params": wrapped.parameters()})
    assert len(other.param_groups) == 1
    del optimizer, other
    gc.collect()
    late = DistributedDataParallel(nn.Linear(3, 3))  # nobody sees it
    with pytest.raises(ValueError, match=message):
        ShardedRAdam(late.parameters(), shard_gradients=True)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_wrapped_models_are_refused(world_size: int) -> None:
    run(check_wrapped, world_size)


def test_arguments_that_exclude_each_other() -> None:
    params = [Parameter(torch.ones(3))]
    for options, message in {
        (("differentiable", True), ("shard_gradients", True)): "differentiable=True excludes",
        (("differentiable", True), ("share_parameters", True)): "differentiable=True excludes",
        (("check_gradients", True),): "check_gradients=True and module= are for shard_gradients=True",
        (("reduce_dtype", torch.bfloat16),): "reduce_dtype= is for shard_gradients=True",
        (("module", nn.Linear(1, 1)),): "check_gradients=True and module= are for shard_gradients=True",
        (("share_parameters", True), ("parameters_as_bucket_view", False)): "excludes parameters_as_bucket_view=False",
    }.items():
        with pytest.raises(ValueError, match=message):
            ShardedRAdam(params, **dict(options))  # type: ignore[arg-type]


# The life of hooks


def check_new_optimizer(rank: int, world_size: int) -> None:
    """The newest optimizer of a model has its gradients; an old one goes with its hooks and memory."""
    torch.manual_seed(0)
    net, reference = nn.Linear(17, 3), nn.Linear(17, 3)
    reference.load_state_dict(net.state_dict())
    first = ShardedRAdam(net.parameters(), shard_gradients=True, **OPTIONS)
    second = ShardedRAdam(net.parameters(), shard_gradients=True, **OPTIONS)
    radam = torch.optim.RAdam(reference.parameters(), **OPTIONS)
    for model in (net, reference):
        model(torch.ones(2, 17)).sum().backward()
    second.step()
    radam.step()
    assert_same(net.parameters(), reference.parameters())
    flats = [weakref.ref(flat) for flat in first._shards.flats]
    del first
    gc.collect()
    assert all(flat() is None for flat in flats)
    second.zero_grad()
    second.add_param_group({"params": [extra := Parameter(torch.ones(5))]})
    net(torch.ones(2, 17)).sum().backward()
    extra.sum().backward()  # type: ignore[no-untyped-call]
    second.step()
    assert isinstance(extra.grad, GradShard)
    assert not torch.equal(extra, torch.ones(5))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_new_optimizer_takes_over(world_size: int) -> None:
    run(check_new_optimizer, world_size)


def check_compiled(rank: int, world_size: int) -> None:
    results = []
    for compiled in (False, True):
        training = Training(True, None, rank, bucket_cap_mb=SMALL)
        model: Any = torch.compile(training.net.trunk, backend="aot_eager") if compiled else training.net.trunk
        for step in range(6):
            training.optimizer.zero_grad()
            model(images(rank, step).flatten()[:320].view(4, 80)).square().mean().backward()
            training.optimizer.step()
        results.append([param.detach().clone() for param in training.net.trunk.parameters()])
    assert_same(results[0], results[1])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_compiled_modules(world_size: int) -> None:
    run(check_compiled, world_size)


def test_copies_have_gradients_of_their_own() -> None:
    import copy

    net = nn.Linear(3, 3)
    optimizer = ShardedRAdam(net.parameters(), shard_gradients=True)
    net(torch.ones(2, 3)).sum().backward()
    both = copy.deepcopy((net, optimizer))
    assert isinstance(both[1], ShardedRAdam)
    both[0](torch.ones(2, 3)).sum().backward()
    both[1].step()
    assert both[1].state[both[0].weight]["step"] == 1
    assert optimizer.state[net.weight]["step"] == 0
    optimizer.step()
    assert_same(net.parameters(), both[0].parameters())
    assert isinstance(both[1]._shards.flats[0], Flat)
