"""Optimizers that are no ShardedRAdam: torch's own and their like, which every rank has as a whole; rank 0 writes them.

They are saved under the same names as ours, so that torch.distributed.checkpoint reads them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import Names, read_nested
from sharded_radam.checkpoint.format.reading import Target
from sharded_radam.checkpoint.format.saved_optimizer import find_optimizer
from sharded_radam.checkpoint.matching import match_groups, names_in, names_of
from sharded_radam.checkpoint.parts import OfRank0, Opaque
from sharded_radam.checkpoint.report import LoadReport, expect_all
from sharded_radam.checkpoint.undo import PutBack, remember_object, reset
from sharded_radam.state.dicts import pack_groups
from sharded_radam.state.values import without_numpy

_OTHER = "other"
"""The key of what is neither a parameter's state nor a group."""


class OtherPlan(NamedTuple):
    """A load of which all is decided: what to read, and the state dict that it makes."""

    targets: list[Target]
    state_dict: dict[str, Any]
    report: LoadReport


@dataclass(frozen=True, slots=True)
class OtherPart:
    """What a checkpoint needs of such an optimizer, and of the model whose parameters' names are to be used."""

    optimizer: Any
    model: nn.Module | None

    def content(self) -> dict[str, Any]:
        """The state, as live tensors, in the form of torch's ``get_optimizer_state_dict``, or of ``state_dict``.

        Raises:
            ValueError: the state is sharded.
            TypeError: a key of it is no text.
        """
        others = dict(self.optimizer.state_dict())
        state, groups = others.pop("state"), others.pop("param_groups")
        names, ours = names_of(self._groups, self.model), self._groups
        name_of = {
            number: names[param][0]
            for packed, group in zip(groups, ours, strict=True)
            for number, param in zip(packed["params"], group["params"], strict=True)
        }
        if unnamed := {key: value for key, value in state.items() if key not in name_of}:
            others["state"] = unnamed
        kept = [_kept({key: value for key, value in group.items() if key != "params"}) for group in groups]
        for group, packed in zip(kept, groups, strict=True):
            numbers = packed["params"]
            group["params"] = OfRank0([name_of[number] for number in numbers])
        named = {name_of[key]: _kept(values) for key, values in state.items() if key in name_of}
        return {"state": named, "param_groups": kept, **({_OTHER: Opaque(others)} if others else {})}

    @property
    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    # Loading

    def prepare(self, index: Index, files: DataFiles, strict: bool, prefix: str) -> OtherPlan:
        """Match names, and make memory for the tensors.

        Raises:
            ValueError: there is no optimizer in the checkpoint; or names, shapes or groups differ, and ``strict``.
        """
        saved = find_optimizer(index, files, prefix)
        names = names_in(saved, self._groups, self.model)
        groups, differing = match_groups(index, saved, self._groups, names, files)
        packed = pack_groups(groups)
        numbered = {
            number: param
            for group, ours in zip(packed, groups, strict=True)
            for number, param in zip(group["params"], ours["params"], strict=True)
        }
        key = f"{prefix}.{_OTHER}"
        content: dict[str, Any] = files.load(index.objects[key], key) if key in index.objects else {}
        targets: list[Target] = []
        state: dict[Any, Any] = dict(content.get("state", {}))
        missing, mismatched, loaded = [], [*differing], 0
        for number, param in numbered.items():
            name = next((name for name in names[param] if name in saved.names), None)
            present = self.optimizer.state.get(param, {})
            kinds = saved.state.get(name or "", {})
            if name is None and param.requires_grad:
                missing.append(names[param][0])
            if problem := _problem(index, kinds, present):
                mismatched.append(f"{name} ({problem})")
            fits = name is not None and not problem
            loaded += fits
            values = _memory(index, kinds, param, files, targets) if fits else present  # what does not fit stays
            if values:
                state[number] = values
        numel = sum(target.memory.numel() for target in targets if target.memory.dim())
        unexpected = tuple(sorted(saved.names.difference(*names.values())))
        world_size = index.info.get("world_size")
        report = LoadReport(loaded, len(numbered), numel, 0, world_size, tuple(missing), unexpected, tuple(mismatched))
        expect_all(report, strict)
        return OtherPlan(targets, {**content, "state": state, "param_groups": packed}, report)

    def remember(self) -> PutBack:
        """What puts the optimizer back: without copies, since torch's ``load_state_dict`` exchanges tensors."""
        if type(self.optimizer).load_state_dict is not Optimizer.load_state_dict:
            return remember_object(self.optimizer)
        attributes = dict(vars(self.optimizer))
        groups = [(group, dict(group)) for group in self._groups]
        state = {param: dict(values) for param, values in self.optimizer.state.items()}

        def put_back() -> None:
            reset(vars(self.optimizer), attributes)
            for group, old in groups:
                reset(group, old)
            reset(self.optimizer.state, state)

        return put_back

    def load(self, plan: OtherPlan) -> LoadReport:
        """Load what was read; hooks, and other optimizers' own ways, may fail."""
        self.optimizer.load_state_dict(plan.state_dict)
        counts = [values.get("step", 0) for values in plan.state_dict["state"].values() if isinstance(values, dict)]
        return replace(plan.report, step=max((int(count) for count in counts), default=0))


def _kept(values: Mapping[Any, Any]) -> dict[str, Any]:
    """All of it is rank 0's."""
    for key, value in values.items():
        if not isinstance(key, str):
            raise TypeError(f"{key!r} in the state of an optimizer: expected texts as keys")
        if is_traceable_wrapper_subclass(value):
            raise ValueError(f"{key} of an optimizer is sharded; expected one that every rank has as a whole")
    return {key: OfRank0(without_numpy(value, key)) for key, value in values.items()}


def _problem(index: Index, kinds: Mapping[str, Names], present: Mapping[str, Any]) -> str | None:
    """Why saved state does not fit the state that there is."""
    for kind, names in kinds.items():
        ours, theirs = present.get(kind), index.tensors.get(names.get((), ""))
        if isinstance(ours, Tensor) and theirs is not None and theirs.shape != tuple(ours.shape):
            return f"{kind} has shape {theirs.shape} in the checkpoint, expected {tuple(ours.shape)}"
    return None


def _memory(
    index: Index, kinds: Mapping[str, Names], param: Tensor, files: DataFiles, targets: list[Target]
) -> dict[str, Any]:
    """State of a parameter, of which the tensors are still to be read: they are added to ``targets``."""
    values: dict[str, Any] = {}
    for kind, names in kinds.items():
        if (key := names.get((), "")) not in index.tensors:
            values[kind] = read_nested(index, names, files)
            continue
        saved = index.tensors[key]
        is_like = saved.shape == tuple(param.shape)  # then with its strides
        values[kind] = torch.empty_like(param if is_like else torch.empty(saved.shape), dtype=saved.dtype, device="cpu")
        targets.append(Target(key, (0,) * len(saved.shape), values[kind]))
    return values
