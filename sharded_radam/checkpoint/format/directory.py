"""Directories that are there whole, or not at all.

A checkpoint is written into ``.NAME.<random>.unfinished`` beside its final place, and renamed to NAME when all of it is
on the disk. What has the final name is committed; what has not is a leftover of a save that did not end. Where a
checkpoint is exchanged for another, the old one is called ``.NAME.<random>.replaced`` until the new one has its name.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import operator
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("sharded_radam")

_LOCK = ".lock"
_RANDOM_BYTES, _RANDOM = 4, "????????"
"""In names of what is not committed, and the pattern of these."""

_STEP = re.compile(r"step_(\d+)")
_PROTECTED = "protected"
"""A file in a checkpoint that nobody removes."""


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_if_possible(folder: Path) -> None:
    """Wait until the entries of a directory are on the disk, if it may be opened and its file system can do that."""
    try:
        fsync(folder)
    except OSError as error:
        logger.warning("the entries of %s may not be on the disk yet: %s", folder, error)


class Hold:
    """Says that the process that makes an unfinished checkpoint lives, by a lock that ends with it."""

    def __init__(self, unfinished: Path) -> None:
        self._file = (unfinished / _LOCK).open("w")
        with suppress(OSError):  # a file system without locks: leftovers cannot be told from what is being written
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def release(self) -> None:
        """End it."""
        self._file.close()


def _is_held(unfinished: Path) -> bool:
    try:
        with (unfinished / _LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks there
        return False
    return False


def begin(final: Path, leftovers: str | None = None, replaces: bool = False) -> Path:
    """Make the unfinished directory for a checkpoint; leftovers are removed: of the same name, or of another pattern.

    Args:
        final: where the checkpoint is to be.
        replaces: whether another one may be there, see :func:`set_aside`.

    Raises:
        ValueError: there is something of the final name, or another process is making it.
        OSError: as of mkdir.
    """
    if os.path.lexists(final) and not replaces:
        raise _exists(final)
    missing = [parent for parent in (final.parent, *final.parent.parents) if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        fsync_if_possible(parent.parent)
    if any(map(_is_held, _unfinished(final.parent, final.name))):
        raise ValueError(
            f"{final} is being saved by another process: save from one process group, or to another path each"
        )
    remove_leftovers(final.parent, leftovers or final.name)
    unfinished = _hidden(final)
    unfinished.mkdir()
    return unfinished


def _exists(final: Path) -> ValueError:
    return ValueError(
        f"{final} exists: checkpoints are never overwritten, since a crash would then leave neither the old nor "
        "the new one; save to another path, or remove it first"
    )


def _hidden(final: Path) -> Path:
    return final.parent / f".{final.name}.{secrets.token_hex(_RANDOM_BYTES)}.unfinished"


def _unfinished(folder: Path, name: str) -> list[Path]:
    """Unfinished checkpoints of a name, a pattern of glob's if it is ``*``; none where they cannot be listed."""
    pattern = name if name == "*" else glob.escape(name)
    with suppress(OSError):
        return [*folder.glob(f".{pattern}.{_RANDOM}.unfinished")]
    return []


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove unfinished checkpoints that nobody is making any more."""
    for leftover in _unfinished(folder, name):
        if not _is_held(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def commit(unfinished: Path, final: Path) -> None:
    """Give a checkpoint its final name; its files are on the disk already. What fails after that is no failure."""
    fsync(unfinished)
    try:
        os.rename(unfinished, final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _exists(final) from error
        raise
    with suppress(OSError):
        (final / _LOCK).unlink()
    fsync_if_possible(final.parent)


def withdraw(unfinished: Path, inode: int, final: Path) -> bool:
    """Make sure that a checkpoint is never committed, also by a process that may be about to; False if it has been.

    A rename succeeds once: this one, or that of ``commit``. ``inode`` is the directory's, which tells it from another
    checkpoint that it was to replace.
    """
    away = _hidden(final)
    try:
        os.rename(unfinished, away)
    except FileNotFoundError:
        return not final.is_dir() or final.stat().st_ino != inode
    shutil.rmtree(away, ignore_errors=True)
    return True


@contextmanager
def set_aside(final: Path) -> Iterator[None]:
    """Within it, ``final`` is free for another checkpoint; after an error the old one is there again."""
    aside = final.parent / f".{final.name}.{secrets.token_hex(_RANDOM_BYTES)}.replaced"
    os.rename(final, aside)
    try:
        yield
    except BaseException:
        if not os.path.lexists(final):
            os.rename(aside, final)
        raise
    with suppress(OSError):  # the new one is committed; the next save tries again
        _discard(aside, final)


def recover(folder: Path) -> None:
    """Give checkpoints their names back for which no other came; remove those for which one did."""
    for aside in folder.glob(f".*.{_RANDOM}.replaced"):
        final = folder / aside.name[1:].rsplit(".", 2)[0]
        if os.path.lexists(final):
            _discard(aside, final)
        else:
            os.rename(aside, final)
            fsync_if_possible(folder)


def step_path(folder: Path, step: object) -> Path:
    """Where a manager has the checkpoint of a step."""
    with suppress(TypeError):  # of what is no number there is none, and ``check_step`` says so
        step = operator.index(step)  # type: ignore[arg-type]
    return folder / f"step_{step}"


def check_step(step: object) -> int:
    """The number of a step.

    Raises:
        ValueError: it is no whole number from 0 on; whole are numpy's and torch's integers too.
    """
    with suppress(TypeError):
        if (number := operator.index(step)) >= 0:  # type: ignore[arg-type]
            return number
    raise ValueError(f"step={step!r}: expected a whole number from 0 on")


def committed_steps(folder: Path) -> list[int]:
    """Steps of which ``folder`` has a committed checkpoint, in increasing order."""
    if not folder.is_dir():
        return []
    matches = [match for entry in folder.iterdir() if (match := _STEP.fullmatch(entry.name))]
    return sorted(int(match[1]) for match in matches if (folder / match[0] / ".metadata").is_file())


def remove(final: Path) -> None:
    """Remove a checkpoint; if this is interrupted, what is left is a leftover, and no checkpoint."""
    _discard(final, final)


def _discard(path: Path, final: Path) -> None:
    away = _hidden(final)
    os.rename(path, away)
    shutil.rmtree(away, ignore_errors=True)


def is_protected(final: Path) -> bool:
    """Whether a checkpoint is never to be removed."""
    return (final / _PROTECTED).exists()


def protect(final: Path, protected: bool) -> None:
    """Say whether a checkpoint may be removed."""
    if protected:
        (final / _PROTECTED).touch()
    else:
        (final / _PROTECTED).unlink(missing_ok=True)
    fsync(final)
