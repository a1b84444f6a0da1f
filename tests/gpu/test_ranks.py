"""Several ranks: NCCL, which shares the one GPU among them, and Gloo with tensors that are there."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import GradScaler, ShardedRAdam
from tests.cases import STEPS, assert_same, missing_at
from tests.gpu.device import DTYPES, GROUPS, SMALL, assert_near, give_grads, params_and_reference
from tests.gpu.training import inputs, make_model
from tests.ranks import DEVICE, run, several_ranks_on_one_gpu
from tests.sides import Side, compare

FOREACH: tuple[dict[str, Any], ...] = ({"foreach": True},)
OURS: dict[str, Any] = {"transport": "native", "bucket_cap_mb": SMALL}


def check_parity(_rank: int, _world_size: int, shards: bool) -> None:
    for dtype in DTYPES:
        for flags in (*FOREACH, {"fused": True}) if dtype in (torch.float32, torch.bfloat16) else FOREACH:
            ours, theirs = params_and_reference(dtype)
            sharded = ShardedRAdam(ours, shard_gradients=shards, weight_decay=0.1, **OURS, **flags)
            assert sharded._shards.transport.name == "native"
            radam = torch.optim.RAdam(theirs, foreach=True, weight_decay=0.1)
            for step in range(1, STEPS + 1):
                sharded.zero_grad()
                give_grads(ours, theirs, step, missing_at(step))
                sharded.step()
                radam.step()
            if "foreach" in flags:
                assert_same(ours, [param.to(dtype) for param in theirs], dtype)
            elif dtype.itemsize >= 4:
                assert_near(ours, theirs, 4, dtype)
            else:
                assert_near(ours, [param.to(dtype) for param in theirs], 1, dtype)
            saved = sharded.consolidate_state_dict(to=0)
            if saved is not None:
                check_saved(saved, radam.state_dict(), dtype)


def check_saved(ours: dict[str, Any], theirs: dict[str, Any], what: object) -> None:
    for index, state in theirs["state"].items():
        for kind, value in state.items():
            one, other = ours["state"][index][kind], value.cpu()
            torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-4, atol=1e-5, msg=f"{what} {index} {kind}")


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(("backend", "world_size"), GROUPS)
def test_parity(backend: str, world_size: int, shards: bool) -> None:
    run(check_parity, world_size, shards, backend=backend)


def sides(**options: Any) -> tuple[Side, Side]:
    """Ours with sharded gradients, and RAdam."""
    return Side(partial(ShardedRAdam, shard_gradients=True, **OURS, **options), DEVICE), Side(torch.optim.RAdam, DEVICE)


def check_accumulation(_rank: int, _world_size: int) -> None:
    ours, theirs = sides()
    for step in range(8):
        ours.optimizer.zero_grad()
        theirs.optimizer.zero_grad()
        with ours.optimizer.no_sync():
            ours.loss(2 * step).backward()  # type: ignore[no-untyped-call]
        ours.loss(2 * step + 1).backward()  # type: ignore[no-untyped-call]
        for part in (2 * step, 2 * step + 1):
            theirs.loss(part).backward()  # type: ignore[no-untyped-call]
        ours.optimizer.step()
        theirs.optimizer.step()
        compare(ours, theirs, step)


def check_clipping(_rank: int, _world_size: int) -> None:
    ours, theirs = sides()
    for step, norm_type in enumerate((2.0, 1.0, float("inf"), 2.0, 2.0, 2.0, 3.0)):
        ours.backward(step)
        theirs.backward(step)
        norm = ours.optimizer.clip_grad_norm_(1.0, norm_type)
        expected = nn.utils.clip_grad_norm_(theirs.params, 1.0, norm_type)
        torch.testing.assert_close(norm.float(), expected)
        ours.optimizer.step()
        theirs.optimizer.step()
        assert_near(ours.params, theirs.params, 8, step)


def check_scaling(rank: int, world_size: int) -> None:
    """In two steps the last rank has a few infinite gradients: all skip these, and lower the scale."""
    options: dict[str, Any] = {"init_scale": 2.0**10, "growth_interval": 3}
    ours, theirs = sides()
    scalers = GradScaler(DEVICE.type, **options), torch.amp.GradScaler(DEVICE.type, **options)
    for step in range(9):
        for side, scaler in zip((ours, theirs), scalers, strict=True):
            side.optimizer.zero_grad()
            loss = scaler.scale(side.loss(step))
            if step in (4, 5) and (side is theirs or rank == world_size - 1):
                loss = loss + float("inf") * side.params[1].sum()  # which one rank owns
            loss.backward()  # type: ignore[no-untyped-call]
            if step % 2:
                scaler.unscale_(side.optimizer)
            scaler.step(side.optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale(), step
        compare(ours, theirs, step)
    assert int(ours.optimizer.state[ours.params[0]]["step"]) == 7


def check_ddp(rank: int, _world_size: int) -> None:
    """In the place of RAdam under DistributedDataParallel; times of phases are there, too."""
    results: list[list[Tensor]] = []
    for build in (torch.optim.RAdam, partial(ShardedRAdam, bucket_cap_mb=SMALL)):
        model = DistributedDataParallel(make_model())
        optimizer = build(model.parameters(), lr=0.05, foreach=True)
        if isinstance(optimizer, ShardedRAdam):
            optimizer.time_phases()
        for step in range(7):
            optimizer.zero_grad()
            model(inputs(rank, step)).sum().backward()
            optimizer.step()
        results.append([param.detach().clone() for param in model.parameters()])
    assert_same(*results)
    assert isinstance(optimizer, ShardedRAdam)
    assert {"update", "all_gather"} <= optimizer.stats().milliseconds.keys()


CHECKS = (check_accumulation, check_clipping, check_scaling, check_ddp)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(("backend", "world_size"), GROUPS)
def test_training(backend: str, world_size: int, check: Any) -> None:
    run(check, world_size, backend=backend)


def test_which_way_ranks_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The official switch of NCCL 2.30, or a host of its own for each rank."""
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE", raising=False)
    assert several_ranks_on_one_gpu(1, (2, 30, 3))["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
    older = [several_ranks_on_one_gpu(rank, (2, 28, 9)) for rank in range(2)]
    assert older[0]["NCCL_HOSTID"] != older[1]["NCCL_HOSTID"]
    assert {older[0][name] for name in ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")} == {"1"}
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "0")
    assert several_ranks_on_one_gpu(0, (2, 30, 3)) == older[0]
