"""Gradients sharded while backward runs (ZeRO stage 2), in the place of DistributedDataParallel's all-reduce.

::

    backward   p.grad of the last layers ... of the first layers        hooks note what has come
    bucket                 [ 1 ] --reduce-scatter-->  own shard of 1    as soon as all of it has; .grad is released
                                         [ 0 ] --reduce-scatter--> own shard of 0
    step       what is missing; which parameters have a gradient on any rank; then the update of the shards

A *round* is every launch of the schedule once, in its order: one for each backward pass that is not in ``no_sync``. It
ends when all gradients have come; or, where some do not come, when the next backward pass produces the first of those
that did, or at the step. So between two steps, all ranks must run the same number of backward passes.

``param.grad`` says whether there is a gradient, as everywhere in torch. While backward runs it is the local gradient;
when its other hooks have run too, which is when the next gradient comes or the pass ends, this takes it, and a
:class:`GradShard` is left in its place.
"""

from __future__ import annotations

import functools
import gc
import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from sharded_radam.buckets.flat import Flat, find_slot
from sharded_radam.buckets.memory import as_real, zeros
from sharded_radam.gradients.grad_shard import GradShard
from sharded_radam.gradients.schedule import Launch, Progress, Slots, make_schedule
from sharded_radam.state.gather import gather_slot, move
from sharded_radam.transport import Reducer, Transport

logger = logging.getLogger("sharded_radam")


class _Part(NamedTuple):
    """Slot ∩ bucket: ``numel`` real numbers of a parameter from ``start`` on, at ``offset`` in the bucket."""

    slot: int
    start: int
    numel: int
    offset: int


