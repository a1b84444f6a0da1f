"""Uneven inputs: what ranks do in ``torch.distributed.algorithms.Join`` that have run out of data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Join, JoinHook, _JoinConfig

from sharded_radam.buckets.memory import dim_order, flatten
from sharded_radam.build import Shards
from sharded_radam.transport import Transport


class ShadowSteps(JoinHook):
    """A joined rank steps along: the others cannot update the shards whose moments only it has.

    Args:
        optimizer: a Joinable.
        shards: of this rank.
    """

    def __init__(self, optimizer: Any, shards: Shards) -> None:
        self.optimizer = optimizer
        self.shards = shards

    def main_hook(self) -> None:
        """Step without data of one's own; called by Join while another rank has data."""
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        own = [param.grad for param in params]
        for param in params:
            param.grad = None  # a new tensor takes what another rank has
        self.shards.is_joined = True
        try:
            self.optimizer.step()
        finally:
            self.shards.is_joined = False
            for param, grad in zip(params, own, strict=True):
                param.grad = grad

    def post_hook(self, is_last_joiner: bool) -> None:
        """Leave Join, which leaves it enabled itself: later steps would go on asking who has data."""
        self.optimizer._join_config = _JoinConfig(
            enable=False, throw_on_early_termination=False, is_first_joinable=False
        )


def share_gradients(optimizer: Any, shards: Shards) -> None:
    """Collective in Join: give joined ranks the gradients and hyperparameters of the first rank that still has data.

    DistributedDataParallel averages gradients over the ranks with data only; a joined rank has those of its last own
    iteration, and its scheduler stands still. Nothing is sent while all ranks have data, beyond who has.

    Args:
        optimizer: a Joinable.
        shards: of this rank.
    """
    if not shards.is_joined:
        Join.notify_join_context(optimizer)
    if not optimizer._join_config.enable:
        return
    param_groups, transport = optimizer.param_groups, shards.transport
    groups = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g in param_groups]
    params = [param for group in param_groups for param in group["params"]]
    news = None if shards.is_joined else (groups, [param.grad is not None for param in params])
    heard = transport.all_gather_objects(news)
    active = [rank for rank, item in enumerate(heard) if item is not None]
    if not active or len(active) == transport.world_size:
        return
    if shards.is_joined:
        _take(param_groups, params, heard[active[0]], transport, active[0])
    elif transport.rank == active[0]:
        for param in (param for param in params if param.grad is not None):
            for rank in (rank for rank, item in enumerate(heard) if item is None):
                transport.send(flatten(param.grad, dim_order(param)).contiguous(), rank)


def _take(
    param_groups: list[dict[str, Any]], params: list[Tensor], news: Any, transport: Transport, source: int
) -> None:
    groups, has_grad = news
    for ours, theirs in zip(param_groups, groups, strict=True):
        ours.update(theirs)
    for param, wanted in zip(params, has_grad, strict=True):
        if not wanted:
            param.grad = None
            continue
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        received = torch.empty(param.numel(), dtype=param.dtype, device=param.device)
        transport.receive(received, source)
        flat = flatten(param.grad, dim_order(param))
        if flat.data_ptr() == param.grad.data_ptr():
            flat.copy_(received)
        else:
            param.grad = received.view(param.shape)
