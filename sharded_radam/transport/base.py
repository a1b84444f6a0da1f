"""What the optimizer asks of the network, and all of it that does not depend on the backend."""

from __future__ import annotations

import itertools
import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.store.groups import backend_of
from sharded_radam.store.meeting import Meeting
from sharded_radam.store.verdicts import LostError, is_agreed
from sharded_radam.streams import has_streams
from sharded_radam.transport.averages import Averages, ReducedAverages
from sharded_radam.transport.everyone import Everyone
from sharded_radam.transport.meter import Meter
from sharded_radam.transport.reducers import Reducer

_TAG = 0x5AD0
"""Point-to-point messages of ours carry tags from here on, apart from a user's own, which are mostly small."""


_numbers = itertools.count()
_unfinished: dict[int, tuple[dist.Work | None, tuple[Tensor, ...]]] = {}
"""Messages that nobody has waited for. Gloo closes its connections if one of them is freed before it has travelled, as
where an optimizer is dropped in the middle of a backward pass."""


class Handle:
    """Communication under way; it owns the request and the tensors read and written, until somebody has waited.

    Args:
        work: the request.
        tensors: that it reads and writes.
        lost: raises what a rank says that has lost the others, of the backend's error.
    """

    def __init__(
        self, work: dist.Work | None, *tensors: Tensor, lost: Callable[[Exception], NoReturn] | None = None
    ) -> None:
        self._work = work
        self._tensors = tensors
        self._lost = lost
        self._number = next(_numbers)
        _unfinished[self._number] = work, tensors

    def wait(self, is_last: bool = True) -> None:
        """Return when the tensors may be used (on CUDA: by kernels launched from now on, on the current stream).

        Args:
            is_last: whether nobody waits again; only for other streams somebody may.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                _unfinished.pop(self._number, None)
                if self._lost is not None:
                    self._lost(error)
                raise
        if is_last:
            self.forget()
        else:
            _unfinished.pop(self._number, None)

    def end(self, seconds: float) -> None:
        """Return when it is done, or has failed, or after some seconds: nobody uses the tensors any more."""
        if self._work is not None:
            with suppress(RuntimeError):
                self._work.wait(timedelta(seconds=seconds))
        self.forget()

    def forget(self) -> None:
        """Let go of what nobody has to wait for any more."""
        self._work, self._tensors = None, ()
        _unfinished.pop(self._number, None)


class Transport(ABC):
    """Moves shards between the ranks of one process group; all ranks make the same calls in the same order.

    ``rank`` and ``world_size`` are those of the group, whose backend moves tensors of ``device``. Tensors are
    contiguous, and travel as bytes: any dtype does. ``reason`` says why it is this transport, ``operation`` what the
    optimizer does; the same words on every rank.

    Args:
        group: the shard group.
        device: of the tensors.
        meeting: where all ranks of a mesh meet, those of other shard groups too; that of the group if None.
        names: what the ranks of the group are called there; as in the group if None.

    ``replicas`` is between the ranks that hold the same shard; None if this one's is the only copy.
    """

    name: str
    reason = ""
    operation = "building ShardedRAdam"
    replicas: Transport | None = None
    is_second = False
    """Whether it is another one's ``replicas``: then it raises LostError for who uses it, who tells all ranks."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        meeting: Meeting | None = None,
        names: Sequence[int] | None = None,
    ) -> None:
        self.group = group
        self.device = device
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.meter = Meter(device)
        self.meeting = meeting or Meeting.of(group)
        self.names = names or range(self.world_size)
        self._late_checks = _LateChecks()

    def copy(self) -> Transport:
        """The same connections, with figures of its own."""
        new = copy(self)
        new.meter, new._late_checks = Meter(self.device), _LateChecks()
        new.meter.times_phases = self.meter.times_phases
        if self.replicas is not None:
            new.add_replicas(self.replicas.copy())
        return new

    def add_replicas(self, replicas: Transport) -> None:
        """Have a transport between the ranks that hold the same shard, of the same meeting."""
        self.replicas = replicas
        replicas.is_second, replicas.meter = True, self.meter

    @property
    def everyone(self) -> Transport | Everyone:
        """All ranks, for what must be equal on all replicas too."""
        return self if self.replicas is None else Everyone(self, self.replicas)

    @property
    def has_one_copy(self) -> bool:
        """Whether all ranks have their parameters in the same memory."""
        return False

    @property
    def restarted(self) -> int:
        """A number that is equal on all ranks, and another one after they have failed together and may go on."""
        return 0

    @contextmanager
    def together(self, operation: str | None = None) -> Iterator[None]:
        """Raise on all ranks, in the same words, whatever one of them raises in here."""
        before, self.operation = self.operation, operation or self.operation
        try:
            yield
        except Exception as error:  # whatever it is, the others must not wait for this rank
            if self.meeting.world_size == 1 or is_agreed(error):
                raise
            self.fail(error)
        finally:
            self.operation = before

    @contextmanager
    def losing_ranks(self) -> Iterator[None]:
        """Whoever loses a rank in here hears in the meeting why."""
        try:
            yield
        except LostError as error:
            if is_agreed(error):
                raise
            self.fail(error)

    def fail(self, problem: Exception) -> NoReturn:
        """Raise on all ranks, as soon as they come or wait for this one, what keeps it from going on."""
        self.meeting.agree(self.operation, None, problem, summon=self.summon, is_within=True)
        raise problem  # not reached: a problem is raised by the meeting

    def lose(self, rank: int | None, error: Exception) -> NoReturn:
        """Raise on all ranks that the backend could not reach a rank (None: it does not say which)."""
        who = "a rank" if rank is None else f"rank {self.names[rank]}"
        self.break_up()
        lost = LostError(f"{who} did not come within {self.meeting.timeout:g} s, or is gone ({error})")
        if self.is_second:
            raise lost from error
        try:
            self.fail(lost)
        except Exception as verdict:
            raise verdict from error

    def summon(self) -> None:
        """Call those who wait for this rank outside of the meeting."""
        self.break_up()
        if self.replicas is not None:
            self.replicas.break_up()

    def break_up(self) -> None:
        """Let those who wait for this rank in the backend fail now, and not at the time-out. Only Gloo can."""
        if self.world_size == 1 or backend_of(self.group, self.device.type) != "gloo":
            return
        # A wait that is over time closes Gloo's connections.
        with suppress(RuntimeError):
            nothing, other = torch.empty(1, dtype=torch.uint8), (self.rank + 1) % self.world_size
            work = dist.irecv(nothing, group=self.group, group_src=other, tag=_TAG - 1)
            assert work is not None
            work.wait(timedelta(milliseconds=1))

    def count(self, kind: str, bucket: Tensor) -> None:
        """Note a collective on a bucket, of which each rank sends, and receives, all shards but one."""
        self.meter.count(kind, bucket.nbytes // self.world_size * (self.world_size - 1))

    def buffers(self, sizes: Sequence[tuple[int, torch.dtype]]) -> list[Tensor | None]:
        """Collective: 1-D memory that suits this transport for flats of these sizes in elements, None if any does."""
        return [None] * len(sizes)

    def keep(self, buffers: Sequence[Tensor]) -> None:  # noqa: B027  (memory of its own is Python's to free)
        """Let go of all other memory that ``buffers`` returned."""

    def begin_update(self) -> None:  # noqa: B027  (nothing to wait for where shards travel as messages)
        """Return when this rank may write its shards."""

    @abstractmethod
    def all_gather(self, bucket: Tensor) -> list[Handle]:
        """Begin to fill a 1-D bucket, in place, with each rank's shard of it; the own shard is final already."""

    def all_gather_each(self, buckets: Sequence[Tensor]) -> list[list[Handle]]:
        """Begin to fill several buckets; where the backend can, in one call, after which they arrive together."""
        return [self.all_gather(bucket) for bucket in buckets]

    def end_update(self) -> None:  # noqa: B027
        """Return when all buckets are gathered here, beside those with handles, and no rank reads this one's."""

    @abstractmethod
    def reducer(self, buckets: Sequence[tuple[int, torch.dtype]]) -> Reducer:
        """Collective: a reducer for buckets of these sizes in elements, and dtypes."""

    def averages(self, tensors: Sequence[Tensor], most_numel: int) -> Averages:
        """What averages 1-D tensors over the ranks; see :class:`Averages`."""
        return ReducedAverages(self, tensors, most_numel)

    def gather(self, shard: Tensor, bucket: Tensor | None, to: int) -> None:
        """Fill ``bucket`` on rank ``to`` with the shards of all ranks; other ranks pass None."""
        if self.rank != to:
            self._isend(shard, to).wait()
            return
        assert bucket is not None
        parts = bucket.chunk(self.world_size)
        handles = [self._irecv(part, rank) for rank, part in enumerate(parts) if rank != to]
        parts[to].copy_(shard)
        for handle in handles:
            handle.wait()

    def gather_to_all(self, shard: Tensor, bucket: Tensor) -> None:
        """Collective: fill a 1-D ``bucket`` (modified in place) with the shards of all ranks, on every rank."""
        bucket.chunk(self.world_size)[self.rank].copy_(shard)
        for handle in self.all_gather(bucket):
            handle.wait()

    def _isend(self, tensor: Tensor, to: int, tag: int = 0) -> Handle:
        message = as_bytes(tensor)
        with self._losing(to):
            work = dist.isend(message, group=self.group, group_dst=to, tag=_TAG + tag)
        return Handle(work, message, lost=partial(self.lose, to))

    def _irecv(self, tensor: Tensor, source: int, tag: int = 0) -> Handle:
        message = as_bytes(tensor)
        with self._losing(source):
            work = dist.irecv(message, group=self.group, group_src=source, tag=_TAG + tag)
        return Handle(work, message, lost=partial(self.lose, source))

    @contextmanager
    def _losing(self, rank: int | None = None) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.lose(rank, error)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Collective: the values of one rank into a contiguous tensor (modified in place)."""
        if tensor.numel():
            self.meter.count("broadcast", 0 if self.rank == source else tensor.nbytes)
            with self._losing():
                dist.broadcast(as_bytes(tensor), group=self.group, group_src=source)

    def all_reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Collective: the sum, maximum or minimum over the ranks (modified in place); for a few elements."""
        self.meter.count("all_reduce", tensor.nbytes)
        with self._losing():
            dist.all_reduce(tensor, op=op, group=self.group)
        return tensor

    def union(self, flags: Sequence[bool], done: int) -> list[bool]:
        """Collective: which flags are set on some rank. The device is not waited for where all are set here.

        Args:
            flags: of this rank.
            done: 32 bits that follow from what this rank has done.

        Raises:
            RuntimeError: on every rank, if they have done different things; on a device, two calls later.
        """
        return self.read_union(flags, self.all_reduce(self.union_row(flags, done), dist.ReduceOp.MAX))

    def union_row(self, flags: Sequence[bool], done: int) -> Tensor:
        """Numbers of which the largest of all ranks are to be found."""
        digits = [*done.to_bytes(4, "little")]
        row = [*map(int, flags), *digits, *(255 - digit for digit in digits)]  # so the maximum tells the minimum, too
        return torch.tensor(row, dtype=torch.uint8).to(self.device, non_blocking=True)

    def read_union(self, flags: Sequence[bool], largest: Tensor) -> list[bool]:
        """What these say; raises as ``union``."""
        self._late_checks.add(largest.narrow(0, len(flags), largest.numel() - len(flags)))
        if all(flags):
            return [True] * len(flags)
        return [bool(flag) for flag in largest.tolist()[: len(flags)]]

    def all_gather_objects(self, item: object) -> list[Any]:
        """Every rank's picklable object: for small things, out of the hot path.

        Not ``dist.all_gather_object``, which needs numpy.
        """
        message = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8).to(self.device)
        lengths = [int(row) for row in self._gather_rows(torch.tensor([message.numel()], device=self.device))]
        padded = message.new_zeros(max(lengths))
        padded[: message.numel()] = message
        rows = self._gather_rows(padded)
        return [pickle.loads(bytes(row[:n].tolist())) for row, n in zip(rows, lengths, strict=True)]

    def _gather_rows(self, row: Tensor) -> Tensor:
        """A 1-D tensor of each rank, all of one length, as the rows of a 2-D one on CPU."""
        table = row.new_empty((self.world_size, row.numel()))
        self.gather_to_all(row, table.view(-1))
        return table.cpu()


