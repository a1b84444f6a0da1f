"""A new optimizer's moments are read straight into their place; and are zeros again if a load fails anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_radam import CheckpointError, CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint import optimizer as optimizer_part
from sharded_radam.checkpoint.format.index import read_index
from tests.cases import set_grads
from tests.ranks import WORLD_SIZES, run


def pair(dtype: torch.dtype) -> tuple[nn.Module, ShardedRAdam]:
    """Parameters above and below what is read directly, of which one is not contiguous."""
    torch.manual_seed(0)
    conv = nn.Conv2d(7, 60, 9)
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Linear(301, 257), conv, nn.Linear(5, 1))
    return model.to(dtype), ShardedRAdam(model.named_parameters(), bucket_cap_mb=1, foreach=True)


def state_of(optimizer: ShardedRAdam) -> list[Tensor]:
    found = []
    for flat in optimizer._shards.flats:
        found += [tensor.clone() for tensor in flat.state.values()]
    return [*found, *(state["step"].clone() for state in optimizer.state.values())]


def assert_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


class Schedule:
    """Can be loaded on all ranks but one."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def state_dict(self) -> dict[str, Any]:
        return {"at": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.fails:
            raise ValueError("not today")


def check(rank: int, world_size: int, folder: str, dtype: torch.dtype) -> None:
    model, optimizer = pair(dtype)
    for seed in range(2):
        set_grads(model.parameters(), seed)
        optimizer.step()
    manager = CheckpointManager(folder, timeout=20)
    manager.save(1, model=model, optimizer=optimizer, scheduler=Schedule(False))
    wanted = state_of(optimizer)

    new_model, new = pair(dtype)
    before = state_of(new)
    weights = [param.detach().clone() for param in new_model.parameters()]
    copied: list[int] = []
    original = optimizer_part._memory_for

    def noted(flat: Any) -> dict[str, Tensor]:
        found = original(flat)
        copied.append(sum(tensor.numel() for name, tensor in found.items() if tensor is not flat.state[name]))
        return found

    optimizer_part._memory_for = noted
    try:
        damage_last_chunk(rank, world_size, Path(folder))  # of the last rank's part
        with pytest.raises(CheckpointError, match=rf"rank {world_size - 1}: .*the file is damaged"):
            new.load(Path(folder, "damaged"), timeout=20)
        assert_bits(state_of(new), before)
        with pytest.raises(CheckpointError, match="not today"):
            manager.load(1, model=new_model, optimizer=new, scheduler=Schedule(rank == world_size - 1))
        assert_bits(state_of(new), before)
        assert_bits([param.detach() for param in new_model.parameters()], weights)
        masters = sum(flat.plan.local_numel for flat in new._shards.flats if flat.is_half)
        assert copied == [masters, masters]

        manager.load(1, model=new_model, optimizer=new)
        assert_bits(state_of(new), wanted)

        set_grads(new_model.parameters(), 7)
        new.step()  # moments that are not zero are left alone until all is there
        before = state_of(new)
        with pytest.raises(CheckpointError, match=rf"rank {world_size - 1}: .*the file is damaged"):
            new.load(Path(folder, "damaged"), timeout=20)
        assert_bits(state_of(new), before)
        new.load(Path(folder, "step_1"), timeout=20)
        assert_bits(state_of(new), wanted)
        assert copied[-1] == sum(tensor.numel() for flat in new._shards.flats for tensor in flat.state.values())
    finally:
        optimizer_part._memory_for = original

    _, other = pair(dtype)
    for flat in other._shards.flats:
        flat.state["exp_avg"].data.fill_(-0.0)  # which no counter of versions sees
    before = state_of(other)
    with pytest.raises(CheckpointError, match="the file is damaged"):
        other.load(Path(folder, "damaged"), timeout=20)
    assert_bits(state_of(other), before)


def damage_last_chunk(rank: int, world_size: int, folder: Path) -> None:
    """What the last rank reads last of its moments."""
    if rank == 0:
        shutil.copytree(folder / "step_1", folder / "damaged")
        index = read_index(folder / "damaged")
        file = f"__{world_size - 1}_0.distcp"
        boxes = [b for key, t in index.tensors.items() if key.endswith("exp_avg_sq") for b in t.boxes]
        last = max((box.extent for box in boxes if box.extent.file == file), key=lambda extent: extent.start)
        with (folder / "damaged" / file).open("r+b") as opened:
            opened.seek(last.start + last.length // 2)
            byte = opened.read(1)[0]
            opened.seek(last.start + last.length // 2)
            opened.write(bytes([byte ^ 1]))
    torch.distributed.barrier() if torch.distributed.is_initialized() else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_or_nothing(tmp_path: Path, world_size: int, dtype: torch.dtype) -> None:
    run(check, world_size, str(tmp_path), dtype)


def check_other_layout(rank: int, world_size: int, folder: str, save: bool) -> None:
    """Other cuts than those of the files: parts of chunks, each into its place."""
    model, optimizer = pair(torch.float32)
    set_grads(model.parameters(), 1)
    optimizer.step()
    if save:
        optimizer.save(folder)
        return
    _, new = pair(torch.float32)
    new.load(folder)
    assert_bits(state_of(new), state_of(optimizer))


def test_other_world_sizes(tmp_path: Path) -> None:
    run(check_other_layout, 3, str(tmp_path / "x"), True)
    for world_size in (1, 2, 8):
        run(check_other_layout, world_size, str(tmp_path / "x"), False)
