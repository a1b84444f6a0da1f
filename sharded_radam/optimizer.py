"""ShardedRAdam: validates, owns the state, and steps in three phases."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook, _JoinConfig
from torch.optim import RAdam
from torch.optim.optimizer import ParamsT

from sharded_radam import callers
from sharded_radam import step_differentiable as autograd_step
from sharded_radam.arrivals import Arrivals
from sharded_radam.buckets.counters import Cohort, Counters
from sharded_radam.buckets.flat import Flat, find_slot
from sharded_radam.buckets.memory import check_device, check_memory, flat_gradient, is_dense
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.checkpoint.optimizer import LoadReport, OptimizerPart
from sharded_radam.checkpoint.peers import Peers
from sharded_radam.checkpoint.save import SaveReport
from sharded_radam.checkpoint.single import load_optimizer, save_optimizer
from sharded_radam.compat import check_graph_capture
from sharded_radam.gradients import measures
from sharded_radam.gradients.hooks import check_not_wrapped
from sharded_radam.gradients.sharded import ShardedGradients
from sharded_radam.plan import ShardPlan, make_plan
from sharded_radam.preflight import Draft, agree, broadcast_, complete_groups, describe, has_members
from sharded_radam.radam import Engine, Hyperparameters, Operands, capturable_update_, update_
from sharded_radam.replicas import compare, facts
from sharded_radam.state import dicts as states
from sharded_radam.state.values import copied, without_numpy
from sharded_radam.stats import Stats, ownership, stats
from sharded_radam.store.meeting import Meeting
from sharded_radam.transport import Alone, Choice, Handle, Transport, choose
from sharded_radam.uneven_inputs import ShadowSteps, share_gradients

T = TypeVar("T")

logger = logging.getLogger("sharded_radam")

_DEBUG_CHECK_STEPS = 100
"""How often replicas are compared under TORCH_DISTRIBUTED_DEBUG."""


@dataclass(frozen=True, slots=True)
class Options:
    """Arguments that RAdam does not have; they are the optimizer's, and no group's."""

    fused: bool | None
    bucket_cap_mb: float
    as_views: bool
    shard_gradients: bool
    check_gradients: bool
    check_replicas: int


def _check_engine(fused: bool, foreach: bool, differentiable: bool, shares_more: bool) -> None:
    if fused and (foreach or differentiable):
        raise ValueError("fused=True excludes foreach=True and differentiable=True: choose one of them")
    if differentiable and foreach:
        raise ValueError("differentiable=True excludes foreach=True: foreach operations don't support autograd")
    if differentiable and shares_more:
        raise ValueError("differentiable=True excludes shard_gradients=True and share_parameters=True")


class ShardedRAdam(RAdam, Joinable):
    r"""``torch.optim.RAdam`` with its state partitioned over the ranks of a process group (ZeRO stages 1 and 2).

    Use it in the place of RAdam, with DistributedDataParallel as it is; the results are RAdam's. Each step

    1. takes the gradients of the own shard out of ``p.grad`` (DDP has averaged them), or, with ``shard_gradients``,
       from what was reduce-scattered during backward,
    2. updates the own shard of each bucket in place (parameters are views of the buckets),
    3. all-gathers the buckets in place; bucket i travels while bucket i+1 is updated.

    Args:
        params: as for torch.optim.RAdam: parameters, dicts, or (name, parameter) pairs; the same on every rank.
        lr, betas, eps, weight_decay, decoupled_weight_decay, maximize, capturable, differentiable:
            as for torch.optim.RAdam.
        foreach: True for torch's foreach update, False for its for-loop; bit-equal to RAdam's of that flag.
        fused: True for one pass over memory by torch's fused Adam kernel (see :mod:`sharded_radam.radam`), which
            differs from RAdam in the last bits. If neither is given: fused on CPU, RAdam's choice elsewhere.
        process_group: whose ranks share the state; the default group if None. Without one, or with one rank, nothing
            is communicated.
        bucket_cap_mb: size of a bucket in MiB.
        parameters_as_bucket_view: if False, parameters keep their own memory, and the buckets cost as much again.
        transport: "native", "gloo", "shared_memory", or None to choose: native on CUDA, shared memory where all ranks
            are on CPUs of one host, otherwise gloo.
        shard_gradients: replaces DistributedDataParallel (ZeRO stage 2): gradients are averaged while backward runs,
            each rank keeps its shards', and ``p.grad`` becomes a
            :class:`~sharded_radam.gradients.grad_shard.GradShard`. The model is not wrapped.
            See ``no_sync``, ``clip_grad_norm_``, ``full_grad``, ``map_grads_``. Between two steps
            all ranks run the same number of backward passes, and each of them reaches one parameter that the others
            reach too.
        check_gradients: with ``shard_gradients``, log local gradients that are not finite before they are reduced, with
            rank and name, and raise on all ranks before the update. Reads every gradient once more.
        check_replicas: compare what must be equal on all ranks (see the method of this name) every so many steps. With
            0, only at the first step, or every 100 steps under ``TORCH_DISTRIBUTED_DEBUG=INFO`` or ``DETAIL``.
        share_parameters: one copy of the parameters for all ranks of a host (shared memory only). Nobody but this
            optimizer may write to them while training goes on, and a step waits until every rank has come to it.
            What one rank writes, all see: load weights on all ranks, then let them meet (``dist.barrier()``).
        module: the model, with ``shard_gradients``: its buffers are broadcast from rank 0 too, and while its
            ``require_backward_grad_sync`` is False, backward passes are as in ``no_sync``.

    fp16 and bf16 parameters have fp32 moments and an fp32 master, and are updated in fp32. All state exists from
    construction on. Construction, ``add_param_group``, ``consolidate_state_dict`` and ``load_state_dict`` are
    collective, as ``step`` is; with ``shard_gradients`` or ``share_parameters`` the first two broadcast the parameters
    from rank 0. Whatever one rank raises in them is raised on all, in the same words: its type if that is ValueError,
    TypeError or MemoryError, or if all ranks raise the same, otherwise RuntimeError.

    Raises:
        ValueError: what RAdam refuses; arguments that exclude each other; parameters that do not fit into buckets;
            arguments or layouts that differ between ranks.
        RuntimeError: from ``step``, if a parameter was moved, recast or replaced since construction, or for sparse
            gradients; the state is unchanged then.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float = 25.0,
        parameters_as_bucket_view: bool = True,
        transport: str | None = None,
        shard_gradients: bool = False,
        check_gradients: bool = False,
        check_replicas: int = 0,
        share_parameters: bool = False,
        module: nn.Module | None = None,
    ) -> None:
        Joinable.__init__(self)
        as_views = parameters_as_bucket_view and not differentiable
        if not check_replicas and os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF").upper() in ("INFO", "DETAIL"):
            check_replicas = _DEBUG_CHECK_STEPS
        self._options = Options(fused, bucket_cap_mb, as_views, shard_gradients, check_gradients, check_replicas)
        self._broadcasts = shard_gradients or share_parameters
        self._flats: list[Flat] = []
        self._parked: list[Flat] = []
        self._members: list[list[Tensor]] = []
        self._gradients: ShardedGradients | None = None
        self._arrivals: Arrivals | None = None
        self._consolidated: dict[Tensor, Any] | None = None
        self._joined = False
        self._steps = 0
        self._module = module
        self._transport: Transport | None = None
        meeting, choice = Meeting.of(process_group), Choice("none", "", None, torch.device("cpu"))

        def make() -> Draft:
            nonlocal choice
            if not 0 < bucket_cap_mb < math.inf:
                raise ValueError(f"bucket_cap_mb={bucket_cap_mb}: expected a size in MiB, above 0 and finite")
            if not isinstance(check_replicas, int) or check_replicas < 0:
                raise ValueError(f"check_replicas={check_replicas}: expected a number of steps, or 0")
            if (check_gradients or module is not None) and not shard_gradients:
                raise ValueError("check_gradients=True and module= are for shard_gradients=True")
            if share_parameters and not parameters_as_bucket_view:
                raise ValueError("share_parameters=True excludes parameters_as_bucket_view=False")
            _check_engine(bool(fused), bool(foreach), differentiable, shard_gradients or share_parameters)
            super(ShardedRAdam, self).__init__(
                params,
                lr=lr,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay,
                decoupled_weight_decay=decoupled_weight_decay,
                foreach=foreach,
                maximize=maximize,
                capturable=capturable,
                differentiable=differentiable,
            )
            options = {
                "bucket_cap_mb": float(bucket_cap_mb),
                "fused": fused and bool(fused),
                "parameters_as_bucket_view": bool(parameters_as_bucket_view),
                "transport": transport,
                "shard_gradients": bool(shard_gradients),
                "check_gradients": bool(check_gradients),
                "check_replicas": check_replicas,
                "share_parameters": bool(share_parameters),
                "module": None if module is None else "a model",
            }
            draft = self._draft(meeting.world_size, options, () if module is None else module.named_buffers())
            choice = choose(process_group, self._device(), transport, share_parameters)
            return draft

        draft = agree(meeting, "building ShardedRAdam", make)
        self._transport = self._connect(choice)
        with self._network.together("building ShardedRAdam"):
            self._adopt(draft)
            if module is not None:
                self.broadcast_buffers(module)
        self._transport.operation = "step 1"
        if self._transport.rank == 0:
            logger.info("%s", self.stats())

    def _connect(self, choice: Choice) -> Transport:
        return choice.connect()

    def _device(self) -> torch.device:
        return next((param.device for group in self.param_groups for param in group["params"]), torch.device("cpu"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group``; collective, as construction is.

        Raises:
            ValueError: as at construction; the optimizer is unchanged then.
        """
        if self._transport is None:  # the constructor of the base class is adding the first groups
            super().add_param_group(param_group)
            return
        self._follow_groups()
        before = len(self.param_groups)
        try:
            self._lay_out(
                f"add_param_group() {self._when()}", lambda: super(ShardedRAdam, self).add_param_group(param_group)
            )
        except BaseException:
            del self.param_groups[before:]
            raise

    def _follow_groups(self) -> None:
        """Collective if somebody has edited which parameters are in ``param_groups``: lay out those."""
        if not has_members(self.param_groups, self._members):
            self._lay_out(f"following what was edited in param_groups {self._when()}", lambda: None)

    def _lay_out(self, what: str, change: Callable[[], None]) -> None:
        """Collective: lay out the groups anew after a change, which all ranks have made."""

        def make() -> Draft:
            change()
            complete_groups(self.param_groups, self.defaults, self._names())
            return self._draft(self._network.world_size)

        draft = agree(self._network.meeting, what, make)
        with self._network.together(what):
            self._adopt(draft)
        self._consolidated = None

    def _names(self) -> dict[Tensor, str]:
        return {
            p: spec.name for flat in self._flats + self._parked for p, spec in zip(flat.params, flat.specs, strict=True)
        }

    def _groupless(self) -> list[dict[str, Any]]:
        """A group of the parameters that are in none any more, and have state: as RAdam's, they find it again."""
        there = {param for group in self.param_groups for param in group["params"]}
        laid_out = [param for flat in self._parked + self._flats for param in flat.params]
        found = [param for param in laid_out if param not in there and param in self.state]
        names = self._names()
        return [{**self.defaults, "params": found, "param_names": [names[p] for p in found]}] if found else []

    @torch.no_grad()
    def _draft(
        self,
        world_size: int,
        options: dict[str, Any] | None = None,
        buffers: Iterable[tuple[str, Tensor]] = (),
    ) -> Draft:
        """Lay out the parameters of all groups; all that can be wrong with them is raised here."""
        groups = self.param_groups + self._groupless()
        params, specs = describe(groups, 0, bool(self._options.fused))
        check_memory(zip(params, specs, strict=True))
        if world_size > 1:
            check_device(params)
        if self.shards_gradients:
            check_not_wrapped(params)
        plan = make_plan(specs, world_size, self._options.bucket_cap_mb)
        return Draft(groups, params, plan, options or {}, tuple(buffers))

    @torch.no_grad()
    def _adopt(self, draft: Draft) -> None:
        """Collective: lay out parameters as all ranks have agreed; state and gradients move along with them."""
        self._wait_for_parameters()
        old, known = self._flats + self._parked, self._names()
        staying, names = set(draft.params), dict(zip(draft.params, draft.plan.params, strict=True))
        for flat in self._flats:
            flat.take_back(flat.check(staying.__contains__, staying))
        for flat in old:
            self._take_back_state(flat, self._foreign_state(flat, staying))
        fresh = [param for param in draft.params if param not in known]
        entries = {param: self._entry_of(param, names[param].name) for param in fresh if self.state.get(param)}
        if self._gradients is not None:
            self._gradients.finish()
        if self._broadcasts:
            broadcast_(fresh, self._network)
        flats = self._make_flats(draft.plan, draft.params, old, self._network.buffers)
        self._move_state(old, flats, entries)
        self._settle(flats)
        if self._gradients is not None:
            self._gradients.make_reducer()

    def _entry_of(self, param: Tensor, name: str) -> states.Entry:
        """What somebody has put into the state for a new parameter."""
        own = self.state[param]
        return states.read_entry(name, param, param.shape, (), own if "step" in own else None)

    def _settle(self, flats: list[Flat]) -> None:
        """Work with these flats from now on."""
        gone, number = [flat for flat in self._flats + self._parked if flat not in flats], len(self.param_groups)
        self._flats = [flat for flat in flats if flat.specs[0].group < number]
        self._parked = [flat for flat in flats if flat.specs[0].group == number]
        self._members = [[*group["params"]] for group in self.param_groups]
        if self._gradients is not None:
            self._gradients.lay_out(self._flats)
        elif self.shards_gradients:
            check = self._options.check_gradients
            self._gradients = ShardedGradients(self._flats, self._network, check, self._module)
        for flat in gone:
            flat.release()
        self._network.keep([flat.buffer for flat in flats])

    def _make_flats(
        self,
        plan: ShardPlan,
        params: Sequence[Tensor],
        old: Sequence[Flat],
        allocate: Callable[[Sequence[tuple[int, torch.dtype]]], Sequence[Tensor | None]],
    ) -> list[Flat]:
        """The flats of a plan: those that there are already, or new ones in the memory that ``allocate`` returns."""
        found: list[Flat | None] = []
        by_members = {tuple(map(id, flat.params)): flat for flat in old}
        for flat_plan in plan.flats:
            flat = by_members.get(tuple(id(params[slot.param]) for slot in flat_plan.slots))
            found.append(flat if flat is not None and flat.is_laid_out_as(flat_plan, plan.params) else None)
        missing = [flat_plan for flat_plan, flat in zip(plan.flats, found, strict=True) if flat is None]
        sizes = [(flat_plan.numel, plan.params[flat_plan.slots[0].param].dtype) for flat_plan in missing]
        buffers = iter(allocate(sizes) if sizes else ())
        elsewhere = {param for flat in old for param in flat.params_of_others()}
        elsewhere |= {param for param in params if not is_dense(param)}
        made = []
        for flat_plan, flat in zip(plan.flats, found, strict=True):
            specs = [plan.params[slot.param] for slot in flat_plan.slots]
            if flat is None:
                members = [params[slot.param] for slot in flat_plan.slots]
                # Wherever it is built, it takes steps.
                with torch.inference_mode(members[0].is_inference()), torch.no_grad():
                    rank, as_views = self._network.rank, self._options.as_views
                    flat = Flat(flat_plan, plan.params, members, rank, as_views, next(buffers), elsewhere)
                flat.take_notes(old)
            flat.specs = specs
            made.append(flat)
        return made

    def _move_state(self, old: Sequence[Flat], flats: Sequence[Flat], entries: Mapping[Tensor, states.Entry]) -> None:
        """Collective: fill the state of new flats, from old ones, and from what users have put there."""
        new, gone = [flat for flat in flats if flat not in old], [flat for flat in old if flat not in flats]
        targets = {param: (flat, slot, flat.state) for flat in new for slot, param in enumerate(flat.params)}
        states.move([(flat, flat.state) for flat in gone], targets, self._network)
        counts = {
            param: float(step) for flat in gone for param, step in zip(flat.params, flat.counters.views, strict=True)
        }
        for flat in new:
            for slot, (param, views) in enumerate(zip(flat.params, flat.local_state, strict=True)):
                if (entry := entries.get(param)) is not None:
                    flat.set_state(slot, entry.tensors)
                    counts[param] = entry.step
                self.state[param].update(views)
            self._set_counts(flat, [counts.get(param, 0.0) for param in flat.params])

    @torch.no_grad()
    def broadcast_buffers(self, module: nn.Module) -> None:
        """Collective: rank 0's buffers (running statistics and the like) to all ranks, as DDP does in each forward.

        Without DistributedDataParallel nobody else does: call it before validation or saving, if the model has some.
        """
        broadcast_(list(module.buffers()), self._network)

    def stats(self) -> Stats:
        """Figures of this rank since construction: bytes, collectives, time by phase; see :class:`Stats`.

        Not collective. Waits for the device if its phases are timed.
        """
        engines = [self._engine(flat) for flat in self._flats]
        return stats(self._flats, engines, self._gradients, self._network, self._steps)

    def time_phases(self, enabled: bool = True) -> None:
        """Whether ``stats()`` has the time of each phase. On CPU it has; elsewhere that takes two events a phase."""
        self._network.meter.times_phases = enabled

    def describe(self) -> str:
        """Who owns what, of all ranks: a line for each shard of each bucket. Not collective."""
        return f"{self.stats()}\n{ownership([(flat.plan, flat.specs) for flat in self._flats])}"

    @property
    def _network(self) -> Transport:
        assert self._transport is not None
        return self._transport

    def _when(self) -> str:
        return f"after {self._steps} steps"

    def _group(self, flat: Flat) -> dict[str, Any]:
        return [*self.param_groups, self.defaults][flat.specs[0].group]

    def _has(self, param: Tensor) -> bool:
        return any(each is param for group in self.param_groups for each in group["params"])

    def _counter_device(self, flat: Flat) -> torch.device:
        return flat.buffer.device if self._group(flat)["capturable"] else torch.device("cpu")

    def _engine(self, flat: Flat) -> Engine:
        foreach, device = self._group(flat)["foreach"], flat.buffer.device.type
        default = self._options.fused is None and foreach is None
        if self.defaults["differentiable"]:
            return "for-loop"
        if self._options.fused or (default and device == "cpu"):
            return "fused"
        return "foreach" if foreach or (foreach is None and device != "cpu") else "for-loop"

    # Step

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimization step; every rank enters the same collectives, whatever its gradients are.

        What was edited since in ``param_groups``, ``state`` or ``param.data`` takes effect as with RAdam; all ranks
        must do the same. Groups with other parameters are laid out anew first, which takes their memory once more.

        Args:
            closure: reevaluates the model and returns the loss, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a parameter was moved, recast or replaced, or has a sparse gradient. Checked before anything
                is changed or sent. With ``shard_gradients``: a rank is gone or does something else; on all ranks, with
                ``check_gradients``, a gradient is not finite.
        """
        check_graph_capture(self)
        with self._network.together():
            loss = self._step(closure)
        self._network.operation = f"step {self._steps + 1}"
        return loss

    def _step(self, closure: Callable[[], float] | None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._joined:
            Join.notify_join_context(self)
        if self._join_config.enable:
            share_gradients(self.param_groups, self._network, self._joined)
        found_inf, scale = self._left_by_scaler()
        if found_inf is not None and found_inf.item():  # no step is wanted
            if self._gradients is not None:
                self._gradients.stepped()
            return loss
        if scale is not None:
            measures.divide_(self._all_gradients(), scale)
        with torch.no_grad():
            cohorts = self._prepare()
        if self.defaults["differentiable"]:
            with torch.enable_grad():
                self._step_differentiable(cohorts)
        else:
            with torch.no_grad():
                self._update_and_gather(cohorts)
        if self._gradients is not None:
            self._gradients.stepped()
        self._steps += 1
        return loss

    def _left_by_scaler(self) -> tuple[Tensor | None, Tensor | None]:
        """``found_inf`` and ``grad_scale`` of a GradScaler, or of whoever sets them as for torch's fused optimizers."""
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        follows = found_inf is not None and (self.shards_gradients or self._options.fused)
        return (found_inf, scale) if follows else (None, None)

    def _prepare(self) -> list[list[Cohort]]:
        """All that can fail, then count the steps of the parameters that have a gradient."""
        self._wait_for_parameters()
        self._follow_groups()
        elsewhere = [flat.check(self._has) for flat in self._flats]
        foreign = [self._foreign_state(flat) for flat in self._flats]
        if self._gradients is None:
            present = [[param.grad is not None for param in flat.params] for flat in self._flats]
        else:
            present = self._gradients.finish()
        if self._checks_replicas_now():
            self.check_replicas()
        for flat, slots, entries in zip(self._flats, elsewhere, foreign, strict=True):
            flat.take_back(slots)
            self._take_back_state(flat, entries)
        self._consolidated = None
        return [
            flat.counters.add_step(has_grad, self._group(flat)["capturable"])
            for flat, has_grad in zip(self._flats, present, strict=True)
        ]

    def _checks_replicas_now(self) -> bool:
        every = self._options.check_replicas
        is_due = self._steps == 0 if every == 0 else self._steps % every == 0
        return is_due and (every > 0 or not self.defaults["capturable"])

    @torch.no_grad()
    def check_replicas(self) -> None:
        """Collective: compare hyperparameters, step counts and parameters of all ranks, to the bit.

        The first step does it by itself, unless ``capturable``, since it waits for the device; see ``check_replicas=``.
        So do ``save`` and ``CheckpointManager.save``, before they write anything.

        Raises:
            RuntimeError: on every rank; names the first difference, the ranks, and both values.
        """
        self._wait_for_parameters()
        if self._network.world_size > 1:
            compare(facts(self.param_groups, self.state, self._names(), self._network.has_one_copy), self._network)

    def _update_and_gather(self, cohorts: Sequence[Sequence[Cohort]]) -> None:
        """The three phases; the first two bucket by bucket, the third in the background of the next buckets."""
        handles: dict[tuple[int, int], list[Handle]] = {}
        meter = self._network.meter
        with meter.phase("all_gather"):
            self._network.begin_update()
        for index, (flat, flat_cohorts) in enumerate(zip(self._flats, cohorts, strict=True)):
            grads: dict[int, Tensor] = {}
            for bucket in range(flat.plan.num_buckets):
                with meter.phase("update"):
                    flat.copy_in(bucket)
                    for cohort in flat_cohorts:
                        self._update(flat, bucket, cohort, grads)
                with meter.phase("all_gather"):
                    self._network.count("all_gather", flat.bucket(bucket))
                    handles[index, bucket] = self._network.all_gather(flat.bucket(bucket))
            flat.note_updated(slot for cohort in flat_cohorts for slot in cohort.slots)
        with meter.phase("all_gather"):
            self._network.end_update()
            if self._arrivals is not None and not any(flat.copied for flat in self._flats):
                self._arrivals.begin(self._flats, handles)
                return
            for handle in (handle for bucket in handles.values() for handle in bucket):
                handle.wait()
        for flat in self._flats:
            flat.copy_out()

    def _update(self, flat: Flat, bucket: int, cohort: Cohort, grads: dict[int, Tensor]) -> None:
        """Phases 1 and 2: the own pieces of a bucket, with their gradients (grads: flattened on first use)."""
        operands, reals = [], flat.reals
        sums = None if self._gradients is None else self._gradients.sum_of(flat)
        for own in flat.pieces[bucket]:
            at = own.piece
            if at.slot in cohort.slots:
                if sums is not None:
                    grad = sums.narrow(0, reals * at.local_start, reals * at.numel)
                else:
                    if at.slot not in grads:
                        param_grad = flat.params[at.slot].grad
                        assert param_grad is not None
                        grads[at.slot] = flat_gradient(param_grad, flat.specs[at.slot])
                    grad = grads[at.slot]
                    if at.numel != flat.plan.slots[at.slot].numel:
                        grad = grad.narrow(0, reals * at.start, reals * at.numel)
                operands.append(Operands(own.param, grad, own.exp_avg, own.exp_avg_sq, own.master))
        hyper = Hyperparameters.of(self._group(flat))
        if isinstance(cohort.step, Tensor):
            capturable_update_(operands, cohort.step, hyper)
        else:
            update_(operands, self._engine(flat), cohort.step, hyper)

    def _step_differentiable(self, cohorts: Sequence[Sequence[Cohort]]) -> None:
        """As above, recorded by autograd: state tensors are replaced, and the flat keeps copies of their values."""
        for flat, flat_cohorts in zip(self._flats, cohorts, strict=True):
            counts = {slot: int(cohort.step) for cohort in flat_cohorts for slot in cohort.slots}
            hyper = Hyperparameters.of(self._group(flat))
            for slot, exchange in enumerate(autograd_step.exchanges(flat, self._network)):
                state = self.state[flat.params[slot]]
                autograd_step.update(flat.params[slot], state, exchange, counts.get(slot), hyper)
                moments = {name: state[name].detach() for name in ("exp_avg", "exp_avg_sq")}
                flat.set_local_state(slot, moments)

    def _foreign_state(self, flat: Flat, among: Set[Tensor] | None = None) -> list[tuple[int, states.Entry]]:
        """What somebody put into ``optimizer.state``, by slot; None in an entry for what is missing.

        Args:
            flat: whose parameters.
            among: look at these parameters only.

        Raises:
            ValueError: it is not of this rank's part of the parameter.
        """
        found = []
        for slot in flat.slots_of_others(self.state, not self.defaults["differentiable"]):
            param, own = flat.params[slot], flat.local_state[slot]["exp_avg"].shape
            if among is not None and param not in among:
                continue
            saved = self.state[param] if "step" in self.state[param] else None
            is_whole = saved is not None and getattr(saved.get("exp_avg"), "shape", None) == param.shape
            shape = param.shape if is_whole else own
            found.append((slot, states.read_entry(flat.specs[slot].name, param, shape, flat.spans(slot), saved)))
        return found

    def _take_back_state(self, flat: Flat, foreign: Sequence[tuple[int, states.Entry]] | None = None) -> None:
        """Follow what somebody did to ``optimizer.state``: tensors put there are copied, missing ones start anew."""
        found = dict(self._foreign_state(flat) if foreign is None else foreign)
        for slot, entry in found.items():
            own = self.state[flat.params[slot]]
            if self.defaults["differentiable"] and entry.tensors is not None:
                continue  # they are part of a graph
            flat.take_back_state(slot, entry.tensors)
            own.update(flat.local_state[slot])
        if found or flat.counters.device != self._counter_device(flat):
            counts = flat.counters.views
            self._set_counts(flat, [found[at].step if at in found else float(count) for at, count in enumerate(counts)])

    def _set_counts(self, flat: Flat, counts: Sequence[float]) -> None:
        flat.counters = Counters(counts, self._counter_device(flat))
        for param, step in zip(flat.params, flat.counters.views, strict=True):
            if param in self.state:
                self.state[param]["step"] = step

    # Gradients

    @property
    def shards_gradients(self) -> bool:
        """Whether gradients are in the shards, and not in ``param.grad``."""
        return self._options.shard_gradients

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch.amp.GradScaler then leaves unscaling and skipping to step().
        return self.shards_gradients

    def unscale_gradients_(self, inv_scale: Tensor, found_inf: Tensor) -> Tensor:
        """Collective, for :class:`sharded_radam.GradScaler`: unscale the shards, agree on infs.

        Args:
            inv_scale: 1-element tensor to multiply by.
            found_inf: 1-element tensor, set to 1 on all ranks if a gradient of any rank is inf or nan.

        Returns:
            ``found_inf``.
        """
        assert self._gradients is not None, "only with shard_gradients=True"
        measures.unscale_(self._gradients, inv_scale, found_inf)
        return found_inf

    def no_sync(self) -> AbstractContextManager[None]:
        """With ``shard_gradients``: backward passes in here accumulate in ``.grad``, as in DDP's ``no_sync``."""
        return nullcontext() if self._gradients is None else self._gradients.no_sync()

    def grad_norm(self, norm_type: float = 2.0) -> Tensor:
        """Collective: the norm of all gradients taken as one vector, as ``torch.nn.utils.get_total_norm`` has it.

        Args:
            norm_type: above 0, or inf.

        Returns:
            0-d, equal on all ranks.
        """
        return measures.norm(self._all_gradients(), norm_type)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Collective: scale all gradients so that their norm is ``max_norm`` at most, as ``torch.nn.utils`` does.

        Returns:
            The norm before, 0-d, equal on all ranks.

        Raises:
            RuntimeError: on all ranks, with ``error_if_nonfinite``, if the norm is inf or nan.
        """
        norm = self.grad_norm(norm_type)
        measures.check_norm(norm, norm_type, error_if_nonfinite)
        measures.clip_to_norm_(self._all_gradients(), max_norm, norm)
        return norm

    def clip_grads_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        """Scale all gradients so that their norm, which is ``total_norm`` now, is ``max_norm`` at most.

        As ``torch.nn.utils.clip_grads_with_norm_``. Collective with ``shard_gradients``.
        """
        gradients = self._all_gradients()
        gradients.finish()
        measures.clip_to_norm_(gradients, max_norm, total_norm)

    def clip_grad_value_(self, clip_value: float) -> None:
        """Limit each element of the gradients to ``-clip_value`` to ``clip_value``, as ``torch.nn.utils`` does.

        Collective with ``shard_gradients``.
        """
        measures.clip_values_(self._all_gradients(), clip_value)

    def _all_gradients(self) -> measures.Whole | ShardedGradients:
        return measures.Whole(self.param_groups) if self._gradients is None else self._gradients

    def full_grad(self, param: Tensor) -> Tensor | None:
        """The whole mean gradient of a parameter. Collective with ``shard_gradients``.

        Returns:
            Of the parameter's shape and dtype; ``param.grad`` itself without ``shard_gradients``. None if it has none.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        return param.grad if self._gradients is None else self._gradients.whole(param)

    def map_grads_(self, fn: Callable[[Tensor, range, Tensor], Tensor | None]) -> None:
        """Change gradients between backward and step: masks, noise, scales for each layer.

        Collective with ``shard_gradients``, where each rank changes the elements that it has. Otherwise each rank
        changes all, and all must do the same.

        Args:
            fn: called with each parameter, the range of its elements in memory order (row-major for a contiguous one),
                and these elements of the gradient, 1-D; fp32 for half precision with ``shard_gradients``. It changes
                them in place, or returns new ones.
        """
        measures.map_(self._all_gradients(), fn)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``, the shards' gradients included."""
        if self._gradients is not None:
            self._follow_groups()  # what is in no group any more keeps its gradient
            self._gradients.reset()
        super().zero_grad(set_to_none)

    # Overlap with the next forward

    def overlap_forward(self, model: nn.Module) -> None:
        """From now on, ``step`` returns while parameters still arrive; the forward of each module waits for its own.

        Whoever reads a parameter otherwise waits for it too: ``state_dict()``, a norm, ``param.data``. Does nothing
        with shared memory, which is read by the very thread that would go on with the forward.

        Args:
            model: all modules that use the parameters; not one that torch.compile made.

        Raises:
            ValueError: a module of the model is compiled, or parameters are not views of buckets.
        """
        if not self._options.as_views:
            raise ValueError("overlap_forward() needs parameters_as_bucket_view=True, and no differentiable=True")
        self._arrivals = self._arrivals or Arrivals()
        self._arrivals.hook(model)

    def _wait_for_parameters(self) -> None:
        if self._arrivals is not None:
            self._arrivals.wait()

    # State dicts

    def consolidate_state_dict(self, to: int = 0) -> dict[str, Any] | None:
        """Collective: the whole state on one rank, as ``torch.optim.RAdam.state_dict()`` would have it.

        Bucket by bucket: beyond the result, rank ``to`` allocates one bucket. Tensors are on CPU, and the dict is
        plain: ``torch.optim.RAdam`` and this optimizer load it at any world size, ``torch.load(weights_only=True)``
        reads it. Half-precision parameters have a "master" beside their moments.

        Args:
            to: rank of the process group that gets it.

        Returns:
            The dict on rank ``to``, None elsewhere. Until the next step (or the next loading, or a new param group),
            ``state_dict()`` on rank ``to`` returns the same state.

        Raises:
            ValueError: on every rank, if on one a group or the state has something that cannot be saved.
            RuntimeError: on every rank: one did not come within the process group's time-out, or does something else.
        """
        what = f"consolidate_state_dict(to={to}) {self._when()}"
        made = self._gather(what, to, torch.device("cpu"), lambda found: (found, self._copy(found)))
        if made is None:
            return None
        found, whole = made
        if self._network.world_size > 1:
            self._consolidated = found
        return whole

    @torch.no_grad()
    def _gather(
        self, what: str, to: int | None, device: torch.device | None, finish: Callable[[dict[Tensor, Any]], T]
    ) -> T | None:
        """Collective: the whole state on rank ``to``, or on all; on a device, or where the parameters are.

        Returns:
            What ``finish`` makes of it, which may fail as well; None on ranks that do not get it.
        """
        self._follow_groups()
        own = self._network.meeting.attempt(what, lambda: self._prepare_to_gather(to))
        found: dict[Tensor, Any] = {}
        with self._together_to_the_end(what):
            for flat in self._flats:
                gathered = states.gather_flat(flat, flat.state, self._network, to, device or flat.buffer.device)
                for param, tensors in zip(flat.params, gathered or [{}] * len(flat.params), strict=True):
                    step = states.export_step(self.state[param]["step"])
                    found[param] = {"step": step.to(device or step.device), **tensors}
            for key, value in own.items():
                found[key] = {**found[key], **value} if key in found else value
            return finish(found) if to in (None, self._network.rank) else None

    @contextmanager
    def _together_to_the_end(self, what: str) -> Iterator[None]:
        """Raise on all ranks what one of them raises in here, also on those that have nothing left to do."""
        with self._network.together(what):
            yield
            self._network.meeting.agree(what)

    @torch.no_grad()
    def _prepare_to_gather(self, to: int | None) -> dict[Any, Any]:
        """All that can fail on one rank; returns what users keep in the state."""
        if to is not None:
            self._check_target(to)
        self._wait_for_parameters()
        states.plain_groups(self.param_groups)  # raises if they cannot be saved
        own = states.plain_state(self.state, self.param_groups)
        for flat in self._flats:
            self._take_back_state(flat)
        return own

    def _check_target(self, to: int) -> None:
        if not 0 <= to < self._network.world_size:
            raise ValueError(f"to={to}: expected a rank of the group, 0 to {self._network.world_size - 1}")

    def state_dict(self) -> dict[str, Any]:
        """The whole state, where it is in this process; not collective.

        With one rank what RAdam returns. With several ranks, after ``consolidate_state_dict``, on its target rank and
        until the next step: the consolidated state, with the options that the param groups have now. For
        torch.distributed.checkpoint, whose functions call this, ``sharded_state_dict()``; or, by a collective, whole
        tensors, where it was told ``StateDictOptions(full_state_dict=True)``.

        Raises:
            RuntimeError: there is only this rank's part of the state, and someone else asks.
        """
        asked = callers.takes_whole()
        if asked is not None and self._network.world_size > 1:
            return self._with_hooks(lambda: self._as_dict(self._gather_for_torch(asked.on_rank_0)))
        if callers.takes_parts() or self._network.world_size == 1:
            return self.sharded_state_dict()
        whole = self._consolidated
        if whole is None:
            raise RuntimeError(
                f"state_dict() on rank {self._network.rank} of {self._network.world_size}: only this rank's part of "
                "the state is here, and a file of it could never be loaded; no file has been touched. Expected one of: "
                "consolidate_state_dict(to=0) on all ranks after the last step, then state_dict() on rank 0 alone; "
                "save(path), or CheckpointManager; the functions of torch.distributed.checkpoint; for that part, "
                "sharded_state_dict(). (Learning rates and the like are in param_groups.)"
            )
        return self._with_hooks(lambda: self._copy(whole))

    def sharded_state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, for torch.distributed.checkpoint; not collective.

        As in ``dcp.save({"optimizer": optimizer.sharded_state_dict()})``, on all ranks. With one rank it is the whole
        state, as RAdam's. With several, moments are
        :class:`~sharded_radam.buckets.range_tensor.RangeTensor` with this rank's
        elements: live views, which ``load_state_dict`` takes back, and which refuse to be pickled.
        """
        self._follow_groups()
        return self._with_hooks(lambda: self._as_dict(self._local_state()))

    @torch.no_grad()
    def full_state(self, param: Tensor) -> dict[str, Any]:
        """Collective: the whole state of a parameter, as ``torch.optim.RAdam`` has it in ``optimizer.state[param]``.

        For code that edits moments and puts them back: cut, append, permute, average. What is put into
        ``optimizer.state[p]`` may be whole, or of the shape that was there.

        Returns:
            Copies: "step" (0-d), "exp_avg" and "exp_avg_sq" of the parameter's shape on its device, "master" with half
            precision; and what users keep there. Empty if the state has been deleted.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        self._wait_for_parameters()
        self._follow_groups()
        index, slot = find_slot(self._flats, param)
        flat = self._flats[index]
        own = self.state.get(param)
        if not own:
            return {}
        self._take_back_state(flat)
        with self._network.together(f"full_state() {self._when()}"):
            tensors = {name: states.gather_slot(flat, slot, local, self._network) for name, local in flat.state.items()}
        return {**states.users_own(own), "step": states.export_step(own["step"]), **tensors}

    def _as_dict(self, found: Mapping[Tensor, Any]) -> dict[str, Any]:
        """State by parameter in torch's format, with the param groups as they are now."""
        found = {param: state for param, state in found.items() if not states.is_left_alone(param, state)}
        return {
            "state": states.index_state(found, self.param_groups),
            "param_groups": states.pack_groups(self.param_groups),
        }

    def _gather_for_torch(self, on_rank_0: bool) -> dict[Tensor, Any]:
        """Collective: whole tensors, on all ranks, or on torch's rank 0; it then drops what the others return."""
        what = f"state_dict() for torch, with full_state_dict=True, {self._when()}"
        if not on_rank_0:
            return self._gather(what, None, None, dict) or {}
        if 0 not in (ranks := dist.get_process_group_ranks(self._network.group)):
            return self._local_state()
        found = self._gather(what, ranks.index(0), torch.device("cpu"), dict)
        return self._local_state() if found is None else found

    def _copy(self, found: Mapping[Tensor, Any]) -> dict[str, Any]:
        """The same, of which nothing changes later but the tensors of ``found``."""
        copies = {key: dict(state) if isinstance(state, dict) else state for key, state in found.items()}
        return {**self._as_dict(copies), "param_groups": states.plain_groups(self.param_groups)}

    def _with_hooks(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = make()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def _local_state(self) -> dict[Tensor, Any]:
        found: dict[Tensor, Any] = dict(self.state)
        for flat in self._flats:
            for slot, param in enumerate(flat.params):
                tensors = flat.range_tensors(slot) if self._network.world_size > 1 else {}
                state = {**without_numpy(self.state[param], "state"), **tensors}
                found[param] = {**state, "step": states.export_step(state["step"])} if "step" in state else state
        return found

    def _answer_with_part(self) -> None:
        """Until the next step, ``state_dict()`` returns this rank's part: for those who ask it and write nothing."""
        self._consolidated = self._local_state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Collective: load a consolidated state, at any world size; each rank copies its own elements.

        Args:
            state_dict: from ``consolidate_state_dict``, ``torch.optim.RAdam.state_dict()``, or
                ``ZeroRedundancyOptimizer(RAdam).state_dict()``; or this optimizer's own local one. Not changed.

        Raises:
            ValueError: on every rank, if one has a dict of other groups, names or shapes than this optimizer's; nothing
                is changed then.
            RuntimeError: a rank did not come within the process group's time-out, or does something else.
        """
        self._follow_groups()
        what = f"load_state_dict() {self._when()}"
        groups, entries, others = self._network.meeting.attempt(what, lambda: self._read_state_dict(state_dict))
        self._load(groups, entries)
        for key, value in others.items():
            self.state[key] = deepcopy(value)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _read_state_dict(
        self, state_dict: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[list[states.Entry]], dict[Any, Any]]:
        """Check all of a dict: its groups, state, and what users keep that is no parameter's of ours."""
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        states.check_keys(state_dict)
        saved_groups = state_dict["param_groups"]
        states.check_groups(self.param_groups, saved_groups)
        by_param = states.saved_state(self.param_groups, state_dict)
        entries = [
            [
                states.read_entry(spec.name, param, param.shape, flat.spans(slot), by_param[param])
                for slot, (param, spec) in enumerate(zip(flat.params, flat.specs, strict=True))
            ]
            for flat in self._flats
        ]
        groups = states.merge_groups(self.param_groups, saved_groups, self.defaults)
        self._check_groups(groups)
        taken = {param for flat in self._flats for param in flat.params}
        others = {key: value for key, value in states.other_state(by_param, state_dict).items() if key not in taken}
        return groups, entries, others

    def _check_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        for index, group in enumerate(groups):
            describe([group], index, bool(self._options.fused))

    @torch.inference_mode(False)  # what is loaded takes steps later
    @torch.no_grad()
    def _load(self, groups: list[dict[str, Any]], entries: Sequence[Sequence[states.Entry | None]]) -> int:
        """Take over what was checked before; parameters without an entry keep their state.

        Returns:
            Of how many parameters, which are not of half precision, the weights are now the saved masters.
        """
        from_masters = 0
        self._wait_for_parameters()
        for param in (param for flat in self._parked for param in flat.params):
            self.state.pop(param, None)
        self.param_groups = groups
        self._consolidated = None
        for flat, flat_entries in zip(self._flats, entries, strict=True):
            counts = []
            for slot, (param, entry) in enumerate(zip(flat.params, flat_entries, strict=True)):
                if entry is not None:
                    tensors = dict(entry.tensors or {})
                    master = tensors.pop("master", None) if not flat.is_half else None
                    if master is not None and not isinstance(master, RangeTensor):
                        from_masters += flat.adopt_master(slot, master)
                    flat.set_state(slot, tensors)
                    self._load_own(param, entry.own)
                    self.state[param].update(flat.local_state[slot])
                counts.append(float(self.state[param]["step"]) if entry is None else entry.step)
            self._set_counts(flat, counts)
        return from_masters

    def _load_own(self, param: Tensor, own: dict[Any, Any]) -> None:
        """What a user keeps of a parameter; copied, unless it was loaded in place."""
        state = self.state[param]
        for key in states.users_own(state).keys() - own.keys():
            del state[key]
        for key, value in own.items():
            if key not in state or state[key] is not value:
                state[key] = copied(value, param.device)

    @torch.no_grad()
    def full_precision_state_dict(self, model: nn.Module, to: int = 0) -> dict[str, Any] | None:
        """Collective: the state dict of a half-precision model as it would be in fp32, on one rank.

        Parameters are their fp32 masters; what has none (other parameters, buffers) is converted. Tensors of full
        precision, integers and extra state are as they are. Beyond the result, rank ``to`` allocates one bucket.

        Args:
            model: the model, wrapped or not; names have no prefix of a wrapper, and a tied weight has each of its names
                with one tensor for all.
            to: rank of the process group that gets it.

        Returns:
            Copies on CPU on rank ``to``, for ``load_state_dict`` of an fp32 model; None elsewhere.

        Raises:
            Exception: on every rank, in the same words: one failed, did not come, or does something else.
        """
        self._follow_groups()
        what = f"full_precision_state_dict(to={to}) {self._when()}"
        self._network.meeting.attempt(what, lambda: self._prepare_masters(to))
        masters: dict[Tensor, Tensor] = {}
        with self._together_to_the_end(what):
            for flat in (flat for flat in self._flats if flat.is_half):
                masters_here = {"master": flat.state["master"]}
                gathered = states.gather_flat(flat, masters_here, self._network, to, torch.device("cpu"))
                masters |= {p: t["master"] for p, t in zip(flat.params, gathered or [], strict=gathered is not None)}
            return states.full_precision(model, masters) if self._network.rank == to else None

    def _prepare_masters(self, to: int) -> None:
        """All that can be wrong on one rank, before masters are gathered."""
        self._check_target(to)
        self._wait_for_parameters()
        for flat in (flat for flat in self._flats if flat.is_half):
            self._take_back_state(flat)
            flat.take_back(flat.check(self._has))
            flat.follow()

    # Checkpoints

    def save(
        self, path: str | os.PathLike[str], *, model: nn.Module | None = None, timeout: float = 600.0
    ) -> SaveReport:
        """Collective: write a checkpoint directory, each rank its own part; nothing is gathered.

        It is written beside ``path``, brought to the disk, and then renamed: there is a whole checkpoint of this name,
        or none. It is one of torch.distributed.checkpoint's, with the optimizer under the key "optim", and with
        checksums. Beyond the state, a rank allocates one chunk (64 MiB at most), on CPU nothing.

        Args:
            path: of the directory, on a file system that all ranks share. It must not exist.
            model: whose parameters' names to use; needed only if the optimizer was built without names and the
                checkpoint is to be loaded by name.
            timeout: seconds to wait for a rank that does not come, or is silent; a slow disk is waited for.

        Raises:
            CheckpointError: on every rank the same, if one of them failed or did not come; nothing is left behind.
        """
        return save_optimizer(path, lambda: self.checkpoint_part(model), Peers.of(self.process_group), timeout)

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        strict: bool = True,
        prefix: str | None = None,
        timeout: float = 600.0,
    ) -> LoadReport:
        """Collective: load a checkpoint directory that any number of ranks saved, by the names of parameters.

        Of this optimizer, or of plain or FSDP2's RAdam by torch.distributed.checkpoint. All is read and checked before
        anything is changed; until then it takes the memory of the own shard once more, on CPU, and one chunk. Moments
        that are zero take what is read at once, as in a new optimizer, and are zeros again if the load fails.

        Args:
            path: of the directory.
            model: as for ``save``.
            strict: whether missing, unexpected and mismatched parameters are errors; they are in the report otherwise,
                and what is missing or mismatched is left as it is.
            prefix: the key that the optimizer was saved under, where there are several in the checkpoint.
            timeout: seconds to wait for a rank that does not come, or is silent; a slow disk is waited for.

        Raises:
            CheckpointError: on every rank the same: no checkpoint, a damaged one, or other parameters. The optimizer is
                unchanged then.
        """
        peers = Peers.of(self.process_group)
        return load_optimizer(path, lambda: self.checkpoint_part(model), peers, timeout, strict, prefix)

    def checkpoint_part(self, model: nn.Module | None = None) -> OptimizerPart:
        """What a checkpoint needs of this optimizer; for CheckpointManager."""
        self._wait_for_parameters()
        self._follow_groups()
        with torch.no_grad():
            for flat in self._flats:
                self._take_back_state(flat)
        return OptimizerPart(
            self._flats,
            self.param_groups,
            self.state,
            model,
            self._check_groups,
            self._load,
            self._network.has_one_copy,
        )

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group whose ranks share the state; None where torch.distributed is not initialised."""
        return self._network.group

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        if self._network.world_size > 1:
            raise RuntimeError(
                f"this optimizer holds rank {self._network.rank}'s part of the state of {self._network.world_size} "
                "ranks, so it cannot be pickled: save what consolidate_state_dict() returns, and load it into a new "
                "optimizer (copy.deepcopy works, in this process)"
            )
        return self._content()

    def _content(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_options": self._options, "_groupless": self._groupless()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(dict(state), self.__dict__.get("_transport") or Alone(torch.device("cpu")))

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedRAdam:
        self._wait_for_parameters()
        self._follow_groups()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new._restore(deepcopy(self._content(), memo), self._network.copy())
        return new

    @torch.no_grad()
    def _restore(self, content: dict[str, Any], transport: Transport) -> None:
        """Become a copy: its parameters and state are other tensors, which are laid out anew, without collectives."""
        Joinable.__init__(self)
        groupless = content.pop("_groupless", [])
        super().__setstate__(content)  # type: ignore[no-untyped-call]
        self._consolidated = None
        self._joined = False
        self._steps = 0
        self._transport = transport
        self._flats = []
        self._gradients = None
        self._arrivals = None
        self._module = None
        self._broadcasts = False
        self._parked = []
        state = {key: dict(own) if isinstance(own, dict) else own for key, own in self.state.items()}
        groups = self.param_groups + groupless
        params, specs = describe(groups, 0, bool(self._options.fused))
        plan = make_plan(specs, transport.world_size, self._options.bucket_cap_mb)
        flats = self._make_flats(plan, params, (), lambda sizes: [None] * len(sizes))
        self._move_state((), flats, {})
        self._settle(flats)
        self.state.update(state)
        for flat in flats:
            self._take_back_state(flat)

    # Join

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For ``torch.distributed.algorithms.Join([ddp_model, optimizer])``: ranks without data step along.

        Raises:
            ValueError: with ``shard_gradients``, since Join is for DistributedDataParallel.
        """
        if self.shards_gradients:
            raise ValueError("Join works with DistributedDataParallel, which shard_gradients=True replaces")
        return ShadowSteps(self._shadow_step, self._leave_join)

    def _shadow_step(self) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        own = [param.grad for param in params]
        for param in params:
            param.grad = None  # a new tensor takes what another rank has
        self._joined = True
        try:
            self.step()
        finally:
            self._joined = False
            for param, grad in zip(params, own, strict=True):
                param.grad = grad

    def _leave_join(self) -> None:
        # Join itself leaves it enabled, and later steps would go on asking who has data.
        self._join_config = _JoinConfig(enable=False, throw_on_early_termination=False, is_first_joinable=False)

    @property
    def join_device(self) -> torch.device:
        """Where Join's own collectives are."""
        return self._flats[0].buffer.device

    @property
    def join_process_group(self) -> dist.ProcessGroup | None:
        """The group of Join's own collectives."""
        return self._network.group
