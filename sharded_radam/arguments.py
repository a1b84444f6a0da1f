"""Arguments of ShardedRAdam beside RAdam's: which exclude each other, must be equal on all ranks, or are kept."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

REDUCE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_DEBUG_CHECK_STEPS = 100
"""How often replicas are compared under TORCH_DISTRIBUTED_DEBUG."""


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments that RAdam does not have; they are the optimizer's, and no group's."""

    fused: bool | None
    bucket_cap_mb: float | None
    as_views: bool
    shard_gradients: bool
    check_gradients: bool
    check_replicas: int
    compiled: bool = False
    reduce_dtype: torch.dtype | None = None

    def __setstate__(self, state: list[Any]) -> None:
        """Take what was pickled, by a version that had fewer of them, too."""
        missing = [field.default for field in fields(self)[len(state) :]]
        for field, value in zip(fields(self), [*state, *missing], strict=True):
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True, slots=True)
class Arguments:
    """Arguments of ShardedRAdam, as they were passed; not those that RAdam checks."""

    process_group: dist.ProcessGroup | None
    mesh: Any
    bucket_cap_mb: float | None
    fused: bool | None
    compiled: bool
    foreach: bool | None
    differentiable: bool
    parameters_as_bucket_view: bool
    transport: str | None
    shard_gradients: bool
    check_gradients: bool
    check_replicas: int
    share_parameters: bool
    reduce_dtype: torch.dtype | None
    module: nn.Module | None

    def check(self, world_size: int) -> None:
        """Raise ValueError for what is out of range, or excludes each other."""
        if self.bucket_cap_mb is not None and not 0 < self.bucket_cap_mb < math.inf:
            raise ValueError(f"bucket_cap_mb={self.bucket_cap_mb}: expected a size in MiB, above 0 and finite")
        if not isinstance(self._check_replicas(), int) or self._check_replicas() < 0:
            raise ValueError(f"check_replicas={self.check_replicas}: expected a number of steps, or 0")
        self._check_gradients()
        if self.share_parameters and not self.parameters_as_bucket_view:
            raise ValueError("share_parameters=True excludes parameters_as_bucket_view=False")
        self._check_engine()
        if self.differentiable and (self.shard_gradients or self.share_parameters):
            raise ValueError("differentiable=True excludes shard_gradients=True and share_parameters=True")
        if self.differentiable and world_size > 1:
            raise ValueError(
                f"differentiable=True is for one rank, and here are {world_size}: autograd cannot run through a step "
                "whose parts other ranks take. Expected differentiable=False, or process_group= with this rank alone, "
                "as torch.distributed.new_subgroups(1) makes it: the whole state is then on every rank, as RAdam's"
            )

    def _check_gradients(self) -> None:
        if (self.check_gradients or self.module is not None) and not self.shard_gradients:
            raise ValueError("check_gradients=True and module= are for shard_gradients=True")
        if self.reduce_dtype is not None and not self.shard_gradients:
            raise ValueError(
                "reduce_dtype= is for shard_gradients=True: DistributedDataParallel has communication hooks"
            )
        if self.reduce_dtype not in (None, *REDUCE_DTYPES):
            raise ValueError(f"reduce_dtype={self.reduce_dtype!r}: expected None or one of {REDUCE_DTYPES}")

    def _check_engine(self) -> None:
        if self.fused and (self.foreach or self.differentiable):
            raise ValueError("fused=True excludes foreach=True and differentiable=True: choose one of them")
        if self.compiled and (self.fused or self.foreach or self.differentiable):
            raise ValueError(
                "compiled=True excludes fused=True, foreach=True and differentiable=True: choose one of them"
            )
        if self.differentiable and self.foreach:
            raise ValueError("differentiable=True excludes foreach=True: foreach operations don't support autograd")

    def _check_replicas(self) -> int:
        is_debug = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF").upper() in ("INFO", "DETAIL")
        return _DEBUG_CHECK_STEPS if is_debug and not self.check_replicas else self.check_replicas

    def options(self) -> Options:
        """Those that the optimizer keeps."""
        as_views = self.parameters_as_bucket_view and not self.differentiable
        interval, gradients = self._check_replicas(), (self.shard_gradients, self.check_gradients)
        others = (bool(self.compiled), self.reduce_dtype)
        return Options(self.fused, self.bucket_cap_mb, as_views, *gradients, interval, *others)

    def offer(self) -> dict[str, Any]:
        """What must be equal on all ranks, as JSON values."""
        return {
            "bucket_cap_mb": None if self.bucket_cap_mb is None else float(self.bucket_cap_mb),
            "fused": self.fused and bool(self.fused),
            "compiled": bool(self.compiled),
            "parameters_as_bucket_view": bool(self.parameters_as_bucket_view),
            "transport": self.transport,
            "shard_gradients": bool(self.shard_gradients),
            "check_gradients": bool(self.check_gradients),
            "reduce_dtype": None if self.reduce_dtype is None else str(self.reduce_dtype),
            "check_replicas": self._check_replicas(),
            "share_parameters": bool(self.share_parameters),
            "module": None if self.module is None else "a model",
        }
