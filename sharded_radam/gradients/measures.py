"""Measures of gradients, and what changes them accordingly: norms, clipping, unscaling, finite or not.

The same functions for both modes: gradients that are sharded, and those that are whole in ``param.grad``.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_radam.buckets.memory import dim_order, flatten, unflatten
from sharded_radam.transport import Everyone, Transport

logger = logging.getLogger("sharded_radam")

NORM_NUMEL = 2**18
"""The norm of so many elements is in their dtype, and what is made of these norms in float64."""


class Gradients(Protocol):
    """All gradients of an optimizer."""

    def finish(self) -> object:
        """Collective if they are sharded: reduce all that is left."""

    def own(self) -> list[Tensor]:
        """Real tensors with all elements that this rank is to change, reduced before."""

    def pieces(self) -> Iterator[tuple[Tensor, range, Tensor]]:
        """Parameter, elements in memory order, and 1-D gradient, of the same; what is changed in place is kept."""


class Sharded(Gradients, Protocol):
    """Those of which each rank has its shards."""

    @property
    def transport(self) -> Transport:
        """Of their ranks."""

    def note_unscaled(self) -> None:
        """Know that they are unscaled."""


class Whole:
    """Those that are whole in ``param.grad``, on every rank.

    Args:
        param_groups: of the optimizer.
    """

    def __init__(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        self._params: list[Tensor] = [param for group in param_groups for param in group["params"]]

    def finish(self) -> None:
        """Do nothing: they are there."""

    def own(self) -> list[Tensor]:
        """All of them, as they are."""
        return [param.grad for param in self._params if param.grad is not None]

    def pieces(self) -> Iterator[tuple[Tensor, range, Tensor]]:
        """Parameter, range of all elements, and 1-D gradient, which may be a copy: it is copied back."""
        for param in self._params:
            if param.grad is not None:
                flat = flatten(param.grad, dim_order(param))
                yield param, range(flat.numel()), flat
                if flat.data_ptr() != param.grad.data_ptr():
                    param.grad.copy_(unflatten(flat, param.shape, dim_order(param)))


@torch.no_grad()
def norm(gradients: Whole | Sharded, norm_type: float) -> Tensor:
    """Collective if sharded: the norm of all gradients taken as one vector, 0-d.

    Of whole gradients torch's, to the bit; of sharded ones in float64 (float32 where there is no float64).

    Raises:
        ValueError: ``norm_type`` is not above 0.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type={norm_type}: expected a number above 0, or inf")
    if isinstance(gradients, Whole):
        return nn.utils.get_total_norm(gradients.own(), norm_type)
    gradients.finish()
    transport, order = gradients.transport, float(norm_type)
    device = transport.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    parts = [part for own in gradients.own() if own.numel() for part in torch.split(own, NORM_NUMEL)]
    norms = [each.to(dtype) for each in torch._foreach_norm(parts, order)] if parts else []
    if math.isinf(order):
        largest = torch.stack(norms).max() if norms else torch.zeros((), dtype=dtype, device=device)
        return transport.all_reduce(largest, dist.ReduceOp.MAX)
    powers = torch.stack(norms).pow(order).sum() if norms else torch.zeros((), dtype=dtype, device=device)
    found = transport.all_reduce(powers, dist.ReduceOp.SUM).pow(1 / order)
    if transport.replicas is not None and transport.replicas.name == "native":
        transport.replicas.broadcast(found)  # each shard group may have added up in another order
    return found


def check_norm(norm: Tensor, norm_type: float, error_if_nonfinite: bool) -> None:
    """Raise RuntimeError, where that is asked for, if a norm of gradients is inf or nan."""
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {norm.item()}, so they cannot be clipped: pass "
            "error_if_nonfinite=False to go on regardless"
        )


@torch.no_grad()
def clip_to_norm_(gradients: Gradients, max_norm: float, total_norm: Tensor) -> None:
    """Scale gradients, which were reduced before and whose norm this is, to ``max_norm`` at most, as torch does."""
    if grads := gradients.own():
        torch._foreach_mul_(grads, (max_norm / (total_norm + 1e-6)).clamp(max=1.0).to(grads[0].device))


@torch.no_grad()
def clip_values_(gradients: Gradients, clip_value: float) -> None:
    """Collective if sharded: limit each element to ``-clip_value`` to ``clip_value``."""
    gradients.finish()
    if grads := gradients.own():
        torch._foreach_clamp_min_(grads, -clip_value)
        torch._foreach_clamp_max_(grads, clip_value)


@torch.no_grad()
def map_(gradients: Gradients, fn: Callable[[Tensor, range, Tensor], Tensor | None]) -> None:
    """Collective if sharded: let ``fn`` change each piece, in place or by what it returns."""
    gradients.finish()
    for param, elements, grad in gradients.pieces():
        changed = fn(param, elements, grad)
        if changed is not None:
            grad.copy_(changed)


@torch.no_grad()
def divide_(gradients: Gradients, scale: Tensor) -> None:
    """Collective if sharded: divide all gradients by a GradScaler's scale."""
    gradients.finish()
    if grads := gradients.own():
        torch._foreach_mul_(grads, scale.double().reciprocal().float())


@torch.no_grad()
def unscale_(gradients: Sharded, inv_scale: Tensor, found_inf: Tensor) -> None:
    """Collective: multiply by ``inv_scale``; set ``found_inf`` to 1 on all ranks if one has inf or nan."""
    gradients.finish()
    gradients.note_unscaled()
    by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in gradients.own():
        by_dtype[grad.dtype].append(grad)
    for grads in by_dtype.values():
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
    gradients.transport.all_reduce(found_inf, dist.ReduceOp.MAX)


class FiniteCheck:
    """Names of gradients of this rank that were not finite before they were reduced.

    Args:
        transport: of the ranks.
    """

    def __init__(self, transport: Transport | Everyone) -> None:
        self._transport = transport
        self._names: list[str] = []

    def look(self, grad: Tensor, name: str) -> None:
        """Log a gradient that is not finite, once; waits for the device."""
        if name not in self._names and not grad.isfinite().all():
            logger.error("gradient of '%s' on rank %d is not finite", name, self._transport.rank)
            self._names.append(name)

    def agree(self) -> None:
        """Collective: raise RuntimeError on every rank if one has such gradients."""
        heard = self._transport.all_gather_objects(self._names)
        bad = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(heard) if names]
        if bad:
            raise RuntimeError(
                f"gradients are not finite, before they were reduced, on {'; '.join(bad)}. Parameters and state are "
                "unchanged; zero_grad() drops these gradients"
            )

    def forget(self) -> None:
        """Forget gradients that are being dropped."""
        self._names.clear()
