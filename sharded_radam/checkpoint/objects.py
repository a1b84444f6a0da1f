"""The models, optimizers and schedulers of a training: what is saved of them, and how it is loaded into them.

One object alone is saved under its kind, several under their names: ``model.weight``, or ``model.g.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from sharded_radam.checkpoint.format.chunks import DataFiles
from sharded_radam.checkpoint.format.index import Index
from sharded_radam.checkpoint.format.reading import Target
from sharded_radam.checkpoint.model import ModelPlan, model_content, plan_model
from sharded_radam.checkpoint.optimizer import OptimizerPart, OptimizerPlan, Shardable
from sharded_radam.checkpoint.other_optimizer import OtherPart, OtherPlan
from sharded_radam.checkpoint.parts import Opaque
from sharded_radam.checkpoint.report import LoadReport, list_differences
from sharded_radam.checkpoint.undo import Change, PutBack, loading_into, may_fail, remember_model, reset
from sharded_radam.replicas import Facts
from sharded_radam.state.dicts import plain_name
from sharded_radam.state.values import is_dense_tensor
from sharded_radam.store.peers import ranks_of

Name = tuple[str, ...]
"""Keys of nested dicts, positions in lists; () where there is one object alone."""


@dataclass(frozen=True, slots=True)
class Objects:
    """The models, optimizers and schedulers of a training, by their names."""

    models: dict[Name, nn.Module]
    optimizers: dict[Name, Any]
    schedulers: dict[Name, Any]

    @staticmethod
    def of(model: Any, optimizer: Any, scheduler: Any) -> Objects:
        """Each is one object, or objects in dicts and lists.

        Raises:
            TypeError: something is of another kind.
        """
        objects = Objects(_by_name(model, "model"), _by_name(optimizer, "optimizer"), _by_name(scheduler, "scheduler"))
        for name, one in objects.models.items():
            if not isinstance(one, nn.Module):
                raise TypeError(f"{_key('model', name)} is a {type(one).__name__}, expected a torch.nn.Module")
        for name, one in objects.optimizers.items():
            if not all(hasattr(one, needed) for needed in ("state_dict", "load_state_dict", "param_groups", "state")):
                raise TypeError(
                    f"{_key('optimizer', name)} is a {type(one).__name__}, expected a ShardedRAdam or another "
                    "torch.optim.Optimizer"
                )
        return objects

    # Saving

    def check_ranks(self, ranks: list[int]) -> None:
        """Raise ValueError if the state of an optimizer is partitioned over other ranks than those that save."""
        for name, optimizer in self.optimizers.items():
            ours = self._ours(name)
            group = getattr(getattr(optimizer, "optimizer", optimizer), "process_group", None)
            if group is not None and (own := ours.ranks if ours else ranks_of(group)) != ranks:
                raise ValueError(
                    f"{_key('optimizer', name)}: its process group has the ranks {own}, those that save are {ranks}: "
                    "give CheckpointManager its process_group, and a folder of its own; or, where other ranks have "
                    "copies of this state, give the optimizer their mesh"
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
        facts_of = {name: part.facts() for name, part in parts.items()}
        values = {
            f"{what} of {_key('optimizer', name)}" if name else what: value
            for name, facts in facts_of.items()
            for what, value in facts.values.items()
        }
        params = {id(param): (name, param) for facts in facts_of.values() for name, param in facts.params}
        shared = {id(p) for part in parts.values() if part.has_one_copy for flat in part.flats for p in flat.params}
        for model_name, model in self.models.items():
            for name, param in model.named_parameters():
                if is_dense_tensor(param) and id(param) not in shared:
                    params.setdefault(id(param), (".".join((*model_name, plain_name(name))), param))
        return Facts(values, [*params.values()])

    def _part(self, name: Name) -> OptimizerPart | OtherPart:
        ours, model = self._ours(name), self._model_of(name)
        return OtherPart(self.optimizers[name], model) if ours is None else ours.checkpoint_part(model)

    def _ours(self, name: Name) -> Shardable | None:
        """The ShardedRAdam that an optimizer is, or that a wrapper such as Accelerate's has."""
        optimizer = self.optimizers[name]
        both = (optimizer, getattr(optimizer, "optimizer", None))
        return next((one for one in both if hasattr(one, "checkpoint_part")), None)

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

    def prepare(self, index: Index, files: DataFiles, strict: bool) -> ObjectsPlan:
        """Match all that there is with the checkpoint, and find memory for it.

        Raises:
            ValueError: something is not in the checkpoint; or names, shapes or groups differ, and ``strict``.
        """
        plan = ObjectsPlan()
        for name, module in self.models.items():
            plan.add_model(name, plan_model(module, index, files, strict, _key("model", name)))
        for name in self.optimizers:
            ours, model, key = self._ours(name), self._model_of(name), _key("optim", name)
            if ours is None:
                other = OtherPart(self.optimizers[name], model)
                plan.add_other(name, other, other.prepare(index, files, strict, key))
            else:
                part = ours.checkpoint_part(model)
                plan.add_ours(name, ours, part, part.prepare(index, files, strict, key))
        for name, scheduler in self.schedulers.items():
            plan.changes.append(loading_into(scheduler, _key("scheduler", name), _scheduler_state(index, files, name)))
        self._expect_all(index, strict)
        return plan

    def _expect_all(self, index: Index, strict: bool) -> None:
        """Where there are several of a kind, what is not asked for is missed."""
        keys = [*index.tensors, *index.objects]
        marks = (key.partition(".param_groups.") for key in keys)
        optimizers = {prefix for prefix, mark, _ in marks if mark and f"{prefix}.".startswith("optim.")}
        schedulers = {key for key in keys if f"{key}.".startswith("scheduler.")}
        left_out = [
            *_others((key for key in keys if key.startswith("model.")), "model", self.models),
            *_others(optimizers, "optim", self.optimizers),
            *_others(schedulers, "scheduler", self.schedulers),
        ]
        if left_out and strict:
            differences = list_differences((), left_out, ())
            raise ValueError(f"{'; '.join(differences)}. Expected all that was saved; strict=False loads what is given")


