"""The state of a ShardedRAdam in a checkpoint.

All is matched by the parameters' names, or by their position where neither side has names, as torch does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sharded_radam.buckets.flat import Flat
from sharded_radam.buckets.memory import is_zero
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import Names, read_nested
from sharded_radam.checkpoint.format.reading import Target, read_value
from sharded_radam.checkpoint.format.saved_optimizer import (
    SavedOptimizer,
    differing_options,
    find_optimizer,
    read_options,
)
from sharded_radam.checkpoint.parts import OfRank0
from sharded_radam.replicas import Facts, facts
from sharded_radam.state.dicts import Entry, export_step, pack_groups, plain_name, users_own
from sharded_radam.state.values import is_dense_tensor

_SHOWN = 10


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: parameters found of all that there are, elements of state, and what the checkpoint says.

    ``from_masters``: how many parameters, not of half precision here, have the saved fp32 masters as their weights.
    """

    loaded: int
    parameters: int
    numel: int
    step: int
    world_size: int | None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    from_masters: int = 0

    def __str__(self) -> str:
        saved_at = f"saved at world size {self.world_size}" if self.world_size else "saved by torch"
        found = f"{self.loaded}/{self.parameters} parameters, {self.numel / 1e6:.4g} M elements, step {self.step}"
        masters = [f"weights of {self.from_masters} parameters from fp32 masters"] if self.from_masters else []
        return "; ".join([f"{found}, {saved_at}", *masters, *self.differences()])

    def differences(self) -> list[str]:
        """Names that are missing, unexpected or mismatched, as text."""
        return list_differences(self.missing, self.unexpected, self.mismatched)


def list_differences(missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[str]) -> list[str]:
    """What of a checkpoint does not fit, as text; nothing if all does."""
    kinds = {
        "missing in the checkpoint": missing,
        "unexpected in the checkpoint": unexpected,
        "mismatched": mismatched,
    }
    return [f"{len(names)} {what}: {some(names)}" for what, names in kinds.items() if names]


def expect_all(report: LoadReport, strict: bool) -> None:
    """Raise ValueError if something of a checkpoint does not fit, and ``strict``."""
    if strict and report.differences():
        raise ValueError(
            f"{'; '.join(report.differences())}. Expected the same parameters on both sides; strict=False loads "
            "what fits and leaves the rest of the optimizer alone"
        )


