"""RAdam with its state sharded over data-parallel ranks, for PyTorch."""

from sharded_radam.amp import GradScaler
from sharded_radam.checkpoint import CheckpointError, CheckpointManager
from sharded_radam.optimizer import ShardedRAdam
from sharded_radam.overview import Stats
from sharded_radam.version import __version__

__all__ = ["CheckpointError", "CheckpointManager", "GradScaler", "ShardedRAdam", "Stats", "__version__"]