class _LateChecks:
    """Compares what ranks have done; the numbers of a device come two calls later, when nobody has to wait for them.

    All ranks raise in the same call then.
    """

    def __init__(self) -> None:
        self._copied: deque[tuple[Any, Tensor]] = deque()

    def add(self, digits: Tensor) -> None:
        """Compare the largest and the smallest digits of all ranks, or begin to copy them to the host."""
        if digits.device.type == "cpu":
            self._compare(digits)
        elif has_streams(digits.device):
            with torch.cuda.device(digits.device):
                self._begin(digits)
            if len(self._copied) > 2:
                event, on_host = self._copied.popleft()
                event.synchronize()
                self._compare(on_host)

    def _begin(self, digits: Tensor) -> None:
        if not torch.cuda.is_current_stream_capturing():
            on_host = torch.empty(digits.shape, dtype=digits.dtype, pin_memory=True)
            on_host.copy_(digits, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied.append((event, on_host))

    def _compare(self, digits: Tensor) -> None:
        largest, complements = digits.chunk(2)
        if not torch.equal(largest, 255 - complements):
            self._copied.clear()  # whose rounds are as wrong
            raise RuntimeError(
                "ranks have done different things since the last step: gradients of different buckets, or of different "
                "steps, were added up. Expected: the same calls of backward(), zero_grad() and step() on every rank, "
                "between two steps as many passes outside of no_sync(). Load a checkpoint, or begin with zero_grad() "
                "on all ranks if parameters are right"
            )


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as 1-D uint8."""
    return tensor.view(-1).view(torch.uint8)
