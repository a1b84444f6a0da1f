"""Saving: every rank writes its own file into an unfinished directory, rank 0 the index, then the directory is named.

Stages, each agreed on: all want to save the same thing to the same place, which is free; all see one directory; all
files are on the disk; committed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sharded_radam.checkpoint.directory as directory
from sharded_radam.checkpoint.agreement import Agreement, Peers, expect_same
from sharded_radam.checkpoint.contents import Staging, contents
from sharded_radam.checkpoint.errors import DamagedError
from sharded_radam.checkpoint.files import DataFile, DataFiles, Extent
from sharded_radam.checkpoint.index import MANIFEST, METADATA, write_index
from sharded_radam.checkpoint.metadata import Box, SavedTensor
from sharded_radam.checkpoint.verification import check_coverage

_SEEN_WITHIN_S = 10.0
"""Network file systems may show a new directory late."""


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save took on this rank: bytes, seconds in which the caller waited, seconds until it was committed."""

    path: Path
    num_bytes: int
    blocked_s: float
    write_s: float

    def __str__(self) -> str:
        rate = self.num_bytes / 1e6 / max(self.write_s, 1e-9)
        return (
            f"{self.path}: {self.num_bytes / 1e6:.1f} MB of this rank, {rate:.0f} MB/s; "
            f"training waited {self.blocked_s:.3f} s, committed after {self.write_s:.3f} s"
        )


@dataclass(frozen=True, slots=True)
class Saved:
    """What is to be saved: values that all ranks have, values of this rank only, and facts for the manifest.

    ``of_rank_0`` has the first keys of what may differ between ranks in ``nested``: rank 0's is saved.
    """

    nested: Mapping[str, Any]
    own: Mapping[str, Any]
    info: Mapping[str, Any]
    of_rank_0: Collection[tuple[str, ...]] = ()


class Save:
    """A save that all ranks have begun: ``write`` does it, on any thread.

    Args:
        final: where the checkpoint is to be.
        collect: gives what to save; see :func:`~sharded_radam.checkpoint.contents.contents`.
        peers: the ranks.
        timeout: see :class:`Agreement`.
        staging: where to copy what is written, if it may change as soon as this returns.

    Raises:
        CheckpointError: the ranks do not save the same thing to the same, free, shared place; nothing was written.
    """

    def __init__(
        self, final: Path, collect: Callable[[], Saved], peers: Peers, timeout: float, staging: Staging | None = None
    ) -> None:
        begin = time.perf_counter()
        self.final = Path(os.path.abspath(final))
        self._peers = peers
        self._agreement = Agreement(peers, f"saving {final}", timeout)
        self._info: dict[str, Any] = {"world_size": peers.world_size, "torch": torch.__version__, "time": time.time()}
        problem: Exception | None = None
        offer: dict[str, Any] = {}
        try:
            saved = collect()
            self._info |= saved.info
            self._contents = contents(saved.nested, saved.own, peers.rank, peers.world_size, saved.of_rank_0)
            offer = {**saved.info, "directory": str(self.final), "contents": self._contents.digest()}
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            problem = error
        self._unfinished = Path(self._agreement.decide(offer, problem, self._make_directory))
        try:
            self._agreement.decide(self._sees_directory(), decide=self._expect_seen)
            if staging is not None:
                self._contents = staging.copy(self._contents)
        except BaseException:
            self._give_up()
            raise
        self.blocked_s = time.perf_counter() - begin

    def _make_directory(self, offers: list[Any]) -> str:
        for what in offers[0]:
            expect_same([offer.get(what) for offer in offers], what)
        return str(directory.begin(self.final))

    def _sees_directory(self) -> bool:
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not self._unfinished.is_dir():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _expect_seen(self, seen: list[bool]) -> None:
        if blind := [rank for rank, sees in enumerate(seen) if not sees]:
            raise ValueError(
                f"rank {', '.join(map(str, blind))} does not see the directory that rank 0 made in "
                f"{self.final.parent}: it must be on a file system that all ranks share"
            )

    def write(self) -> SaveReport:
        """Write this rank's file and commit with the others.

        Raises:
            CheckpointError: on every rank, if one could not write; there is no checkpoint then, nor a part of one.
        """
        begin = time.perf_counter()
        problem: Exception | None = None
        written: list[Any] = []
        try:
            written = self._write_file()
        except (OSError, RuntimeError, ValueError) as error:
            problem = error
        num_bytes = sum(length for *_, length, _ in written)
        try:
            self._agreement.decide(written, problem, self._commit)
        except BaseException:
            self._give_up()
            raise
        return SaveReport(self.final, num_bytes, self.blocked_s, time.perf_counter() - begin)

    def _write_file(self) -> list[Any]:
        """Rows for rank 0: key, offsets, sizes (None for objects), start, length, CRC-32."""
        rows: list[Any] = []
        path = self._unfinished / f"__{self._peers.rank}_0.distcp"
        with DataFile(path) as file:
            for key, offsets, data in self._contents.parts:
                extent = file.add(data.cpu())
                rows.append((key, offsets, tuple(data.shape), *extent[1:]))
            objects = {key: file.add(value) for key, value in self._contents.objects.items()}
            rows += [(key, None, None, *extent[1:]) for key, extent in objects.items()]
        with DataFiles(self._unfinished) as files:
            for key, extent in objects.items():
                try:
                    files.load(extent, key)
                except DamagedError as error:  # not to be found out when it is needed
                    raise ValueError(f"what was saved could not be loaded: {error}") from error
        return rows

    def _commit(self, offers: list[Any]) -> None:
        boxes: dict[str, list[Box]] = {key: [] for key in self._contents.described}
        objects: dict[str, Extent] = {}
        for rank, rows in enumerate(offers):
            for key, offsets, sizes, start, length, crc32 in rows:
                extent = Extent(f"__{rank}_0.distcp", start, length, crc32)
                if offsets is None:
                    objects[key] = extent
                else:
                    boxes[key].append(Box(tuple(offsets), tuple(sizes), extent))
        for alias, original in self._contents.aliases.items():
            boxes[alias] = boxes[original]
        tensors = {
            key: SavedTensor(dtype, shape, tuple(boxes[key]))
            for key, (dtype, shape) in self._contents.described.items()
        }
        check_coverage(tensors)
        paths = {key: self._contents.paths.get(key, (key,)) for key in [*tensors, *objects]}
        write_index(self._unfinished, tensors, objects, paths, self._info)
        directory.fsync(self._unfinished / METADATA)
        directory.fsync(self._unfinished / MANIFEST)
        directory.commit(self._unfinished, self.final)

    def _give_up(self) -> None:
        if self._peers.rank == 0:
            shutil.rmtree(self._unfinished, ignore_errors=True)
