"""RAdam with its state sharded over data-parallel ranks, for PyTorch."""

from sharded_radam.amp import GradScaler
from sharded_radam.checkpoint import CheckpointError, CheckpointManager
from sharded_radam.optimizer import ShardedRAdam
from sharded_radam.overview import Stats

__all__ = ["CheckpointError", "CheckpointManager", "GradScaler", "ShardedRAdam", "Stats", "__version__"]

__version__ = "0.1.0"
