"""What must be equal on all ranks is compared at the first step, and every so many under ``check_replicas``."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from sharded_radam.replicas import checksums
from tests.cases import assert_same
from tests.ranks import WORLD_SIZES, run

pytestmark = pytest.mark.quick

SEVERAL = [size for size in WORLD_SIZES if size > 1]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))


def backward(model: nn.Module) -> None:
    model(torch.ones(2, 7)).square().sum().backward()


def expect(model: nn.Module, optimizer: ShardedRAdam, message: str) -> None:
    """The step raises on this rank too, and has changed nothing."""
    params = [param.detach().clone() for param in model.parameters()]
    steps = [float(optimizer.state[param]["step"]) for param in model.parameters()]
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same(model.parameters(), params)
    assert [float(optimizer.state[param]["step"]) for param in model.parameters()] == steps


def other_seed(rank: int, last: int) -> None:
    model = net(seed=7 * (rank == last))
    optimizer = ShardedRAdam(model.named_parameters())
    backward(model)
    ours, theirs = (net(seed).get_parameter("0.weight")[0, 0].item() for seed in (0, 7))
    expect(model, optimizer, rf"parameter '0\.weight' at \(0, 0\) differs: {ours} on rank 0, {theirs} on rank {last}\.")


def one_element(rank: int, last: int) -> None:
    model = net()
    with torch.no_grad():
        for index in (1, 4):
            model.get_parameter("1.weight")[2, index] += 1.0 * (rank == last)
    optimizer = ShardedRAdam(model.named_parameters())
    backward(model)
    expect(model, optimizer, rf"parameter '1\.weight' at \(2, 1\) differs: .* on rank 0, .* on rank {last}\.")


def exchanged_parameters(rank: int, last: int) -> None:
    """Layers that were made in another order have the same sum."""
    first, second = torch.arange(6.0), torch.arange(6.0) + 1
    params = [Parameter(first), Parameter(second)] if rank != last else [Parameter(second), Parameter(first)]
    optimizer = ShardedRAdam(params)
    for param in params:
        param.grad = torch.ones(6)
    with pytest.raises(RuntimeError, match=r"parameter '0\.0' at \(0,\) differs: 0\.0 on rank 0, 1\.0 on rank"):
        optimizer.step()


def frozen_and_half(rank: int, last: int) -> None:
    """A frozen parameter lies in a bucket as well, and is overwritten."""
    model = net().bfloat16()
    model.get_parameter("0.bias").requires_grad_(False)
    with torch.no_grad():
        model.get_parameter("0.bias")[3] = 2.0 + (rank == last)
    optimizer = ShardedRAdam(model.named_parameters())
    model(torch.ones(2, 7).bfloat16()).sum().backward()
    expect(model, optimizer, r"parameter '0\.bias' at \(3,\) differs: 2\.0 on rank 0, 3\.0 on rank")


def other_lr(rank: int, last: int) -> None:
    model = net()
    optimizer = ShardedRAdam(model.named_parameters(), lr=0.5 if rank == last else 0.1)
    backward(model)
    expect(model, optimizer, rf"lr of param group 0 differs: 0\.1 on rank 0, 0\.5 on rank {last}\.")


def loaded_another_file_on_rank_0(rank: int, last: int) -> None:
    model = net()
    optimizer = ShardedRAdam(model.named_parameters())
    for _ in range(3):
        backward(model)
        optimizer.step()
    file = io.BytesIO()
    saved = optimizer.consolidate_state_dict()
    if rank == 0:
        torch.save(saved, file)
    optimizer = ShardedRAdam(model.named_parameters())
    fresh = torch.optim.RAdam(model.named_parameters()).state_dict()
    optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True) if rank == 0 else fresh)
    backward(model)
    others = ", ".join(map(str, range(1, last + 1)))
    expect(model, optimizer, rf"the step count of '0\.weight' differs: 3\.0 on rank 0, 0\.0 on ranks? {others}\.")


def experts_that_ddp_ignores(rank: int, last: int) -> None:
    model = net(seed=rank)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(  # type: ignore[no-untyped-call]
        model, ["1.weight", "1.bias"]
    )
    wrapped = DistributedDataParallel(model)
    optimizer = ShardedRAdam(wrapped.named_parameters())
    wrapped(torch.ones(2, 7)).sum().backward()
    expect(model, optimizer, r"parameter 'module\.1\.weight' at \(0, 0\) differs")


CASES: tuple[Callable[[int, int], None], ...] = (
    *(other_seed, one_element, exchanged_parameters, frozen_and_half, other_lr, loaded_another_file_on_rank_0),
    experts_that_ddp_ignores,
)


def check_first_step(rank: int, world_size: int) -> None:
    for case in CASES:
        case(rank, world_size - 1)
        dist.barrier()


@pytest.mark.parametrize("world_size", [*SEVERAL, pytest.param(8, marks=pytest.mark.timeout(120))])
def test_the_first_step_finds_ranks_that_differ(world_size: int) -> None:
    run(check_first_step, world_size, timeout=110)


def check_later_steps(rank: int, world_size: int) -> None:
    for options in ({}, {"shard_gradients": True}, {"transport": "native"}, {"parameters_as_bucket_view": False}):
        model = net()
        optimizer = ShardedRAdam(model.named_parameters(), check_replicas=3, **options)
        counted: list[int] = []
        for step in range(5):
            optimizer.zero_grad()
            backward(model)
            before = optimizer.stats().collectives.get("all_reduce", 0)
            optimizer.step()
            counted.append(optimizer.stats().collectives.get("all_reduce", 0) - before)
            if step == 3:
                optimizer.param_groups[0]["lr"] *= 1 + (rank == 1)
        usual = counted[1]
        assert counted == [usual + 1, usual, usual, usual + 1, usual], options
        optimizer.step()
        expect(model, optimizer, "lr of param group 0 differs")
        with pytest.raises(RuntimeError, match="lr of param group 0 differs"):
            optimizer.check_replicas()
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()


@pytest.mark.parametrize("world_size", SEVERAL)
def test_every_third_step_finds_them(world_size: int) -> None:
    run(check_later_steps, world_size)


@contextmanager
def changed(tensor: Tensor, index: tuple[int, ...], by: float) -> Iterator[None]:
    before = tensor.detach()[index].item()
    tensor.detach()[index] += by
    yield
    tensor.detach()[index] = before


def check_saves(rank: int, world_size: int, folder: str, sharded: bool) -> list[str]:
    """What is said on this rank, of saves that differ on the last one."""
    last, said = rank == world_size - 1, []
    model = nn.ModuleDict({"g": net(), "d": nn.Conv2d(16, 50, 3)})
    model["d"].weight = Parameter(model["d"].get_parameter("weight").contiguous(memory_format=torch.channels_last))
    frozen = model["d"].get_parameter("bias").requires_grad_(False)
    g = ShardedRAdam(model["g"].named_parameters(), shard_gradients=sharded, lr=0.5)
    d = ShardedRAdam([model["d"].get_parameter("weight")], shard_gradients=sharded, foreach=True)
    manager = CheckpointManager(folder)

    def save() -> None:
        manager.save(1, model=model, optimizer={"g": g, "d": d}, blocking=False)

    def alone() -> None:
        g.save(f"{folder}/alone")

    def expect(action: Callable[[], None]) -> None:
        with pytest.raises(CheckpointError) as info:
            action()
        said.append(str(info.value))

    with changed(model["g"].get_parameter("1.weight"), (2, 1), last * 1.0):
        expect(save)
        expect(alone)
    with changed(model["d"].get_parameter("weight"), (49, 15, 2, 1), last * 1.0):
        expect(save)
    with changed(frozen, (7,), last * 1.0):
        expect(save)
    g.param_groups[0]["lr"] = 0.25 if last else 0.5
    expect(save)
    expect(alone)
    g.param_groups[0]["lr"] = 0.5
    g.param_groups[0]["mine"] = rank  # what one adds may differ, rank 0's counts
    counter = g.state[model["g"].get_parameter("0.bias")]
    counter["step"] = torch.tensor(3.0 * last)
    expect(save)
    counter["step"] = torch.tensor(0.0)
    assert not any(Path(folder).iterdir())
    dist.barrier()
    alone()
    save()
    manager.close()
    dist.barrier()
    assert sorted(path.name for path in Path(folder).iterdir()) == ["alone", "step_1"]
    return said


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "sharded"])
@pytest.mark.parametrize("world_size", SEVERAL)
def test_a_save_finds_ranks_that_differ(tmp_path: Path, world_size: int, sharded: bool) -> None:
    heard = run(check_saves, world_size, str(tmp_path), sharded)
    assert all(said == heard[0] for said in heard)
    weight, where = net().get_parameter("1.weight")[2, 1].item(), f"on rank {world_size - 1}."
    places = [f"saving {tmp_path}/{name}: " for name in ("step_1", "alone", "step_1", "step_1", "step_1", "alone")]
    begins = [
        *[f"parameter '{name}' at (2, 1) differs: {weight} on rank 0, " for name in ("g.1.weight", "1.weight")],
        "parameter 'd.weight' at (49, 15, 2, 1) differs: ",
        "parameter 'd.bias' at (7,) differs: ",
        "lr of param group 0 of optimizer.g differs: 0.5 on rank 0, 0.25 ",
        "lr of param group 0 differs: 0.5 on rank 0, 0.25 ",
        "the step count of 'g.0.bias' of optimizer.g differs: 0.0 on rank 0, 3.0 ",
    ]
    for text, place, begin in zip(heard[0], [*places, places[0]], begins, strict=True):
        assert text.startswith(place + begin), text
        assert where in text


def check_one_copy(rank: int, world_size: int, folder: str) -> None:
    model = net()
    optimizer = ShardedRAdam(model.named_parameters(), share_parameters=True)
    backward(model)
    optimizer.step()
    with mock.patch("sharded_radam.replicas._sum", side_effect=AssertionError("it has nothing to compare")):
        CheckpointManager(folder).save(1, model=model, optimizer=optimizer)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 + rank)
        with pytest.raises(CheckpointError, match=r"lr of param group 0 differs: 0\.1 on rank 0, 0\.2 on rank"):
            CheckpointManager(folder).save(2, model=model, optimizer=optimizer)


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_copy_of_the_parameters_is_not_compared(tmp_path: Path, world_size: int) -> None:
    run(check_one_copy, world_size, str(tmp_path))


def check_debug(rank: int, world_size: int) -> None:
    with mock.patch.dict("os.environ", {"TORCH_DISTRIBUTED_DEBUG": "INFO"}):
        assert ShardedRAdam(net().parameters())._shards.options.check_replicas == 100
    with mock.patch.dict("os.environ", {"TORCH_DISTRIBUTED_DEBUG": "OFF"}):
        assert ShardedRAdam(net().parameters())._shards.options.check_replicas == 0
    with pytest.raises(ValueError, match="check_replicas=-1: expected a number of steps, or 0"):
        ShardedRAdam(net().parameters(), check_replicas=-1)


@pytest.mark.parametrize("world_size", [1, 2])
def test_debugging_switches_it_on(world_size: int) -> None:
    run(check_debug, world_size)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str
)
def test_a_checksum_sees_each_element(dtype: torch.dtype) -> None:
    param = torch.randn(4, 3, 2).to(dtype)
    for like in (param, param.permute(2, 0, 1), param[:, ::2]):
        before: Any = checksums([like])
        for index in range(like.numel()):
            changed = like.clone()
            assert checksums([changed]) == before
            changed[torch.unravel_index(torch.tensor(index), like.shape)] += 1
            assert checksums([changed]) != before
    assert checksums([]).tolist() == []
    assert checksums([torch.ones(())]).tolist() == [0x3F800000]
