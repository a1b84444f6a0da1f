"""The optimizer that a checkpoint has: ``optim.state.<parameter>.exp_avg``, ``optim.param_groups.0.lr`` and so on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.nesting import Names, Path, below, read_nested
from sharded_radam.state.dicts import plain_name
from sharded_radam.state.values import equal


@dataclass(frozen=True, slots=True)
class SavedOptimizer:
    """Names of parameters, and the keys of what was saved of them.

    ``state``: kind (``exp_avg`` ...) -> keys, for each parameter that has taken a step. ``groups``: option -> keys, for
    each param group. ``members``: the parameters of each group; numbers where the optimizer had no names.
    ``called``: the names that the optimizer had for parameters that were saved under a model's.
    """

    state: dict[str, dict[str, Names]]
    groups: list[dict[str, Names]]
    members: list[list[str]]
    called: dict[str, str]

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
    prefix = _only_prefix(index, prefix)
    state = {plain_name(str(name)): kinds for name, kinds in _tree(index, f"{prefix}state.").items()}
    options = _tree(index, f"{prefix}param_groups.")
    if any(not str(name).isdigit() for name in options):
        # StateDictOptions(flatten_optimizer_state_dict=True): each parameter has the options of its group
        return SavedOptimizer(state, [*options.values()], [[plain_name(str(name))] for name in options], {})
    groups = [group for _, group in sorted(options.items(), key=lambda item: int(item[0]))]
    members = [_read_names(index, group, "params", files) for group in groups]
    listed = [_read_names(index, group, "param_names", files) for group in groups]
    called: dict[str, str] = {}
    for saved_names, own_names in zip(members, listed, strict=True):
        called.update(zip(saved_names, own_names, strict=False))  # there may be no names of its own
    if called and all(name.isdigit() for name in called):  # a bare state_dict() has numbers, beside names
        return SavedOptimizer({called.get(name, name): kinds for name, kinds in state.items()}, groups, listed, {})
    return SavedOptimizer(state, groups, members, called)


def _tree(index: Index, prefix: str) -> dict[str | int, dict[str, Names]]:
    """What is saved below a prefix: name of a parameter, or number of a group -> kind or option -> keys."""
    tree: dict[str | int, dict[str, dict[Path, str]]] = {}
    for (name, *rest), key in below(index, prefix):
        if not rest:  # it was saved under names with dots
            name, _, kind = str(name).rpartition(".")
            rest = [kind]
        tree.setdefault(name, {}).setdefault(str(rest[0]), {})[tuple(rest[1:])] = key
    return tree


def list_prefixes(index: Index) -> list[str]:
    """The keys under which there are optimizers; an empty text if a checkpoint is nothing but one."""
    marks = (key.partition("param_groups.") for key in [*index.tensors, *index.objects])
    prefixes = {prefix for prefix, mark, _ in marks if mark and (not prefix or prefix.endswith("."))}
    return sorted(prefix.rstrip(".") for prefix in prefixes)


def _only_prefix(index: Index, prefix: str | None) -> str:
    names = list_prefixes(index)
    if prefix is not None:
        if prefix not in names:
            raise ValueError(f"{index.folder} has no optimizer under {prefix!r}, only under {names}")
        return f"{prefix}." if prefix else ""
    if not names:
        raise ValueError(f"{index.folder} has no optimizer: no key has param_groups in it")
    if len(names) > 1:
        raise ValueError(f"{index.folder} has several optimizers, under {names}: say which by prefix=")
    return f"{names[0]}." if names[0] else ""


def _read_names(index: Index, group: Mapping[str, Names], option: str, files: DataFiles) -> list[str]:
    names = read_nested(index, group[option], files) if option in group else []
    return [plain_name(str(name)) for name in names]


def read_options(index: Index, group: Mapping[str, Names], files: DataFiles) -> dict[str, Any]:
    """The hyperparameters of a group, and what users keep there."""
    wanted = {option: names for option, names in group.items() if option not in ("params", "param_names")}
    return {option: read_nested(index, names, files) for option, names in wanted.items()}


def differing_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Options in which two groups differ."""
    return sorted(key for key in one.keys() | other.keys() if not equal(one.get(key), other.get(key)))
