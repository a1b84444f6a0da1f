"""Uneven inputs: what ranks do in ``torch.distributed.algorithms.Join`` that have run out of data."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Join, JoinHook, _JoinConfig

from sharded_radam.buckets.memory import dim_order, flatten, unflatten
from sharded_radam.build import Shards
from sharded_radam.transport import Transport

BATCH_BYTES = 25 * 2**20
"""Gradients travel in messages of about this size."""


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
    news_of_first = heard[active[0]]
    if shards.is_joined:
        for ours, theirs in zip(param_groups, news_of_first[0], strict=True):
            ours.update(theirs)
    _broadcast_gradients(params, news_of_first[1], transport, active[0], shards.is_joined)


def _broadcast_gradients(
    params: Sequence[Tensor], has_grad: Sequence[bool], transport: Transport, source: int, is_taken: bool
) -> None:
    """Collective: those of one rank, some MiB at a time; who has its own gradients lets the others' go."""
    for batch in _batches([param for param, has in zip(params, has_grad, strict=True) if has]):
        numels = [param.numel() for param in batch]
        if transport.rank == source:
            message = torch.cat([flatten(param.grad, dim_order(param)) for param in batch if param.grad is not None])
        else:
            message = batch[0].new_empty(sum(numels))
        transport.broadcast(message, source)
        if is_taken:
            for param, part in zip(batch, torch.split(message, numels), strict=True):
                param.grad = unflatten(part.clone(), param.shape, dim_order(param))


def _batches(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Of parameters of one dtype and device, of about BATCH_BYTES."""
    waiting: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    num_bytes: Counter[tuple[torch.dtype, torch.device]] = Counter()
    for param in params:
        kind = (param.dtype, param.device)
        waiting[kind].append(param)
        num_bytes[kind] += param.nbytes
        if num_bytes[kind] >= BATCH_BYTES:
            del num_bytes[kind]
            yield waiting.pop(kind)
    yield from waiting.values()
