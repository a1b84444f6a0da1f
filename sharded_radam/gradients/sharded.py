"""Gradients sharded while backward runs (ZeRO stage 2), in the place of DistributedDataParallel's all-reduce.

::

    backward   p.grad of the last layers ... of the first layers        hooks note what has come
    bucket                 [ 1 ] --reduce-scatter-->  own shard of 1    as soon as all of it has; .grad is released
                                         [ 0 ] --reduce-scatter--> own shard of 0
    step       what is missing; which parameters have a gradient on any rank; then the update of the shards

:class:`ShardedGradients` brings together who does what: ``hooks`` say what has come, ``places`` take it out of
``param.grad``, ``rounds`` say what is to be sent, ``packing`` sends it.

Hooks run on the streams of their modules. All kernels here are in one :class:`~sharded_radam.streams.Lane`: during
backward on the stream of the pass's first gradient, after whatever the other gradients came on; otherwise on that of
the caller.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sharded_radam.buckets.flat import Flat, find_slot
from sharded_radam.buckets.memory import as_real
from sharded_radam.gradients.hooks import Hooks
from sharded_radam.gradients.measures import FiniteCheck, unscale_
from sharded_radam.gradients.packing import Sums
from sharded_radam.gradients.places import Places
from sharded_radam.gradients.rounds import Event, Rounds, State
from sharded_radam.gradients.schedule import Launch, SlotKey
from sharded_radam.state.gather import gather_slot, move
from sharded_radam.streams import Lane
from sharded_radam.transport import Reducer, Transport


class ShardedGradients:
    """The mean gradients of the own shards of some flats.

    Args:
        flats: of the optimizer.
        transport: of their ranks.
        check: report gradients that are not finite before they are reduced.
        module: whose ``require_backward_grad_sync`` counts as DistributedDataParallel's.
        reduce_dtype: in which gradients travel; that of their parameters if None.
    """

    def __init__(
        self,
        flats: Sequence[Flat],
        transport: Transport,
        check: bool,
        module: nn.Module | None = None,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.transport = transport
        self._reduce_dtype = reduce_dtype
        self._finite = FiniteCheck(transport.everyone) if check else None
        self._syncs = True  # outside of no_sync
        self._switches = {} if module is None else module.__dict__
        self._arriving: SlotKey | None = None
        self._task = -1  # the backward pass of the last arrival
        self._generation = 0  # how often gradients were used or dropped
        self._done = 0  # a checksum of the launches since ranks compared it last
        self._restarted = transport.restarted
        self._lane = Lane.on(transport.device)
        self._set_flats(flats)
        self._hooks = Hooks(self)
        self._hooks.listen(self.params(), take_over=True)

    def _set_flats(self, flats: Sequence[Flat]) -> None:
        self.sums = Sums(flats, self.transport, self._reduce_dtype)
        self.rounds = Rounds([flat.plan for flat in flats])
        self.places = Places(self.sums, weakref.ref(self), self._finite, self._lane)

    @torch.no_grad()
    def lay_out(self, flats: Sequence[Flat]) -> None:
        """Collective: take these flats in the place of those there are.

        Gradients, which must have been reduced, move along; those of parameters that leave become whole. New parameters
        may have gradients already, so a round is due.
        """
        self._move()
        staying = {param for flat in flats for param in flat.params}
        present = {param for key, param in self.params() if self.places.is_present(key)}
        leaving = [param for _, param in self.params() if param in present and param not in staying]
        # All before the first is assigned: an assigned gradient is taken back into its shard when the next is read.
        for param, grad in zip(leaving, [self.whole(param) for param in leaving], strict=True):
            param.grad = grad
        self._hooks.leave()
        sources = [(flat, {"sum": self.sums.elements(index)}) for index, flat in enumerate(self.sums.flats)]
        self._set_flats(flats)
        self._hooks.listen(self.params(), take_over=True)
        moving = [(key, param) for key, param in self.params() if param in present]
        targets = {
            param: (self.sums.flats[index], slot, {"sum": self.sums.elements(index)}) for (index, slot), param in moving
        }
        move(sources, targets, self.transport)
        for key, _ in moving:
            self.places.adopt(key)

    def make_reducer(self) -> Reducer:
        """Collective the first time: the reducer for the buckets of all flats."""
        return self.sums.make_reducer()

    def params(self) -> Sequence[tuple[SlotKey, Tensor]]:
        """All parameters, flat by flat in the order of their slots."""
        return self.places.params()

    # Backward

    def arrive(self, key: SlotKey) -> None:
        """Note that backward has accumulated a gradient; reduce what the ones before have made complete."""
        self.settle()
        if self._task != (task := torch._C._current_graph_task_id()):
            self._task = task
            self.places.follow_dropped()
            torch.autograd.Variable._execution_engine.queue_callback(self._end_pass)
            self._move()
        if self._lane is not None:
            self._lane.note()
        if not (self._syncs and self._switches.get("require_backward_grad_sync", True)):
            self.rounds.note(Event.HELD)
            return
        self.rounds.note(Event.GRADIENT)
        if key in self.rounds.arrived:
            self._end_round()  # another backward has begun
        self._arriving = key

    def settle(self) -> None:
        """Take the gradient that came last: all hooks of its parameter have run."""
        key, self._arriving = self._arriving, None
        if key is None:
            return
        if self._lane is None:
            self.places.take(key)
        else:
            with self._lane.entered():
                self.places.take(key)
        if not self.rounds.expects(key):
            return  # rare: it waits for the step
        self.rounds.take(key)
        while self.rounds.is_ready:
            self._launch_next()
        if self.rounds.is_over:
            self.rounds.end()

    def _end_pass(self) -> None:
        self._move()  # to whoever has called backward, for whom all is in order then
        self.settle()

    def _end_round(self) -> None:
        while not self.rounds.is_over:
            self._launch_next()
        self.rounds.end()

    @torch.no_grad()  # with create_graph=True, hooks run with gradients enabled
    def _launch_next(self) -> None:
        launch, done = self.rounds.next_launch()
        with self._in_lane():
            self._send(launch)
            self.places.release(launch.flat, done)

    def _in_lane(self) -> AbstractContextManager[None]:
        return nullcontext() if self._lane is None else self._lane.entered()

    def _move(self) -> None:
        """Go on, on the current stream."""
        if self._lane is not None:
            self._lane.move()

    def _send(self, launch: Launch) -> None:
        """Begin to reduce the gradients of a launch, also those that have not come as a round expects them."""
        for key in ((launch.flat, slot) for slot in launch.slots):
            if key not in self.rounds.arrived:
                self.places.take(key)
        self._done = zlib.crc32(f"{self._generation} {launch.flat} {launch.bucket}".encode(), self._done)
        self.sums.send(launch, self.places.to_send(launch), self._mark(launch.bucket))

    def _mark(self, bucket: int) -> int:
        """One byte by which ranks notice that they reduce different buckets, or gradients of different steps."""
        return (31 * self._generation + bucket) % 256  # 31: up to so many buckets, neighbouring steps share no mark

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of backward passes in here stay in ``.grad``, and are reduced with those of the next one."""
        before, self._syncs = self._syncs, False
        try:
            yield
        finally:
            self._syncs = before

    # Step

    @torch.no_grad()
    def finish(self, waits: bool = True) -> list[list[bool]]:
        """Collective: reduce all that is left.

        Args:
            waits: for the mean over replicas. Else the sums are not to be used before ``sums.wait``.

        Returns:
            For each flat, which of its parameters have a gradient on some rank.

        Raises:
            RuntimeError: on every rank, with ``check``, if one had a gradient that is not finite; or if the gradients
                are in another optimizer's shards.
        """
        self._move()
        self.settle()
        self._check_owner()
        self.places.follow_dropped()
        is_due = not self.rounds.is_reduced
        if is_due:
            if not self.rounds.is_launched:
                self._end_round()
            self._send_tail()
            self.rounds.note(Event.TAIL)
            self._follow_arrivals()
            self._hooks.listen(self.params(), take_over=False)
        with self.transport.meter.phase("reduce_scatter"):
            self.make_reducer()
            self.sums.finish()
        if self.transport.replicas is not None:
            self._average_replicas(is_due, waits)
        if self._finite is not None:
            self._finite.agree()
        self.places.follow_assigned()
        return [self.places.present(index) for index in range(len(self.sums.flats))]

    def _average_replicas(self, is_due: bool, waits: bool) -> None:
        """Once a step, as a rule, since nobody reads the sums before."""
        with self.transport.losing_ranks():
            if is_due:
                self.sums.begin_average(sorted({index for index, _ in self.places.has_grad}))
            if waits or self.places.has_assigned():
                self.sums.finish_average()

    def reduce_once(self) -> None:
        """Collective the first time after a backward pass: reduce all that is left."""
        self._move()
        if not self.rounds.is_reduced:
            self.finish()

    def end_rounds(self) -> None:
        """Send what was begun, and wait for it. Collective only after a backward pass that did not end."""
        self._move()
        self.settle()
        if self.rounds.state is State.OPEN:
            self._end_round()  # other ranks may have come further, and wait for this one
        self.sums.finish()

    def _check_owner(self) -> None:
        for key in self._hooks.of_others():
            if self.places.param(key).grad is not None:
                raise RuntimeError(
                    f"the gradient of '{self.places.shard(key).spec.name}' is sharded by another optimizer: the one "
                    "that was built last, or whose zero_grad() was called last. Expected: zero_grad() of the optimizer "
                    "that is to step, before the backward pass; or, for several steps with one gradient, "
                    "DistributedDataParallel in the place of shard_gradients=True"
                )

    def _send_tail(self) -> None:
        done, self._done = self._done, 0
        flags = [param.grad is not None for _, param in self.params()]
        try:
            flags = self.transport.everyone.union(flags, done)
        except RuntimeError:
            self._restarted = -1  # all ranks have failed, and begin anew
            raise
        self.places.set_present(flags)
        for launch in self.rounds.schedule.tail:
            if any((launch.flat, slot) in self.places.has_grad for slot in launch.slots):
                self._send(launch)
        for launch in self.rounds.schedule.tail:
            self.places.release(launch.flat, launch.slots)
        self.places.place_others()

    def _follow_arrivals(self) -> None:
        """After the first backward, and whenever other parameters have gradients: launch in the order of rank 0's."""
        present = self.places.has_grad
        if present and not self.rounds.knows_order(present):
            arrivals = self.transport.everyone.all_gather_objects(self.rounds.last_arrivals)[0]
            self.rounds.follow(arrivals, present)

    def stepped(self) -> None:
        """Note that a step has used the gradients, or was skipped; the next one reduces again."""
        self.rounds.note(Event.STEP)
        self._generation += 1

    @torch.no_grad()
    def reset(self) -> None:
        """Prepare for new gradients, when ``.grad`` is about to be dropped or zeroed."""
        if self._restarted != self.transport.restarted:
            self._restart()
        self.end_rounds()
        self.places.drop_all()
        self._hooks.listen(self.params(), take_over=True)
        self.stepped()

    def _restart(self) -> None:
        """Begin anew where every rank does: they have failed together, perhaps in the middle of a round."""
        self._restarted = self._generation = self.transport.restarted
        self._arriving, self._done = None, 0
        self.places.has_grad.clear()
        self.rounds = Rounds([flat.plan for flat in self.sums.flats])
        self.sums.restart()

    # What is read and changed between backward and step

    def own(self) -> list[Tensor]:
        """1-D real views of the gradients in the own shards.

        One for each flat whose parameters all have gradients, padding included; otherwise one for each piece.
        """
        found = []
        for index, total in enumerate(self.sums.totals):
            if all(self.places.present(index)):
                found.append(total)
            else:
                found += [as_real(piece) for _, _, piece in self.places.pieces(index)]
        return found

    def pieces(self) -> Iterator[tuple[Tensor, range, Tensor]]:
        """Parameter, elements in memory order, and 1-D view of the gradient, of all own pieces that have one."""
        return (each for index in range(len(self.sums.flats)) for each in self.places.pieces(index))

    @torch.no_grad()
    def whole(self, param: Tensor) -> Tensor | None:
        """Collective: all elements of a gradient, shaped as its parameter and of its dtype; None if it has none."""
        present = self.finish()
        index, slot = find_slot(self.sums.flats, param)
        if not present[index][slot]:
            return None
        flat = self.sums.flats[index]
        return gather_slot(flat, slot, self.sums.elements(index), self.transport).to(param.dtype)

    def note_unscaled(self) -> None:
        """Know that the sums, which were reduced before, are unscaled."""
        self.rounds.note(Event.UNSCALE)

    def unscale_once_(self, inv_scale: Tensor, found_inf: Tensor) -> None:
        """Collective if they are scaled: unscale, for torch's GradScaler, which asks for each dtype in turn."""
        if self.rounds.state is not State.UNSCALED:
            unscale_(self, inv_scale, found_inf)
