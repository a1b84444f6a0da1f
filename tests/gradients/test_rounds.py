"""The rounds of backward passes: the drawing of the module's docstring as a table, and what passes make of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharded_radam.gradients.rounds import TRANSITIONS, Event, Rounds, State
from sharded_radam.gradients.schedule import Launch
from tests.gradients.test_schedule import DRAWN, A, B, C, D, flat

pytestmark = pytest.mark.quick

TABLE = """
             DUE       OPEN      COMPLETE  REDUCED   UNSCALED
GRADIENT     DUE       OPEN      COMPLETE  COMPLETE  COMPLETE
HELD         DUE       OPEN      DUE       DUE       DUE
TAKEN        OPEN      OPEN      OPEN      -         -
LAUNCHED     COMPLETE  COMPLETE  -         -         -
TAIL         -         -         REDUCED   -         -
UNSCALE      -         -         -         UNSCALED  UNSCALED
STEP         DUE       OPEN      DUE       DUE       DUE
"""
"""What each event makes of each state; what cannot happen is "-"."""


def test_the_table() -> None:
    states, *rows = (line.split() for line in TABLE.strip().splitlines())
    assert states == [state.name for state in State]
    assert [row[0] for row in rows] == [event.name for event in Event]
    for event, *targets in rows:
        found = TRANSITIONS[Event[event]]
        assert [found[State[name]].name if State[name] in found else "-" for name in states] == targets


def test_what_cannot_happen_is_an_error() -> None:
    for state in State:
        for event in Event:
            rounds = Rounds([DRAWN])
            rounds.state = state
            if state in TRANSITIONS[event]:
                rounds.note(event)
                assert rounds.state is TRANSITIONS[event][state]
            else:
                with pytest.raises(KeyError):
                    rounds.note(event)


def launch_ready(rounds: Rounds, all_of_them: bool = False) -> list[Launch]:
    """What backward does after each gradient; or what the step does, and the next backward pass."""
    sent = []
    while not rounds.is_over and (all_of_them or rounds.is_ready):
        sent.append(rounds.next_launch()[0])
    if rounds.is_over:
        rounds.end()
    return sent


LAUNCHES = {1: Launch(0, 1, frozenset({B, C, D})), 0: Launch(0, 0, frozenset({A, B}))}

PASSES: dict[str, list[tuple[str, str, list[int]]]] = {
    "all gradients come": [
        *(("d", "OPEN", []), ("c", "OPEN", []), ("b", "OPEN", [1]), ("a", "COMPLETE", [0])),
        *(("finish", "REDUCED", []), ("unscale", "UNSCALED", []), ("step", "DUE", [])),
    ],
    "some do not come": [("d", "OPEN", []), ("b", "OPEN", []), ("finish", "REDUCED", [1, 0]), ("step", "DUE", [])],
    "none comes": [("finish", "REDUCED", [1, 0]), ("step", "DUE", [])],
    "a second pass begins": [
        *(("d", "OPEN", []), ("c", "OPEN", []), ("d", "OPEN", [1, 0]), ("c", "OPEN", []), ("b", "OPEN", [1])),
        ("a", "COMPLETE", [0]),
    ],
    "a pass after what was reduced": [("finish", "REDUCED", [1, 0]), ("d", "OPEN", []), ("finish", "REDUCED", [1, 0])],
    "gradients are held": [
        *(("held", "DUE", []), ("d", "OPEN", []), ("held", "OPEN", []), ("finish", "REDUCED", [1, 0])),
        *(("held", "DUE", []), ("finish", "REDUCED", [1, 0]), ("step", "DUE", [])),
    ],
    "a rare one comes": [
        *(("finish", "REDUCED", [1, 0]), ("rare", "COMPLETE", []), ("finish", "REDUCED", [])),
        *(("step", "DUE", []), ("rare", "DUE", []), ("finish", "REDUCED", [1, 0])),
    ],
    "a step is skipped": [("d", "OPEN", []), ("step", "OPEN", []), ("finish", "REDUCED", [1, 0]), ("step", "DUE", [])],
}
"""What happens, the state after it, and the buckets that are launched."""


@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str) -> None:
    rounds = Rounds([DRAWN])
    for what, state, buckets in PASSES[name]:
        sent = []
        if what == "finish":
            if not rounds.is_launched:
                sent += launch_ready(rounds, all_of_them=True)
            rounds.note(Event.TAIL)
        elif what in ("held", "unscale", "step"):
            rounds.note(Event[what.upper()])
        else:
            rounds.note(Event.GRADIENT)
            key = (0, 9 if what == "rare" else "abcd".index(what))
            if key in rounds.arrived:
                sent += launch_ready(rounds, all_of_them=True)
            if rounds.expects(key):
                rounds.take(key)
                sent += launch_ready(rounds)
        assert (rounds.state.name, sent) == (state, [LAUNCHES[bucket] for bucket in buckets])
        assert bool(rounds.arrived) == (rounds.state is State.OPEN)


def test_gradients_are_let_go_with_the_last_launch_that_needs_them() -> None:
    """``b`` is in both buckets."""
    rounds = Rounds([DRAWN])
    assert sorted(rounds.next_launch()[1]) == [C, D]
    assert sorted(rounds.next_launch()[1]) == [A, B]


@given(st.data())
def test_the_order_of_arrival_is_followed(data: st.DataObject) -> None:
    plans = [flat(data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=6)), 128) for _ in range(2)]
    keys = [(index, slot) for index, plan in enumerate(plans) for slot in range(len(plan.slots))]
    rounds = Rounds(plans)
    assert not rounds.schedule.tail
    order = data.draw(st.permutations(keys))
    for key in order:
        rounds.take(key)
    assert len(launch_ready(rounds)) > 0
    assert rounds.last_arrivals == order
    present = data.draw(st.sets(st.sampled_from(keys), min_size=1))
    assert not rounds.knows_order(present)
    rounds.follow(rounds.last_arrivals, present)
    assert rounds.knows_order(present)
    assert {key for key in keys if rounds.expects(key)} == present
    for key in (key for key in order if key in present):
        assert not rounds.is_over
        rounds.take(key)
        launch_ready(rounds)
    assert rounds.state is State.COMPLETE
