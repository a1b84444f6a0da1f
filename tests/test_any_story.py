"""Random stories of what users do between steps, beside torch.optim.RAdam: equal to the bit, or an error that harms
nothing.

``python -m tests.test_any_story 20000`` tells so many, a fifth of them at two ranks.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    clip_grads_with_norm_,
    parameters_to_vector,
    vector_to_parameters,
)

from sharded_radam import ShardedRAdam
from tests.ranks import run
from tests.sides import Side, compare

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test  # noqa: E402


class Story:
    """Both sides, and what can happen to them; each method takes one number, by which it chooses."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.sides = [Side(ShardedRAdam, bucket_cap_mb=1e-3, **options), Side(torch.optim.RAdam)]
        self.hooked: set[int] = set()
        self.taken_out = False

    def params(self, side: Side) -> list[Tensor]:
        return [param for group in side.groups for param in group["params"]]

    def chosen(self, side: Side, number: int) -> Tensor:
        params = self.params(side)
        return params[number % len(params)]

    def backward(self, number: int) -> None:
        """Of some of the parameters, onto the gradients that are there."""
        for side in self.sides:
            generator = torch.Generator().manual_seed(number)
            terms = []
            for index, param in enumerate(side.params):
                grad = torch.randn(param.shape, generator=generator).bfloat16().float()
                if param.requires_grad and (number >> index) % 4:
                    terms.append((param * grad).sum())
            if terms:
                torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]

    def step(self, number: int) -> None:
        for side in self.sides:
            side.optimizer.step()
        compare(self.sides[0], self.sides[1], "step")

    def iterate(self, number: int) -> None:
        self.zero_grad(number)
        self.backward(number)
        self.step(number)

    def zero_grad(self, number: int) -> None:
        for side in self.sides:
            side.optimizer.zero_grad(set_to_none=bool(number % 2))

    def drop_gradient(self, number: int) -> None:
        for side in self.sides:
            self.chosen(side, number).grad = None

    def append(self, number: int) -> None:
        for side in self.sides:
            group = side.groups[number % len(side.groups)]
            group["params"].append(side.new(number % 5 + 1, 3))

    def remove(self, number: int) -> None:
        """One or two, so that some are left."""
        if len(self.params(self.sides[0])) > 2:
            self.taken_out = True
            for side in self.sides:
                gone = {id(self.chosen(side, number)), id(self.chosen(side, number // 3))}
                for group in side.groups:
                    group["params"] = [param for param in group["params"] if id(param) not in gone]

    def put_back(self, number: int) -> None:
        for side in self.sides:
            there = {id(param) for param in self.params(side)}
            side.groups[0]["params"] += [param for param in side.params if id(param) not in there]
        self.taken_out = False

    def move(self, number: int) -> None:
        for side in self.sides:
            chosen = self.chosen(side, number)
            for group in side.groups:
                group["params"] = [param for param in group["params"] if param is not chosen]
            side.groups[number % len(side.groups)]["params"].append(chosen)

    def reverse(self, number: int) -> None:
        for side in self.sides:
            side.groups.reverse()

    def split(self, number: int) -> None:
        """One group becomes two, in a list that is assigned."""
        for side in self.sides:
            first, *others = side.groups
            if len(first["params"]) > 1:
                halves = first["params"][:1], first["params"][1:]
                side.optimizer.param_groups = [{**first, "params": half, "lr": 0.02} for half in halves] + others

    def add_group(self, number: int) -> None:
        for side in self.sides:
            side.optimizer.add_param_group({"params": [side.new(number % 7 + 1)], "lr": 0.1})

    def set_options(self, number: int) -> None:
        for side in self.sides:
            group = side.groups[number % len(side.groups)]
            group.update(lr=(number % 9) / 100, weight_decay=(number % 3) / 10, maximize=bool(number % 2))

    def clear_state(self, number: int) -> None:
        for side in self.sides:
            if number % 3:
                side.optimizer.state.pop(self.chosen(side, number), None)
            else:
                side.optimizer.state.clear()

    def zero_step(self, number: int) -> None:
        for side in self.sides:
            state = side.optimizer.state.get(self.chosen(side, number), {})
            if "step" in state:
                state["step"].zero_()

    def scale_moments(self, number: int) -> None:
        for side in self.sides:
            for state in side.optimizer.state.values():
                if number % 2 and "exp_avg" in state:
                    state["exp_avg"].mul_(0.5)
                elif "exp_avg" in state:
                    state["exp_avg"] = state["exp_avg"] * 0.5

    def assign_data(self, number: int) -> None:
        for side in self.sides:
            if number % 2:
                chosen = self.chosen(side, number)
                chosen.data = chosen.data * 0.5
            else:
                side.kept = parameters_to_vector(side.params).detach().clone()
                vector_to_parameters(side.kept, side.params)

    def clip(self, number: int) -> None:
        """By value; or by norm, where gradients are whole."""
        ours, theirs = self.sides
        if all(param.grad is None for param in self.params(theirs)):
            return
        if number % 2 or self.options.get("shard_gradients"):
            ours.optimizer.clip_grad_value_(0.5)
            clip_grad_value_(self.params(theirs), 0.5)
        else:
            ours.optimizer.clip_grad_norm_(1.0)
            clip_grad_norm_(self.params(theirs), 1.0)

    def clip_with_norm(self, number: int) -> None:
        """By a norm that is given: the computed one of sharded gradients may differ in its last bits."""
        ours, theirs = self.sides
        if any(param.grad is not None for param in self.params(theirs)):
            norm = torch.tensor(float(number % 7))
            ours.optimizer.clip_grads_with_norm_(1.5, norm)
            clip_grads_with_norm_(self.params(theirs), 1.5, norm)

    def freeze_or_thaw(self, number: int) -> None:
        for side in self.sides:
            chosen = self.chosen(side, number)
            chosen.requires_grad_(not chosen.requires_grad)

    def hook(self, number: int) -> None:
        """A hook on a parameter's gradient, in whatever order with the optimizer's."""
        index = number % len(self.sides[0].params)
        if index not in self.hooked and all(side.params[index].requires_grad for side in self.sides):
            self.hooked.add(index)
            for side in self.sides:
                side.params[index].register_hook(_double)  # type: ignore[no-untyped-call]

    def step_hooks(self, number: int) -> None:
        """One before steps that changes gradients, and one after them that changes parameters; or none any more."""
        for side in self.sides:
            for handle in side.hooks:
                handle.remove()
            side.hooks.clear()
            if number % 3:
                side.hooks.append(side.optimizer.register_step_pre_hook(_halve_gradients))
                side.hooks.append(side.optimizer.register_step_post_hook(_shrink))

    def go_back(self, number: int) -> None:
        """Save to a directory, go on, and load what was saved."""
        if self.taken_out:
            return
        ours, theirs = self.sides
        place = [tempfile.mkdtemp()]
        if dist.is_initialized():
            dist.broadcast_object_list(place)
        with shut(place[0]) as folder:
            ours.optimizer.save(folder / "saved")
            saved = copy.deepcopy(theirs.optimizer.state_dict())
            self.iterate(number)
            ours.optimizer.load(folder / "saved")
            theirs.optimizer.load_state_dict(saved)

    def save_and_load(self, number: int) -> None:
        if self.taken_out:  # RAdam's state_dict() is a KeyError where a parameter with state is in no group
            return
        ours, theirs = self.sides
        saved = [ours.optimizer.consolidate_state_dict()]
        if dist.is_initialized():
            dist.broadcast_object_list(saved)
        ours.optimizer.load_state_dict(saved[0])
        theirs.optimizer.load_state_dict(copy.deepcopy(theirs.optimizer.state_dict()))

    def deepcopy(self, number: int) -> None:
        for side in self.sides:  # a sharded gradient is its optimizer's, and is not copied
            side.optimizer.zero_grad()
        if not self.hooked:  # hooks are not copied
            self.sides = [copy.deepcopy(side) for side in self.sides]

    def fail(self, number: int) -> None:
        """A parameter in two groups is an error; nothing has changed, and without it all goes on."""
        side = self.sides[0]
        if side.hooks:  # they have changed the gradients by then, as they would RAdam's
            return
        if len(side.groups) > 1 and side.groups[0]["params"]:
            before = [param.detach().clone() for param in side.params]
            side.groups[1]["params"].append(side.groups[0]["params"][0])
            with pytest.raises(ValueError, match="a parameter can be in one group only"):
                side.optimizer.step()
            side.groups[1]["params"].pop()
            assert all(map(torch.equal, side.params, before))

    def tell(self, events: list[tuple[str, int]]) -> None:
        for name, number in events:
            getattr(self, name)(number)
        compare(self.sides[0], self.sides[1], "the end")


@contextmanager
def shut(place: str) -> Iterator[Path]:
    """A folder of all ranks, until all of them are through with it."""
    try:
        yield Path(place)
        if dist.is_initialized():
            dist.barrier()
    finally:
        shutil.rmtree(place, ignore_errors=True)


@torch.no_grad()
def _halve_gradients(optimizer: Any, *_: Any) -> None:
    if isinstance(optimizer, ShardedRAdam):
        optimizer.map_grads_(lambda _param, _elements, grad: grad.mul_(0.5))
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                param.grad.mul_(0.5)


@torch.no_grad()
def _shrink(optimizer: Any, *_: Any) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.mul_(0.75)


def _double(grad: Tensor) -> Tensor:
    return grad * 2


MODES: list[dict[str, Any]] = [{}, {"shard_gradients": True}, {"parameters_as_bucket_view": False}]
EVENTS = [name for name in vars(Story) if not name.startswith("_") and name not in ("params", "chosen", "tell")]


def tell(_rank: int, _world_size: int, mode: int, events: list[tuple[str, int]]) -> None:
    Story(**MODES[mode]).tell(events)


def tell_one_by_one(_rank: int, _world_size: int, mode: int, events: list[tuple[str, int]]) -> None:
    """Compare after each event, which reads gradients."""
    story = Story(**MODES[mode])
    for event in events:
        story.tell([event])


class Stories(RuleBasedStateMachine):
    """Of one rank as they are told; those of several are told by all of them in the end."""

    world_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.mode: int | None = None
        self.story: Story | None = None

    @rule(
        name=st.sampled_from(["iterate", "iterate", *EVENTS]),
        number=st.integers(0, 2**12),
        mode=st.sampled_from([0, 1, 2]),
    )
    def happens(self, name: str, number: int, mode: int) -> None:
        if self.mode is None:
            self.mode = mode
            self.story = Story(**MODES[mode]) if self.world_size == 1 else None
        self.events.append((name, number))
        if self.story is not None:
            self.story.tell([(name, number)])

    def teardown(self) -> None:
        if self.world_size > 1 and self.mode is not None:
            run(tell, self.world_size, self.mode, self.events)


class StoriesOfTwo(Stories):
    world_size = 2


def tell_many(number: int) -> None:
    """So many stories, a fifth of them at two ranks."""
    for machine, share in ((Stories, 0.8), (StoriesOfTwo, 0.2)):
        limits = settings(max_examples=int(number * share), stateful_step_count=15, deadline=None)
        run_state_machine_as_test(machine, settings=limits)


TOLD_ONCE: list[list[tuple[str, int]]] = [
    [("append", 0), ("assign_data", 0), ("iterate", 64)],  # a new parameter in memory that somebody else has
    # a frozen parameter whose step was set to 0, and that has moments
    [("iterate", 4), ("zero_step", 476), ("freeze_or_thaw", 230), ("save_and_load", 0)],
    # a parameter that is frozen while groups are laid out anew
    [("freeze_or_thaw", 1), ("split", 0), ("freeze_or_thaw", 1), ("step", 0), ("iterate", 2)],
]
"""Stories that failed once."""


@pytest.mark.quick
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_stories_that_failed_once(world_size: int) -> None:
    for events in TOLD_ONCE:
        for mode in range(len(MODES)):
            run(tell, world_size, mode, events)
            run(tell_one_by_one, world_size, mode, events)


@pytest.mark.timeout(600)
def test_stories() -> None:
    tell_many(250)


if __name__ == "__main__":
    tell_many(int(sys.argv[1]))
