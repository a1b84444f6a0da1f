"""Clipping the gradients of several optimizers by one norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sharded_radam.gradients.measures import check_norm
from sharded_radam.optimizer import ShardedRAdam


@torch.no_grad()
def clip_grad_norm_(
    optimizers: Iterable[torch.optim.Optimizer],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale the gradients of all optimizers so that their norm, taken as one vector, is ``max_norm`` at most.

    Collective if one of them has ``shard_gradients``. The norm is torch's to the bit where none has.

    Args:
        optimizers: ShardedRAdam, and others whose gradients are whole on every rank.
        max_norm: of all gradients together.
        norm_type: above 0, or inf.
        error_if_nonfinite: raise if the norm is inf or nan.

    Returns:
        The norm before, 0-d, equal on all ranks.

    Raises:
        RuntimeError: on all ranks, with ``error_if_nonfinite``, if the norm is inf or nan.
    """
    every = list(optimizers)
    sharded = [each for each in every if isinstance(each, ShardedRAdam) and each.shards_gradients]
    plain = [
        param
        for each in every
        if each not in sharded
        for group in each.param_groups
        for param in group["params"]
        if param.grad is not None
    ]
    norms = [each.grad_norm(norm_type) for each in sharded]
    whole = nn.utils.get_total_norm([param.grad for param in plain], norm_type)
    total: Tensor = whole
    if norms:
        total = torch.linalg.vector_norm(torch.stack([*norms, whole.to(norms[0])]), norm_type)
    check_norm(total, norm_type, error_if_nonfinite)
    for each in sharded:
        each.clip_grads_with_norm_(max_norm, total)
    nn.utils.clip_grads_with_norm_(plain, max_norm, total)
    return total
