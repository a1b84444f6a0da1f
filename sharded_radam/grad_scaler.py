"""Gradient scaling with sharded gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sharded_radam.optimizer import ShardedRAdam


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` for ranks that may have no gradient at all in a step.

    With ``ShardedRAdam(shard_gradients=True)`` both unscale the shards, and an inf or nan of any rank is one of all
    ranks, so all skip the step and lower the scale together; but torch's raises on a rank that has no gradient. For
    other optimizers it is torch's.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        if isinstance(optimizer, ShardedRAdam) and optimizer.shards_gradients:
            return {found_inf.device: optimizer.unscale_gradients_(inv_scale, found_inf)}
        found: dict[torch.device, Tensor] = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        return found
