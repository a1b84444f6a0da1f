"""Checkpoints: directories in the format of torch.distributed.checkpoint that are atomic, checked, and for any world
size. ``ShardedRAdam.save`` and ``load`` do one optimizer, :class:`CheckpointManager` a whole training.

::

    a whole training      manager, training       several models, optimizers and schedulers
    optimizer, model      optimizer, model        what is saved, under which names
    parts                 parts                   which elements this rank writes
    agreement             agreement               all ranks succeed, or all fail with the same words
    files                 format/                 chunks with checksums; what is where; rename when complete
    conversions           convert/                what one process makes of a checkpoint
"""

from sharded_radam.checkpoint.manager import CheckpointManager
from sharded_radam.checkpoint.report import LoadReport
from sharded_radam.checkpoint.save import SaveReport
from sharded_radam.checkpoint.training import Restored
from sharded_radam.store.agreement import CheckpointError

__all__ = ["CheckpointError", "CheckpointManager", "LoadReport", "Restored", "SaveReport"]
