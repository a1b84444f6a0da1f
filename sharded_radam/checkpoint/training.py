"""What is saved of a training: models, optimizers, schedulers, data positions, random number generators.

One object alone is saved under its kind, several under their names: ``model.weight``, or ``model.g.weight``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.reading import Target
from sharded_radam.checkpoint.model import model_content, model_targets
from sharded_radam.checkpoint.optimizer import LoadReport, OptimizerPart, Prepared, list_differences
from sharded_radam.checkpoint.other_optimizer import OtherPart
from sharded_radam.checkpoint.parts import Opaque
from sharded_radam.checkpoint.undo import Change, may_fail, remember_model, remember_object, reset
from sharded_radam.replicas import Facts
from sharded_radam.state.dicts import Entry, plain_name
from sharded_radam.state.values import is_dense_tensor
from sharded_radam.store.peers import ranks_of

Name = tuple[str, ...]
"""Keys of nested dicts, positions in lists; () where there is one object alone."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint had beside what was loaded into objects.

    ``data`` is what this rank saved as its data position, or what all ranks saved if that is one and the same; None if
    the ranks are others now and had different ones. ``optimizers`` has what was loaded of several optimizers, by their
    names (``"g"``; ``"0"`` in a list), and ``optimizer`` what was of one alone.
    """

    step: int
    user: Any
    data: Any
    optimizer: LoadReport | None
    optimizers: dict[str, LoadReport]
    _read_positions: Callable[[], tuple[Any, ...]] = field(repr=False, compare=False)

    @property
    def data_of_ranks(self) -> tuple[Any, ...]:
        """Data positions of all ranks that saved, read when they are asked for: the checkpoint must still be there."""
        return self._read_positions()


@dataclass(frozen=True, slots=True)
class Training:
    """The objects of a training by their names."""

    models: dict[Name, nn.Module]
    optimizers: dict[Name, Any]
    schedulers: dict[Name, Any]

    @staticmethod
    def of(model: Any, optimizer: Any, scheduler: Any) -> Training:
        """Each is one object, or objects in dicts and lists.

        Raises:
            TypeError: something is of another kind.
        """
        found = Training(_by_name(model, "model"), _by_name(optimizer, "optimizer"), _by_name(scheduler, "scheduler"))
        for name, one in found.models.items():
            if not isinstance(one, nn.Module):
                raise TypeError(f"{_key('model', name)} is a {type(one).__name__}, expected a torch.nn.Module")
        for name, one in found.optimizers.items():
            if not all(hasattr(one, needed) for needed in ("state_dict", "load_state_dict", "param_groups", "state")):
                raise TypeError(
                    f"{_key('optimizer', name)} is a {type(one).__name__}, expected a ShardedRAdam or another "
                    "torch.optim.Optimizer"
                )
        return found

    # Saving

    def check_ranks(self, ranks: list[int]) -> None:
        """Raise ValueError if the state of an optimizer is partitioned over other ranks than those that save."""
        for name, optimizer in self.optimizers.items():
            group = getattr(getattr(optimizer, "optimizer", optimizer), "process_group", None)
            if group is not None and (own := ranks_of(group)) != ranks:
                raise ValueError(
                    f"{_key('optimizer', name)}: its process group has the ranks {own}, those that save are {ranks}: "
                    "give CheckpointManager its process_group, and a folder of its own"
                )

    def content(self) -> tuple[dict[str, Any], Facts]:
        """What all ranks save, and what of it must be equal on them."""
        nested: dict[str, Any] = {}
        parts = {name: self._part(name) for name in self.optimizers}
        for name, model in self.models.items():
            _put(nested, ("model", *name), model_content(model))
        for name, part in parts.items():
            _put(nested, ("optim", *name), part.content())
        for name, scheduler in self.schedulers.items():
            _put(nested, ("scheduler", *name), Opaque(scheduler.state_dict()))
        return nested, self._facts({name: part for name, part in parts.items() if isinstance(part, OptimizerPart)})

    def _facts(self, parts: Mapping[Name, OptimizerPart]) -> Facts:
        """Of all our optimizers, and of the parameters of all models, once each."""
        found = {name: part.facts() for name, part in parts.items()}
        values = {
            f"{what} of {_key('optimizer', name)}" if name else what: value
            for name, facts in found.items()
            for what, value in facts.values.items()
        }
        params = {id(param): (name, param) for facts in found.values() for name, param in facts.params}
        shared = {id(p) for part in parts.values() if part.has_one_copy for flat in part.flats for p in flat.params}
        for at, model in self.models.items():
            for name, param in model.named_parameters():
                if is_dense_tensor(param) and id(param) not in shared:
                    params.setdefault(id(param), (".".join((*at, plain_name(name))), param))
        return Facts(values, [*params.values()])

    def _part(self, name: Name) -> OptimizerPart | OtherPart:
        optimizer = self.optimizers[name]
        model = self._model_of(name)
        ours = next((one for one in (optimizer, getattr(optimizer, "optimizer", None)) if _is_ours(one)), None)
        part: OptimizerPart | None = ours.checkpoint_part(model) if ours is not None else None
        return part or OtherPart(optimizer, model)

    def _model_of(self, name: Name) -> nn.Module | None:
        """The model whose names an optimizer's parameters have: that of the same name, or all together."""
        if not self.models or () in self.models:
            return self.models.get(())
        params = {id(param) for group in self.optimizers[name].param_groups for param in group["params"]}
        own = self.models.get(name)
        if own is not None and params <= {id(param) for param in own.parameters()}:
            return own
        return _joined(self.models)

    # Loading

    def prepare(
        self, index: Index, files: DataFiles, strict: bool
    ) -> tuple[list[Target], list[Change], Callable[[], dict[str, LoadReport]]]:
        """Memory to read into; what may fail when that is done; what to do then, which cannot, and has the reports.

        Raises:
            ValueError: something is not in the checkpoint; or names, shapes or groups differ, and ``strict``.
        """
        targets: list[Target] = []
        changes: list[Change] = []
        last: list[Callable[[], object]] = []
        reports: dict[str, LoadReport] = {}
        for name, model in self.models.items():
            of_model, put = model_targets(model, index, files, strict, _key("model", name))
            targets += of_model
            if may_fail(model):
                changes.append(Change(_key("model", name), partial(remember_model, model), put))
            else:
                last.append(put)
        for name in self.optimizers:
            part, key, what = self._part(name), _key("optim", name), _key("optimizer", name)
            if isinstance(part, OtherPart):
                other = part.prepare(index, files, strict, key)
                targets += other.targets
                changes.append(Change(what, part.remember, partial(_report, reports, name, part.load, other)))
            else:
                prepared = part.prepare(index, files, strict, key)
                targets += prepared.targets
                changes.append(_groups(what, part, prepared))
                last.append(partial(_report, reports, name, part.apply, prepared))
        for name, scheduler in self.schedulers.items():
            changes.append(loading_into(scheduler, _key("scheduler", name), _value(index, files, name)))

        self._expect_all(index, strict)

        def finish() -> dict[str, LoadReport]:
            for action in last:
                action()
            return reports

        return targets, changes, finish

    def _expect_all(self, index: Index, strict: bool) -> None:
        """Where there are several of a kind, what is not asked for is missed."""
        keys = [*index.tensors, *index.objects]
        marks = (key.partition(".param_groups.") for key in keys)
        optimizers = {before for before, mark, _ in marks if mark and f"{before}.".startswith("optim.")}
        schedulers = {key for key in keys if f"{key}.".startswith("scheduler.")}
        left_out = [
            *_others((key for key in keys if key.startswith("model.")), "model", self.models),
            *_others(optimizers, "optim", self.optimizers),
            *_others(schedulers, "scheduler", self.schedulers),
        ]
        if left_out and strict:
            found = list_differences((), left_out, ())
            raise ValueError(f"{'; '.join(found)}. Expected all that was saved; strict=False loads what is given")