def some(names: Sequence[str]) -> str:
    """The first of many names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


class _Match(NamedTuple):
    """A slot of flat number ``flat``, and what the checkpoint has for it: kinds -> names, None if it is not there."""

    flat: int
    slot: int
    name: str
    kinds: Mapping[str, Names] | None
    problem: str | None


class _Loading(NamedTuple):
    """Memory for the state of one slot."""

    step: Tensor
    tensors: dict[str, Tensor]
    own: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A load of which all is decided: what to read, and what to do with it."""

    targets: list[Target]
    loading: dict[tuple[int, int], _Loading]
    groups: list[dict[str, Any]]
    report: LoadReport


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """What a checkpoint needs of an optimizer.

    Args:
        flats: its flats.
        param_groups: its groups.
        state: its state, of which this reads the step counters.
        model: whose parameters' names are to be used, if the optimizer was built without.
        check: raises ValueError for groups that the optimizer cannot have.
        adopt: takes new groups, and for each flat an entry for each slot, None for those to be left alone; returns how
            many weights became masters.
        has_one_copy: whether all ranks have their parameters in the same memory.
    """

    flats: Sequence[Flat]
    param_groups: Sequence[dict[str, Any]]
    state: Mapping[Tensor, Any]
    model: nn.Module | None
    check: Callable[[list[dict[str, Any]]], object]
    adopt: Callable[[list[dict[str, Any]], list[list[Entry | None]]], int]
    has_one_copy: bool = False

    # Saving

    def content(self) -> dict[str, Any]:
        """The state as range tensors, in the form of torch's ``get_optimizer_state_dict``, or of ``state_dict``."""
        names = self.names()
        groups = pack_groups(self.param_groups)
        state = {}
        for flat in self.flats:
            for slot, param in enumerate(flat.params):
                step = export_step(self.state[param]["step"]).cpu()
                state[names[param][0]] = {"step": step, **flat.range_tensors(slot), **self._users_own(param)}
        for group, ours in zip(groups, self.param_groups, strict=True):
            # Numbers become text, as they do as keys of the state: torch's converters find one by the other.
            group["params"] = [names[param][0] for param in ours["params"]]
        return {
            "state": state,
            "param_groups": [{key: OfRank0(value) for key, value in group.items()} for group in groups],
        }

    def facts(self) -> Facts:
        """What must be equal on all ranks."""
        names = {param: names[0] for param, names in self.names().items()}
        taken = {param: names[param] for flat in self.flats for param in flat.params}
        return facts(self.param_groups, self.state, taken, self.has_one_copy)

    def _users_own(self, param: Tensor) -> dict[str, Any]:
        """Tensors of the parameter's shape are equal on all ranks, as it is; of anything else rank 0's counts."""
        found = users_own(self.state[param])
        if others := [key for key in found if not isinstance(key, str)]:
            raise ValueError(f"optimizer.state has the keys {others} for a parameter, which cannot be saved: use text")
        return {
            key: value if is_dense_tensor(value) and value.shape == param.shape else OfRank0(value)
            for key, value in found.items()
        }

    def step(self) -> int:
        """The largest number of steps that a parameter has taken."""
        return max((int(self.state[param]["step"]) for flat in self.flats for param in flat.params), default=0)

    def _has_names(self) -> bool:
        return self.model is not None or all("param_names" in group for group in self.param_groups)

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def names(self) -> dict[Tensor, tuple[str, ...]]:
        """Names of every parameter: of a tied one all that the model has for it; its number where there are none."""
        params = self._params()
        pairs: list[tuple[Tensor, str]]
        if self.model is not None:
            pairs = [(param, plain_name(name)) for name, param in self.model.named_parameters(remove_duplicate=False)]
        elif self._has_names():
            listed = [plain_name(name) for group in self.param_groups for name in group["param_names"]]
            pairs = [*zip(params, listed, strict=True)]
        else:
            pairs = [(param, str(index)) for index, param in enumerate(params)]
        found: dict[Tensor, list[str]] = {}
        owners: dict[str, Tensor] = {}
        for param, name in pairs:
            found.setdefault(param, []).append(name)
            if owners.setdefault(name, param) is not param:
                raise ValueError(f"two parameters are called '{name}': give the optimizer names that differ")
        if unknown := [index for index, param in enumerate(params) if param not in found]:
            raise ValueError(f"parameters {unknown[:_SHOWN]} of the optimizer are not the given model's")
        return {param: tuple(found[param]) for param in params}

    # Loading

    def prepare(self, index: Index, files: DataFiles, strict: bool, prefix: str | None) -> Prepared:
        """Match names, and find memory for what is to be read: as much as the own shards on CPU, or these themselves.

        Raises:
            ValueError: there is no optimizer in the checkpoint; or names, shapes or groups differ, and ``strict``.
        """
        saved = find_optimizer(index, files, prefix)
        names = self.names_in(saved)
        matches = self._match(index, saved, names)
        groups, differing = self.merge_groups(index, saved, names, files)
        fitting = [match for match in matches if match.kinds is not None and match.problem is None]
        targets, loading = self._make_targets(index, files, fitting)
        report = LoadReport(
            loaded=len(fitting),
            parameters=len(matches),
            numel=sum(t.numel() for into in loading.values() for t in into.tensors.values() if _is_part(t)),
            step=0,
            world_size=index.info.get("world_size"),
            missing=tuple(m.name for m in matches if m.kinds is None and self._param(m).requires_grad),
            unexpected=tuple(sorted(saved.names.difference(*names.values()))),
            mismatched=(*(m.problem for m in matches if m.problem is not None), *differing),
        )
        expect_all(report, strict)
        self.check(groups)
        return Prepared(targets, loading, groups, report)

    def apply(self, prepared: Prepared) -> LoadReport:
        """Put what was read into the optimizer; nothing in it can fail."""
        entries: list[list[Entry | None]] = [[None] * len(flat.params) for flat in self.flats]
        for (flat, slot), into in prepared.loading.items():
            entries[flat][slot] = Entry(into.step.item(), dict(into.tensors) or None, into.own)
        from_masters = self.adopt(prepared.groups, entries)
        step = max((int(into.step.item()) for into in prepared.loading.values()), default=0)
        return replace(prepared.report, step=step, from_masters=from_masters)

    def _param(self, match: _Match) -> Tensor:
        return self.flats[match.flat].params[match.slot]

    def names_in(self, saved: SavedOptimizer) -> dict[Tensor, tuple[str, ...]]:
        """Under which names the checkpoint may have our parameters."""
        if saved.is_numbered:
            ours = [len(group["params"]) for group in self.param_groups]
            theirs = [len(names) for names in saved.members]
            if ours != theirs:
                raise ValueError(
                    f"the checkpoint has no parameter names, and groups of {theirs} parameters; the optimizer has "
                    f"groups of {ours}. Without names both must have the same groups"
                )
            numbers = [number for members in saved.members for number in members]
            return {param: (number,) for param, number in zip(self._params(), numbers, strict=True)}
        if not self._has_names():
            raise ValueError(
                "the checkpoint has names of parameters, the optimizer has none: build it with "
                "model.named_parameters(), or pass model="
            )
        saved_as = {own: name for name, own in saved.called.items()}
        return {
            param: (*names, *(saved_as[name] for name in names if name in saved_as))
            for param, names in self.names().items()
        }

    def _match(self, index: Index, saved: SavedOptimizer, names: Mapping[Tensor, tuple[str, ...]]) -> list[_Match]:
        known, found = saved.names, []
        for at, flat in enumerate(self.flats):
            for slot, param in enumerate(flat.params):
                name = next((name for name in names[param] if name in known), None)
                kinds = None if name is None else saved.state.get(name, {})
                problem = _problem(index, name or "", kinds or {}, flat.specs[slot].shape, param)
                found.append(_Match(at, slot, name or names[param][0], kinds, problem))
        return found

    def _make_targets(
        self, index: Index, files: DataFiles, matches: Sequence[_Match]
    ) -> tuple[list[Target], dict[tuple[int, int], _Loading]]:
        targets: list[Target] = []
        loading: dict[tuple[int, int], _Loading] = {}
        memory = [_memory_for(flat) for flat in self.flats]
        for match in matches:
            assert match.kinds is not None
            step = torch.zeros((), dtype=torch.float64)
            ranges = self.flats[match.flat].range_tensors(match.slot, memory[match.flat])
            tensors: dict[str, Tensor] = {kind: tensor for kind, tensor in ranges.items() if kind in match.kinds}
            if "master" in match.kinds and "master" not in tensors:  # the weights, which are whole
                tensors["master"] = torch.empty(self._param(match).shape, dtype=torch.float32)
            own = {kind: _memory(index, names, files) for kind, names in users_own(match.kinds).items()}
            loading[match.flat, match.slot] = _Loading(step, tensors, own)
            for kind, tensor in tensors.items():
                is_live = kind in ranges and memory[match.flat][kind] is self.flats[match.flat].state[kind]
                boxes = tensor.boxes() if isinstance(tensor, RangeTensor) else {(0,) * tensor.dim(): tensor}
                targets += [Target(match.kinds[kind][()], offsets, view, is_live) for offsets, view in boxes.items()]
            targets += [
                Target(match.kinds[kind][()], (0,) * value.dim(), value)
                for kind, value in own.items()
                if match.kinds[kind].get(()) in index.tensors
            ]
            if (key := match.kinds.get("step", {}).get(())) in index.tensors:
                shape = index.tensors[key].shape
                targets.append(Target(key, (0,) * len(shape), step.view(shape)))
            elif key is not None:
                step.fill_(float(read_value(index, key, files)))
        return targets, loading

    def merge_groups(
        self, index: Index, saved: SavedOptimizer, names: Mapping[Tensor, tuple[str, ...]], files: DataFiles
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Our groups, each with the options of the saved groups that had its parameters, if these have the same."""
        group_of = {name: at for at, members in enumerate(saved.members) for name in members}
        options: dict[int, dict[str, Any]] = {}
        merged, differing = [], []
        for number, group in enumerate(self.param_groups):
            held = [name for param in group["params"] for name in names[param] if name in group_of]
            sources = dict.fromkeys(group_of[name] for name in held)
            for at in sources:
                if at not in options:
                    options[at] = read_options(index, saved.groups[at], files)
            found = [options[at] for at in sources]
            keys = sorted({key for other in found[1:] for key in differing_options(found[0], other)})
            if keys:
                differing.append(f"param group {number} (it was in groups that differ in {', '.join(keys)})")
            merged.append({**group, **(deepcopy(found[0]) if found and not keys else {})})
        return merged, differing


def _problem(index: Index, name: str, kinds: Mapping[str, Names], shape: tuple[int, ...], param: Tensor) -> str | None:
    """Why saved state does not fit a parameter."""
    if kinds and (absent := {"step", "exp_avg", "exp_avg_sq"} - kinds.keys()):
        return f"{name} (the checkpoint has no {', '.join(sorted(absent))})"
    for kind in ("exp_avg", "exp_avg_sq", "master"):
        if kind in kinds and kinds[kind].get(()) not in index.tensors:
            return f"{name} ({kind} is no tensor in the checkpoint)"
        found = index.tensors.get(kinds.get(kind, {}).get((), ""))
        if found is not None and found.shape != shape:
            return f"{name} ({kind} has shape {found.shape} in the checkpoint, expected {shape})"
        if found is not None and found.dtype.is_complex != param.is_complex():
            return f"{name} ({kind} is {found.dtype} in the checkpoint, and the parameter {param.dtype})"
    return None


def _is_part(tensor: Tensor) -> bool:
    return isinstance(tensor, RangeTensor)


def _memory(index: Index, names: Names, files: DataFiles) -> Any:
    """What users kept: for a tensor memory to read it into, otherwise the value."""
    if (key := names.get(())) in index.tensors:
        return torch.empty(index.tensors[key].shape, dtype=index.tensors[key].dtype)
    return read_nested(index, names, files)


def _memory_for(flat: Flat) -> dict[str, Tensor]:
    """What of the state is zero, as all moments are before the first step, takes what is read; for the rest new memory.

    Zeros can be put back if another rank's load fails. And nobody but this can tell that they are there: steps, loads
    and users write to the state in many ways.
    """
    # Not in huge pages: they are freed again at once, and to get some where the page cache is full took 2 s a GB.
    return {
        name: local if is_zero(local) else torch.empty(local.numel(), dtype=local.dtype)
        for name, local in flat.state.items()
    }
