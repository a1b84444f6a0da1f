"""Ranks for tests: a few processes, started once, that run module-level functions as the ranks of a process group."""

from __future__ import annotations

import atexit
import datetime as dt
import importlib.util
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess, SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from sharded_radam.compat import VERSION

WORLD_SIZES: tuple[int, ...] = (1, 2, 3, 4)
_TIMEOUT_S = 120.0
"""Three times what the longest takes on a loaded machine."""

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cpu"))
"""Where the tests of tests/gpu compute, and their ranks: ``cpu`` or ``cuda``."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
"""Makes processes that have torch imported, which takes seconds, and little else."""


class RankError(AssertionError):
    """A function failed on some ranks; the text has their tracebacks."""


def several_ranks_on_one_gpu(rank: int, version: tuple[Any, ...]) -> dict[str, str]:
    """Variables by which NCCL of a version lets the ranks of a group share a GPU.

    From 2.30 on there is a switch for it. Before, ranks that seem to be on other hosts may; they meet by sockets.
    Each rank gets few blocks, since the kernels of all wait for each other.
    """
    shared = {"NCCL_MAX_CTAS": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
    if version >= (2, 30) and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "1") != "0":
        return {**shared, "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NET_GDR_LEVEL": "LOC"}
    return {**shared, "NCCL_HOSTID": f"rank{rank}", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}


def _join(store: str, rank: int, world_size: int, backend: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    options: dict[str, Any] = {}
    if DEVICE.type == "cuda":
        torch.cuda.set_device(0)
    if backend == "nccl":
        nccl: Any = torch.cuda.nccl
        for name, value in several_ranks_on_one_gpu(rank, nccl.version()).items():
            os.environ.setdefault(name, value)  # it reads them once; a process is always the same rank
        options["device_id"] = torch.device("cuda", 0)
    dist.init_process_group(
        backend,
        store=FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=dt.timedelta(seconds=30 if DEVICE.type == "cpu" else 60),
        **options,
    )
    torch.manual_seed(0)


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, args, rank, world_size, store, backend = connection.recv()
        except EOFError:
            return
        try:
            _join(store, rank, world_size, backend)
            answer = ("ok", function(rank, world_size, *args))
        except BaseException:
            answer = ("error", traceback.format_exc())
        finally:
            if VERSION < (2, 8):
                time.sleep(0.05)  # Gloo of torch 2.6 hangs if a thread of its own has yet to free a tensor
            if dist.is_initialized() and (backend == "gloo" or answer[0] == "ok"):  # NCCL would wait for the others
                dist.destroy_process_group()
        connection.send(answer)


_workers: list[tuple[ForkServerProcess | SpawnProcess, Connection]] = []


def _ensure(world_size: int) -> None:
    # CUDA cannot be used in a fork of a process that has asked for it, as importing torch's parts may do.
    context = CONTEXT if DEVICE.type == "cpu" else multiprocessing.get_context("spawn")
    while len(_workers) < world_size:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        _workers.append((process, ours))


@atexit.register
def stop() -> None:
    """End all ranks, also those that hang."""
    for process, connection in _workers:
        connection.close()
        process.kill()
        process.join()
    _workers.clear()


def run(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = _TIMEOUT_S, backend: str = "gloo"
) -> list[Any]:
    """Results of ``function(rank, world_size, *args)`` on each rank of a group with this backend.

    Raises:
        RankError: it failed, or did not end in time, on some rank.
    """
    _ensure(world_size)
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, connection) in enumerate(_workers[:world_size]):
            connection.send((function, args, rank, world_size, str(Path(folder) / "store"), backend))
        results, errors = [], []
        for rank, (process, connection) in enumerate(_workers[:world_size]):
            if not connection.poll(timeout):
                errors.append(f"rank {rank} did not end in {timeout} s (alive: {process.is_alive()})")
                continue
            try:
                kind, value = connection.recv()
            except EOFError:
                process.join()
                errors.append(f"rank {rank} has ended, with status {process.exitcode}")
                continue
            results.append(value)
            if kind == "error":
                errors.append(f"rank {rank}:\n{value}")
    if errors:
        stop()  # a rank may still be waiting for another
        if any("Numpy is not available" in error for error in errors) and importlib.util.find_spec("numpy") is None:
            pytest.skip("numpy is not installed, and torch's own collectives of objects need it")
        raise RankError("\n".join(errors))
    return results


# Ranks that may be killed


class End(NamedTuple):
    """How a process ended."""

    status: int
    """0; 1 if the function raised; minus the signal that killed it."""
    text: str
    """What it raised."""


def _end(function: Callable[..., object], rank: int, world_size: int, args: Sequence[object], folder: str) -> None:
    try:
        _join(f"{folder}/store", rank, world_size, "gloo")
        function(rank, world_size, *args)
    except BaseException as error:
        Path(folder, f"error{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)  # Gloo's destructors may wait for the dead


def ends(
    function: Callable[..., object], world_size: int, *calls: Sequence[object], timeout: float = _TIMEOUT_S
) -> list[list[End]]:
    """How the ranks end that run ``function(rank, world_size, *call)``, for each call; all of them at once.

    Each rank is a process of its own, started anew. A fork of one that has threads would hang or crash at times.
    """
    with tempfile.TemporaryDirectory() as folder:
        groups = []
        for number, call in enumerate(calls):
            place = Path(folder, str(number))
            place.mkdir()
            arguments = [(function, rank, world_size, call, str(place)) for rank in range(world_size)]
            groups.append((place, [CONTEXT.Process(target=_end, args=each) for each in arguments]))
        processes = [process for _, group in groups for process in group]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            late = [process.name for process in processes if process.exitcode is None]
            assert not late, f"not ended in {timeout} s: {late}"
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            [
                End(process.exitcode or 0, error.read_text() if (error := place / f"error{rank}").exists() else "")
                for rank, process in enumerate(group)
            ]
            for place, group in groups
        ]
