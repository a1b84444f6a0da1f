"""Gradients on their way: what is summed, in which order, in which memory; and the signals between ranks."""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from sharded_radam.transport import make_transport
from sharded_radam.transport import sockets as signals
from sharded_radam.transport.reducers import CHUNK_NUMEL, sum_
from sharded_radam.transport.shared_memory import SLOTS, SharedMemoryTransport
from tests.cases import num_descriptors
from tests.ranks import WORLD_SIZES, RankError, run

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def values(rank: int, bucket: int, numel: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(100 * bucket + rank)
    return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)


def mean(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """In the order of the ranks, in ``dtype``; half precision divided last."""
    first = 1 if parts[0].dtype != dtype else len(parts)
    total = parts[0].to(dtype) / first
    for part in parts[1:]:
        total = total + part.to(dtype) / first
    return total / (len(parts) // first)


def check_reducers(rank: int, world_size: int) -> None:
    sizes = [64 * world_size * n for n in (3, 1, 7, 2, 2, 5, 4, 1, 3 * CHUNK_NUMEL // 64 // world_size + 1)]
    for name in ("gloo", "native", "shared_memory"):
        network = make_transport(None, CPU, name)
        for dtype in DTYPES:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            reducer = network.reducer([(max(sizes), dtype)])
            for accumulate in (False, True):
                outs = [torch.full((numel // world_size,), 2.0, dtype=wide) for numel in sizes]
                for bucket, numel in enumerate(sizes):
                    memory = reducer.open(numel, dtype)
                    reducer.fill([memory], [values(rank, bucket, numel, dtype)])
                    reducer.close(outs[bucket], accumulate, bucket)
                    if bucket == 4:
                        reducer.finish()
                reducer.finish()
                reducer.finish()
                for bucket, numel in enumerate(sizes):
                    parts = [values(r, bucket, numel, dtype).chunk(world_size)[rank] for r in range(world_size)]
                    wanted = mean(parts, wide) + (2.0 if accumulate else 0.0)
                    if name == "native" and world_size > 2 and dtype == wide:  # in the backend's order
                        torch.testing.assert_close(outs[bucket], wanted)
                    else:
                        assert torch.equal(outs[bucket], wanted), (name, dtype, accumulate, bucket)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_means_are_summed_in_the_order_of_ranks(world_size: int) -> None:
    run(check_reducers, world_size)


def test_sum_of_parts() -> None:
    parts = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    out = torch.zeros(1)
    sum_(out, parts, accumulate=False, divisor=3)
    assert out.item() == 0.0  # (1e8 + 1) - 1e8 in fp32; another order gives 1/3
    sum_(out, [parts[0], parts[2], parts[1]], accumulate=True, divisor=3)
    assert out.item() == torch.tensor(1.0).div(3).item()


def check_bytes(rank: int, world_size: int) -> dict[str, int]:
    """The traffic of one reduced bucket."""
    counts: Counter[str] = Counter()
    isend, numel = dist.isend, 64 * world_size

    def counted(message: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts["isend"] += 1
        counts["bytes"] += message.nbytes
        return isend(message, *args, **kwargs)

    for name in ("gloo", "shared_memory"):
        reducer = make_transport(None, CPU, name).reducer([(numel, torch.float32)])
        counts.clear()
        with mock.patch.object(dist, "isend", counted):
            reducer.open(numel, torch.float32).fill_(1.0)
            reducer.close(torch.empty(64), False, 0)
            reducer.finish()
        wanted = {"isend": world_size - 1, "bytes": 64 * 4 * (world_size - 1)}
        assert counts == (wanted if name == "gloo" and world_size > 1 else {}), name
    return counts


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bytes_of_a_reduction(world_size: int) -> None:
    run(check_bytes, world_size)


def check_ring(rank: int, world_size: int) -> None:
    """Slow and fast ranks: nobody overwrites what another has yet to read."""
    network = make_transport(None, CPU, "shared_memory")
    reducer = network.reducer([(64 * world_size, torch.float32)])
    delays = torch.Generator().manual_seed(rank)
    outs = [torch.empty(64) for _ in range(40 * SLOTS)]
    for bucket, out in enumerate(outs):
        if torch.rand((), generator=delays) < 0.2:
            torch.ones(200_000).cumsum(0)
        reducer.fill([reducer.open(64 * world_size, torch.float32)], [torch.full((64 * world_size,), rank + bucket)])
        reducer.close(out, False, bucket % 256)
    reducer.finish()
    for bucket, out in enumerate(outs):
        assert torch.equal(out, torch.full((64,), bucket + (world_size - 1) / 2))


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_slots_are_used_again_when_all_have_read_them(world_size: int) -> None:
    run(check_ring, world_size)


def check_marks(rank: int, world_size: int) -> None:
    """Ranks that do not do the same learn of it, instead of adding up different buckets."""
    network = make_transport(None, CPU, "shared_memory")
    reducer = network.reducer([(64 * world_size, torch.float32)])

    def reduce() -> None:
        reducer.open(64 * world_size, torch.float32)
        reducer.close(torch.empty(64), False, 7 if rank == 0 else 8)
        reducer.finish()

    with pytest.raises(RuntimeError, match=r"rank \d is doing something else than rank \d|rank \d is gone"):
        reduce()


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_ranks_that_do_not_do_the_same(world_size: int) -> None:
    run(check_marks, world_size)


# The choice of shared memory


def check_fallback(rank: int, world_size: int) -> tuple[str, list[str]]:
    """One rank that cannot connect is enough for all to use Gloo, and rank 0 says so in one line."""
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("sharded_radam"), Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        for broken in ("bind", "connect", "host"):
            lines.clear()
            with pytest.MonkeyPatch.context() as patch:
                if rank == world_size - 1:
                    breaking(patch, broken)
                assert make_transport(None, CPU, None).name == "gloo"
                assert len(lines) == (rank == 0), lines
                with pytest.raises(ValueError, match=r"no shared memory between the ranks: .*one Linux host"):
                    make_transport(None, CPU, "shared_memory")
                with pytest.raises(ValueError, match="no shared memory between the ranks"):
                    ShardedRAdam([Parameter(torch.ones(3))], share_parameters=True)
        assert make_transport(None, CPU, None).name == "shared_memory"
    finally:
        logger.removeHandler(handler)
    return "", lines


def breaking(patch: pytest.MonkeyPatch, what: str) -> None:
    class Broken(socket.socket):
        def bind(self, address: Any) -> None:
            raise OSError("no such thing as bind")

    class Deaf(socket.socket):
        def connect(self, address: Any) -> None:
            raise OSError("nobody is there")

    if what == "host":
        patch.setattr(signals, "_host", lambda: ("another boot", 1, 0))
    else:
        patch.setattr(socket, "socket", Broken if what == "bind" else Deaf)


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_fallback_to_gloo(world_size: int) -> None:
    run(check_fallback, world_size)


def check_no_memory(rank: int, world_size: int) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    params = [Parameter(torch.ones(300)) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(RuntimeError, match=r"rank 0: no shared memory of \d+ bytes \(.*No space left"):
            ShardedRAdam(params)
    assert make_transport(None, CPU, None).name == "shared_memory"


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_no_memory_on_one_rank_is_an_error_on_all(world_size: int) -> None:
    run(check_no_memory, world_size)


def check_nothing_is_left(rank: int, world_size: int) -> int:
    """No files while the optimizer lives; no descriptors but the sockets, and none after."""
    gc.collect()  # what earlier tests left in this process has descriptors, too
    dist.barrier()
    shm = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    dist.barrier()
    before = -1
    while before != (now := num_descriptors()):  # Gloo closes those of earlier groups in a thread of its own
        before = now
        time.sleep(0.1)
    optimizer = ShardedRAdam([Parameter(torch.ones(1000)), Parameter(torch.ones(3).double())], shard_gradients=True)
    assert isinstance(optimizer._shards.transport, SharedMemoryTransport)
    held: int = num_descriptors() - before
    assert not Path("/dev/shm").is_dir() or set(os.listdir("/dev/shm")) <= shm
    dist.barrier()
    optimizer._shards.transport.signals.close()
    return held


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_nothing_has_a_name(world_size: int) -> None:
    for held in run(check_nothing_is_left, world_size):
        assert held == world_size - 1  # sockets; memory is mapped, and its descriptors are closed


def test_transports_are_checked() -> None:
    with pytest.raises(RankError, match="expected None or one of"):
        run(check_unknown, 2)


def check_unknown(rank: int, world_size: int) -> None:
    make_transport(None, CPU, "carrier pigeon")
