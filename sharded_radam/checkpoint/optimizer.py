"""The state of a ShardedRAdam in a checkpoint: what it is saved as, and what a load makes of what was saved.

Knowledge runs one way: the optimizer gives its :class:`OptimizerPart`, and takes what an :class:`OptimizerPlan` has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sharded_radam.buckets.flat import Flat
from sharded_radam.buckets.memory import is_zero
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.checkpoint.draft import ToSave
from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import Names, read_nested
from sharded_radam.checkpoint.format.reading import Target, read_value
from sharded_radam.checkpoint.format.saved_optimizer import SavedOptimizer, find_optimizer
from sharded_radam.checkpoint.matching import match_groups, names_in, names_of
from sharded_radam.checkpoint.parts import OfRank0
from sharded_radam.checkpoint.report import LoadReport, expect_all
from sharded_radam.checkpoint.undo import Change
from sharded_radam.preflight import check_shardable
from sharded_radam.replicas import Facts, facts
from sharded_radam.state.dicts import Entry, export_step, pack_groups, users_own
from sharded_radam.state.values import is_dense_tensor

Entries = Sequence[Sequence[Entry | None]]
"""For each flat and each of its slots what its state becomes; None where that is left alone."""


class Shardable(Protocol):
    """What a checkpoint asks of a ShardedRAdam."""

    def checkpoint_part(self, model: nn.Module | None = None) -> OptimizerPart:
        """What is saved of it, and what a load needs to know."""

    def take_over(self, groups: list[dict[str, Any]], entries: Entries) -> int:
        """Take over what was checked; return how many weights became masters."""

    @property
    def ranks(self) -> list[int]:
        """Global ranks of all that it is on."""


class _ParamMatch(NamedTuple):
    """A slot of flat number ``flat``, and what the checkpoint has for it: kinds -> names, None if it is not there."""

    flat: int
    slot: int
    name: str
    kinds: Mapping[str, Names] | None
    problem: str | None


class _StagedState(NamedTuple):
    """Memory for the state of one slot, to be filled by a load; and what users keep."""

    step: Tensor
    tensors: dict[str, Tensor]
    own: dict[str, Any]

    def entry(self) -> Entry:
        return Entry(self.step.item(), dict(self.tensors) or None, self.own)


@dataclass(frozen=True, slots=True)
class OptimizerPlan:
    """A load of which all is decided: what to read, and then what the optimizer is to take over.

    ``staged`` has the memory for each flat and each of its slots, None where the state is left alone.
    """

    targets: list[Target]
    staged: list[list[_StagedState | None]]
    groups: list[dict[str, Any]]
    report: LoadReport
    changes: tuple[Change, ...] = ()

    def entries(self) -> Entries:
        """When the targets have been read."""
        return [[state and state.entry() for state in slots] for slots in self.staged]

    def no_entries(self) -> Entries:
        """Those that leave all state alone."""
        return [[None] * len(slots) for slots in self.staged]

    def report_taken_over(self, from_masters: int) -> LoadReport:
        """The report, when the optimizer has taken it over."""
        steps = [int(state.step.item()) for slots in self.staged for state in slots if state is not None]
        return replace(self.report, step=max(steps, default=0), from_masters=from_masters)


@dataclass(frozen=True, slots=True)
class OptimizerPart:
    """What a checkpoint needs of an optimizer.

    Args:
        flats: its flats.
        param_groups: its groups.
        state: its state, of which this reads the step counters.
        model: whose parameters' names are to be used, if the optimizer was built without.
        is_fused: whether the fused engine was asked for, which does not take all groups.
        has_one_copy: whether all ranks have their parameters in the same memory.
        replica: which of the replicas this is that hold the same shards, and how many there are; each writes a part.
    """

    flats: Sequence[Flat]
    param_groups: list[dict[str, Any]]
    state: Mapping[Tensor, Any]
    model: nn.Module | None
    is_fused: bool
    has_one_copy: bool
    replica: tuple[int, int] = (0, 1)

    # Saving

    def collect(self) -> ToSave:
        """A checkpoint of this optimizer alone, under the key "optim"."""
        return ToSave({"optim": self.content()}, info={"step": self.step()}, replicas=self.facts())

    def content(self) -> dict[str, Any]:
        """The state as range tensors, in the form of torch's ``get_optimizer_state_dict``, or of ``state_dict``."""
        names = names_of(self.param_groups, self.model)
        groups = pack_groups(self.param_groups)
        state = {}
        for flat in self.flats:
            within = flat.plan.part_of(*self.replica)
            for slot, param in enumerate(flat.params):
                step, ranges = export_step(self.state[param]["step"]).cpu(), flat.range_tensors(slot, within=within)
                state[names[param][0]] = {"step": step, **ranges, **self._users_own(param)}
        for group, ours in zip(groups, self.param_groups, strict=True):
            # Numbers become text, as they do as keys of the state: torch's converters find one by the other.
            group["params"] = [names[param][0] for param in ours["params"]]
        return {
            "state": state,
            "param_groups": [{key: OfRank0(value) for key, value in group.items()} for group in groups],
        }

    def facts(self) -> Facts:
        """What must be equal on all ranks."""
        names = {param: names[0] for param, names in names_of(self.param_groups, self.model).items()}
        taken = {param: names[param] for flat in self.flats for param in flat.params}
        return facts(self.param_groups, self.state, taken, self.has_one_copy)

    def _users_own(self, param: Tensor) -> dict[str, Any]:
        """Tensors of the parameter's shape are equal on all ranks, as it is; of anything else rank 0's counts."""
        own = users_own(self.state[param])
        if others := [key for key in own if not isinstance(key, str)]:
            raise ValueError(f"optimizer.state has the keys {others} for a parameter, which cannot be saved: use text")
        return {
            key: value if is_dense_tensor(value) and value.shape == param.shape else OfRank0(value)
            for key, value in own.items()
        }

    def step(self) -> int:
        """The largest number of steps that a parameter has taken."""
        return max((int(self.state[param]["step"]) for flat in self.flats for param in flat.params), default=0)

    # Loading

    def prepare(self, index: Index, files: DataFiles, strict: bool, prefix: str | None) -> OptimizerPlan:
        """Match names, and find memory for what is to be read: as much as the own shards on CPU, or these themselves.

        Raises:
            ValueError: there is no optimizer in the checkpoint; or names, shapes or groups differ, and ``strict``.
        """
        saved = find_optimizer(index, files, prefix)
        names = names_in(saved, self.param_groups, self.model)
        matches = self._match(index, saved, names)
        groups, differing = match_groups(index, saved, self.param_groups, names, files)
        fitting = [match for match in matches if match.kinds is not None and match.problem is None]
        staged, targets = self._stage(index, files, fitting)
        ranges = [
            tensor
            for slots in staged
            for state in slots
            if state is not None
            for tensor in state.tensors.values()
            if isinstance(tensor, RangeTensor)
        ]
        report = LoadReport(
            loaded=len(fitting),
            parameters=len(matches),
            numel=sum(tensor.numel() for tensor in ranges),
            step=0,
            world_size=index.info.get("world_size"),
            missing=tuple(m.name for m in matches if m.kinds is None and self._param(m).requires_grad),
            unexpected=tuple(sorted(saved.names.difference(*names.values()))),
            mismatched=(*(m.problem for m in matches if m.problem is not None), *differing),
        )
        expect_all(report, strict)
        check_shardable(groups, self.is_fused)
        return OptimizerPlan(targets, staged, groups, report)

    def _param(self, match: _ParamMatch) -> Tensor:
        return self.flats[match.flat].params[match.slot]

    def _match(self, index: Index, saved: SavedOptimizer, names: Mapping[Tensor, tuple[str, ...]]) -> list[_ParamMatch]:
        known, matches = saved.names, []
        for number, flat in enumerate(self.flats):
            for slot, param in enumerate(flat.params):
                name = next((name for name in names[param] if name in known), None)
                kinds = None if name is None else saved.state.get(name, {})
                problem = _problem(index, name or "", kinds or {}, flat.specs[slot].shape, param)
                matches.append(_ParamMatch(number, slot, name or names[param][0], kinds, problem))
        return matches

    def _stage(
        self, index: Index, files: DataFiles, matches: Sequence[_ParamMatch]
    ) -> tuple[list[list[_StagedState | None]], list[Target]]:
        """Memory for what fits, and what is to be read into it."""
        targets: list[Target] = []
        staged: list[list[_StagedState | None]] = [[None] * len(flat.params) for flat in self.flats]
        memory = [_memory_for(flat) for flat in self.flats]
        for match in matches:
            assert match.kinds is not None
            step = torch.zeros((), dtype=torch.float64)
            ranges = self.flats[match.flat].range_tensors(match.slot, memory[match.flat])
            tensors: dict[str, Tensor] = {kind: tensor for kind, tensor in ranges.items() if kind in match.kinds}
            if "master" in match.kinds and "master" not in tensors:  # the weights, which are whole
                tensors["master"] = torch.empty(self._param(match).shape, dtype=torch.float32)
            own = {kind: _memory(index, names, files) for kind, names in users_own(match.kinds).items()}
            staged[match.flat][match.slot] = _StagedState(step, tensors, own)
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
        return staged, targets


def _problem(index: Index, name: str, kinds: Mapping[str, Names], shape: tuple[int, ...], param: Tensor) -> str | None:
    """Why saved state does not fit a parameter."""
    if kinds and (absent := {"step", "exp_avg", "exp_avg_sq"} - kinds.keys()):
        return f"{name} (the checkpoint has no {', '.join(sorted(absent))})"
    for kind in ("exp_avg", "exp_avg_sq", "master"):
        if kind in kinds and kinds[kind].get(()) not in index.tensors:
            return f"{name} ({kind} is no tensor in the checkpoint)"
        saved = index.tensors.get(kinds.get(kind, {}).get((), ""))
        if saved is not None and saved.shape != shape:
            return f"{name} ({kind} has shape {saved.shape} in the checkpoint, expected {shape})"
        if saved is not None and saved.dtype.is_complex != param.is_complex():
            return f"{name} ({kind} is {saved.dtype} in the checkpoint, and the parameter {param.dtype})"
    return None


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
