"""Saving: every rank writes its own file into an unfinished directory, rank 0 the index, then the directory is named.

Stages, each agreed on: all want to save the same thing to the same place, which is free; all see one directory; all
files are on the disk; committed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import sharded_radam.checkpoint.format.directory as directory
from sharded_radam.checkpoint.draft import Draft, Offer, ToSave, compare, make_draft
from sharded_radam.checkpoint.format.chunks import DataFile, Extent
from sharded_radam.checkpoint.format.index import MANIFEST, METADATA, write_index
from sharded_radam.checkpoint.format.metadata import SavedBox, SavedTensor
from sharded_radam.checkpoint.format.verification import check_coverage
from sharded_radam.checkpoint.staging import Staging
from sharded_radam.replicas import first_difference
from sharded_radam.store.agreement import Agreement
from sharded_radam.store.offers import absolute
from sharded_radam.store.peers import Peers

_SEEN_WITHIN_S = 10.0
"""Network file systems may show a new directory late."""

_LOOK_S = 0.05
"""Between two looks for it."""


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


class Save:
    """A save that all ranks have begun, by ``begin``; ``write`` does it, on any thread."""

    def __init__(self, draft: Draft, place: _Place, agreement: Agreement, rank: int, blocked_s: float) -> None:
        self._draft = draft
        self._place = place
        self._agreement = agreement
        self._rank = rank
        self.final = draft.final
        self.blocked_s = blocked_s

    @classmethod
    def begin(
        cls,
        final: str | os.PathLike[str],
        collect: Callable[[], ToSave],
        peers: Peers,
        timeout: float,
        staging: Staging | None = None,
        leftovers: str | None = None,
    ) -> Save:
        """Collective: agree on what is saved, make the directory, and copy what may change.

        Args:
            final: where the checkpoint is to be.
            collect: gives what to save, and raises if there is none; see
                :func:`~sharded_radam.checkpoint.parts.part_of_rank`.
            peers: the ranks.
            timeout: see :class:`Agreement`.
            staging: where to copy what is written, if it may change as soon as this returns.
            leftovers: whose unfinished checkpoints to remove in the folder of ``final``: a name, ``*`` for all; those
                of its own name if None.

        Raises:
            CheckpointError: the ranks do not save the same thing to the same, free, shared place, or one of them has
                what cannot be saved, or no memory for the copy; nothing was written.
        """
        began = time.perf_counter()
        agreement = Agreement.begin(peers, f"saving {absolute(final)}", timeout)
        place = _Place()
        try:
            draft = _agree(agreement, place, partial(make_draft, final, collect, peers, leftovers))
            draft = _get_ready(agreement, place, draft, staging)
        except BaseException as error:
            _give_up(agreement, place, error)
            raise
        return cls(draft, place, agreement, peers.rank, time.perf_counter() - began)

    def write(self) -> SaveReport:
        """Write this rank's file and commit with the others.

        Raises:
            CheckpointError: on every rank, if one could not write; there is no checkpoint then, nor a part of one.
        """
        began = time.perf_counter()
        problem: Exception | None = None
        written: list[Any] = []
        try:
            try:
                written = self._write_file()
            except Exception as error:
                problem = error
            self._agreement.decide(written, problem, self._commit, self._settle)
        except BaseException as error:
            _give_up(self._agreement, self._place, error)
            raise
        self._agreement.close()
        self._place.release()
        num_bytes = sum(length for *_, length, _ in written)
        return SaveReport(self.final, num_bytes, self.blocked_s, time.perf_counter() - began)

    def _write_file(self) -> list[Any]:
        """Rows for rank 0: key, offsets, sizes (None for objects), start, length, CRC-32."""
        rows: list[Any] = []
        with DataFile(self._place.folder / _data_file(self._rank)) as file:
            for key, offsets, data in self._draft.part.boxes:
                self._agreement.check()
                extent = file.add(data.cpu())
                rows.append((key, offsets, tuple(data.shape), *extent[1:]))
            for key, chunk in self._draft.chunks.items():
                rows.append((key, None, None, *file.append(chunk)[1:]))
        return rows

    def _commit(self, rows_of_ranks: list[Any]) -> None:
        """On rank 0, when all files are on the disk: write the index, and give the directory its name."""
        part, folder = self._draft.part, self._place.folder
        boxes: dict[str, list[SavedBox]] = {key: [] for key in part.described}
        objects: dict[str, Extent] = {}
        for rank, rows in enumerate(rows_of_ranks):
            for key, offsets, sizes, start, length, crc32 in rows:
                extent = Extent(_data_file(rank), start, length, crc32)
                if offsets is None:
                    objects[key] = extent
                else:
                    boxes[key].append(SavedBox(tuple(offsets), tuple(sizes), extent))
        for alias, original in part.aliases.items():
            boxes[alias] = boxes[original]
        tensors = {key: SavedTensor(dtype, shape, tuple(boxes[key])) for key, (dtype, shape) in part.described.items()}
        check_coverage(tensors)
        paths = {key: part.paths.get(key, (key,)) for key in [*tensors, *objects]}
        write_index(folder, tensors, objects, paths, self._draft.info)
        directory.fsync(folder / METADATA)
        directory.fsync(folder / MANIFEST)
        with directory.set_aside(self.final) if self._draft.replaces else nullcontext():
            directory.commit(folder, self.final)

    def _settle(self) -> bool:
        return not directory.withdraw(self._place.folder, self._place.inode, self.final)


def _data_file(rank: int) -> str:
    """As torch.distributed.checkpoint calls it."""
    return f"__{rank}_0.distcp"


class _Place:
    """The unfinished directory, as far as this rank knows it, and what rank 0 holds it by."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._hold: directory.Hold | None = None
        self.inode = 0

    @property
    def folder(self) -> Path:
        assert self._folder is not None
        return self._folder

    def make(self, final: Path, leftovers: str | None, replaces: bool) -> str:
        """On rank 0."""
        self._folder = directory.begin(final, leftovers, replaces)
        self._hold = directory.Hold(self._folder)
        return str(self._folder)

    def see(self, folder: str) -> None:
        """Where rank 0 has made it."""
        self._folder = Path(folder)

    def await_folder(self) -> bool:
        """Whether this rank sees it, after a while."""
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not self.folder.is_dir():
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S)
        self.inode = self.folder.stat().st_ino
        return True

    def remove(self) -> None:
        """After a failure: no rank commits any more."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self.release()

    def release(self) -> None:
        """Hold it no longer."""
        if self._hold is not None:
            self._hold.release()


def _agree(agreement: Agreement, place: _Place, make: Callable[[], tuple[Draft, Offer]]) -> Draft:
    """Compare what is to be saved, and make the directory."""
    problem: Exception | None = None
    draft, offer = None, None
    try:
        draft, offer = make()
    except Exception as error:
        problem = error

    def decide(offers: list[Any]) -> str | None:
        assert draft is not None
        return place.make(draft.final, draft.leftovers, draft.replaces) if compare(offers) else None

    folder = agreement.decide(offer and offer.values, problem, decide)
    assert draft is not None
    assert offer is not None
    if folder is None:
        _raise_difference(agreement, offer)
    place.see(folder)
    return draft


def _raise_difference(agreement: Agreement, offer: Offer) -> NoReturn:
    """Collective: raise on all ranks what is not equal on them."""

    def gather(item: Any) -> list[Any]:
        return cast("list[Any]", agreement.decide(item, decide=lambda offers: offers))

    def fail(_: list[Any]) -> None:
        raise ValueError(text)

    assert offer.sums is not None
    text = first_difference(offer.replicas, offer.sums, gather)
    agreement.decide(None, decide=fail)
    raise AssertionError(text)


def _get_ready(agreement: Agreement, place: _Place, draft: Draft, staging: Staging | None) -> Draft:
    """See the directory on every rank, and copy what may change."""
    problem: Exception | None = None
    sees = False
    try:
        sees = place.await_folder()
        if staging is not None:
            draft = replace(draft, part=staging.copy(draft.part))
    except Exception as error:
        problem = error
    agreement.decide(sees, problem, partial(_expect_seen, draft.final))
    return draft


def _expect_seen(final: Path, seen: list[bool]) -> None:
    if blind := [rank for rank, sees in enumerate(seen) if not sees]:
        raise ValueError(
            f"rank {', '.join(map(str, blind))} does not see the directory that rank 0 made in "
            f"{final.parent}: it must be on a file system that all ranks share"
        )


def _give_up(agreement: Agreement, place: _Place, error: BaseException) -> None:
    """After the verdict, or to make it."""
    agreement.close(error)
    place.remove()
