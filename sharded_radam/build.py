"""What a rank has of an optimizer, and how it is laid out, at construction and whenever param groups change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import RAdam

from sharded_radam.arguments import Arguments, Options
from sharded_radam.arrivals import Arrivals
from sharded_radam.buckets.flat import DTYPES, Flat, has_memory_of_its_own
from sharded_radam.buckets.memory import check_device, check_memory, is_dense
from sharded_radam.compiled import compile_for
from sharded_radam.dtypes import wide
from sharded_radam.gradients.hooks import check_not_wrapped
from sharded_radam.gradients.measures import Whole
from sharded_radam.gradients.sharded import ShardedGradients
from sharded_radam.plan import FlatPlan, ShardPlan, make_plan
from sharded_radam.preflight import Draft, agree, broadcast_, complete_groups, describe, find_twice, has_members
from sharded_radam.radam import Hyperparameters
from sharded_radam.state.dicts import Entry, read_entry
from sharded_radam.state.edits import find_edits, set_counts, take_back
from sharded_radam.state.gather import move
from sharded_radam.store.groups import Groups, groups_of
from sharded_radam.store.meeting import Meeting
from sharded_radam.store.peers import ranks_of
from sharded_radam.transport import Choice, Transport, choose


@dataclass(slots=True)
class Shards:
    """What a rank has of the state that all share.

    It does not know the optimizer, so that one that is dropped is freed at once.

    Attributes:
        transport: between the ranks of the shard group, and, as ``replicas``, of the replica group.
        groups: these.
        options: of the optimizer.
        module: the model, with ``shard_gradients``.
        broadcasts: whether new parameters get the values of rank 0.
        flats: of the param groups, in their order.
        parked: flats of the parameters that are in no group any more, and have state.
        members: the parameters of each group that were laid out.
        gradients: of the own shards, with ``shard_gradients``.
        arrivals: of parameters, with ``overlap_forward``.
        steps: that were taken.
        listed_twice: what to say of a parameter that is listed twice in a group, "" if none is.
        is_joined: whether this rank has run out of data, and steps along (``torch.distributed.algorithms.Join``).
        consolidated: the whole state, from ``consolidate_state_dict`` until the next step.
    """

    transport: Transport
    options: Options
    groups: Groups
    module: nn.Module | None = None
    broadcasts: bool = False
    flats: list[Flat] = field(default_factory=list)
    parked: list[Flat] = field(default_factory=list)
    members: list[list[Tensor]] = field(default_factory=list)
    gradients: ShardedGradients | None = None
    arrivals: Arrivals | None = None
    steps: int = 0
    listed_twice: str = ""
    is_joined: bool = False
    consolidated: dict[Tensor, Any] | None = None

    @property
    def when(self) -> str:
        """How far this rank has come, for errors."""
        return f"after {self.steps} steps"

    def ranks(self) -> list[int]:
        """Global ranks of all, in increasing order; this process alone is rank 0."""
        return [0] if self.groups.shard is None else ranks_of(self.groups)

    def row(self) -> list[int]:
        """Global ranks of the shard group, in its order."""
        return [0] if self.groups.shard is None else ranks_of(self.groups.shard)

    @property
    def global_rank(self) -> int:
        """Of this process."""
        return self.row()[self.transport.rank]

    def names(self) -> dict[Tensor, str]:
        """Of all parameters that are laid out."""
        flats = self.flats + self.parked
        return {p: spec.name for flat in flats for p, spec in zip(flat.params, flat.specs, strict=True)}

    def all_gradients(self, param_groups: Sequence[Mapping[str, Any]]) -> Whole | ShardedGradients:
        """To be measured or changed, wherever they are."""
        return Whole(param_groups) if self.gradients is None else self.gradients

    def wait(self) -> None:
        """Return when all parameters have arrived."""
        if self.arrivals is not None:
            self.arrivals.wait()

    def end_arrivals(self) -> None:
        """The same, and nobody else waits any more: their memory is about to be written."""
        if self.arrivals is not None:
            self.arrivals.end()


# Construction


def build(
    optimizer: RAdam,
    initialise: Callable[[], None],
    arguments: Arguments,
    connect: Callable[[Choice], Transport] = Choice.connect,
) -> Shards:
    """Collective: lay out the parameters of a new optimizer.

    Args:
        optimizer: that is under construction.
        initialise: calls RAdam's constructor.
        arguments: of ShardedRAdam.
        connect: makes the transport that was chosen.

    Raises:
        ValueError, TypeError, MemoryError: on every rank, what one of them raised, or what differs between them.
    """
    mesh, what = arguments.mesh, "building ShardedRAdam"
    meeting = Meeting.of(arguments.process_group) if mesh is None else Meeting.of_mesh(mesh)
    draft = agree(meeting, what, partial(_first_draft, optimizer, initialise, arguments, meeting))
    choice = draft.choice
    assert choice is not None
    shares_more = arguments.shard_gradients or arguments.share_parameters
    shards = Shards(connect(choice), arguments.options(), choice.groups, arguments.module, shares_more)
    with shards.transport.together(what):
        adopt(optimizer, shards, draft)
        if arguments.module is not None:
            broadcast_(list(arguments.module.buffers()), shards.transport.everyone)
    shards.transport.operation = "step 1"
    return shards


def _first_draft(optimizer: RAdam, initialise: Callable[[], None], arguments: Arguments, meeting: Meeting) -> Draft:
    """All that can fail on one rank."""
    groups = groups_of(arguments.process_group, arguments.mesh)
    arguments.check(meeting.world_size)
    initialise()
    draft = make_draft(optimizer.param_groups, arguments.options(), groups.shard_size, meeting.world_size)
    buffers = () if arguments.module is None else arguments.module.named_buffers()
    device = next((param.device for group in optimizer.param_groups for param in group["params"]), torch.device("cpu"))
    choice = choose(groups, device, arguments.transport, arguments.share_parameters, meeting)
    offer = {"mesh": [*map(list, groups.rows)] or None, **arguments.offer()}
    return replace(draft, options=offer, buffers=tuple(buffers), choice=choice)


def check_is_whole(shards: Shards) -> None:
    """Raise RuntimeError if other ranks have parts of the state: then an optimizer is not pickled."""
    transport = shards.transport
    if transport.world_size > 1:
        raise RuntimeError(
            f"this optimizer holds rank {transport.rank}'s part of the state of {transport.world_size} "
            "ranks, so it cannot be pickled: save what consolidate_state_dict() returns, and load it into a new "
            "optimizer (copy.deepcopy works, in this process)"
        )


@torch.no_grad()
def rebuild(
    optimizer: RAdam, transport: Transport, options: Options, groups: Groups, groupless: Sequence[dict[str, Any]]
) -> Shards:
    """Lay out a copy of an optimizer, without collectives.

    Args:
        optimizer: whose groups and state have tensors of their own (state: modified in place).
        transport: to use.
        options: of the optimizer.
        groups: of the transport.
        groupless: groups of parameters that are in none of its groups, but have state.
    """
    if options.compiled:
        _compile([*optimizer.param_groups, *groupless], options)
    shards = Shards(transport, options, groups)
    state = {key: dict(own) if isinstance(own, dict) else own for key, own in optimizer.state.items()}
    params, specs = describe([*optimizer.param_groups, *groupless], 0, bool(options.fused))
    plan = make_plan(specs, transport.world_size, options.bucket_cap_mb)
    flats = _make_flats(shards, plan, params, (), lambda sizes: [None] * len(sizes))
    _move_state(optimizer, shards, (), flats, {})
    _settle(optimizer, shards, flats)
    optimizer.state.update(state)
    for flat in flats:
        take_back(optimizer, flat)
    return shards


# Param groups that change


def follow_groups(optimizer: RAdam, shards: Shards) -> None:
    """Collective if somebody has edited which parameters are in ``param_groups``: lay out those."""
    if not has_members(optimizer.param_groups, shards.members):
        lay_out(optimizer, shards, f"following what was edited in param_groups {shards.when}")


def lay_out(optimizer: RAdam, shards: Shards, what: str, change: Callable[[], None] = lambda: None) -> None:
    """Collective: lay out the groups anew.

    Args:
        optimizer: whose groups.
        shards: of this rank.
        what: is done, for errors.
        change: changes the groups before; it may fail.
    """

    def make() -> Draft:
        change()
        complete_groups(optimizer.param_groups, optimizer.defaults, shards.names())
        groups = optimizer.param_groups + find_groupless(optimizer, shards)
        return make_draft(groups, shards.options, shards.transport.world_size, shards.transport.meeting.world_size)

    draft = agree(shards.transport.meeting, what, make)
    with shards.transport.together(what):
        adopt(optimizer, shards, draft)
    shards.consolidated = None


def find_groupless(optimizer: RAdam, shards: Shards) -> list[dict[str, Any]]:
    """A group of the parameters that are in none any more, and have state: as RAdam's, they find it again."""
    present = {param for group in optimizer.param_groups for param in group["params"]}
    laid_out = [param for flat in shards.parked + shards.flats for param in flat.params]
    params = [param for param in laid_out if param not in present and param in optimizer.state]
    names = shards.names()
    return [{**optimizer.defaults, "params": params, "param_names": [names[p] for p in params]}] if params else []


