"""Hooks of the whole process on what modules register: there only while somebody needs them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Generic, TypeVar

from torch.utils.hooks import RemovableHandle

T = TypeVar("T")

_LOOPS = {("torch.nn.modules.module", name) for name in ("register_parameter", "add_module", "__setattr__")}
"""Module and function of torch's loops over such hooks."""


class HookWhileUsed(Generic[T]):
    """A hook that comes with the first of its users and goes with the last; iterates over those that live.

    Args:
        install: registers the hook.
    """

    def __init__(self, install: Callable[[], RemovableHandle]) -> None:
        self._install = install
        self._handle: RemovableHandle | None = None
        self._num_users = 0
        self._users: weakref.WeakSet[T] = weakref.WeakSet()

    def __iter__(self) -> Iterator[T]:
        return iter(self._users)

    @property
    def is_installed(self) -> bool:
        """Whether the hook sees what is registered now."""
        return self._handle is not None

    def add(self, user: T) -> None:
        """Keep the hook as long as ``user`` lives."""
        self._num_users += 1
        weakref.finalize(user, self._leave).atexit = False
        self._users.add(user)
        if self._handle is None:
            self._handle = self._install()

    def _leave(self) -> None:
        self._num_users -= 1
        self._remove_if_unused()

    def _remove_if_unused(self) -> None:
        if self._num_users or self._handle is None:
            return
        if _is_in_loop():
            # Python collects garbage wherever it likes, and a dict must not change while a loop is over it.
            weakref.finalize(_Garbage(), self._remove_if_unused).atexit = False
            return
        self._handle.remove()
        self._handle = None


class _Garbage:
    """What the next collection finds, and no earlier moment."""

    def __init__(self) -> None:
        self.itself = self


def _is_in_loop() -> bool:
    """Whether a thread is in one of torch's loops over these hooks."""
    for innermost in sys._current_frames().values():
        frame: FrameType | None = innermost
        while frame is not None:
            if (frame.f_globals.get("__name__"), frame.f_code.co_name) in _LOOPS:
                return True
            frame = frame.f_back
    return False
