"""What ``param.grad`` is where gradients are sharded: the elements that this rank has of the mean gradient."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from sharded_radam import streams
from sharded_radam.buckets.memory import as_real, flat_gradient, flatten
from sharded_radam.plan import ParamSpec

aten = torch.ops.aten

_FILLING = (aten.zero_, aten.fill_, aten.copy_, aten.masked_fill_)
"""Operations that change each element by itself, which torch has not tagged as such."""


class Owner(Protocol):
    """Whoever reduces the gradients."""

    def reduce_once(self) -> None:
        """Collective the first time after a backward pass: reduce all that is left."""

    def end_rounds(self) -> None:
        """Collective only after a backward pass that did not end: send what was begun, and wait for it."""

    def unscale_once_(self, inv_scale: Tensor, found_inf: Tensor) -> None:
        """Collective: unscale all gradients if that was not done."""


class GradShard(torch.Tensor):
    """Stands in ``param.grad`` for a gradient of which this rank has some ranges.

    It is there from the end of a backward pass until somebody drops it, as any gradient is: ``param.grad = None`` and
    ``model.zero_grad()`` drop it, and backward adds to one that was kept. What changes elements one by one, in place,
    works (``mul_``, ``clamp_``, ``masked_fill_``, so also ``torch.nn.utils.clip_grad_value_``); as with
    DistributedDataParallel, all ranks must do it. Whatever needs all elements raises RuntimeError and names the method
    of the optimizer that has the answer.

    Args:
        param: of the gradient.
        spec: of the parameter.
        pieces: first element in memory order, and 1-D view of the own elements.
        owner: who reduces it.

    ``sending`` is this rank's local gradient, 1-D, while it is being reduced; ``fresh`` what backward has added to a
    gradient that was kept, of the parameter's shape.
    """

    spec: ParamSpec
    pieces: Sequence[tuple[int, Tensor]]
    owner: weakref.ref[Owner]
    sending: Tensor | None
    fresh: Tensor | None

    @staticmethod
    def __new__(
        cls, param: Tensor, spec: ParamSpec, pieces: Sequence[tuple[int, Tensor]], owner: weakref.ref[Any]
    ) -> GradShard:
        made: GradShard = torch.Tensor._make_wrapper_subclass(
            cls, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )
        made.spec, made.pieces, made.owner = spec, pieces, owner
        made.sending = made.fresh = None
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        numel = sum(piece.numel() for _, piece in self.pieces)
        return f"GradShard('{self.spec.name}', {tuple(self.shape)}, {numel} of {self.numel()} elements here)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError(self._refusal("pickling"))

    def _refusal(self, what: str) -> str:
        numel = sum(piece.numel() for _, piece in self.pieces)
        return (
            f"{what} of the gradient of '{self.spec.name}': it is sharded, and this rank has {numel} of its "
            f"{self.numel()} elements. Expected: optimizer.clip_grad_norm_(), grad_norm() or clip_grads_with_norm_() "
            "in the place of torch.nn.utils' functions, optimizer.full_grad(param) to read it, "
            "optimizer.map_grads_(fn) to change the elements of each rank"
        )

    def assign(self, grad: Tensor) -> None:
        """Take the own elements of a whole gradient, as it is."""
        flat, reals = flat_gradient(grad, self.spec), 2 if self.is_complex() else 1
        for start, piece in self.pieces:
            as_real(piece).copy_(flat.narrow(0, reals * start, reals * piece.numel()))

    def send(self, grad: Tensor) -> None:
        """Note a local gradient that is to be reduced, beside what is already."""
        flat = flat_gradient(grad, self.spec)
        self.sending = flat if self.sending is None else self.sending + flat

    def forget(self) -> None:
        """Drop local gradients that were not sent."""
        self.sending = self.fresh = None

    def _add(self, grad: Tensor, in_place: bool) -> GradShard:
        """What backward does to a gradient that was kept."""
        target = self if in_place else GradShard(self, self.spec, self.pieces, self.owner)
        if self.fresh is not None:
            streams.keep(self.fresh)
        target.fresh = grad.detach() if self.fresh is None else self.fresh + grad.detach()
        return target

    def _change(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> GradShard:
        """Do an operation on each own piece, with the same pieces of all arguments."""
        wholes = [
            flatten(arg.expand(self.shape), self.spec.dim_order) if isinstance(arg, Tensor) and arg.dim() else arg
            for arg in args
        ]
        for start, piece in self.pieces:
            func(
                piece,
                *(
                    whole.narrow(0, start, piece.numel()) if isinstance(whole, Tensor) and whole.dim() else whole
                    for whole in wholes
                ),
                **options,
            )
        return self

    @classmethod
    @torch.no_grad()
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        packet, options = func.overloadpacket, kwargs or {}
        each = getattr(aten, packet.__name__.removeprefix("_foreach_"), None)
        if packet is aten._amp_foreach_non_finite_check_and_unscale_:  # torch.amp.GradScaler
            _unscale_(*args)
        elif packet.__name__.startswith("_foreach_") and each is not None and func._schema.is_mutable:
            for index, tensor in enumerate(args[0]):
                each(tensor, *(arg[index] if isinstance(arg, (list, tuple)) else arg for arg in args[1:]), **options)
        elif isinstance(args[0], GradShard):
            return args[0]._dispatch(func, args[1:], options)
        else:
            shard = next(leaf for leaf in _leaves(args) if isinstance(leaf, GradShard))
            raise RuntimeError(shard._refusal(str(packet)))
        return None

    def _dispatch(self, func: Any, args: Sequence[Any], options: dict[str, Any]) -> GradShard:
        packet = func.overloadpacket
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and packet in (aten.add_, aten.add) and len(args) == 1:
            return self._add(args[0], packet is aten.add_)
        is_elementwise = func._schema.is_mutable and (packet in _FILLING or torch.Tag.pointwise in func.tags)
        if in_backward or not is_elementwise or any(isinstance(leaf, GradShard) for leaf in _leaves(args)):
            raise RuntimeError(self._refusal(f"{packet}{' in a backward pass' if in_backward else ''}"))
        owner = self.owner()
        if packet is aten.zero_:
            if owner is not None:
                owner.end_rounds()
            self.forget()
        elif owner is not None:
            owner.reduce_once()
        return self._change(func, args, options)


def _unscale_(grads: Sequence[Any], found_inf: Tensor, inv_scale: Tensor) -> None:
    owners = {grad.owner() for grad in grads if isinstance(grad, GradShard)}
    for owner in owners:
        if owner is not None:
            owner.unscale_once_(inv_scale, found_inf)


def _leaves(args: Any) -> list[Any]:
    return [leaf for arg in args for leaf in (_leaves(arg) if isinstance(arg, (list, tuple)) else [arg])]