@torch.no_grad()
def make_draft(groups: Sequence[Mapping[str, Any]], options: Options, world_size: int, num_ranks: int) -> Draft:
    """Plan the layout of groups; all that can be wrong with their parameters is raised here.

    Args:
        groups: param groups.
        options: of the optimizer.
        world_size: of the shard group.
        num_ranks: in all, with those of other shard groups.
    """
    params, specs = describe(groups, 0, bool(options.fused))
    check_memory(zip(params, specs, strict=True))
    if num_ranks > 1:
        check_device(params)
    if options.shard_gradients:
        check_not_wrapped(params)
    if options.compiled:
        _compile(groups, options)
    return Draft(groups, params, make_plan(specs, world_size, options.bucket_cap_mb), {})


def _compile(groups: Sequence[Mapping[str, Any]], options: Options) -> None:
    """Compile the updates of groups, of which the first steps would wait for it otherwise."""
    for group in groups:
        hyper = Hyperparameters.of(group)
        for dtype, device in {(param.dtype, param.device) for param in group["params"] if param.dtype in DTYPES}:
            compile_for(dtype, wide(dtype) if options.shard_gradients else dtype, device, hyper, group["capturable"])


@torch.no_grad()
def adopt(optimizer: RAdam, shards: Shards, draft: Draft) -> None:
    """Collective: lay out parameters as all ranks have agreed; state and gradients move along with them."""
    shards.end_arrivals()
    old, known = shards.flats + shards.parked, shards.names()
    staying, specs = set(draft.params), dict(zip(draft.params, draft.plan.params, strict=True))
    for flat in shards.flats:
        flat.take_back(flat.check(staying.__contains__, staying))
    for flat in old:
        take_back(optimizer, flat, find_edits(optimizer, flat, staying), flat.counters.device)
    fresh = [param for param in draft.params if param not in known]
    entries = {p: _entry_of(p, specs[p].name, optimizer.state[p]) for p in fresh if optimizer.state.get(p)}
    if shards.gradients is not None:
        shards.gradients.finish()
    if shards.broadcasts:
        broadcast_(fresh, shards.transport.everyone)
    flats = _make_flats(shards, draft.plan, draft.params, old, shards.transport.buffers)
    _move_state(optimizer, shards, old, flats, entries)
    _settle(optimizer, shards, flats)
    if shards.gradients is not None:
        shards.gradients.make_reducer()


