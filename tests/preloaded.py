"""What processes of tests have imported when they begin; no garbage is looked for in it, which would cost a tenth."""

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
