"""Messages between ranks through torch.distributed's store: JSON values under keys, never pickles.

Nobody waits inside of the store: who waits looks again after a pause, so that several threads may share a connection,
and look at other things too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.25
"""Between two looks at the store, which may be asked by thousands."""


class StoreLostError(Exception):
    """The store does not answer: the process that had it has ended, or the network is down."""


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch's stores raise
        raise StoreLostError(str(error)) from error


class Board:
    """A store as it is used here. Every method may raise StoreLostError."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def put(self, key: str, text: str) -> None:
        """Write a key."""
        with _answering():
            self._store.set(key, text)

    def read(self, key: str) -> str | None:
        """The text of a key, None if it is not there."""
        with _answering():
            return self._store.get(key).decode() if self._store.check([key]) else None

    def look(self, key: str) -> Any:
        """The JSON value of a key, None if it is not there."""
        text = self.read(key)
        return None if text is None else json.loads(text)

    def look_at_all(self, keys: dict[int, str]) -> dict[int, Any]:
        """The JSON values of those keys that are there, by the same numbers; one request if all are."""
        with _answering():
            if self._store.check([*keys.values()]):
                texts = self._store.multi_get([*keys.values()])
                return {number: json.loads(text) for number, text in zip(keys, texts, strict=True)}
        found = {number: self.look(key) for number, key in keys.items()}
        return {number: value for number, value in found.items() if value is not None}

    def has(self, keys: list[str]) -> bool:
        """Whether all of these keys are there."""
        with _answering():
            return bool(self._store.check(keys))

    def count(self, key: str) -> int:
        """Add 1 to a number, 0 if it is not there; return what it is now."""
        with _answering():
            return int(self._store.add(key, 1))

    def exchange(self, key: str, expected: str, new: str) -> str:
        """Write a key if it has the expected text, or is not there; return the text that it has now."""
        with _answering():
            found: str = self._store.compare_set(key, expected, new).decode()
            if found == expected != new:  # a store says so of a key that it does not have
                found = self._store.compare_set(key, "", new).decode()
            return found

    def claim(self, key: str, value: Any) -> Any:
        """Write a key if nobody has; return the value that it has now. So whoever is second learns what counts."""
        return json.loads(self.exchange(key, "", json.dumps(value)))

    def drop(self, *keys: str) -> None:
        """Remove keys."""
        with _answering():
            for key in keys:
                self._store.delete_key(key)


def pauses() -> Iterator[None]:
    """Come again and again, after pauses that grow to a tenth of the time that has been waited."""
    begin = time.monotonic()
    while True:
        yield
        time.sleep(min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, (time.monotonic() - begin) / 10)))