def _entry_of(param: Tensor, name: str, state: dict[str, Any]) -> Entry:
    """What somebody has put into the state for a new parameter."""
    return read_entry(name, param, param.shape, (), state if "step" in state else None)


def _make_flats(
    shards: Shards,
    plan: ShardPlan,
    params: Sequence[Tensor],
    old: Sequence[Flat],
    allocate: Callable[[Sequence[tuple[int, torch.dtype]]], Sequence[Tensor | None]],
) -> list[Flat]:
    """The flats of a plan: those that there are already, or new ones in the memory that ``allocate`` returns."""
    known = _find_known(plan, params, old)
    missing = [flat_plan for flat_plan, flat in zip(plan.flats, known, strict=True) if flat is None]
    sizes = [(flat_plan.numel, plan.params[flat_plan.slots[0].param].dtype) for flat_plan in missing]
    buffers = iter(allocate(sizes) if sizes else ())
    elsewhere = {param for flat in old for param in flat.params_of_others()}
    elsewhere |= {param for param in params if not is_dense(param)}
    if old:  # somebody may expect what a step writes to be in that memory, as with parameters that are here already
        laid_out = {param for flat in old for param in flat.params}
        fresh = [(param, spec) for param, spec in zip(params, plan.params, strict=True) if param not in laid_out]
        elsewhere |= {param for param, spec in fresh if not has_memory_of_its_own(param, spec)}
    flats = []
    for flat_plan, flat in zip(plan.flats, known, strict=True):
        if flat is None:
            members = [params[slot.param] for slot in flat_plan.slots]
            # Wherever it is built, it takes steps.
            with torch.inference_mode(members[0].is_inference()), torch.no_grad():
                rank, as_views = shards.transport.rank, shards.options.as_views
                flat = Flat(flat_plan, plan.params, members, rank, as_views, next(buffers), elsewhere)
            flat.replaced.take(before.replaced for before in old)
        flat.specs = [plan.params[slot.param] for slot in flat_plan.slots]
        flats.append(flat)
    return flats


