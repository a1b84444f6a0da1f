"""Ranks for tests: a few processes, started once, that run module-level functions as the ranks of a Gloo group."""

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
from multiprocessing.context import ForkServerProcess
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

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])
"""Makes processes that have torch imported, which takes seconds, and little else."""


class RankError(AssertionError):
    """A function failed on some ranks; the text has their tracebacks."""


def _join(store: str, rank: int, world_size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=dt.timedelta(seconds=30),
    )
    torch.manual_seed(0)


def _serve(connection: Connection) -> None:
    while True:
        try:
            function, args, rank, world_size, store = connection.recv()
        except EOFError:
            return
        try:
            _join(store, rank, world_size)
            answer = ("ok", function(rank, world_size, *args))
        except BaseException:
            answer = ("error", traceback.format_exc())
        finally:
            if VERSION < (2, 8):
                time.sleep(0.05)  # Gloo of torch 2.6 hangs if a thread of its own has yet to free a tensor
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send(answer)


_workers: list[tuple[ForkServerProcess, Connection]] = []


def _ensure(world_size: int) -> None:
    while len(_workers) < world_size:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
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


def run(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = _TIMEOUT_S) -> list[Any]:
    """Results of ``function(rank, world_size, *args)`` on each rank.

    Raises:
        RankError: it failed, or did not end in time, on some rank.
    """
    _ensure(world_size)
    with tempfile.TemporaryDirectory() as folder:
        for rank, (_, connection) in enumerate(_workers[:world_size]):
            connection.send((function, args, rank, world_size, str(Path(folder) / "store")))
        results, errors = [], []
        for rank, (process, connection) in enumerate(_workers[:world_size]):
            if not connection.poll(timeout):
                errors.append(f"rank {rank} did not end in {timeout} s (alive: {process.is_alive()})")
                continue
            kind, value = connection.recv()
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
        _join(f"{folder}/store", rank, world_size)
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
