"""A rank opens the files that it needs, and a few of them at a time."""

from __future__ import annotations

import itertools
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from sharded_radam import CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.verification import verify
from tests.cases import noted_reads, set_grads
from tests.ranks import run

DESCRIPTORS = "/proc/self/fd"
pytestmark = pytest.mark.skipif(not os.path.isdir(DESCRIPTORS), reason="open files are counted in Linux's /proc")


@contextmanager
def few_descriptors() -> Iterator[None]:
    """At most 8 more than are open now: far below 64, and fewer than there are files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {*map(int, os.listdir(DESCRIPTORS))}
    free = itertools.islice((number for number in itertools.count() if number not in used), 8)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def training(width: int) -> tuple[nn.Module, ShardedRAdam]:
    torch.manual_seed(0)
    model = nn.Linear(width, 3)
    optimizer = ShardedRAdam(model.named_parameters(), bucket_cap_mb=1e-3, transport="gloo")
    set_grads(model.parameters(), 1)
    optimizer.step()
    return model, optimizer


def check_load(rank: int, world_size: int, folder: str) -> None:
    model, optimizer = training(1001)
    manager = CheckpointManager(folder, timeout=20)
    manager.save(1, model=model, optimizer=optimizer, data={"at": rank})
    wanted = [param.detach().clone() for param in model.parameters()]
    state = torch.get_rng_state()
    for param in model.parameters():
        param.detach().zero_()
    torch.manual_seed(rank)
    with few_descriptors():
        restored = manager.load(1, model=model, optimizer=optimizer)
        assert restored.data == {"at": rank}
        assert restored.data_of_ranks == tuple({"at": at} for at in range(world_size))
    assert torch.equal(torch.get_rng_state(), state)
    for param, value in zip(model.parameters(), wanted, strict=True):
        assert torch.equal(param, value)


def test_sixteen_ranks_with_few_descriptors(tmp_path: Path) -> None:
    """The model is cut over the files of all ranks."""
    run(check_load, 16, str(tmp_path))
    index = read_index(tmp_path / "step_1")
    assert len({box.extent.file for box in index.tensors["model.weight"].boxes}) == 16
    with few_descriptors():
        verify(index)


def check_opened(rank: int, world_size: int, folder: str) -> None:
    """At the world size of saving, one's own random state and position are all that is read beside the shards."""
    _, optimizer = training(40)
    manager = CheckpointManager(folder, timeout=20)
    manager.save(1, optimizer=optimizer, data=rank)
    with noted_reads() as read:
        restored = manager.load(1)
        index = read_index(Path(folder, "step_1"))
        assert {*read} == {index.objects[f"data.{rank}"], index.objects[f"rng.{rank}"]}
        read.clear()
        assert restored.data_of_ranks == tuple(range(world_size))
        assert read == [index.objects[f"data.{at}"] for at in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_what_other_ranks_saved_for_themselves_is_not_read(tmp_path: Path, world_size: int) -> None:
    run(check_opened, world_size, str(tmp_path))
