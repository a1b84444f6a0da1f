"""Peers as whole training iterations: a model, what synchronises its gradients, and its optimizer."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import peers
import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import ShardedRAdam

LR = 1e-3
ZERO1 = "DDP + sharded_radam"
ZERO2 = "sharded_radam, shard_gradients"
ZERO2_GLOO = "sharded_radam, shard_gradients, transport gloo"
ONE_COPY = "sharded_radam, shard_gradients, share_parameters"
ZERO2_MESH = "sharded_radam, shard_gradients, mesh of 2 replicas"
DDP = "DDP + RAdam foreach"
ZERO = "DDP + ZeroRedundancyOptimizer"
FSDP = "FSDP2 + RAdam foreach"
DEEPSPEED = "DeepSpeed ZeRO-2 + RAdam foreach"
COMPILED = "sharded_radam, shard_gradients, compiled"
OURS = (ZERO1, ZERO2, ZERO2_GLOO, ONE_COPY, ZERO2_MESH, COMPILED)


def have_deepspeed() -> bool:
    """Whether DeepSpeed is installed (``pip install deepspeed``); it is no dependency of the benchmarks."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if not torch.cuda.is_available() else "cuda")
    return importlib.util.find_spec("deepspeed") is not None


def names(world_size: int, dtype: torch.dtype = torch.float32) -> list[str]:
    """The peers that can run here; the first is what the others' times are divided by."""
    if dtype == torch.bfloat16:
        return [COMPILED, ZERO2, *((ZERO, FSDP) if world_size > 1 else ()), DDP]
    if world_size == 1:
        return [ZERO2, ZERO1, DDP]
    found = [ZERO2, ONE_COPY, ZERO2_GLOO, ZERO1, ZERO, DDP, FSDP]
    if torch.cuda.is_available():
        found = [ZERO2, ZERO1, ZERO, DDP, FSDP]
    if world_size >= 4 and world_size % 2 == 0:
        found.insert(1, ZERO2_MESH)
    return [*found, DEEPSPEED] if have_deepspeed() else found


class Trainer:
    """One iteration of a peer: gradients, their synchronisation, and the step.

    Args:
        name: of the peer.
        make_model: returns the model, equal on all ranks, whose forward returns the loss.
        blocks: the modules of a model that FSDP2 is to shard one by one.
        policy: in which dtypes FSDP2 computes and reduces; that of the parameters if None.
    """

    def __init__(
        self,
        name: str,
        make_model: Callable[[], nn.Module],
        blocks: Callable[[nn.Module], list[nn.Module]],
        policy: MixedPrecisionPolicy | None = None,
    ) -> None:
        self.name = name
        model = make_model()
        self.engine: Any = None
        if name == DEEPSPEED:
            self.model, self.optimizer = self._deepspeed(model)
            return
        if name == FSDP:
            mesh = init_device_mesh(
                "cuda" if torch.cuda.is_available() else "cpu", (torch.distributed.get_world_size(),)
            )
            for module in (*blocks(model), model):
                fully_shard(module, mesh=mesh, mp_policy=policy or MixedPrecisionPolicy())
        elif name in (ZERO1, ZERO, DDP):
            model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self.model = model
        self.optimizer = self._optimizer(name, model)

    def _optimizer(self, name: str, model: nn.Module) -> torch.optim.Optimizer:
        params = model.parameters()
        if name in OURS:
            transport = "gloo" if name == ZERO2_GLOO else None
            options: dict[str, Any] = {
                "shard_gradients": name != ZERO1,
                "share_parameters": name == ONE_COPY,
                "compiled": name == COMPILED,
            }
            if name == ZERO2_MESH:
                options["mesh"] = peers.two_replicas("cuda" if torch.cuda.is_available() else "cpu")
            return ShardedRAdam(params, lr=LR, transport=transport, **options)
        if name == ZERO:
            options = {"parameters_as_bucket_view": True, "lr": LR, "foreach": True}
            return ZeroRedundancyOptimizer(params, torch.optim.RAdam, **options)
        return torch.optim.RAdam(params, lr=LR, foreach=True)

    def _deepspeed(self, model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        deepspeed = importlib.import_module("deepspeed")
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        radam = torch.optim.RAdam(model.parameters(), lr=LR, foreach=True)
        self.engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=radam, config=config)
        return self.engine, optimizer

    def iterate(self, *inputs: Tensor) -> Tensor:
        """Forward, backward with synchronisation, step."""
        if self.engine is not None:
            loss: Tensor = self.engine(*inputs)
            self.engine.backward(loss)
            self.engine.step()
            return loss.detach()
        with record_function("forward"):
            loss = self.model(*inputs)
        with record_function("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with record_function("step"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()
