"""The bytes that torch's operations move, counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_OVERWRITE = re.compile(r"aten::(_foreach_)?(copy|fill|zero)_$")
_ONLY_SHAPES = re.compile(r"aten::(new_.*|.*_like|empty.*|zeros|ones|full)$")
_UNDEFINED = re.compile(r"aten::(new_)?empty.*")


def bytes_of(action: Callable[[], object]) -> int:
    """What the operations of ``action`` read and write: each of them all its inputs and outputs, an input once."""
    with _Traffic() as traffic:  # type: ignore[no-untyped-call]
        action()
    moved: int = traffic.moved
    return moved


class _Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema = func._schema
        given = zip(schema.arguments, args, strict=False)
        named = ((each, kwargs[each.name]) for each in schema.arguments if each.name in kwargs)
        read: dict[int, int] = {}
        for argument, value in (*given, *named):
            alias = argument.alias_info
            is_written = alias is not None and alias.is_write
            if is_written and argument.name != "grads":  # fused optimizers only read them, unless they unscale
                self.moved += sum(tensor.nbytes for tensor in _tensors(value))
            is_read = not _ONLY_SHAPES.match(schema.name) if alias is None else is_written and not argument.is_out
            if is_read and not (is_written and _OVERWRITE.match(schema.name)):
                read |= {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(value)}
        self.moved += sum(read.values())
        if not _UNDEFINED.match(schema.name):
            results = (result,) if len(schema.returns) == 1 else result
            for returned, value in zip(schema.returns, results or (), strict=False):
                self.moved += sum(tensor.nbytes for tensor in _tensors(value)) if returned.alias_info is None else 0
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    leaves: list[Any] = [*value] if isinstance(value, list | tuple) else [value]
    return (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
