"""Writes small files as this Python and this torch write them; test_versions.py, under tests/, reads all of them.

From the root of the checkout, with each Python and torch: ``PYTHONPATH=. python tests/data/write.py``. It makes
``tests/data/PYTHON-TORCH.tar.xz`` with: ``dcp``, a checkpoint by torch.distributed.checkpoint; ``ours``, one by
ShardedRAdam; and ``protocol2.pickle`` to ``protocol5.pickle``, torch's objects of a ``.metadata`` by each protocol.
"""

from __future__ import annotations

import pickle
import platform
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import metadata as torchs
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict_saver import save

from sharded_radam import ShardedRAdam


def state_dict() -> dict[str, Any]:
    """What is in ``dcp``."""
    moments = {"exp_avg": torch.arange(6.0).view(2, 3).bfloat16(), "step": torch.tensor(7.0)}
    groups = [{"lr": 0.5, "betas": (0.9, 0.999), "params": ["a.weight"]}]
    return {
        "model": {"a.weight": torch.arange(6.0).view(2, 3)},
        "optim": {"state": {"a.weight": moments}, "param_groups": groups},
    }


def trained() -> tuple[nn.Module, ShardedRAdam]:
    """What is in ``ours``: 3 steps of constant gradients."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, 1.0)
    optimizer = ShardedRAdam(model.named_parameters(), lr=0.25, foreach=True)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.full_like(param, 0.5)
        optimizer.step()
    return model, optimizer


def torchs_metadata() -> torchs.Metadata:
    """What is in ``protocol2.pickle`` and so on: a tensor in two boxes, a value, and what the format knows beside."""
    chunks = [
        torchs.ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([1, 300])) for at in range(2)
    ]  # 300: an integer of two bytes
    tensor = torchs.TensorStorageMetadata(
        torchs.TensorProperties(torch.float32, memory_format=torch.channels_last), torch.Size([2, 300]), chunks
    )
    stored = {
        torchs.MetadataIndex("w", chunk.offsets, at): _StorageInfo("__0_0.distcp", at * 70000, 70000)
        for at, chunk in enumerate(chunks)
    }
    stored[torchs.MetadataIndex("v")] = _StorageInfo("__1_0.distcp", 0, 2**40)
    return torchs.Metadata(
        {"w": tensor, "v": torchs.BytesStorageMetadata()},
        planner_data={"w": ("w",), "v": ("groups", 0, "v")},
        storage_data=stored,
        storage_meta=torchs.StorageMeta(Path("a/b"), "x"),
    )


def main() -> None:
    """Write all of it."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        folder = Path(name)
        save(state_dict(), checkpoint_id=folder / "dcp")
        trained()[1].save(folder / "ours")
        for protocol in range(2, 6):
            (folder / f"protocol{protocol}.pickle").write_bytes(pickle.dumps(torchs_metadata(), protocol))
        archive = Path(__file__).parent / f"{platform.python_version()}-{torch.__version__.partition('+')[0]}"
        print(shutil.make_archive(str(archive), "xztar", folder))


if __name__ == "__main__":
    main()
