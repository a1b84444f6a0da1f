"""A rank that is killed, wherever it is: the others raise, within the group's time-out, and nothing is left behind."""

from __future__ import annotations

import datetime as dt
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore

from sharded_radam import ShardedRAdam, step
from sharded_radam.store.meeting import _GRACE_S
from tests.ranks import CONTEXT

TIMEOUT_S = 10.0
AT_LAST_S = TIMEOUT_S + _GRACE_S + 5.0
"""For a rank that waits in vain, then asks the others what they know."""


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_here(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def in_backward(model: nn.Sequential, optimizer: ShardedRAdam, fatal: Callable[..., None]) -> None:
    model[0].register_full_backward_hook(fatal)


def in_step(model: nn.Sequential, optimizer: ShardedRAdam, fatal: Callable[..., None]) -> None:
    step.update_buckets = fatal  # type: ignore[attr-defined]


def in_gather(model: nn.Sequential, optimizer: ShardedRAdam, fatal: Callable[..., None]) -> None:
    """When some buckets of the own shard are out, or may be read, and before the others' have been read."""
    network, calls = optimizer._shards.transport, []

    def fatal_later(bucket: Tensor) -> Any:
        calls.append(bucket)
        return fatal() if len(calls) == 3 else type(network).all_gather(network, bucket)

    network.all_gather = fatal_later  # type: ignore[method-assign]


PLACES = {"backward": in_backward, "step": in_step, "gather": in_gather}


def train(rank: int, world_size: int, folder: str, options: dict[str, Any], place: str, fatal: Any) -> None:
    """Two steps; in the second, the last rank meets its end. The others write down how they learn of it."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=FileStore(f"{folder}/store", world_size),
        rank=rank,
        world_size=world_size,
        timeout=dt.timedelta(seconds=TIMEOUT_S),
    )
    model = nn.Sequential(nn.Linear(17, 257), nn.Tanh(), nn.Linear(257, 1))
    optimizer = ShardedRAdam(model.parameters(), bucket_cap_mb=1e-3, shard_gradients=True, **options)

    def iterate() -> None:
        model(torch.randn(4, 17, requires_grad=True)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    iterate()
    Path(folder, f"ready{rank}").touch()
    if rank == world_size - 1:
        PLACES[place](model, optimizer, fatal)
    begin = time.perf_counter()
    try:
        iterate()
    except RuntimeError as error:
        text = f"{time.perf_counter() - begin} {type(error).__name__} {error}"
    else:
        text = "0 nothing was raised"
    Path(folder, f"told{rank}").write_text(text)
    os._exit(0)  # Gloo's destructors may wait for the dead


def last_words(
    folder: Path, world_size: int, options: dict[str, Any], place: str, fatal: Any
) -> list[tuple[float, str]]:
    """For each rank that survives, after how many seconds it raised what."""
    arguments = (world_size, str(folder), options, place, fatal)
    ranks = [CONTEXT.Process(target=train, args=(rank, *arguments)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    try:
        for process in ranks[:-1]:
            process.join(40)
            assert process.exitcode == 0, (process, list(folder.iterdir()))
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert ranks[-1].exitcode == -signal.SIGKILL
    assert (folder / f"ready{world_size - 1}").exists()
    told = [(folder / f"told{rank}").read_text().split(" ", 1) for rank in range(world_size - 1)]
    return [(float(seconds), text) for seconds, text in told]


def check_gone(seconds: float, text: str, world_size: int) -> None:
    """Connections tell at once that a rank is gone, and the meeting which one; the sockets of shared memory both."""
    assert seconds < TIMEOUT_S, text
    assert text.startswith("RuntimeError step 2: "), text
    assert f"rank {world_size - 1} has ended: it was killed" in text or f"rank {world_size - 1} is gone" in text, text


def left_in_memory() -> set[str]:
    """Files in shared memory that are neither semaphores nor torch's, which other tests may have now."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in names if not name.startswith(("sem.", "torch_"))}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("transport", ["gloo", "native", "shared_memory"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_others_raise(tmp_path: Path, world_size: int, transport: str, place: str) -> None:
    before = left_in_memory()
    for seconds, text in last_words(tmp_path, world_size, {"transport": transport}, place, die):
        check_gone(seconds, text, world_size)
    assert left_in_memory() <= before


@pytest.mark.parametrize("place", PLACES)
def test_with_shared_parameters(tmp_path: Path, place: str) -> None:
    for seconds, text in last_words(tmp_path, 3, {"share_parameters": True}, place, die):
        check_gone(seconds, text, 3)


def test_a_rank_that_hangs(tmp_path: Path) -> None:
    """Stopped, not dead: noticed by the process group's time-out."""
    for seconds, text in last_words(tmp_path, 2, {}, "step", stop_here):
        assert "rank 1 did not come within the process group's time-out of 10 s" in text
        assert TIMEOUT_S - 1 < seconds < AT_LAST_S
