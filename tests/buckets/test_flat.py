"""Parameters as views: strides, windows, and what happens when a parameter is no longer what it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sharded_radam import ShardedRAdam
from sharded_radam.buckets.memory import dim_order, flatten, unflatten
from tests.cases import make_params, set_grads
from tests.ranks import WORLD_SIZES, run

pytestmark = pytest.mark.quick

MOVES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "to(dtype)": (lambda m: m.to(torch.float64), r"was torch\.float32 and is now torch\.float64"),
    "half": (lambda m: m.half(), r"was torch\.float32 and is now torch\.float16"),
    "shape": (lambda m: setattr(m[0].weight, "data", torch.ones(3, 3)), r"was of shape \(4, 3\) and is now \(3, 3\)"),
    "assign": (
        lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        r"was replaced by another Parameter in Linear\.(weight|bias)",
    ),
    "new Parameter": (
        lambda m: setattr(m[1], "bias", Parameter(torch.zeros(2))),
        r"'1\.bias' was replaced by another Parameter in Linear\.bias",
    ),
}


@pytest.mark.parametrize("move", MOVES)
def test_moved_parameters_are_an_error(move: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ShardedRAdam(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    steps = [state["step"].item() for state in optimizer.state.values()]
    action, message = MOVES[move]
    action(model)
    before = [param.detach().clone() for param in model.parameters()]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"parameter '[01]\.(weight|bias)'.*|{message}") as caught:
            optimizer.step()
        assert caught.match(message)
        assert caught.match("Build it anew now")
    assert all(map(torch.equal, model.parameters(), before))
    assert [state["step"].item() for state in optimizer.state.values()] == steps


def test_moves_that_are_no_harm() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = ShardedRAdam(model.named_parameters())
    weight, bias = model[0].get_parameter("weight"), model[1].get_parameter("bias")
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.to("cpu").float()
    model[0].weight = weight
    model[1].bias = Parameter(torch.zeros(2))
    model[1].bias = bias  # put back: the optimizer's parameter is in its place again
    with torch.no_grad():
        weight.zero_()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert weight.abs().sum() > 0


def check_taken_back(rank: int, world_size: int, half: bool) -> None:
    """Whatever assigns ``.data``, the step goes on from these values, as torch.optim.RAdam does."""
    dtype = torch.bfloat16 if half else torch.float32
    models = [nn.Sequential(nn.Linear(3, 17), nn.Linear(17, 5)).to(dtype) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours = ShardedRAdam(models[0].parameters(), foreach=True, weight_decay=0.1)
    theirs = torch.optim.RAdam(models[1].parameters(), foreach=True, weight_decay=0.1)
    addresses = [param.data_ptr() for param in models[0].parameters()]
    for step in range(8):
        for model in models:
            if step == 4:
                model.to("cpu:0")  # a copy, in torch 2.13
            if step == 6:
                model[0].weight.data = torch.full((17, 3), 0.5, dtype=dtype)
            set_grads(list(model.parameters()), step)
        for optimizer in (ours, theirs):
            optimizer.step()
        if not half:
            assert all(map(torch.equal, models[0].parameters(), models[1].parameters())), step
        assert (models[0][0].get_parameter("weight") - 0.5).abs().max() < 0.1 or step < 6
        assert [param.data_ptr() for param in models[0].parameters()] == addresses


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_data_that_was_assigned_is_taken_back(world_size: int) -> None:
    for half in (False, True):
        run(check_taken_back, world_size, half)


def test_with_their_own_memory_parameters_may_move_but_not_change_type() -> None:
    param = Parameter(torch.ones(5))
    optimizer = ShardedRAdam([param], parameters_as_bucket_view=False)
    param.data = torch.full((5,), 7.0)
    param.grad = torch.ones(5)
    optimizer.step()
    assert (param < 7).all()
    assert (param > 6).all()
    param.data = param.data.double()
    with pytest.raises(RuntimeError, match=r"is now torch\.float64"):
        optimizer.step()


@pytest.mark.parametrize("as_views", [True, False])
def test_memory_order_is_kept(as_views: bool) -> None:
    params = make_params()
    params += [Parameter(p) for p in nn.LSTM(5, 7, 2, bidirectional=True).parameters()]
    params.append(Parameter(torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)))
    params.append(Parameter(torch.randn(3, 4, 5).permute(2, 0, 1)))
    params.append(Parameter(torch.randn(2, 1, 3, 1).contiguous(memory_format=torch.channels_last)))
    before = [(param.stride(), param.detach().clone()) for param in params]
    optimizer = ShardedRAdam(params, parameters_as_bucket_view=as_views)
    assert [(param.stride(), True) for param in params] == [(stride, True) for stride, _ in before]
    assert all(torch.equal(param, value) for param, (_, value) in zip(params, before, strict=True))
    set_grads(params, 1)
    optimizer.step()
    assert [param.stride() for param in params] == [stride for stride, _ in before]
    assert all(optimizer.state[param]["exp_avg"].stride() == param.stride() for param in params)


def test_flatten_and_unflatten_are_inverse() -> None:
    for tensor in [
        torch.randn(3, 4, 5),
        torch.randn(3, 4, 5).permute(1, 2, 0),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(()),
        torch.randn(0, 3).t(),
        torch.randn(6, 5)[:, :3],
    ]:
        order = dim_order(tensor)
        flat = flatten(tensor, order)
        back = unflatten(flat, tensor.shape, order)
        assert flat.dim() == 1
        assert torch.equal(back, tensor)
        if tensor.permute(order).is_contiguous() and tensor.numel():
            assert flat.data_ptr() == tensor.data_ptr()
            assert back.stride() == tensor.stride()


def test_gradients_in_another_memory_order() -> None:
    ours, theirs = make_params(), make_params()
    sharded, radam = ShardedRAdam(ours, foreach=True), torch.optim.RAdam(theirs, foreach=True)
    for step in range(1, 9):
        for params in (ours, theirs):
            set_grads(params, step)
            for param in params:
                if param.dim() > 1:
                    assert param.grad is not None
                    param.grad = param.grad.transpose(0, 1).contiguous().transpose(0, 1)
        sharded.step()
        radam.step()
    assert all(map(torch.equal, ours, theirs))


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest new storage that an operation returned, in bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def check_bytes(_rank: int, world_size: int) -> None:
    shapes = [(1000, 1000), (2_000_017,), (3,), (300, 257)]
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    bucket_bytes = 4 * 2**20
    for flags in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        for dtype in (torch.float32, torch.bfloat16):
            params = [Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
            optimizer = ShardedRAdam(params, bucket_cap_mb=4.0, weight_decay=0.1, **flags)  # type: ignore[arg-type]
            own = sum(tensor.nbytes for state in optimizer.state.values() for n, tensor in state.items() if n != "step")
            allocated = sum(tensor.nbytes for flat in optimizer._shards.flats for tensor in flat.state.values())
            padding = 64 * (len(shapes) + world_size)
            bytes_each = 8 if dtype == torch.float32 else 12
            assert own <= allocated <= bytes_each * (numel + padding) / world_size
            assert allocated >= bytes_each * numel / world_size
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
            for _ in range(7):
                with Allocations() as allocations:
                    optimizer.step()
                # Temporaries of a chunk, and never one of the size of a bucket.
                limit = 0 if flags == {"fused": True} and dtype == torch.float32 else 2**20
                assert allocations.largest <= max(limit, 4096), (flags, dtype, allocations.largest)
                assert allocations.largest < bucket_bytes


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bytes_of_state_and_of_a_step(world_size: int) -> None:
    run(check_bytes, world_size)


def test_weights_loaded_after_construction_reach_the_masters() -> None:
    """A master that kept the old weights would write them back in the next step."""
    params = [Parameter(torch.zeros(70, dtype=torch.bfloat16))]
    for as_views in (True, False):
        optimizer = ShardedRAdam(params, parameters_as_bucket_view=as_views)
        with torch.no_grad():
            params[0].fill_(5.0)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        torch.testing.assert_close(optimizer.state[params[0]]["master"], torch.full((70,), 5.0 - 1e-3))


def test_huge_pages_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large flats are mapped by us; here all are."""
    results = []
    for threshold in (1, 2**40):
        monkeypatch.setattr("sharded_radam.buckets.memory.HUGE_BYTES", threshold)
        params = make_params()
        optimizer = ShardedRAdam(params)
        assert not any(tensor.any() for flat in optimizer._shards.flats for tensor in flat.state.values())
        for step in range(1, 9):
            set_grads(params, step)
            optimizer.step()
        copied = copy.deepcopy(optimizer)
        results.append([*params, *copied.param_groups[0]["params"]])
        del optimizer, copied
    assert all(map(torch.equal, results[0], results[1]))
