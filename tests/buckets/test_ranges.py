"""Range tensors: their geometry, what may be done with them, and torch.distributed.checkpoint with them."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import ShardedRAdam
from sharded_radam.buckets.range_tensor import RangeTensor, range_boxes
from sharded_radam.compat import VERSION
from tests.cases import assert_same, quietly, set_grads
from tests.ranks import WORLD_SIZES, run

SAVED_AT, END = 8, 13


def test_drawing() -> None:
    """The drawing in the module's docstring."""
    found = [(tuple(box.offsets), tuple(box.sizes), box.start) for box in range_boxes((4, 6), 5, 22)]
    assert found == [((0, 5), (1, 1), 5), ((1, 0), (2, 6), 6), ((3, 0), (1, 4), 18)]


@given(st.lists(st.integers(1, 6), max_size=5).map(tuple), st.data())
@settings(max_examples=300, deadline=None)
def test_boxes_hold_a_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    elements = torch.arange(numel).view(shape)
    found = range_boxes(shape, start, stop)
    seen = []
    for box in found:
        part = elements[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]
        assert part.is_contiguous() or part.numel() == 1
        assert part.reshape(-1)[0] == box.start
        seen.append(part.reshape(-1))
    assert torch.equal(torch.cat([elements.reshape(-1)[:0], *seen]), torch.arange(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(st.permutations([0, 1, 2]), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_shards_are_views_in_the_order_of_dimensions(order: list[int], one: int, other: int) -> None:
    """Also where memory has another order of dimensions than the shape, as in channels_last."""
    start, stop = sorted((one, other))
    whole = torch.arange(60.0).view([(3, 4, 5)[dim] for dim in order])
    logical = whole.permute(sorted(range(3), key=order.__getitem__))
    piece = torch.arange(60.0)[start:stop]
    tensor = RangeTensor((3, 4, 5), [(start, piece)], order, piece.dtype, piece.device)
    count = 0
    for offsets, view in tensor.boxes().items():
        at = tuple(slice(o, o + n) for o, n in zip(offsets, view.shape, strict=True))
        assert torch.equal(view, logical[at])
        assert view.untyped_storage().nbytes() == view.nbytes
        assert view.data_ptr() == piece.data_ptr() + 4 * (int(view.min()) - start)
        count += view.numel()
    assert count == stop - start


def test_what_may_be_done_with_a_range_tensor() -> None:
    piece = torch.arange(6.0)
    tensor = RangeTensor((3, 4), [(2, piece)], (0, 1), piece.dtype, piece.device)
    assert (tuple(tensor.shape), tensor.spans(), tensor.dtype) == ((3, 4), [(2, 8)], torch.float32)
    assert str(tensor) == "RangeTensor((3, 4), [(2, 8)])"
    detached = tensor.detach()
    assert isinstance(detached, RangeTensor)
    assert detached.pieces[0][1].data_ptr() == piece.data_ptr()
    for copied in (tensor.clone(), copy.deepcopy(tensor), tensor.to(torch.float64), tensor.cpu().clone()):
        assert isinstance(copied, RangeTensor)
        assert copied.pieces[0][1].data_ptr() != piece.data_ptr()
        assert torch.equal(copied.pieces[0][1].float(), piece)
    assert tensor.to(torch.float64).dtype == torch.float64
    zeros = torch.zeros_like(tensor)
    assert isinstance(zeros, RangeTensor)
    assert not zeros.pieces[0][1].any()
    zeros.copy_(tensor)
    assert torch.equal(zeros.pieces[0][1], piece)
    misuses: list[Callable[[], Tensor]] = [lambda: tensor + 1, tensor.sum, lambda: torch.zeros(3, 4).copy_(tensor)]
    for misuse in misuses:
        with pytest.raises(NotImplementedError, match="on a RangeTensor: it has only the elements"):
            misuse()


class Net(nn.Module):
    """0-d, (1,), (0, k), 3-D, channels_last, transposed, complex; and one that gets its first gradient late."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))

        self.scalar, self.one, self.empty = parameter(), parameter(1), parameter(0, 3)
        self.big, self.three = parameter(300, 17), parameter(5, 64, 7)
        self.conv = nn.Parameter(parameter(4, 3, 5, 5).detach().contiguous(memory_format=torch.channels_last))
        self.transposed = nn.Parameter(parameter(9, 14).detach().t())
        self.complex = parameter(70, 3, dtype=torch.complex64)
        self.late = parameter(130)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, first: int, last: int) -> None:
    """Gradients by name, so that the order of parameters does not matter."""
    names = sorted(name for name, _ in model.named_parameters())
    params = dict(model.named_parameters())
    for step in range(first, last + 1):
        set_grads([params[name] for name in names], step, [names.index("late")] if step < 4 else [])
        optimizer.step()


def make(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer; the kinds differ in layout only."""
    model = Net()
    params = list(model.parameters())
    if kind == "other layout":
        return model, ShardedRAdam(params[::-1], foreach=True, bucket_cap_mb=5e-3)
    if kind == "radam":
        return model, torch.optim.RAdam(params, foreach=True)
    return model, ShardedRAdam(params, foreach=True, bucket_cap_mb=3e-3)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def under_ddp(model: nn.Module) -> DistributedDataParallel:
    """Without synchronising complex parameters, which Gloo of torch 2.8 cannot send."""
    unsent = [name for name, param in model.named_parameters() if param.is_complex()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, unsent)  # type: ignore[no-untyped-call]
    return DistributedDataParallel(model)


def save(_rank: int, world_size: int, folder: str, kind: str, wrapped: bool) -> None:
    model, optimizer = make(kind)
    module: nn.Module = under_ddp(model) if wrapped else model
    train(optimizer, model, 1, SAVED_AT)
    before = [tensor.clone() for s in optimizer.state.values() for tensor in s.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_save(state_of(module, optimizer), checkpoint_id=f"{folder}/{world_size}")
    after = [tensor for s in optimizer.state.values() for tensor in s.values()]
    assert all(map(torch.equal, before, after))


def load(_rank: int, _world_size: int, path: str, kind: str) -> list[Tensor]:
    model, optimizer = make(kind)
    if kind != "radam":
        train(optimizer, model, 1, 2)  # what is there is replaced
    target = state_of(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_load(target, checkpoint_id=path)
    set_model_state_dict(model, target["model"])
    set_optimizer_state_dict(model, optimizer, target["optim"])
    train(optimizer, model, SAVED_AT + 1, END)
    return [param.detach().clone() for param in model.parameters()]


def uninterrupted() -> list[Tensor]:
    model, optimizer = make("radam")
    train(optimizer, model, 1, END)
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("saved_at", WORLD_SIZES)
def test_checkpoints_of_torch_at_any_world_size(tmp_path: Path, saved_at: int) -> None:
    """dcp.save and dcp.load as they come: any world size, buckets and order, and plain RAdam; same bits."""
    run(save, saved_at, str(tmp_path), "sharded", True)
    wanted = uninterrupted()
    for world_size in WORLD_SIZES:
        kind = ("sharded", "other layout")[(saved_at + world_size) % 2]  # both from each, and at each
        for result in run(load, world_size, str(tmp_path / str(saved_at)), kind):
            assert_same(result, wanted, (world_size, kind))
    assert_same(load(0, 1, str(tmp_path / str(saved_at)), "radam"), wanted)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_checkpoints_of_plain_radam(tmp_path: Path, world_size: int) -> None:
    run(save, 1, str(tmp_path), "radam", False)
    model, optimizer = make("radam")
    train(optimizer, model, 1, END)
    for result in run(load, world_size, str(tmp_path / "1"), "sharded"):
        assert_same(result, uninterrupted())


def check_fresh(_rank: int, _world_size: int) -> None:
    """torch's functions never call step() behind the user's back, nor change the state."""
    model, optimizer = make("sharded")
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(list(model.parameters()))
    found = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, found)
    assert not calls
    assert all(map(torch.equal, model.parameters(), before))
    assert all(not tensor.any() for state in optimizer.state.values() for tensor in state.values())
    state = found["state"]
    assert isinstance(state, dict)
    assert set(state) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_fresh_state_is_left_alone(world_size: int) -> None:
    run(check_fresh, world_size)


def check_async(rank: int, world_size: int, folder: str) -> None:
    """Live state may change as soon as async_save returns, on a Gloo group of its own."""
    model, optimizer = make("sharded")
    train(optimizer, model, 1, SAVED_AT)
    group = dist.new_group(backend="gloo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        future = async_save(state_of(model, optimizer), checkpoint_id=folder, process_group=group)
    train(optimizer, model, SAVED_AT + 1, END)
    assert isinstance(future, Future)
    future.result(timeout=30)


@pytest.mark.skipif(VERSION < (2, 11), reason="async_save of torch 2.6 does not copy CPU tensors; 2.8 refuses ours")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_async_save(tmp_path: Path, world_size: int) -> None:
    run(check_async, world_size, str(tmp_path / "x"))
    for result in run(load, 1, str(tmp_path / "x"), "sharded"):
        assert_same(result, uninterrupted())


def half(rank: int, world_size: int, folder: str, save_it: bool) -> list[Tensor]:
    """bf16 parameters with fp32 masters, which a checkpoint keeps."""
    model = nn.Linear(31, 57).bfloat16()
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.linspace(-1, 1, param.numel()).view(param.shape))
    optimizer = ShardedRAdam(model.parameters(), bucket_cap_mb=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if save_it:
            train_half(optimizer, model, 1, SAVED_AT)
            dcp_save(state_of(model, optimizer), checkpoint_id=folder)
        else:
            target = state_of(model, optimizer)
            dcp_load(target, checkpoint_id=folder)
            set_model_state_dict(model, target["model"])
            set_optimizer_state_dict(model, optimizer, target["optim"])
    train_half(optimizer, model, SAVED_AT + 1, END)
    saved = optimizer.consolidate_state_dict(to=0)
    masters = [state["master"] for state in saved["state"].values()] if saved else []
    return [*(param.detach().clone() for param in model.parameters()), *masters]


def train_half(optimizer: torch.optim.Optimizer, model: nn.Module, first: int, last: int) -> None:
    for step in range(first, last + 1):
        set_grads(model.parameters(), step)
        optimizer.step()


@pytest.mark.parametrize("saved_at", WORLD_SIZES)
def test_masters_are_saved(tmp_path: Path, saved_at: int) -> None:
    wanted = run(half, saved_at, str(tmp_path / "x"), True)[0]
    assert len(wanted) == 4
    for world_size in WORLD_SIZES:
        assert_same(run(half, world_size, str(tmp_path / "x"), False)[0], wanted)


def check_fsdp2(_rank: int, world_size: int, folder: str) -> None:
    """What FSDP2's RAdam saved loads here, and what we saved loads there."""
    mesh = init_device_mesh("cpu", (world_size,))

    def plain() -> nn.Sequential:
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(13, 29), nn.Linear(29, 5))

    def fsdp_pair() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = plain()
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.RAdam(model.parameters(), lr=0.01, foreach=True)

    def our_pair() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = plain()
        return model, ShardedRAdam(model.parameters(), lr=0.01, foreach=True, bucket_cap_mb=1e-3)

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last + 1):
            optimizer.zero_grad()
            inputs = torch.randn(6, 13, generator=torch.Generator().manual_seed(step))
            model(inputs).square().mean().backward()  # the same on every rank, so that averaging changes nothing
            optimizer.step()

    def values(model: nn.Module) -> list[Tensor]:
        return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in model.parameters()]

    for number, (saver, loader) in enumerate([(fsdp_pair, our_pair), (our_pair, fsdp_pair)]):
        model, optimizer = saver()
        steps(model, optimizer, 1, SAVED_AT)
        dcp_save(state_of(model, optimizer), checkpoint_id=f"{folder}/{number}")
        steps(model, optimizer, SAVED_AT + 1, END)
        other, other_optimizer = loader()
        target = state_of(other, other_optimizer)
        dcp_load(target, checkpoint_id=f"{folder}/{number}")
        set_model_state_dict(other, target["model"])
        set_optimizer_state_dict(other, other_optimizer, target["optim"])
        steps(other, other_optimizer, SAVED_AT + 1, END)
        for one, two in zip(values(model), values(other), strict=True):
            # Averaging over 3 ranks is not exact, so gradients differ in their last bits there.
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
            assert world_size == 3 or torch.equal(one, two)


@pytest.mark.skipif(VERSION < (2, 11), reason="FSDP2 on CPUs fails in torch 2.6, and does not average in 2.8")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_checkpoints_of_fsdp2(tmp_path: Path, world_size: int) -> None:
    run(check_fsdp2, world_size, str(tmp_path))


def check_bare(_rank: int, _world_size: int, folder: str) -> None:
    """The optimizer itself as a Stateful, without names: parameters are then matched by their number."""
    results = []
    for resume in (False, True):
        model, optimizer = make("sharded")
        content = {"model": model, "optim": optimizer}
        if resume:
            dcp_load(content, checkpoint_id=folder)
        else:
            train(optimizer, model, 1, SAVED_AT)
            dcp_save(content, checkpoint_id=folder)
        train(optimizer, model, SAVED_AT + 1, END)
        results.append([param.detach().clone() for param in model.parameters()])
    assert_same(*results)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_optimizer_as_stateful(tmp_path: Path, world_size: int) -> None:
    run(check_bare, world_size, str(tmp_path / "x"))


def check_one_writer(rank: int, world_size: int, folder: str) -> None:
    """What one rank alone writes is half a checkpoint: an error before anything is written, on that rank."""
    model, optimizer = make("sharded")
    train(optimizer, model, 1, 2)
    groups = [dist.new_group([each]) for each in range(world_size)]
    ways: list[dict[str, Any]] = [{"no_dist": True}, {"process_group": groups[rank]}]
    for number, options in enumerate(ways):
        path = Path(folder, f"{rank}-{number}")
        if world_size == 1:
            quietly(dcp_save, state_of(model, optimizer), checkpoint_id=path, **options)
            continue
        with pytest.raises(BaseException, match="is saving on one rank alone"):  # CheckpointException is no Exception
            quietly(dcp_save, state_of(model, optimizer), checkpoint_id=path, **options)
        assert not path.exists() or not list(path.iterdir())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_rank_does_not_write_its_part_alone(tmp_path: Path, world_size: int) -> None:
    run(check_one_writer, world_size, str(tmp_path))
