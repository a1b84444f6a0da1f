"""Values are right however late collectives are, and whichever streams read parameters or make gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import pytest
import torch

from tests.cases import assert_same
from tests.gpu.device import GROUPS, Stream, late_collectives, only_cuda
from tests.gpu.training import train, train_branches
from tests.ranks import run

STEPS = 7
"""Past the switch of rho_t."""

MODES: list[tuple[torch.dtype, bool, bool]] = [
    (torch.float32, False, True),
    (torch.float32, True, False),
    (torch.float32, True, True),
    (torch.bfloat16, True, True),
]
"""Dtype, whether gradients are sharded, whether parameters arrive during forward."""


def check_late(rank: int, _world_size: int) -> None:
    for mode in MODES:
        expected = train(rank, STEPS, *mode)
        assert_same(train(rank, STEPS, *mode, lambda _: late_collectives()), expected, mode)


@pytest.mark.parametrize(("backend", "world_size"), GROUPS)
def test_collectives_may_be_late(backend: str, world_size: int) -> None:
    run(check_late, world_size, backend=backend)


def unheard(step: int) -> AbstractContextManager[None]:
    """Not in the first steps, in which ranks tell each other how to go on."""
    return late_collectives(waits=False) if step >= 3 else nullcontext()


def check_without_waiting(rank: int, _world_size: int) -> None:
    for mode in MODES[1:3]:
        expected = train(rank, STEPS, *mode)
        with pytest.raises((AssertionError, RuntimeError)):  # values differ from those, or between ranks
            assert_same(train(rank, STEPS, *mode, unheard), expected)


@only_cuda("nothing is late on the CPU")
def test_the_check_itself_can_fail() -> None:
    run(check_without_waiting, 2, backend="nccl")


def check_branches(rank: int, _world_size: int) -> None:
    expected = train_branches(rank, STEPS, None)
    assert_same(train_branches(rank, STEPS, [Stream() for _ in range(3)]), expected)


@pytest.mark.parametrize(("backend", "world_size"), [pytest.param("gloo", 1, id="1"), *GROUPS])
def test_gradients_of_several_streams(backend: str, world_size: int) -> None:
    run(check_branches, world_size, backend=backend)
