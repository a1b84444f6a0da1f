"""What processes of tests have imported when they begin; a collector that looks at all of it takes a tenth of the time."""

import gc
import importlib
from contextlib import suppress

for name in (
    "pytest",
    "numpy",
    "torch._dynamo",
    "torch.nn.parallel",
    "torch.distributed.checkpoint.state_dict",
    "sharded_radam.checkpoint",
    "sharded_radam.cli",
    "sharded_radam.planning",
):
    with suppress(ImportError):
        importlib.import_module(name)
gc.collect()
gc.freeze()