class ShardedGradients:
    """The mean gradients of the own shards of some flats.

    ``sums[i]`` is 1-D with the layout of ``flats[i].state``: real numbers, fp32 for half precision. Padding in it is
    undefined.

    Args:
        flats: of the optimizer.
        transport: of their ranks.
        check: report gradients that are not finite before they are reduced.
        module: whose ``require_backward_grad_sync`` counts as DistributedDataParallel's.
    """

    def __init__(
        self, flats: Sequence[Flat], transport: Transport, check: bool, module: nn.Module | None = None
    ) -> None:
        self.flats: list[Flat] = []
        self.sums: list[Tensor] = []
        self.is_unscaled = False
        self._this = weakref.ref(self)
        self._hooks: dict[Slots, _Hook] = {}
        self._shards: list[list[GradShard]] = []
        self._transport = transport
        self._check = check
        self._syncing = True
        self._switches = {} if module is None else module.__dict__
        self._reducer: Reducer | None = None
        self._epoch = 0
        self._arriving: Slots | None = None
        self._task = -1  # the backward pass of the last arrival
        self._restarted = transport.restarted
        self._has_grad: set[Slots] = set()
        # Parameters in whose ``.grad`` the shard was left: if it is gone, somebody dropped that gradient.
        self._placed: set[Slots] = set()
        # Slots whose elements in a bucket's sums are not zero, and those of them that are still meant.
        self._filled: dict[tuple[int, int], set[int]] = defaultdict(set)
        self._valid: dict[tuple[int, int], set[int]] = defaultdict(set)
        self._not_finite: list[str] = []
        self._last_arrivals: list[Slots] = []
        self._had_round = False
        self._is_behind = False
        self._is_reduced = False
        self._set_flats(flats)
        self._is_behind = False
        _alive.add(self)

    def _set_flats(self, flats: Sequence[Flat]) -> None:
        self.flats, self.sums, self._shards = list(flats), [], []
        for flat in flats:
            dtype = flat.state["exp_avg"].dtype.to_real()
            total = zeros(flat.reals * flat.plan.local_numel, dtype, flat.buffer.device)
            self.sums.append(total)
            pieces: list[list[tuple[int, Tensor]]] = [[] for _ in flat.params]
            for at in (own.piece for pieces_ in flat.pieces for own in pieces_):
                pieces[at.slot].append((at.start, _elements(flat, total).narrow(0, at.local_start, at.numel)))
            self._shards.append(
                [
                    GradShard(p, spec, own, self._this)
                    for p, spec, own in zip(flat.params, flat.specs, pieces, strict=True)
                ]
            )
        self._reducer = None
        self._expected: set[Slots] = set()
        self._last_arrivals = []
        self._reschedule(list(self._keys())[::-1])
        self._listen(take_over=True)
        self._is_reduced = False
        self._is_behind = True  # the new parameters may have gradients already

    @torch.no_grad()
    def lay_out(self, flats: Sequence[Flat]) -> None:
        """Collective: take these flats in the place of those there are.

        Gradients, which must have been reduced, move along; those of parameters that leave become whole.
        """
        params = {param for flat in flats for param in flat.params}
        present = {self._param(key) for key in self._keys() if self._is_present(key)}
        leaving = [param for param in map(self._param, self._keys()) if param in present and param not in params]
        # All before the first is assigned: an assigned gradient is taken back into its shard when the next is read.
        for param, grad in zip(leaving, [self.whole(param) for param in leaving], strict=True):
            param.grad = grad
        for key, hook in self._hooks.items():
            if self._param(key) not in params and hook.owner is self._this and hook.handle is not None:
                hook.handle.remove()
                hook.owner, hook.handle = _nobody, None
        sources = [(flat, {"sum": _elements(flat, total)}) for flat, total in zip(self.flats, self.sums, strict=True)]
        for state in (self._hooks, self._placed, self._filled, self._valid, self._has_grad):
            state.clear()
        self._set_flats(flats)
        targets = {
            param: (flat, slot, {"sum": _elements(flat, total)})
            for flat, total in zip(flats, self.sums, strict=True)
            for slot, param in enumerate(flat.params)
            if param in present
        }
        move(sources, targets, self._transport)
        for key in self._keys():
            if self._param(key) in present:
                self._has_grad.add(key)
                self._place(key)
                self._note_filled(key)

    def make_reducer(self) -> Reducer:
        """Collective: the reducer for the buckets of all flats."""
        self._reducer = self._transport.reducer(self._sizes())
        return self._reducer

    def _sizes(self) -> list[tuple[int, torch.dtype]]:
        return [(flat.reals * flat.plan.bucket_numel, flat.buffer.dtype.to_real()) for flat in self.flats]

    def shard_bytes(self) -> int:
        """Of the sums."""
        return sum(total.nbytes for total in self.sums)

    def slot_bytes(self) -> int:
        """Of the buckets that are filled or under way; not collective, so 0 before the first backward of a copy."""
        return self._reducer.num_slots * self._reducer.slot_bytes(self._sizes()) if self._reducer else 0

    @property
    def _reduce(self) -> Reducer:
        return self._reducer or self.make_reducer()

    def sum_of(self, flat: Flat) -> Tensor:
        """The mean gradients of the own shards of a flat."""
        return next(total for total, each in zip(self.sums, self.flats, strict=True) if each is flat)

    # Backward

    def _listen(self, take_over: bool) -> None:
        """Hooks for all parameters that require gradients now; one optimizer has the hook of a parameter.

        Args:
            take_over: take those of others too.
        """
        for index, flat in enumerate(self.flats):
            for slot, param in enumerate(flat.params):
                known = self._hooks.get((index, slot))
                if param.requires_grad and (known is None or known.owner is not self._this):
                    self._listen_to((index, slot), take_over)

    def _listen_to(self, key: Slots, take_over: bool) -> None:
        param = self._param(key)
        hook = _hooks.get(param)
        if hook is None:
            hook = _hooks[param] = _Hook()
        if take_over or hook.owner() is None:
            if hook.handle is not None:
                hook.handle.remove()
            hook.handle = param.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                functools.partial(_on_gradient, self._this, key)
            )
            hook.owner = self._this
        self._hooks[key] = hook

    @torch.no_grad()
    def arrive(self, key: Slots) -> None:
        """Note that backward has accumulated a gradient; reduce what the ones before have made complete."""
        self.settle()
        if self._task != (task := torch._C._current_graph_task_id()):
            self._task = task
            self._notice_dropped()
            torch.autograd.Variable._execution_engine.queue_callback(self.settle)  # when that pass ends
        self._is_reduced = self.is_unscaled = False
        if not (self._syncing and self._switches.get("require_backward_grad_sync", True)):
            self._is_behind = True
            return
        if key in self._progress.arrived:
            self._end_round()  # another backward has begun
        self._arriving = key

    @torch.no_grad()
    def settle(self) -> None:
        """Take the gradient that came last: all hooks of its parameter have run."""
        key, self._arriving = self._arriving, None
        if key is None:
            return
        self._take(key)
        if not self._progress.expects(key):
            return  # rare: it waits for the step
        self._progress.arrive(key)
        while self._progress.is_ready:
            self._launch_next()
        if self._progress.is_over:
            self._begin_round()

    def _take(self, key: Slots) -> None:
        """Move the local gradient out of ``.grad``, where its shard stays."""
        shard, grad = self._shard(key), self._param(key).grad
        local = grad.fresh if isinstance(grad, GradShard) else grad
        if grad is None:  # dropped by a hook
            shard.sending = shard.fresh = None
        if local is not None:
            shard.send(self._checked(local, key))
            shard.fresh = None
            self._place(key)

    def _place(self, key: Slots) -> None:
        self._param(key).grad = self._shard(key)
        self._placed.add(key)

    def _notice_dropped(self) -> None:
        """Forget gradients that somebody dropped since; where all that this rank knows of are, those of others too."""
        lost = [key for key in self._placed if not isinstance(self._param(key).grad, GradShard)]
        if lost and len(lost) == len(self._placed):
            self._valid.clear()
        for key in lost:
            self._shard(key).sending = self._shard(key).fresh = None
            for bucket in self._buckets_of(key):
                self._valid[bucket].discard(key[1])
        self._placed.difference_update(lost)

    def _checked(self, grad: Tensor, key: Slots) -> Tensor:
        name = self._shard(key).spec.name
        if grad.is_sparse:
            raise RuntimeError(f"RAdam does not support sparse gradients (parameter '{name}')")
        if self._check and name not in self._not_finite and not grad.isfinite().all():
            logger.error("gradient of '%s' on rank %d is not finite", name, self._transport.rank)
            self._not_finite.append(name)
        return grad

    def _end_round(self) -> None:
        while not self._progress.is_over:
            self._launch_next()
        self._begin_round()

    def _begin_round(self) -> None:
        if self._progress.arrived:
            self._last_arrivals = list(self._progress.arrived)
        self._had_round = True
        self._is_behind = False
        self._progress.reset()

    def _launch_next(self) -> None:
        launch, done = self._progress.take()
        self._send(launch)
        for slot in done:
            self._shards[launch.flat][slot].sending = None

    def _send(self, launch: Launch) -> None:
        """Pack the gradients of a launch, and begin to reduce them."""
        flat, plan, where = self.flats[launch.flat], self.flats[launch.flat].plan, (launch.flat, launch.bucket)
        for slot in launch.slots:
            if (launch.flat, slot) not in self._progress.arrived:
                self._take((launch.flat, slot))
        first, stop = plan.bucket_range(launch.bucket)
        with self._transport.meter.phase("reduce_scatter"):
            accumulates = self._keep(where)
            bucket = self._reduce.open(flat.reals * (stop - first), flat.buffer.dtype.to_real())
            targets, sources, empty = [], [], []
            for part in self._parts[where]:
                target = bucket.narrow(0, part.offset, part.numel)
                sending = self._shards[launch.flat][part.slot].sending
                if part.slot in launch.slots and sending is not None and flat.params[part.slot].grad is not None:
                    targets.append(target)
                    sources.append(sending.narrow(0, part.start, part.numel))
                else:
                    empty.append(target)
            self._reduce.fill(targets, sources)
            if empty:
                torch._foreach_zero_(empty)
            local_start, local_stop = (flat.reals * at for at in plan.local_range(launch.bucket))
            out = self.sums[launch.flat].narrow(0, local_start, local_stop - local_start)
            self._transport.count("reduce_scatter", bucket)
            self._reduce.close(out, accumulates, (31 * self._epoch + launch.bucket) % 256)
        self._valid[where] |= launch.slots
        self._filled[where] = set(self._valid[where])

    def _keep(self, where: tuple[int, int]) -> bool:
        """Whether gradients in the sums of a bucket are to be added to; of those that were dropped, make zeros."""
        flat, dropped = self.flats[where[0]], self._filled[where] - self._valid[where]
        if self._valid[where] and dropped:
            self._reduce.finish()  # nothing may still be on its way to there
            for at in (own.piece for own in flat.pieces[where[1]]):
                if at.slot in dropped:
                    self.sums[where[0]].narrow(0, flat.reals * at.local_start, flat.reals * at.numel).zero_()
        return bool(self._valid[where])

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes in here stay in ``.grad``, and are reduced with those of the next one."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    # Step

    @torch.no_grad()
    def finish(self) -> list[list[bool]]:
        """Collective: reduce all that is left.

        Returns:
            For each flat, which of its parameters have a gradient on some rank.

        Raises:
            RuntimeError: on every rank, with ``check``, if one had a gradient that is not finite; or if the gradients
                are in another optimizer's shards.
        """
        self.settle()
        self._check_owner()
        self._notice_dropped()
        if not self._is_reduced:
            if self._progress.arrived or self._is_behind or not self._had_round:
                self._end_round()
            self._send_tail()
            self._is_reduced = True
            self._follow_arrivals()
            self._listen(take_over=False)
        with self._transport.meter.phase("reduce_scatter"):
            self._reduce.finish()
        if self._check:
            self._raise_not_finite()
        self._follow_assigned()
        return [[self._is_present((i, slot)) for slot in range(len(flat.params))] for i, flat in enumerate(self.flats)]

    def reduce_once(self) -> None:
        """Collective the first time after a backward pass: reduce all that is left."""
        if not self._is_reduced:
            self.finish()

    def end_rounds(self) -> None:
        """Send what was begun, and wait for it. Collective only after a backward pass that did not end."""
        self.settle()
        if self._progress.arrived:
            self._end_round()  # other ranks may have come further, and wait for this one
        if self._reducer is not None:
            self._reducer.finish()

    def _check_owner(self) -> None:
        for key in self._keys():
            grad, hook = self._param(key).grad, self._hooks.get(key)
            if grad is not None and hook is not None and hook.owner() not in (self, None):
                raise RuntimeError(
                    f"the gradient of '{self._shard(key).spec.name}' is sharded by another optimizer: the one that was "
                    "built last, or whose zero_grad() was called last. Expected: zero_grad() of the optimizer that is "
                    "to step, before the backward pass; or, for several steps with one gradient, "
                    "DistributedDataParallel in the place of shard_gradients=True"
                )

    def _send_tail(self) -> None:
        keys = list(self._keys())
        flags = self._transport.union([self._param(key).grad is not None for key in keys])
        self._has_grad = {key for key, flag in zip(keys, flags, strict=True) if flag}
        for launch in self._schedule.tail:
            if any((launch.flat, slot) in self._has_grad for slot in launch.slots):
                self._send(launch)
        for launch in self._schedule.tail:
            for slot in launch.slots:
                self._shards[launch.flat][slot].sending = None
        for key in self._has_grad:
            if self._param(key).grad is None:  # only other ranks have one
                self._place(key)

    def _follow_assigned(self) -> None:
        """Take what was assigned to ``.grad`` after backward, as it is: as under DDP, all ranks assign the same."""
        for key in self._keys():
            param, shard = self._param(key), self._shard(key)
            if param.grad is not None and param.grad is not shard:
                shard.assign(self._checked(param.grad, key))
                self._place(key)
                self._has_grad.add(key)
                self._note_filled(key)

    def _note_filled(self, key: Slots) -> None:
        for bucket in self._buckets_of(key):
            self._valid[bucket].add(key[1])
            self._filled[bucket].add(key[1])

    def _is_present(self, key: Slots) -> bool:
        return key in self._has_grad and self._param(key).grad is not None

    def _follow_arrivals(self) -> None:
        """After the first backward, and whenever other parameters have gradients: launch in the order of rank 0's."""
        if self._has_grad and self._expected != self._has_grad:
            self._expected = set(self._has_grad)
            arrivals = self._transport.all_gather_objects(self._last_arrivals)[0]
            known = [key for key in arrivals if key in self._has_grad]
            self._reschedule(known + sorted(self._has_grad - set(known), reverse=True))

    def _reschedule(self, order: Sequence[Slots]) -> None:
        plans = [flat.plan for flat in self.flats]
        self._schedule = make_schedule(plans, order)
        self._progress = Progress(self._schedule)
        self._parts = {
            (launch.flat, launch.bucket): self._parts_of(launch.flat, launch.bucket)
            for launch in (*self._schedule.launches, *self._schedule.tail)
        }

    def _parts_of(self, flat: int, bucket: int) -> list[_Part]:
        plan, reals = self.flats[flat].plan, self.flats[flat].reals
        first, end = plan.bucket_range(bucket)
        return [
            _Part(slot, reals * (start - plan.slots[slot].start), reals * (stop - start), reals * (start - first))
            for slot, start, stop in plan.overlaps(first, end)
        ]

    def _raise_not_finite(self) -> None:
        heard = self._transport.all_gather_objects(self._not_finite)
        bad = [f"rank {rank}: {', '.join(names)}" for rank, names in enumerate(heard) if names]
        if bad:
            raise RuntimeError(
                f"gradients are not finite, before they were reduced, on {'; '.join(bad)}. Parameters and state are "
                "unchanged; zero_grad() drops these gradients"
            )

    def stepped(self) -> None:
        """A step has used the gradients; the next one reduces again."""
        self._had_round = False
        self._epoch += 1
        self._is_reduced = False
        self.is_unscaled = False

    @torch.no_grad()
    def reset(self) -> None:
        """Prepare for new gradients, when ``.grad`` is about to be dropped or zeroed."""
        if self._restarted != self._transport.restarted:
            self._restart()
        self.end_rounds()
        for shard in (shard for shards in self._shards for shard in shards):
            shard.sending = shard.fresh = None
        self._placed.clear()
        self._valid.clear()
        self._not_finite.clear()
        self._listen(take_over=True)
        self.stepped()

    def _restart(self) -> None:
        """Begin anew where every rank does: they have failed together, perhaps in the middle of a round."""
        self._restarted = self._epoch = self._transport.restarted
        self._arriving, self._is_behind = None, False
        self._expected.clear()
        self._has_grad.clear()
        self._reschedule(list(self._keys())[::-1])
        if self._reducer is not None:
            self._reducer.restart()

    # What users read from .grad otherwise

    def _keys(self) -> Iterator[Slots]:
        for index, flat in enumerate(self.flats):
            for slot in range(len(flat.params)):
                yield index, slot

    def _param(self, key: Slots) -> Tensor:
        return self.flats[key[0]].params[key[1]]

    def _shard(self, key: Slots) -> GradShard:
        return self._shards[key[0]][key[1]]

    def _buckets_of(self, key: Slots) -> Iterator[tuple[int, int]]:
        return ((key[0], bucket) for bucket in self.flats[key[0]].plan.buckets_of(key[1]))

    def own(self, complex_views: bool = False) -> list[Tensor]:
        """1-D views of all pieces of the own shards whose parameter has a gradient."""
        return [piece if complex_views else as_real(piece) for _, _, piece in self.pieces()]

    def pieces(self) -> Iterator[tuple[Tensor, range, Tensor]]:
        """Parameter, elements in memory order, and 1-D view of the gradient, of all own pieces that have one."""
        for key in self._keys():
            if self._is_present(key):
                for start, piece in self._shard(key).pieces:
                    yield self._param(key), range(start, start + piece.numel()), piece

    @torch.no_grad()
    def whole(self, param: Tensor) -> Tensor | None:
        """Collective: all elements of a gradient, shaped as its parameter and of its dtype; None if it has none."""
        present = self.finish()
        index, slot = find_slot(self.flats, param)
        if not present[index][slot]:
            return None
        flat = self.flats[index]
        return gather_slot(flat, slot, _elements(flat, self.sums[index]), self._transport).to(param.dtype)

    @torch.no_grad()
    def norm(self, norm_type: float) -> Tensor:
        """Collective: the norm of all gradients as one vector, 0-d float64 (float32 where there is no float64)."""
        self.finish()
        device = self._transport.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        norms = [torch.linalg.vector_norm(view, norm_type).to(dtype) for view in self.own(complex_views=True)]
        if math.isinf(norm_type):
            largest = torch.stack(norms).max() if norms else torch.zeros((), dtype=dtype, device=device)
            return self._transport.all_reduce(largest, dist.ReduceOp.MAX)
        powers = torch.stack(norms).pow(norm_type).sum() if norms else torch.zeros((), dtype=dtype, device=device)
        return self._transport.all_reduce(powers, dist.ReduceOp.SUM).pow(1 / norm_type)

    @torch.no_grad()
    def unscale_(self, inv_scale: Tensor, found_inf: Tensor) -> None:
        """Collective: multiply by ``inv_scale``; set ``found_inf`` to 1 on all ranks if one has inf or nan."""
        self.finish()
        self.is_unscaled = True
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for view in self.own():
            by_dtype[view.dtype].append(view)
        for views in by_dtype.values():
            torch._amp_foreach_non_finite_check_and_unscale_(views, found_inf, inv_scale)
        self._transport.all_reduce(found_inf, dist.ReduceOp.MAX)

    def unscale_once_(self, inv_scale: Tensor, found_inf: Tensor) -> None:
        """The same for torch's GradScaler, which asks for each dtype in turn."""
        if not self.is_unscaled:
            self.unscale_(inv_scale, found_inf)