def _find_known(plan: ShardPlan, params: Sequence[Tensor], old: Sequence[Flat]) -> list[Flat | None]:
    """For each flat of a plan the one that has its parameters already, laid out as it is."""
    by_members = {tuple(map(id, flat.params)): flat for flat in old}

    def find(flat_plan: FlatPlan) -> Flat | None:
        flat = by_members.get(tuple(id(params[slot.param]) for slot in flat_plan.slots))
        return flat if flat is not None and flat.is_laid_out_as(flat_plan, plan.params) else None

    return [find(flat_plan) for flat_plan in plan.flats]


def _move_state(
    optimizer: RAdam, shards: Shards, old: Sequence[Flat], flats: Sequence[Flat], entries: Mapping[Tensor, Entry]
) -> None:
    """Collective: fill the state of new flats, from old ones, and from what users have put there."""
    new, gone = [flat for flat in flats if flat not in old], [flat for flat in old if flat not in flats]
    targets = {param: (flat, slot, flat.state) for flat in new for slot, param in enumerate(flat.params)}
    move([(flat, flat.state) for flat in gone], targets, shards.transport)
    counts = {p: float(step) for flat in gone for p, step in zip(flat.params, flat.counters.views, strict=True)}
    for flat in new:
        for slot, (param, views) in enumerate(zip(flat.params, flat.local_state, strict=True)):
            if (entry := entries.get(param)) is not None:
                flat.set_state(slot, entry.tensors)
                counts[param] = entry.step
            optimizer.state[param].update(views)
        set_counts(optimizer, flat, [counts.get(param, 0.0) for param in flat.params])


def _settle(optimizer: RAdam, shards: Shards, flats: Sequence[Flat]) -> None:
    """Collective if gradients are sharded: work with these flats from now on."""
    gone, number = [flat for flat in shards.flats + shards.parked if flat not in flats], len(optimizer.param_groups)
    shards.flats = [flat for flat in flats if flat.specs[0].group < number]
    shards.parked = [flat for flat in flats if flat.specs[0].group == number]
    shards.members = [[*group["params"]] for group in optimizer.param_groups]
    shards.listed_twice = find_twice(optimizer.param_groups)
    if shards.gradients is not None:
        shards.gradients.lay_out(shards.flats)
    elif shards.options.shard_gradients:
        options, transport = shards.options, shards.transport
        shards.gradients = ShardedGradients(
            shards.flats, transport, options.check_gradients, shards.module, options.reduce_dtype
        )
    for flat in gone:
        flat.release()
    shards.transport.keep([flat.buffer for flat in flats])
