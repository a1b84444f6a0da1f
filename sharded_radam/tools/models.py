"""Names, shapes and dtypes of a model's parameters, without its weights."""

from __future__ import annotations

import importlib
import json
import os
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharded_radam.buckets.memory import dim_order
from sharded_radam.plan import ParamSpec

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_LARGEST_HEADER = 100 * 2**20


def read_model(source: str, dtype: torch.dtype | None = None, device_type: str = "cuda") -> list[ParamSpec]:
    """The parameters of a model.

    Args:
        source: ``package.module:function``, called without arguments on the meta device, which returns a module; a
            ``.safetensors`` file, or the index of several; a ``config.json`` of Hugging Face, or its folder (needs
            transformers); or a number of elements, such as ``124e6`` or ``7B``.
        dtype: instead of their own.
        device_type: where they will be.

    Raises:
        ValueError: none of these, or what it says of its parameters cannot be used.
        OSError: the file cannot be read.
    """
    path = Path(source)
    if path.is_dir() and (path / "config.json").exists():
        path /= "config.json"
    number = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)([kmbgt]?)", source.strip(), re.IGNORECASE)
    if path.suffix == ".safetensors":
        found = _of_shapes(_read_header(path), dtype, device_type)
    elif path.name.endswith(".safetensors.index.json"):
        found = _of_index(path, dtype, device_type)
    elif path.suffix == ".json":
        found = _of_module(_from_config(path), dtype, device_type)
    elif number:
        numel = round(float(number[1]) * _UNITS[number[2].lower()])
        found = [ParamSpec("all", (numel,), (0,), dtype or torch.float32, device_type, 0)]
    elif ":" in source:
        found = _of_module(_call(source), dtype, device_type)
    else:
        raise ValueError(
            f"model '{source}': expected package.module:function, a .safetensors file, a config.json, or a number of "
            "elements such as 124e6 or 7B"
        )
    if not sum(param.numel for param in found):
        raise ValueError(f"model '{source}' has no parameters that can be trained")
    return found


def _call(source: str) -> nn.Module:
    module_name, _, attribute = source.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            target = getattr(target, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model '{source}': {error}") from error
    with torch.device("meta"):
        made = target() if callable(target) and not isinstance(target, nn.Module) else target
    if not isinstance(made, nn.Module):
        raise ValueError(f"model '{source}' returned a {type(made).__name__}, expected a torch.nn.Module")
    return made


def _from_config(path: Path) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{path}: Hugging Face's configs need transformers: pip install 'sharded_radam[hf]'"
        ) from error
    config: Any = transformers.AutoConfig.from_pretrained(path.parent if path.name == "config.json" else path)
    name = (config.architectures or ["AutoModel"])[0]
    architecture: Any = getattr(transformers, name, None)
    if architecture is None:
        raise ValueError(f"{path}: transformers {transformers.__version__} does not know the architecture {name}")
    with torch.device("meta"):
        made: nn.Module = architecture.from_config(config) if name == "AutoModel" else architecture(config)
    return made


def _of_module(module: nn.Module, dtype: torch.dtype | None, device_type: str) -> list[ParamSpec]:
    return [
        ParamSpec(name, tuple(param.shape), dim_order(param), dtype or param.dtype, device_type, 0)
        for name, param in module.named_parameters()
        if param.requires_grad
    ]


def _of_index(path: Path, dtype: torch.dtype | None, device_type: str) -> list[ParamSpec]:
    files = json.loads(path.read_text())["weight_map"]
    headers: dict[str, Any] = {}
    for file in dict.fromkeys(files.values()):
        headers |= _read_header(path.parent / file)
    return _of_shapes(headers, dtype, device_type)


def _read_header(path: Path) -> dict[str, Any]:
    """A safetensors file begins with 8 bytes, the length of the JSON that follows; https://huggingface.co/docs/safetensors."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = file.read(length) if 0 < length < _LARGEST_HEADER else b""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a safetensors file") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file")
    return header


def _of_shapes(header: Mapping[str, Any], dtype: torch.dtype | None, device_type: str) -> list[ParamSpec]:
    """Tensors of floating point; which of them are buffers, a file does not say."""
    found = []
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] in _SAFETENSORS_DTYPES:
            shape = tuple(entry["shape"])
            own = dtype or _SAFETENSORS_DTYPES[entry["dtype"]]
            found.append(ParamSpec(name, shape, tuple(range(len(shape))), own, device_type, 0))
    return found