def _is_ours(optimizer: Any) -> bool:
    return hasattr(optimizer, "checkpoint_part")


def _by_name(objects: Any, kind: str) -> dict[Name, Any]:
    if objects is None:
        return {}
    found: dict[Name, Any] = {}

    def visit(value: Any, name: Name) -> None:
        if not isinstance(value, (Mapping, list, tuple)):
            found[name] = value
            return
        pairs = value.items() if isinstance(value, Mapping) else ((str(at), one) for at, one in enumerate(value))
        for key, inner in pairs:
            if not isinstance(key, str) or not key or "." in key:
                raise TypeError(f"{key!r} as a name in {_key(kind, name)}: expected texts without dots")
            visit(inner, (*name, key))

    visit(objects, ())
    return found


def _key(kind: str, name: Name) -> str:
    return ".".join((kind, *name))


def _put(nested: dict[str, Any], path: Name, content: Any) -> None:
    for key in path[:-1]:
        nested = nested.setdefault(key, {})
    nested[path[-1]] = content


def _others(keys: Iterable[str], kind: str, given: Mapping[Name, Any]) -> list[str]:
    """Keys that belong to none of the given objects, if there are several."""
    if not given or () in given:
        return []
    prefixes = tuple(f"{_key(kind, name)}." for name in given)
    return sorted(key for key in keys if not f"{key}.".startswith(prefixes))


