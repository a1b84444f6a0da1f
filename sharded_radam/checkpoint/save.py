"""Saving: every rank writes its own file into an unfinished directory, rank 0 the index, then the directory is named.

Stages, each agreed on: all want to save the same thing to the same place, which is free; all see one directory; all
files are on the disk; committed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

import sharded_radam.checkpoint.format.directory as directory
from sharded_radam.checkpoint.format.chunks import DataFile, Extent, encode
from sharded_radam.checkpoint.format.index import MANIFEST, METADATA, write_index
from sharded_radam.checkpoint.format.metadata import Box, SavedTensor
from sharded_radam.checkpoint.format.verification import check_coverage
from sharded_radam.checkpoint.parts import Staging, contents
from sharded_radam.replicas import NO_FACTS, Facts, fingerprint, first_difference
from sharded_radam.store.agreement import Agreement
from sharded_radam.store.offers import absolute, expect_same
from sharded_radam.store.peers import Peers

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

    ``notes`` are rank 0's facts for the manifest; ``replaces`` says there whether one that has the name is to be
    replaced. ``replicas`` must be equal on all ranks, which is checked.
    """

    nested: Mapping[str, Any]
    own: Mapping[str, Any]
    info: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)
    replaces: bool = False
    replicas: Facts = NO_FACTS


class Save:
    """A save that all ranks have begun: ``write`` does it, on any thread.

    Args:
        final: where the checkpoint is to be.
        collect: gives what to save; see :func:`~sharded_radam.checkpoint.parts.contents`.
        peers: the ranks.
        timeout: see :class:`Agreement`.
        staging: where to copy what is written, if it may change as soon as this returns.
        leftovers: whose unfinished checkpoints to remove in the folder of ``final``: a name, ``*`` for all; those of
            its own name if None.

    Raises:
        CheckpointError: the ranks do not save the same thing to the same, free, shared place, or one of them has what
            cannot be saved, or no memory for the copy; nothing was written.
    """

    def __init__(
        self,
        final: str | os.PathLike[str],
        collect: Callable[[], Saved],
        peers: Peers,
        timeout: float,
        staging: Staging | None = None,
        leftovers: str | None = None,
    ) -> None:
        begin = time.perf_counter()
        self._peers = peers
        self._leftovers = leftovers
        self._unfinished: Path | None = None
        self._hold: directory.Hold | None = None
        self._agreement = Agreement.begin(peers, f"saving {absolute(final)}", timeout)
        self._info: dict[str, Any] = {"world_size": peers.world_size, "torch": torch.__version__, "time": time.time()}
        try:
            self._begin(final, collect)
            self._get_ready(staging)
        except BaseException as error:
            self._give_up(error)
            raise
        self.blocked_s = time.perf_counter() - begin

    def _begin(self, final: str | os.PathLike[str], collect: Callable[[], Saved]) -> None:
        """Compare what is to be saved, and make the directory."""
        problem: Exception | None = None
        offer: dict[str, Any] = {}
        try:
            self.final = Path(os.path.abspath(final))
            saved = collect()
            self._info |= {**saved.info, **saved.notes}
            self._replaces = saved.replaces
            found = contents(saved.nested, saved.own, self._peers.rank, self._peers.world_size)
            self._chunks = {key: encode(value, key) for key, value in found.objects.items()}
            self._contents = replace(found, objects={})
            offer = {"contents": found.digest(), **saved.info}
            if self._peers.world_size > 1:
                digest, sums = fingerprint(saved.replicas)
                offer["replicas"] = digest.tolist()
        except Exception as error:
            problem = error
        unfinished = self._agreement.decide(offer, problem, self._make_directory)
        if unfinished is None:
            self._raise_difference(saved.replicas, sums)
        self._unfinished = Path(unfinished)

    def _raise_difference(self, here: Facts, sums: Tensor) -> NoReturn:
        """Collective: raise on all ranks what is not equal on them."""

        def gather(item: Any) -> list[Any]:
            return cast("list[Any]", self._agreement.decide(item, decide=lambda offers: offers))

        def fail(_: list[Any]) -> None:
            raise ValueError(text)

        text = first_difference(here, sums, gather)
        self._agreement.decide(None, decide=fail)
        raise AssertionError(text)

    def _make_directory(self, offers: list[Any]) -> str | None:
        expect_same([offer["contents"] for offer in offers], "contents")
        if any(offer.get("replicas") != offers[0].get("replicas") for offer in offers):
            return None
        for what in offers[0]:
            expect_same([offer.get(what) for offer in offers], what)
        self._unfinished = directory.begin(self.final, self._leftovers, self._replaces)
        self._hold = directory.Hold(self._unfinished)
        return str(self._unfinished)

    def _get_ready(self, staging: Staging | None) -> None:
        """See the directory on every rank, and copy what may change."""
        problem: Exception | None = None
        sees = False
        try:
            sees = self._sees_directory()
            self._inode = self._folder.stat().st_ino if sees else 0
            if staging is not None:
                self._contents = staging.copy(self._contents)
        except Exception as error:
            problem = error
        self._agreement.decide(sees, problem, self._expect_seen)

    def _sees_directory(self) -> bool:
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not self._folder.is_dir():
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
            try:
                written = self._write_file()
            except Exception as error:
                problem = error
            self._agreement.decide(written, problem, self._commit, self._settle)
        except BaseException as error:
            self._give_up(error)
            raise
        self._agreement.close()
        if self._hold is not None:
            self._hold.release()
        num_bytes = sum(length for *_, length, _ in written)
        return SaveReport(self.final, num_bytes, self.blocked_s, time.perf_counter() - begin)

    def _write_file(self) -> list[Any]:
        """Rows for rank 0: key, offsets, sizes (None for objects), start, length, CRC-32."""
        rows: list[Any] = []
        with DataFile(self._folder / f"__{self._peers.rank}_0.distcp") as file:
            for key, offsets, data in self._contents.parts:
                self._agreement.check()
                extent = file.add(data.cpu())
                rows.append((key, offsets, tuple(data.shape), *extent[1:]))
            for key, chunk in self._chunks.items():
                rows.append((key, None, None, *file.append(chunk)[1:]))
        return rows

    @property
    def _folder(self) -> Path:
        assert self._unfinished is not None
        return self._unfinished

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
        write_index(self._folder, tensors, objects, paths, self._info)
        directory.fsync(self._folder / METADATA)
        directory.fsync(self._folder / MANIFEST)
        with directory.set_aside(self.final) if self._replaces else nullcontext():
            directory.commit(self._folder, self.final)

    def _settle(self) -> bool:
        return not directory.withdraw(self._folder, self._inode, self.final)

    def _give_up(self, error: BaseException) -> None:
        """After the verdict, or to make it: no rank commits any more."""
        self._agreement.close(error)
        if self._unfinished is not None:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        if self._hold is not None:
            self._hold.release()
