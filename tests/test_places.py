"""Where an optimizer is built, stepped and saved: meshes, groups that are gone, modes, modules of other kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim.swa_utils import AveragedModel

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from tests.cases import assert_same
from tests.ranks import WORLD_SIZES, run

SEVERAL = [size for size in WORLD_SIZES if size > 1]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 3) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(torch.ones(4, 10)).square().sum().backward()
        optimizer.step()


def expected(num_steps: int = 3) -> list[torch.Tensor]:
    model = net()
    train(model, torch.optim.RAdam(model.parameters(), foreach=False), num_steps)
    return [param.detach() for param in model.parameters()]


def expect(model: nn.Module, num_steps: int, sums_of_ranks: int = 1) -> None:
    """RAdam's values: to the bit, or but for the rounding of sums where gradients are sums over ranks, by thirds."""
    ours = [param.detach() for param in model.parameters()]
    if sums_of_ranks in (1, 2):
        assert_same(ours, expected(num_steps))
    else:
        torch.testing.assert_close(ours, expected(num_steps))


def refusal(action: Callable[[], object]) -> tuple[str, str]:
    try:
        action()
    except (RuntimeError, ValueError, TypeError) as error:
        return type(error).__name__, str(error)
    raise AssertionError("it worked")


# Meshes


def check_mesh(rank: int, world_size: int, folder: str) -> list[tuple[str, str]]:
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("dp",))
    model = net()
    group: Any = mesh
    optimizer = ShardedRAdam(model.named_parameters(), process_group=group, foreach=False, fused=False)
    assert optimizer.process_group is mesh.get_group()
    train(model, optimizer)
    assert_same([param.detach() for param in model.parameters()], expected())
    CheckpointManager(folder, process_group=group).save(1, model=model, optimizer=optimizer)
    assert CheckpointManager(folder, process_group=group).load_latest(model=model, optimizer=optimizer)
    group = init_device_mesh("cpu", (world_size, 1), mesh_dim_names=("tp", "replicas"))
    ShardedRAdam(net().parameters(), process_group=group["replicas"])
    # All ranks of it save, as with mesh=.
    assert CheckpointManager(folder, process_group=group).load_latest(model=model, optimizer=optimizer)
    return [
        refusal(lambda: ShardedRAdam(net().parameters(), process_group=group)),
        refusal(lambda: ShardedRAdam(net().parameters(), process_group=[*range(world_size)])),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_mesh_as_process_group(tmp_path: Path, world_size: int) -> None:
    heard = run(check_mesh, world_size, str(tmp_path))
    assert all(said == heard[0] for said in heard)
    (kind, mesh), (other, ranks) = heard[0]
    assert (kind, other) == ("ValueError", "TypeError")
    assert "has 2 dimensions" in mesh
    assert mesh.endswith(
        "such as mesh['replicas'], or mesh.get_group('replicas'); or, as mesh=, two of them: (replicate, shard)"
    )
    assert "expected a torch.distributed.ProcessGroup" in ranks


# Groups that are gone


def check_destroyed(rank: int, world_size: int, folder: str, renews: bool) -> list[tuple[str, str]]:
    model = net()
    optimizer = ShardedRAdam(model.named_parameters())
    manager = CheckpointManager(f"{folder}/manager")
    train(model, optimizer)
    dist.barrier()
    dist.destroy_process_group()
    if renews:
        store: Any = dist
        dist.init_process_group(
            "gloo", store=store.FileStore(f"{folder}/store", world_size), rank=rank, world_size=world_size
        )
        manager = CheckpointManager(f"{folder}/manager")
    if world_size == 1:
        optimizer.save(f"{folder}/alone")
        manager.save(1, model=model, optimizer=optimizer)
        return []
    return [
        refusal(lambda: optimizer.save(f"{folder}/alone")),
        refusal(lambda: optimizer.load(f"{folder}/alone")),
        refusal(lambda: CheckpointManager(f"{folder}/new").save(1, optimizer=optimizer)),
        *([refusal(lambda: manager.save(1, model=model, optimizer=optimizer))] if renews else []),
    ]


@pytest.mark.parametrize("renews", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_saving_after_the_group_was_destroyed(tmp_path: Path, world_size: int, renews: bool) -> None:
    heard = run(check_destroyed, world_size, str(tmp_path), renews)
    assert all(said == heard[0] for said in heard)
    for kind, text in heard[0]:
        assert kind in ("RuntimeError", CheckpointError.__name__)
        assert f"the process group has been destroyed, of whose {world_size} ranks each holds its part" in text
        assert "save before destroy_process_group(); with a new process group, build the optimizer" in text
    assert not list(tmp_path.glob("**/*.distcp")) or world_size == 1


# Modules of other kinds


def check_lazy(rank: int, world_size: int) -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    for options in ({}, {"shard_gradients": True}):
        kind, text = refusal(lambda options=options: ShardedRAdam(model.named_parameters(), **options))  # type: ignore[misc]
        assert kind == "ValueError"
        assert "parameter '0.weight' has no shape yet" in text
        assert "Run one, on every rank, and then build the optimizer" in text
    model(torch.ones(2, 5))
    model(torch.ones(2, 5)).sum().backward()
    ShardedRAdam(model.named_parameters(), share_parameters=world_size > 1).step()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_lazy_modules_need_a_forward_first(world_size: int) -> None:
    run(check_lazy, world_size)


def check_fsdp1(rank: int, world_size: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for use_orig_params in (False, True):
        model = FullyShardedDataParallel(net(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        kind, text = refusal(lambda model=model: ShardedRAdam(model.named_parameters()))  # type: ignore[misc]
        assert kind == "ValueError"
        assert "is FullyShardedDataParallel's, which has other elements of it on each rank" in text


@pytest.mark.parametrize("world_size", SEVERAL)
def test_parameters_of_fsdp1_are_refused(world_size: int) -> None:
    run(check_fsdp1, world_size)


# Modes


def check_modes(rank: int, world_size: int, mode: Callable[[], Any]) -> None:
    for shard_gradients in (False, True):
        model = net()
        optimizer = ShardedRAdam(model.named_parameters(), shard_gradients=shard_gradients, foreach=False, fused=False)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 10)).square().sum().backward()
            with mode():
                optimizer.step()
        heard: list[Any] = [copy.deepcopy(optimizer.consolidate_state_dict())]
        dist.broadcast_object_list(heard)
        weights = dict(zip(model.state_dict(), expected(2), strict=True))
        train(model, optimizer, 1)
        with mode():
            model.load_state_dict({name: param + 0 for name, param in weights.items()})
            optimizer.load_state_dict(heard[0])
        train(model, optimizer, 2)
        expect(model, 4, world_size if shard_gradients else 1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stepping_and_loading_in_a_mode(world_size: int, mode: Callable[[], Any]) -> None:
    run(check_modes, world_size, mode)


# Weights that are exchanged for an evaluation


def exchange_data(one: nn.Module, other: nn.Module) -> None:
    for param, of_other in zip(one.parameters(), other.parameters(), strict=True):
        param.data, of_other.data = of_other.data, param.data


def exchange_tensors(one: nn.Module, other: nn.Module) -> None:
    for param, of_other in zip(one.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(param, of_other)  # type: ignore[no-untyped-call]


def exchange_in_place(one: nn.Module, other: nn.Module) -> None:
    """All ranks write the same into one copy; nobody may read what another one has written already."""
    before = [param.detach().clone() for param in one.parameters()]
    dist.barrier()
    with torch.no_grad():
        for param, of_other, old in zip(one.parameters(), other.parameters(), before, strict=True):
            param.copy_(of_other)
            of_other.copy_(old)
    dist.barrier()


def check_exchange(rank: int, world_size: int, options: dict[str, Any]) -> None:
    ranks = world_size if "shard_gradients" in options else 1
    for exchange in (exchange_data, exchange_tensors, exchange_in_place):
        model = net()
        optimizer = ShardedRAdam(model.named_parameters(), foreach=False, fused=False, **options)
        average = AveragedModel(model)
        mean = [torch.zeros_like(param.detach()) for param in model.parameters()]
        for step in range(3):
            train(model, optimizer, 1)
            average.update_parameters(model)
            now = [param.detach() for param in model.parameters()]
            mean = [old + (new - old) / (step + 1) for old, new in zip(mean, now, strict=True)]
        if exchange is exchange_tensors and "shard_gradients" in options:
            # torch refuses it at the first parameter: that one is known by its identity.
            assert "Cannot swap t1" in refusal(lambda one=model, other=average.module: exchange_tensors(one, other))[1]  # type: ignore[misc]
            continue
        exchange(model, average.module)
        torch.testing.assert_close([param.detach() for param in model.parameters()], mean)
        dist.barrier()
        exchange(model, average.module)
        expect(model, 3, ranks)
        train(model, optimizer, 1)
        expect(model, 4, ranks)


@pytest.mark.parametrize(
    "options",
    [{}, {"share_parameters": True}, {"shard_gradients": True}, {"share_parameters": True, "shard_gradients": True}],
    ids=lambda options: "+".join(options) or "DDP",
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_weights_that_are_exchanged_for_an_evaluation(world_size: int, options: dict[str, Any]) -> None:
    run(check_exchange, world_size, options)


# Values


def check_default_dtype(rank: int, world_size: int, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model, other = net().float(), net().float()
        optimizer = ShardedRAdam(model.parameters(), foreach=False, fused=False)
        theirs = torch.optim.RAdam(other.parameters(), foreach=False)
        for step in range(7):
            for param in [*model.parameters(), *other.parameters()]:
                param.grad = torch.full_like(param, 0.1 * step)
            optimizer.step()
            theirs.step()
        assert_same([param.detach() for param in model.parameters()], [param.detach() for param in other.parameters()])
        found = optimizer.consolidate_state_dict()
        if found is not None:
            for state, of_theirs in zip(found["state"].values(), theirs.state_dict()["state"].values(), strict=True):
                assert_same(state.values(), of_theirs.values())
                assert [tensor.dtype for tensor in state.values()] == [tensor.dtype for tensor in of_theirs.values()]
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_another_default_dtype(world_size: int, dtype: torch.dtype) -> None:
    run(check_default_dtype, world_size, dtype)


CLIPPED: tuple[tuple[torch.dtype, ...], ...] = (
    *((dtype,) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)),
    (torch.float32, torch.bfloat16, torch.float64),
)


def check_clip(rank: int, world_size: int) -> None:
    """Of gradients that are whole, the norm and what follows from it are torch's to the bit."""
    generator = torch.Generator().manual_seed(1)
    for dtypes in CLIPPED:
        params, others = (
            [nn.Parameter(torch.ones(7, 3 + i, dtype=dtypes[i % len(dtypes)])) for i in range(5)] for _ in range(2)
        )
        groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
        optimizer = ShardedRAdam(groups)
        for norm_type in (1.0, 2.0, 3.0, float("inf")):
            for max_norm in (1.0, 1e4):
                for param, other in zip(params, others, strict=True):
                    param.grad = torch.randn(param.shape, generator=generator).to(param.dtype) * 10
                    other.grad = param.grad.clone()
                norm = optimizer.clip_grad_norm_(max_norm, norm_type)
                theirs = nn.utils.clip_grad_norm_(others, max_norm, norm_type)
                assert (norm.dtype, norm.item()) == (theirs.dtype, theirs.item()), (dtypes, norm_type)
                assert_same([p.grad for p in params], [p.grad for p in others], (dtypes, norm_type))  # type: ignore[misc]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_clipping_of_whole_gradients_is_torchs(world_size: int) -> None:
    run(check_clip, world_size)


def check_found_inf(rank: int, world_size: int, shard_gradients: bool) -> None:
    """What torch's GradScaler sets on a fused optimizer: a step is skipped where it found inf."""
    model = net()
    optimizer: Any = ShardedRAdam(model.named_parameters(), fused=True, shard_gradients=shard_gradients)
    train(model, optimizer, 1)
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.found_inf = torch.tensor(1.0)
    train(model, optimizer, 1)
    assert_same([param.detach() for param in model.parameters()], before)
    optimizer.found_inf = torch.tensor(0.0)
    train(model, optimizer, 2)
    assert all(float(optimizer.state[param]["step"]) == 3 for param in model.parameters())
    torch.testing.assert_close([param.detach() for param in model.parameters()], expected())


@pytest.mark.parametrize("shard_gradients", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_found_inf_with_fused(world_size: int, shard_gradients: bool) -> None:
    run(check_found_inf, world_size, shard_gradients)