def _elements(flat: Flat, total: Tensor) -> Tensor:
    """The sums of a flat as elements of its parameters, which may be complex."""
    return torch.view_as_complex(total.view(-1, 2)) if flat.buffer.is_complex() else total


def _nobody() -> None:
    return None


@dataclass(slots=True)
class _Hook:
    """The hook of a parameter, and whose it is; an optimizer that takes it over changes this object."""

    handle: RemovableHandle | None = None
    owner: Callable[[], ShardedGradients | None] = _nobody


_hooks: Any = WeakIdKeyDictionary()
_alive: weakref.WeakSet[ShardedGradients] = weakref.WeakSet()
_wrapped: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _on_gradient(gradients: weakref.ref[ShardedGradients], key: Slots, param: Tensor) -> None:
    found = gradients()
    if found is not None:
        found.arrive(key)


def check_not_wrapped(params: Sequence[Tensor]) -> None:
    """Raise ValueError if DistributedDataParallel averages the gradients of these parameters."""
    _find_wrapped()
    for module in _wrapped:
        _check_disjoint(module, params)


@functools.cache
def _find_wrapped() -> None:
    """Note, once, what was wrapped before this was imported; :func:`_on_module` sees the rest."""
    _wrapped.update(each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel))


def _check_disjoint(module: nn.Module, params: Sequence[Tensor]) -> None:
    ours = {id(param) for param in params}
    if any(id(param) in ours for param in module.parameters()):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which averages gradients, and shard_gradients=True does "
            "so too: pass the parameters of the model itself and do not wrap it, or leave shard_gradients away"
        )


def _on_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if isinstance(module, DistributedDataParallel) and child is not None:
        _wrapped.add(module)
        for gradients in _alive:
            _check_disjoint(child, [param for flat in gradients.flats for param in flat.params])


register_module_module_registration_hook(_on_module)
