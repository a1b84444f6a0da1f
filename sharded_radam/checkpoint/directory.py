"""Directories that are there whole, or not at all.

A checkpoint is written into ``.NAME.<random>.unfinished`` beside its final place, and renamed to NAME when all of it is
on the disk. What has the final name is committed; what has not is a leftover of a save that did not end.
"""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
from pathlib import Path

_STEP = re.compile(r"step_(\d+)")


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin(final: Path) -> Path:
    """Make the unfinished directory for a checkpoint; leftovers of the same name are removed.

    Raises:
        ValueError: there is something of the final name.
        OSError: as of mkdir.
    """
    if os.path.lexists(final):
        raise ValueError(
            f"{final} exists: checkpoints are never overwritten, since a crash would then leave neither the old nor "
            "the new one; save to another path, or remove it first"
        )
    missing = [parent for parent in (final.parent, *final.parent.parents) if not parent.exists()]
    final.parent.mkdir(parents=True, exist_ok=True)
    for parent in missing:
        fsync(parent.parent)
    remove_leftovers(final.parent, final.name)
    unfinished = final.parent / f".{final.name}.{secrets.token_hex(4)}.unfinished"
    unfinished.mkdir()
    return unfinished


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove unfinished checkpoints of a name, a pattern of glob's if it is ``*``."""
    pattern = name if name == "*" else glob.escape(name)
    for leftover in folder.glob(f".{pattern}.????????.unfinished"):
        shutil.rmtree(leftover, ignore_errors=True)


def commit(unfinished: Path, final: Path) -> None:
    """Give a checkpoint its final name; its files are on the disk already."""
    fsync(unfinished)
    os.rename(unfinished, final)
    fsync(final.parent)


def step_path(folder: Path, step: int) -> Path:
    """Where a manager has the checkpoint of a step."""
    return folder / f"step_{step}"


def committed_steps(folder: Path) -> list[int]:
    """Steps of which ``folder`` has a committed checkpoint, in increasing order."""
    if not folder.is_dir():
        return []
    found = [match for entry in folder.iterdir() if (match := _STEP.fullmatch(entry.name))]
    return sorted(int(match[1]) for match in found if (folder / match[0] / ".metadata").is_file())


def remove(final: Path) -> None:
    """Remove a checkpoint; if this is interrupted, what is left is a leftover, and no checkpoint."""
    away = final.parent / f".{final.name}.{secrets.token_hex(4)}.unfinished"
    os.rename(final, away)
    shutil.rmtree(away, ignore_errors=True)
