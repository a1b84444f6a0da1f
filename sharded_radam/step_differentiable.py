"""The step that autograd can run through: ``differentiable=True``.

At world size > 1 the parameters are replicas, and so are what they are computed from and what is computed from them.
The step is then a function of replicas, and its derivative is that of the same function on one rank: cutting out the
own elements and gathering all elements are each other's adjoints. A loss that differs between ranks counts with its
mean over the ranks, as in DistributedDataParallel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.radam import radam

from sharded_radam.buckets.flat import Flat
from sharded_radam.buckets.memory import dim_order, flatten, unflatten
from sharded_radam.radam import Hyperparameters
from sharded_radam.transport import Transport


@dataclass(frozen=True, slots=True)
class Exchange:
    """Cuts one parameter's elements (1-D) into those of each rank, and puts them together again.

    ``ranges[rank]`` are the intervals of elements that a rank owns.
    """

    transport: Transport
    numel: int
    ranges: tuple[tuple[tuple[int, int], ...], ...]

    def own(self, full: Tensor) -> Tensor:
        """The own elements of all elements."""
        return torch.cat([full[:0], *(full[start:stop] for start, stop in self.ranges[self.transport.rank])])

    def all(self, own: Tensor) -> Tensor:
        """Collective: all elements, from each rank's own."""
        counts = [sum(stop - start for start, stop in ranges) for ranges in self.ranges]
        table = own.new_zeros((len(counts), max(counts)))
        table[self.transport.rank, : own.numel()] = own
        for handle in self.transport.all_gather(table.view(-1)):
            handle.wait()
        full = own.new_empty(self.numel)
        for row, ranges in zip(table, self.ranges, strict=True):
            taken = 0
            for start, stop in ranges:
                full[start:stop] = row[taken : taken + stop - start]
                taken += stop - start
        return full


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.own(full)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _All.apply(grads[0], ctx.exchange), None  # type: ignore[no-untyped-call]


class _All(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.all(own)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        mean = _Mean.apply(grads[0], ctx.exchange.transport)  # type: ignore[no-untyped-call]
        return _Own.apply(mean, ctx.exchange), None  # type: ignore[no-untyped-call]


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, transport: Transport) -> Tensor:
        ctx.transport = transport
        return transport.average(tensor.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Mean.apply(grads[0], ctx.transport), None  # type: ignore[no-untyped-call]


class _Shared(torch.autograd.Function):
    """A replica that each rank uses for its own elements: its derivative is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, transport: Transport) -> Tensor:
        ctx.transport = transport
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grads[0], ctx.transport), None  # type: ignore[no-untyped-call]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, transport: Transport) -> Tensor:
        ctx.transport = transport
        return transport.average(tensor.contiguous()) * transport.world_size

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        mean = _Mean.apply(grads[0], ctx.transport)  # type: ignore[no-untyped-call]
        return _Shared.apply(mean, ctx.transport), None  # type: ignore[no-untyped-call]


def exchanges(flat: Flat, transport: Transport) -> list[Exchange]:
    """One for each slot of a flat."""
    ranges: list[list[list[tuple[int, int]]]] = [[[] for _ in range(transport.world_size)] for _ in flat.params]
    for rank in range(transport.world_size):
        for piece in flat.plan.pieces(rank):
            ranges[piece.slot][rank].append((piece.start, piece.start + piece.numel))
    return [
        Exchange(transport, slot.numel, tuple(tuple(r) for r in own))
        for slot, own in zip(flat.plan.slots, ranges, strict=True)
    ]


def update(
    param: Tensor, state: dict[str, Tensor], exchange: Exchange, step: int | None, hyper: Hyperparameters
) -> None:
    """One step of one parameter, recorded by autograd (param: modified in place; moments of ``state``: replaced).

    Collective if ``step`` is None too: then this rank only takes part, since the parameter has no gradient here.
    """
    order = dim_order(param)
    dtype = state["exp_avg"].dtype  # fp32 where the parameter is half precision
    own = _Own.apply(flatten(param, order), exchange).to(dtype, copy=True)  # type: ignore[no-untyped-call]
    if step is not None:
        assert param.grad is not None
        grad = _Own.apply(flatten(param.grad, order), exchange).to(dtype)  # type: ignore[no-untyped-call]
        lr = hyper.lr
        if isinstance(lr, Tensor):
            lr = _Shared.apply(lr, exchange.transport)  # type: ignore[no-untyped-call]
        moments = [flatten(state[name], order).clone() for name in ("exp_avg", "exp_avg_sq")]
        radam(
            [own],
            [grad],
            [moments[0]],
            [moments[1]],
            [torch.tensor(step - 1.0, dtype=torch.float64)],
            foreach=False,
            differentiable=True,
            beta1=hyper.beta1,
            beta2=hyper.beta2,
            lr=lr,
            weight_decay=hyper.weight_decay,
            eps=hyper.eps,
            decoupled_weight_decay=hyper.decoupled_weight_decay,
            maximize=hyper.maximize,
        )
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            state[name] = moment if state[name].dim() == 1 else unflatten(moment, param.shape, dim_order(param))
    if step is not None or exchange.transport.world_size > 1:
        whole = _All.apply(own.to(param.dtype), exchange)  # type: ignore[no-untyped-call]
        param.copy_(unflatten(whole, param.shape, dim_order(param)))