@dataclass(frozen=True, slots=True)
class ObjectsPlan:
    """A load of which all is decided: what to read, what may fail then, and what cannot."""

    targets: list[Target] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    _models: list[ModelPlan] = field(default_factory=list)
    _optimizers: list[tuple[Name, Shardable, OptimizerPlan]] = field(default_factory=list)
    _reports: dict[str, LoadReport] = field(default_factory=dict)

    def add_model(self, name: Name, plan: ModelPlan) -> None:
        """One whose loading may fail is changed, and put back; else no copy of it is needed."""
        self.targets.extend(plan.targets)
        if may_fail(plan.model):
            self.changes.append(Change(_key("model", name), partial(remember_model, plan.model), plan.apply))
        else:
            self._models.append(plan)

    def add_ours(self, name: Name, optimizer: Shardable, part: OptimizerPart, plan: OptimizerPlan) -> None:
        """Its groups are changed before its state: a scheduler may expect them when it is loaded."""
        self.targets.extend(plan.targets)
        self.changes.append(_changing_groups(_key("optimizer", name), optimizer, part, plan))
        self._optimizers.append((name, optimizer, plan))

    def add_other(self, name: Name, part: OtherPart, plan: OtherPlan) -> None:
        """Code that is not ours may fail."""
        self.targets.extend(plan.targets)
        load = partial(self._load_other, name, part, plan)
        self.changes.append(Change(_key("optimizer", name), part.remember, load))

    def _load_other(self, name: Name, part: OtherPart, plan: OtherPlan) -> None:
        self._reports[".".join(name)] = part.load(plan)

    def apply(self) -> dict[str, LoadReport]:
        """Put what was read in its place, where nothing can fail; the reports of all optimizers, by their names."""
        for model in self._models:
            model.apply()
        for name, optimizer, plan in self._optimizers:
            self._reports[".".join(name)] = plan.report_taken_over(optimizer.take_over(plan.groups, plan.entries()))
        return self._reports


def _changing_groups(what: str, optimizer: Shardable, part: OptimizerPart, plan: OptimizerPlan) -> Change:
    live, nothing = part.param_groups, plan.no_entries()

    def remember() -> PutBack:
        groups = [(group, dict(group)) for group in live]

        def put_back() -> None:
            for group, old in groups:
                reset(group, old)
            optimizer.take_over(live, nothing)

        return put_back

    return Change(what, remember, lambda: optimizer.take_over(plan.groups, nothing))


def _by_name(objects: Any, kind: str) -> dict[Name, Any]:
    if objects is None:
        return {}
    named: dict[Name, Any] = {}

    def visit(value: Any, name: Name) -> None:
        if not isinstance(value, (Mapping, list, tuple)):
            named[name] = value
            return
        pairs = (
            value.items() if isinstance(value, Mapping) else ((str(number), one) for number, one in enumerate(value))
        )
        for key, inner in pairs:
            if not isinstance(key, str) or not key or "." in key:
                raise TypeError(f"{key!r} as a name in {_key(kind, name)}: expected texts without dots")
            visit(inner, (*name, key))

    visit(objects, ())
    return named


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
        module = root
        for key in name[:-1]:
            module = module._modules.setdefault(key, nn.Module())  # type: ignore[assignment]
        module._modules[name[-1]] = model  # add_module does not take all names
    return root


def _scheduler_state(index: Index, files: DataFiles, name: Name) -> Any:
    key = _key("scheduler", name)
    if key not in index.objects:
        raise ValueError(f"{index.folder} has no {key}: load without scheduler=, or with what was saved")
    return files.load(index.objects[key], key)
