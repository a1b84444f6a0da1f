"""Two sides, ShardedRAdam and torch.optim.RAdam, to which the same is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_radam import ShardedRAdam

SHAPES = [(7, 9), (3,), (50,), (4, 4), (), (129,)]


class Side:
    """An optimizer with its parameters: ours, or RAdam, to which the same is done."""

    def __init__(self, build: Callable[..., Any], device: torch.device | str = "cpu", **options: Any) -> None:
        torch.manual_seed(0)
        self.params = [Parameter(torch.randn(shape).to(device)) for shape in SHAPES]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.01, "weight_decay": 0.1}]
        self.optimizer = build(groups, foreach=True, **options)
        self.kept: Any = None
        self.hooks: list[Any] = []
        """Handles of the optimizer's."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.optimizer.param_groups
        return found

    def new(self, *shape: int) -> Parameter:
        self.params.append(Parameter(torch.full(shape, 0.3)))
        return self.params[-1]

    def loss(self, seed: int) -> Tensor:
        """One whose gradients have few bits, so that their mean over any number of equal ranks is exact."""
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(p.shape, generator=generator).bfloat16().float().to(p.device) for p in self.params]
        used = {param for group in self.groups for param in group["params"]}
        pairs = [(p, g) for p, g in zip(self.params, grads, strict=True) if p in used and p.requires_grad]
        return torch.stack([(param * grad).sum() for param, grad in pairs]).sum()

    def backward(self, seed: int) -> None:
        self.optimizer.zero_grad()
        self.loss(seed).backward()  # type: ignore[no-untyped-call]

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """The whole state of a parameter."""
        if isinstance(self.optimizer, ShardedRAdam):
            return self.optimizer.full_state(param)
        return dict(self.optimizer.state[param])


def compare(ours: Side, theirs: Side, what: object) -> None:
    for index, (own, param) in enumerate(zip(ours.params, theirs.params, strict=True)):
        assert torch.equal(own, param), (what, index)
    if isinstance(ours.kept, Tensor):
        assert torch.equal(ours.kept, theirs.kept), what
    for own, param in zip(ours.params, theirs.params, strict=True):
        if any(own is each for group in ours.groups for each in group["params"]):
            state, expected = ours.state_of(own), theirs.optimizer.state.get(param, {})
            for kind, value in expected.items():
                assert torch.equal(state[kind].double(), value.double()), (what, kind)
