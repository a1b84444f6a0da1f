"""The rounds of backward passes between two steps: a state machine over the launches of a schedule. Integers only.

A *round* is every launch of the schedule once, in its order: one for each backward pass that is not in ``no_sync``. It
ends when all gradients have come. Where some do not come, it ends when the next backward pass produces the first of
those that did, or at the step. So between two steps, all ranks must run the same number of backward passes.

::

     ┌────────────── LAUNCHED ─────────────┐
     │      TAKEN          LAUNCHED        ▼      TAIL             UNSCALE
    DUE ───────────► OPEN ────────────► COMPLETE ──────► REDUCED ───────────► UNSCALED
     ▲                 ▲                 │ │ ▲             │ │                   │ │
     │                 └───── TAKEN ─────┘ │ └── GRADIENT ─┘─│───────────────────┘ │
     └─────────────────────────────────────┴── STEP, HELD ───┴─────────────────────┘

A gradient that is not expected, since it had not come when the order was found out, begins no round; it waits in
``.grad`` for the tail. At the step, a round that is DUE is sent from beginning to end, and one that is OPEN from where
it is. Both stay what they are if a GradScaler skips that step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto

from sharded_radam.gradients.schedule import Launch, Schedule, SlotKey, make_schedule
from sharded_radam.plan import FlatPlan


class State(Enum):
    """What has become of the gradients since the last step."""

    # A round is to be sent before the step: none was since the last one, or gradients of no_sync wait in ``.grad``.
    DUE = auto()
    # Some gradients of a backward pass have come. Each launch is sent when all of its own have.
    OPEN = auto()
    # All launches were sent; the tail was not.
    COMPLETE = auto()
    # The tail was sent too: the sums have all gradients.
    REDUCED = auto()
    # And a GradScaler has unscaled them.
    UNSCALED = auto()

    __hash__ = object.__hash__  # Enum's is written in Python, and each gradient asks for it


class Event(Enum):
    """What changes the state."""

    # Backward has accumulated a gradient.
    GRADIENT = auto()
    # The same, in no_sync.
    HELD = auto()
    # An expected gradient has been taken out of ``.grad``.
    TAKEN = auto()
    # All launches of the round were sent.
    LAUNCHED = auto()
    # The tail was sent.
    TAIL = auto()
    # The sums were unscaled.
    UNSCALE = auto()
    # A step has used the gradients, or was skipped; or zero_grad() is about to drop them, and has ended the round.
    STEP = auto()

    __hash__ = object.__hash__


_DUE, _OPEN, _COMPLETE, _REDUCED, _UNSCALED = State

TRANSITIONS: Mapping[Event, Mapping[State, State]] = {
    Event.GRADIENT: {
        _DUE: _DUE,
        _OPEN: _OPEN,
        _COMPLETE: _COMPLETE,
        _REDUCED: _COMPLETE,
        _UNSCALED: _COMPLETE,
    },
    Event.HELD: {_DUE: _DUE, _OPEN: _OPEN, _COMPLETE: _DUE, _REDUCED: _DUE, _UNSCALED: _DUE},
    Event.TAKEN: {_DUE: _OPEN, _OPEN: _OPEN, _COMPLETE: _OPEN},
    Event.LAUNCHED: {_DUE: _COMPLETE, _OPEN: _COMPLETE},
    Event.TAIL: {_COMPLETE: _REDUCED},
    Event.UNSCALE: {_REDUCED: _UNSCALED, _UNSCALED: _UNSCALED},
    Event.STEP: {_DUE: _DUE, _OPEN: _OPEN, _COMPLETE: _DUE, _REDUCED: _DUE, _UNSCALED: _DUE},
}
"""What each event makes of each state; what is not here cannot happen."""


class Rounds:
    """One round after the other, with the launches of a schedule that follows the order in which gradients arrive.

    Args:
        plans: of the flats. Until ``follow``, gradients are expected from the last slot to the first.

    ``arrived`` are the slots that have come in this round, in their order; there are some exactly while it is OPEN.
    ``last_arrivals`` are those of the last round that had any.
    """

    def __init__(self, plans: Sequence[FlatPlan]) -> None:
        self.state = State.DUE
        self.arrived: dict[SlotKey, None] = {}
        self.last_arrivals: list[SlotKey] = []
        self._plans = plans
        self._expected: frozenset[SlotKey] = frozenset()
        self._reschedule([(flat, slot) for flat, plan in enumerate(plans) for slot in range(len(plan.slots))][::-1])

    def note(self, event: Event) -> None:
        """Let the state follow."""
        self.state = TRANSITIONS[event][self.state]

    @property
    def is_reduced(self) -> bool:
        """Whether the sums have all gradients."""
        return self.state in (State.REDUCED, State.UNSCALED)

    @property
    def is_launched(self) -> bool:
        """Whether nothing but the tail is left to be sent."""
        return self.state not in (State.DUE, State.OPEN)

    # The launches of a round

    def expects(self, key: SlotKey) -> bool:
        """Whether a slot is in any launch."""
        return key in self._numbers

    def take(self, key: SlotKey) -> None:
        """Note that an expected gradient was taken."""
        self.arrived[key] = None
        for number in self._numbers[key]:
            self._missing[number] -= 1
        self.note(Event.TAKEN)

    @property
    def is_over(self) -> bool:
        """Whether no launch is left."""
        return self._next == len(self.schedule.launches)

    @property
    def is_ready(self) -> bool:
        """Whether all gradients of the next launch have come."""
        return not self.is_over and self._missing[self._next] == 0

    def next_launch(self) -> tuple[Launch, list[int]]:
        """The next launch, which is no longer the next then, and those of its slots that no later one needs."""
        launch = self.schedule.launches[self._next]
        self._next += 1
        done = []
        for slot in launch.slots:
            self._unsent[launch.flat, slot] -= 1
            if self._unsent[launch.flat, slot] == 0:
                done.append(slot)
        return launch, done

    def end(self) -> None:
        """End the round, whose launches were all sent."""
        if self.arrived:
            self.last_arrivals = list(self.arrived)
        self.note(Event.LAUNCHED)
        self._begin()

    def _begin(self) -> None:
        self.arrived.clear()
        self._next = 0
        self._missing = [len(launch.slots) for launch in self.schedule.launches]
        self._unsent = {key: len(numbers) for key, numbers in self._numbers.items()}

    # Their order

    def knows_order(self, present: Iterable[SlotKey]) -> bool:
        """Whether the schedule was made for just these slots."""
        return self._expected == set(present)

    def follow(self, arrivals: Sequence[SlotKey], present: Iterable[SlotKey]) -> None:
        """Expect gradients of these slots from now on, in the order of arrival; of those that did not arrive, last."""
        self._expected = frozenset(present)
        known = [key for key in arrivals if key in self._expected]
        self._reschedule(known + sorted(self._expected.difference(known), reverse=True))

    def _reschedule(self, order: Sequence[SlotKey]) -> None:
        self.schedule: Schedule = make_schedule(self._plans, order)
        self._numbers: dict[SlotKey, list[int]] = defaultdict(list)
        for number, launch in enumerate(self.schedule.launches):
            for slot in launch.slots:
                self._numbers[launch.flat, slot].append(number)
        self._begin()
