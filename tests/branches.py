"""Trainings whose modules run on several streams, with gradients and parameters that travel in every way there is."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from sharded_radam import ShardedRAdam
from sharded_radam.checkpoint.parts import part_of_rank
from sharded_radam.checkpoint.staging import Staging
from sharded_radam.gradients.grad_shard import GradShard
from tests.clocks import Stream
from tests.races import Races

SHAPES = [(70, 9), (3,), (500,), (64, 3), (130,)]


class Layer(nn.Module):
    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = Parameter(torch.zeros(shape, device="meta", dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sum()


class Training:
    """A model of branches, each of which runs on a stream; torch's engine is played.

    It orders the stream of a node after that of the node before (here the caller's), and the stream of the caller after
    all, and then calls callbacks.
    """

    def __init__(
        self, races: Races, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_streams: int, **options: Any
    ) -> None:
        self.races = races
        self.skipped: set[int] = set()  # branches without gradients
        self.turn = 0
        self._streams = [Stream(races, f"branch {number}") for number in range(num_streams)] or [races.main]
        self.model = nn.Sequential(*(Layer(shape, dtype) for shape in SHAPES))
        self.average = [torch.zeros_like(param) for param in self.model.parameters()]
        self.optimizer = ShardedRAdam(self.model.parameters(), bucket_cap_mb=1e-3, **options)
        self._task = -1
        self._tasks = itertools.count()
        self._callbacks: list[Callable[[], None]] = []
        monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: self._task)
        monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", self)

    def queue_callback(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    @torch.no_grad()
    def _each(self, slots: Sequence[int], visit: Callable[[Layer], None]) -> None:
        caller = self.races.current
        for stream in self._streams:
            stream.wait_stream(caller)
        for slot in slots:
            with self.races.stream(self._streams[(slot + self.turn) % len(self._streams)]):
                visit(self.model[slot])  # type: ignore[arg-type]
        for stream in self._streams:
            caller.wait_stream(stream)

    def run(self) -> None:
        """Forward and backward."""
        x = torch.zeros((), device="meta")
        slots = range(len(self.model))
        self._each(slots, lambda layer: layer(x))
        self._task = next(self._tasks)
        self._each([slot for slot in reversed(slots) if slot not in self.skipped], self._accumulate)
        while self._callbacks:
            self._callbacks.pop()()
        self._task = -1

    @staticmethod
    def _accumulate(layer: Layer) -> None:
        param = layer.weight
        with torch._C.DisableTorchFunctionSubclass():  # as in C++
            grad = param.detach() * 2
            if param.grad is None:
                param.grad = grad
            elif isinstance(param.grad, GradShard):
                param.grad.add_(grad)
            else:
                param.grad += grad
            hooks = param._post_accumulate_grad_hooks or {}
        for hook in hooks.values():
            hook(param)

    def follow(self, stream: Stream) -> None:
        """Average the parameters on a stream that was told to wait before."""
        with self.races.stream(stream), torch.no_grad():
            for mean, param in zip(self.average, self.model.parameters(), strict=True):
                mean.lerp_(param, 0.1)


def train_ddp(training: Training) -> None:
    """Gradients in ``.grad``, averaged by somebody else; they are kept once."""
    for step in range(4):
        training.run()
        training.optimizer.clip_grad_norm_(1.0)
        training.optimizer.step()
        if step != 1:
            training.optimizer.zero_grad()


def train_sharded(training: Training) -> None:
    """With several passes a step, one of them in no_sync, clipping, and gradients that are kept, zeroed or missing.

    A branch has another stream in each pass.
    """
    optimizer = training.optimizer
    for step in range(5):
        training.skipped = {1, 2} if step == 2 else {3} if step == 3 else set()
        for number in range(3):
            training.turn += 1
            with optimizer.no_sync() if number == (step + 1) % 3 else contextlib.nullcontext():
                training.run()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()
        if step != 2:
            optimizer.zero_grad(set_to_none=step != 1)


def train_on_other_streams(training: Training) -> None:
    """Norms, changes of gradients and steps on streams of their own, with the order that torch asks for."""
    main, optimizer = training.races.main, training.optimizer
    measuring, changing, stepping = (Stream(training.races, name) for name in ("measuring", "changing", "stepping"))
    for _ in range(3):
        training.run()
        measuring.wait_stream(main)
        with training.races.stream(measuring):
            optimizer.grad_norm()
        changing.wait_stream(main)
        with training.races.stream(changing):
            for param in training.model.parameters():
                param.grad.mul_(0.5)  # type: ignore[union-attr]
        stepping.wait_stream(main)
        with training.races.stream(stepping):
            optimizer.step()
            optimizer.zero_grad()
        main.wait_stream(stepping)


def train_with_average(training: Training) -> None:
    """An average on a side stream, right after the step, or after a forward for which that stream does not wait."""
    main, side = training.races.main, Stream(training.races, "side")
    for step in range(4):
        training.run()
        main.wait_stream(side)
        training.optimizer.step()
        training.optimizer.zero_grad()
        side.wait_stream(main)
        if step % 2:
            training.run()
        training.follow(side)


def train_with_saves(training: Training) -> None:
    """Each step is staged, and written while the next one runs."""
    staging, optimizer = Staging(), training.optimizer
    for _ in range(3):
        training.run()
        optimizer.step()
        optimizer.zero_grad()
        content = {"model": dict(training.model.named_parameters()), **optimizer.checkpoint_part().content()}
        part = staging.copy(part_of_rank(content, {}, 0, optimizer._shards.transport.world_size))
        assert len(part.boxes) > len(SHAPES)
        training.run()
        optimizer.step()
        for box in part.boxes:
            training.races.touch_on_host(box.data)


def train_and_stop(training: Training) -> None:
    """The optimizer is dropped after a backward pass, whose caller allocates memory then."""
    optimizer = ShardedRAdam([Parameter(torch.zeros(3, device="meta"))])
    for number in range(3):
        if number:
            training.run()
            training.optimizer.step()
            training.optimizer.zero_grad()
        training.run()
        if number == 2:
            training.optimizer = optimizer
            training.model.zero_grad()
            gc.collect()
            torch.zeros(5, device="meta")


def train_more(training: Training) -> None:
    """Parameters are added between backward and step, each time on a stream of its own."""
    main, optimizer = training.races.main, training.optimizer
    for step in range(2):
        training.run()
        adding = Stream(training.races, f"adding {step}")
        adding.wait_stream(main)
        with training.races.stream(adding):
            layer = Layer((77,), training.average[0].dtype)
            training.model.append(layer)
            optimizer.add_param_group({"params": [layer.weight]})
        main.wait_stream(adding)
        optimizer.step()
        optimizer.zero_grad()


MODES: dict[str, tuple[Callable[[Training], None], dict[str, Any]]] = {
    "ddp": (train_ddp, {}),
    "sharded": (train_sharded, {"shard_gradients": True}),
    "reduced in bf16": (train_sharded, {"shard_gradients": True, "reduce_dtype": torch.bfloat16}),
    "on other streams": (train_on_other_streams, {"shard_gradients": True}),
    "average": (train_with_average, {}),
    "sharded, average": (train_with_average, {"shard_gradients": True}),
    "more parameters": (train_more, {"shard_gradients": True}),
    "dropped": (train_and_stop, {"shard_gradients": True}),
    "saves": (train_with_saves, {"shard_gradients": True}),
}
