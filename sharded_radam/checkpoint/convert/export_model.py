"""The weights of a checkpoint as one file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_radam.checkpoint.convert.output import (
    Later,
    Progress,
    check_free,
    saved_tensor,
    write_new,
    write_safetensors,
    write_torch,
)
from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import read_nested
from sharded_radam.checkpoint.format.reading import fill_tensor, read_tensor
from sharded_radam.checkpoint.format.saved_optimizer import find_optimizer, list_prefixes
from sharded_radam.checkpoint.format.verification import check_coverage
from sharded_radam.checkpoint.model import EXTRA_STATE, saved_model
from sharded_radam.dtypes import HALF_DTYPES


def export_model(index: Index, output: Path, fp32: bool, progress: Progress) -> dict[str, int]:
    """Write the weights of a checkpoint as one file: safetensors if its name ends so, else as torch.save does.

    A safetensors file has tensors only; the other one has extra state, too.

    Args:
        index: of the checkpoint.
        output: the file; it must not exist.
        fp32: whether half-precision tensors become fp32 ones: the masters that the optimizer was saved with; without
            these, what they are now.
        progress: is told numbers of bytes.

    Returns:
        Numbers of tensors, of those from masters, and of bytes.

    Raises:
        ValueError: there is no model, it is not complete, or the file exists.
    """
    check_free(output)
    index.check_files()
    check_coverage(index.tensors)
    model = saved_model(index)
    if not model:
        raise ValueError(f"{index.folder} has no model: it was saved without model=")
    with DataFiles(index.folder, progress) as files:
        masters = _masters(index, files) if fp32 else {}
        content: dict[str, Any] = {}
        for name, names in model.items():
            key = names.get((), "")
            if key not in index.tensors or name.endswith(EXTRA_STATE):
                content[name] = read_nested(index, names, files)
            elif fp32 and index.tensors[key].dtype in HALF_DTYPES:
                content[name] = _in_fp32(index, key, masters.get(key), files)
            else:
                content[name] = saved_tensor(index, key, files)
        is_safe = output.suffix == ".safetensors"
        tensors = {name: value for name, value in content.items() if isinstance(value, Later)}
        write = partial(write_safetensors, tensors=tensors) if is_safe else partial(write_torch, content=content)
        write_new(output, write)
    return {"tensors": len(tensors), "from_masters": len(masters), "bytes": output.stat().st_size}


def _masters(index: Index, files: DataFiles) -> dict[str, str]:
    """Keys of the model's tensors -> keys of their masters; a tied weight is saved once, under two names."""
    masters: dict[str, str] = {}
    for prefix in list_prefixes(index):
        group = prefix.partition(".")[2]
        for name, kinds in find_optimizer(index, files, prefix).state.items():
            master = kinds.get("master", {}).get((), "")
            for key in (f"model.{group}.{name}", f"model.{name}"):
                half, wide = index.tensors.get(key), index.tensors.get(master)
                if half is not None and wide is not None and half.shape == wide.shape:
                    masters.setdefault(key, master)
    of_boxes = {index.tensors[key].boxes: master for key, master in masters.items() if index.tensors[key].numel}
    tied = {key: of_boxes[saved.boxes] for key, saved in index.tensors.items() if saved.boxes in of_boxes}
    return {**tied, **masters}


def _in_fp32(index: Index, key: str, master: str | None, files: DataFiles) -> Later:
    """An fp32 tensor of a half-precision one: the master, wherever that is rounded to it."""
    saved = index.tensors[key]

    def fill(memory: Tensor) -> None:
        half = read_tensor(index, key, files)
        if master is None:
            memory.copy_(half)
            return
        fill_tensor(memory, index.tensors[master], master, files)
        memory.copy_(torch.where(memory.to(half.dtype) == half, memory, half.float()))

    return Later(torch.float32, saved.shape, fill)
