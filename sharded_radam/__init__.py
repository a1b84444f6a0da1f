"""RAdam with its state sharded over data-parallel ranks, for PyTorch."""

import sharded_radam.compat  # noqa: F401  (first, since it says so if torch is too old)
from sharded_radam.checkpoint import CheckpointError, CheckpointManager
from sharded_radam.clipping import clip_grad_norm_
from sharded_radam.grad_scaler import GradScaler
from sharded_radam.optimizer import ShardedRAdam
from sharded_radam.stats import Stats
from sharded_radam.store.mesh import make_mesh
from sharded_radam.version import __version__

__all__ = [
    "CheckpointError",
    "CheckpointManager",
    "GradScaler",
    "ShardedRAdam",
    "Stats",
    "__version__",
    "clip_grad_norm_",
    "make_mesh",
]
