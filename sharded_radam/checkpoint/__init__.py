"""Checkpoints: directories in the format of torch.distributed.checkpoint that are atomic, checked, and for any world
size. ``ShardedRAdam.save`` and ``load`` do one optimizer, :class:`CheckpointManager` a whole training.

::

    the user's            manager                 which checkpoints there are, and which of them stay (retention)
    a whole training      training                its objects (objects), and what each rank has (rank_values)
    optimizer, model      optimizer, model        what is saved, under which names; what fits of it (matching)
    save                  save                    what is compared (draft), which elements a rank writes (parts)
    load                  load                    read by all ranks, or by none; what may fail is put back (undo)
    files                 format/                 chunks with checksums; what is where; rename when complete
    conversions           convert/                what one process makes of a checkpoint

All ranks succeed, or all fail with the same words: that is ``sharded_radam.store.agreement``.
"""

from sharded_radam.checkpoint.manager import CheckpointManager
from sharded_radam.checkpoint.report import LoadReport
from sharded_radam.checkpoint.save import SaveReport
from sharded_radam.checkpoint.training import Restored
from sharded_radam.store.agreement import CheckpointError

__all__ = ["CheckpointError", "CheckpointManager", "LoadReport", "Restored", "SaveReport"]
