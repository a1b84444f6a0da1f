"""The optimizer that a checkpoint has: ``optim.state.<parameter>.exp_avg``, ``optim.param_groups.0.lr`` and so on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sharded_radam.checkpoint.files import DataFiles
from sharded_radam.checkpoint.index import Index
from sharded_radam.checkpoint.reading import read_value
from sharded_radam.state import plain_name


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """Names of parameters, and the keys of what was saved of them.

    ``state``: kind (``exp_avg`` ...) -> key, for each parameter that has taken a step. ``groups``: option -> key, for
    each param group. ``members``: the parameters of each group; numbers where the optimizer had no names.
    """

    state: dict[str, dict[str, str]]
    groups: list[dict[str, str]]
    members: list[list[str]]

    @property
    def names(self) -> set[str]:
        return set(self.state).union(*self.members)

    @property
    def is_numbered(self) -> bool:
        """Whether parameters are known by their number only."""
        return bool(self.names) and all(name.isdigit() for name in self.names)


def find_optimizer(index: Index, files: DataFiles, prefix: str | None) -> SavedOptimizer:
    """Find the optimizer in a checkpoint, under whatever key it was saved; both of torch's formats are understood.

    Raises:
        ValueError: there is none, or several and no ``prefix`` that says which.
    """
    keys = [*index.tensors, *index.objects]
    prefix = _only_prefix(keys, index, prefix)
    state: dict[str, dict[str, str]] = {}
    nested: dict[int, dict[str, str]] = {}
    flattened: dict[str, dict[str, str]] = {}
    for key in keys:
        if key.startswith(f"{prefix}state."):
            name, _, kind = key.removeprefix(f"{prefix}state.").rpartition(".")
            state.setdefault(plain_name(name), {})[kind] = key
        elif key.startswith(f"{prefix}param_groups."):
            rest = key.removeprefix(f"{prefix}param_groups.")
            number, _, option = rest.partition(".")
            if number.isdigit():
                nested.setdefault(int(number), {})[option] = key
            else:  # StateDictOptions(flatten_optimizer_state_dict=True): each parameter has the options of its group
                name, _, option = rest.rpartition(".")
                flattened.setdefault(plain_name(name), {})[option] = key
    if flattened:
        return SavedOptimizer(state, [*flattened.values()], [[name] for name in flattened])
    groups = [group for _, group in sorted(nested.items())]
    members = [_members(index, group, files) for group in groups]
    if any("param_names" in group for group in groups):  # saved with numbers, but there are names
        numbers = [_read_names(index, group, "params", files) for group in groups]
        of_number = {n: m for ns, ms in zip(numbers, members, strict=True) for n, m in zip(ns, ms, strict=True)}
        state = {of_number.get(name, name): kinds for name, kinds in state.items()}
    return SavedOptimizer(state, groups, members)


def _only_prefix(keys: Iterable[str], index: Index, prefix: str | None) -> str:
    marks = (key.partition("param_groups.") for key in keys)
    found = {before for before, mark, _ in marks if mark and (not before or before.endswith("."))}
    names = sorted(before.rstrip(".") for before in found)
    if prefix is not None:
        if prefix not in names:
            raise ValueError(f"{index.folder} has no optimizer under {prefix!r}, only under {names}")
        return f"{prefix}." if prefix else ""
    if not found:
        raise ValueError(f"{index.folder} has no optimizer: no key has param_groups in it")
    if len(found) > 1:
        raise ValueError(f"{index.folder} has several optimizers, under {names}: say which by prefix=")
    return found.pop()


def _members(index: Index, group: Mapping[str, str], files: DataFiles) -> list[str]:
    return _read_names(index, group, "param_names" if "param_names" in group else "params", files)


def _read_names(index: Index, group: Mapping[str, str], option: str, files: DataFiles) -> list[str]:
    names = read_value(index, group[option], files) if option in group else []
    return [plain_name(str(name)) for name in names]


def read_options(index: Index, group: Mapping[str, str], files: DataFiles) -> dict[str, Any]:
    """The hyperparameters of a group."""
    wanted = {option: key for option, key in group.items() if option not in ("params", "param_names")}
    return {option: read_value(index, key, files) for option, key in wanted.items()}


def differing_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Options in which two groups differ."""

    def value(options: Mapping[str, Any], key: str) -> Any:
        found = options.get(key)
        return found.item() if isinstance(found, Tensor) else found

    return sorted(key for key in one.keys() | other.keys() if value(one, key) != value(other, key))
