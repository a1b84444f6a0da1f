"""Checkpoints: directories in the format of torch.distributed.checkpoint that are atomic, checked, and for any world
size. ``ShardedRAdam.save`` and ``load`` do one optimizer, :class:`CheckpointManager` a whole training.

::

    a whole training      training                        several models, optimizers and schedulers
    optimizer, model      optimizer_part, model_part      what is saved, under which names
    content of a rank     contents                        which elements this rank writes
    agreement             agreement                       all ranks succeed, or all fail with the same words
    files                 files, index, directory         chunks with checksums; what is where; rename when complete
"""

from sharded_radam.checkpoint.agreement import CheckpointError
from sharded_radam.checkpoint.manager import CheckpointManager
from sharded_radam.checkpoint.optimizer_part import LoadReport
from sharded_radam.checkpoint.saving import SaveReport
from sharded_radam.checkpoint.training import Restored

__all__ = ["CheckpointError", "CheckpointManager", "LoadReport", "Restored", "SaveReport"]
