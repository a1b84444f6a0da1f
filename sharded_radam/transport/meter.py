"""What an optimizer has done so far: collectives and their bytes, and, where asked for, the time of its phases."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.profiler import record_function


class Meter:
    """Counts and clocks of one rank.

    Counting costs nothing. The clock of a CPU neither; on other devices each phase takes two events, so it is off until
    ``times_phases`` is set there.

    Args:
        device: where the phases run.
    """

    def __init__(self, device: torch.device) -> None:
        self.collectives: Counter[str] = Counter()
        self.received_bytes: Counter[str] = Counter()
        self.times_phases = device.type == "cpu"
        self._device = device
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: deque[tuple[str, Any, Any]] = deque()

    def count(self, kind: str, received_bytes: int) -> None:
        """One more collective, which brings so many bytes of other ranks here."""
        self.collectives[kind] += 1
        self.received_bytes[kind] += received_bytes

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add what runs in here to a phase; a range ``sharded_radam::<name>`` for torch.profiler."""
        with record_function(f"sharded_radam::{name}"):
            if not self.times_phases:
                yield
            elif self._device.type == "cpu":
                begin = time.perf_counter()
                yield
                self._seconds[name] += time.perf_counter() - begin
            else:
                events = torch.get_device_module(self._device)
                begin, end = events.Event(enable_timing=True), events.Event(enable_timing=True)
                begin.record()
                yield
                end.record()
                self._events.append((name, begin, end))
                self._read_events(wait=False)

    def milliseconds(self) -> dict[str, float]:
        """Of each phase since the clock was set; waits for the device."""
        self._read_events(wait=True)
        return {name: 1e3 * seconds for name, seconds in sorted(self._seconds.items())}

    def _read_events(self, wait: bool) -> None:
        """Add up the events that are over, so that they do not pile up."""
        while self._events and (wait or self._events[0][2].query()):
            name, begin, end = self._events.popleft()
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1e3
