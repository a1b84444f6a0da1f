"""Streams, events and work that only know what comes before what; in the place of torch's in ``tests/races.py``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor


class Recorder(Protocol):
    """Whoever asks what comes before what."""

    host: Clock
    communication: Clock
    current: Stream

    def collect(self) -> None:
        """See what was freed before anything else is known to be over."""


class Clock:
    """Somebody whose actions have an order: a stream, the host, or the communication."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: Counter[Clock] = Counter()

    def __repr__(self) -> str:
        return self.name

    def join(self, seen: Counter[Clock]) -> None:
        """Come after what somebody has seen."""
        self.seen |= seen

    def tick(self) -> int:
        """Count one more action."""
        self.seen[self] += 1
        return self.seen[self]


class Stream(Clock):
    """In the place of torch.cuda.Stream."""

    def __init__(self, races: Recorder, name: str) -> None:
        super().__init__(name)
        self._races = races

    def wait_stream(self, other: Stream) -> None:
        self._races.collect()
        self.join(other.seen)

    def wait_event(self, event: Event) -> None:
        self._races.collect()
        self.join(event.seen)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._races)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._races.host.join(self.seen)


class Event:
    """In the place of torch.cuda.Event."""

    def __init__(self, races: Recorder) -> None:
        self._races = races
        self.seen: Counter[Clock] = Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.seen = (stream or self._races.current).seen.copy()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._races.current).wait_event(self)

    def synchronize(self) -> None:
        self._races.host.join(self.seen)


class Work:
    """Of a collective: the current stream waits, and until somebody does, the tensors are alive."""

    def __init__(self, races: Recorder, tensors: Iterable[Tensor]) -> None:
        self._races = races
        self._seen = races.communication.seen.copy()
        self._tensors = tuple(tensors)

    def wait(self, *_: Any) -> None:
        self._races.collect()
        self._races.current.join(self._seen)
        self._tensors = ()


class Group:
    """Several collectives in one call of the backend, in the place of what torch's _coalescing_manager yields."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def wait(self) -> None:
        for work in self.works:
            work.wait()