def _joined(models: Mapping[Name, nn.Module]) -> nn.Module:
    root = nn.Module()
    for name, model in models.items():
        at = root
        for key in name[:-1]:
            at = at._modules.setdefault(key, nn.Module())  # type: ignore[assignment]
        at._modules[name[-1]] = model  # add_module does not take all names
    return root


def _report(reports: dict[str, LoadReport], name: Name, load: Callable[[Any], LoadReport], prepared: Any) -> None:
    reports[".".join(name)] = load(prepared)


def _groups(what: str, part: OptimizerPart, prepared: Prepared) -> Change:
    """Of an optimizer of ours the groups only: a scheduler may expect them when it is loaded."""
    nothing: list[list[Entry | None]] = [[None] * len(flat.params) for flat in part.flats]
    live: Any = part.param_groups  # a list

    def remember() -> Callable[[], None]:
        groups = [(group, dict(group)) for group in live]

        def put_back() -> None:
            for group, old in groups:
                reset(group, old)
            part.adopt(live, nothing)

        return put_back

    return Change(what, remember, lambda: part.adopt(prepared.groups, nothing))


def loading_into(thing: Any, what: str, state: Any) -> Change:
    """Anything with ``load_state_dict``."""
    return Change(what, lambda: remember_object(thing), lambda: thing.load_state_dict(state))


def _value(index: Index, files: DataFiles, name: Name) -> Any:
    key = _key("scheduler", name)
    if key not in index.objects:
        raise ValueError(f"{index.folder} has no {key}: load without scheduler=, or with what was saved")
    return files.load(index.objects[key], key)


# What each rank has for itself


def of_ranks(index: Index, name: str) -> list[str]:
    """Keys of what the ranks saved, each its own, in the order of ranks."""
    keys = [key for key in index.objects if key.startswith(f"{name}.")]
    return sorted(keys, key=lambda key: int(key.removeprefix(f"{name}.")))


def read_positions(index: Index) -> tuple[Any, ...]:
    """Data positions of all ranks that saved."""
    with DataFiles(index.folder) as files:
        return tuple(files.load(index.objects[key], key) for key in of_ranks(index, "data"))


def random_states() -> dict[str, Any]:
    """States of all generators that this process uses, as plain values."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = (name, keys.tolist(), *rest)
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Set those that this process has."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "numpy" in states and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(states["numpy"]))


def setting_random_states(states: dict[str, Any]) -> Change:
    """The last change, since others may draw random numbers."""

    def remember() -> Callable[[], None]:
        before = random_states()
        return lambda: set_random_states(before)

    return Change("the random number generators", remember, lambda: set_random_states(states))
