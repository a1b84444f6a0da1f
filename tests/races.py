"""A device that only records: which stream reads and writes which memory, after what. It finds what nothing orders.

Each stream, the host and the communication have a clock: of every other one, how far it is known to have come. What
orders them joins clocks: an event, a stream that waits for another, work that is waited for, a kernel that is launched.
Two accesses to the same bytes, one of which writes, are a race if the clock of the later one does not have the earlier.

Memory that is freed belongs to the stream that allocated it, which may use it again at once, as CUDA's caching
allocator does: uses by other streams must be over then for the stream, or be noted by ``record_stream``.

Tensors are on "meta", and torch.cuda says what their streams are. They cannot be fake ones on "cuda": these are no
torch.nn.Parameter, for which nobody waits but the step.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_radam.gradients.grad_shard import GradShard
from tests.clocks import Clock, Event, Group, Stream, Work


class Access(NamedTuple):
    """What somebody did to some bytes of a block, as his so-manieth action."""

    clock: Clock
    number: int
    start: int
    stop: int
    writes: bool
    what: str

    def is_known_to(self, clock: Clock) -> bool:
        """Whether it comes before whatever that one does next."""
        return clock.seen[self.clock] >= self.number


@dataclass(slots=True)
class Block:
    """Memory of one storage, and what was done to it; freed, it is also to wait for what is ``over``."""

    storage: Any
    owner: Clock
    what: str
    accesses: list[Access] = field(default_factory=list)
    recorded: set[Clock] = field(default_factory=set)
    over: Counter[Clock] = field(default_factory=Counter)


class Races(TorchDispatchMode):
    """Records what runs in here. ``found`` are the races, in words; ``num_accesses`` what was looked at.

    ``num_grouped`` are the calls that began several collectives.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.host = Clock("host")
        self.communication = Clock("communication")
        self.main = self.current = Stream(self, "main")
        self.found: list[str] = []
        self.num_accesses = self.num_grouped = 0
        self._blocks: dict[int, Block] = {}
        self._freed: list[Block] = []
        self._held: list[tuple[str, list[Tensor], list[Tensor]]] | None = None  # until their group is complete

    @contextlib.contextmanager
    def stream(self, stream: Stream | None) -> Iterator[None]:
        """In the place of torch.cuda.stream."""
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if any(isinstance(leaf, GradShard) for leaf in _tensors((args, kwargs))):
            return NotImplemented  # it does operations of its own
        self.collect()
        leaves = _tensors(args)
        is_to_host = func is torch.ops.aten.copy_.default and leaves[0].device != leaves[1].device
        results = args[0] if is_to_host else func(*args, **kwargs)  # there is nothing to copy
        inputs = list(_bound(func._schema, args, kwargs))
        on_device = any(each.device.type == "meta" for each in _tensors((args, kwargs, results)))
        clock: Clock = self.current if on_device else self.host
        clock.join(self.host.seen)
        number = clock.tick()
        known = {_key(each) for each in _tensors((args, kwargs))}
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            for tensor, writes in inputs:
                is_read_by_host = tensor.device.type == "cpu" and on_device and not writes
                reader = self.host if is_read_by_host else clock
                self._access(tensor, reader, reader.tick() if is_read_by_host else number, writes, str(func))
        for tensor in _tensors(results):
            if _key(tensor) not in known:
                self._access(tensor, clock, number, True, str(func))
        to_host = any(each.device.type == "cpu" for each in _tensors(results)) or any(
            writes and tensor.device.type == "cpu" for tensor, writes in inputs
        )
        if on_device and to_host and not _is_non_blocking(func._schema, args, kwargs):
            self.host.join(clock.seen)
        return results

    def collective(self, what: str, reads: Iterable[Tensor], writes: Iterable[Tensor], is_async: bool) -> Work | None:
        """Communicate after all that the current stream has been given."""
        if self._held is not None:
            self._held.append((what, list(reads), list(writes)))
            return None
        work = self._communicate([(what, list(reads), list(writes))])
        if is_async:
            return work
        work.wait()
        return None

    def _communicate(self, calls: Sequence[tuple[str, list[Tensor], list[Tensor]]]) -> Work:
        self.collect()
        self.communication.join(self.current.seen)
        self.communication.join(self.host.seen)
        number = self.communication.tick()
        for what, reads, writes in calls:
            for tensor in reads:
                self._access(tensor, self.communication, number, False, what)
            for tensor in writes:
                self._access(tensor, self.communication, number, True, what)
        return Work(self, [tensor for _, reads, writes in calls for tensor in (*reads, *writes)])

    @contextlib.contextmanager
    def coalescing(self, *_: Any, async_ops: bool = False, **__: Any) -> Iterator[Group]:
        """In the place of torch.distributed._coalescing_manager."""
        group, self._held = Group(), []
        yield group
        held, self._held = self._held, None
        self.num_grouped += 1
        group.works.append(self._communicate(held))
        if not async_ops:
            group.wait()

    def touch_on_host(self, tensor: Tensor) -> None:
        """Read host memory, as a thread does that writes it to the disk."""
        self._access(tensor, self.host, self.host.tick(), False, "the host")

    # Memory

    def _access(self, tensor: Tensor, clock: Clock, number: int, writes: bool, what: str) -> None:
        if tensor.numel() == 0:
            return
        self.num_accesses += 1
        block = self._block_of(tensor, what)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = int(tensor.storage_offset()) * tensor.itemsize
        new = Access(clock, number, start, start + (last + 1) * tensor.itemsize, writes, what)
        kept = []
        for old in block.accesses:
            if old.start >= new.stop or new.start >= old.stop:
                kept.append(old)
                continue
            is_before = old.is_known_to(clock) or (old.clock is clock and old.number == number)
            if not is_before and (writes or old.writes):
                self.found.append(f"{block.what}: {_words(old)}, then {_words(new)}")
            if not (is_before and writes and new.start <= old.start and old.stop <= new.stop):
                kept.append(old)
        block.accesses = [*kept, new]

    def _block_of(self, tensor: Tensor, what: str) -> Block:
        key = _key(tensor)
        if key not in self._blocks:
            owner = self.current if tensor.device.type == "meta" else self.host
            self._reuse(owner)
            storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            self._blocks[key] = Block(storage, owner, f"{tuple(tensor.shape)} by {what} on {owner}")
        return self._blocks[key]

    def _reuse(self, owner: Clock) -> None:
        """Take for new memory whatever the stream has freed."""
        kept = []
        for block in self._freed:
            unknown = [
                each for each in block.accesses if max(owner.seen[each.clock], block.over[each.clock]) < each.number
            ]
            if block.owner is not owner:
                kept.append(block)
            elif unknown:
                self.found.append(f"{block.what}: {_words(unknown[0])}, then it is freed, and used again")
        self._freed = kept

    def collect(self) -> None:
        """See what was freed."""
        for key in [key for key, block in self._blocks.items() if block.storage.expired()]:
            block = self._blocks.pop(key)
            for stream in block.recorded:
                block.over |= stream.seen
            self._freed.append(block)

    def record(self, tensor: Tensor, stream: Stream) -> None:
        """In the place of Tensor.record_stream."""
        self._block_of(tensor, "record_stream").recorded.add(stream)

    # In the place of torch's

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let torch.cuda and torch.distributed be this device."""
        monkeypatch.setattr("sharded_radam.streams.has_streams", lambda device: device.type == "meta")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(self))
        monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: self.record(tensor, stream))
        for name in dir(dist):
            if name.startswith(("all_", "reduce", "scatter", "gather", "broadcast", "isend", "irecv", "send", "recv")):
                monkeypatch.setattr(dist, name, _COLLECTIVES.get(name, _unknown)(self, name))
        for module in (dist, dist.distributed_c10d):
            monkeypatch.setattr(module, "_coalescing_manager", self.coalescing)


def _words(access: Access) -> str:
    return f"{access.clock} {'writes' if access.writes else 'reads'} [{access.start}:{access.stop}] ({access.what})"


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif isinstance(tree, Tensor):
        return [tree]
    elif not isinstance(tree, (list, tuple)):
        return []
    return [tensor for branch in tree for tensor in _tensors(branch)]


def _bound(schema: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    """The tensors of a call, and whether it writes to them."""
    for index, argument in enumerate(schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        yield from ((tensor, writes) for tensor in _tensors(value))


def _is_non_blocking(schema: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in schema.arguments]
    return bool(kwargs.get("non_blocking") or dict(zip(names, args, strict=False)).get("non_blocking"))


def _out_and_in(races: Races, what: str) -> Callable[..., Work | None]:
    return lambda out, own, *_, async_op=False, **__: races.collective(what, [own], [out], async_op)


def _in_place(races: Races, what: str) -> Callable[..., Work | None]:
    return lambda tensor, *_, async_op=False, **__: races.collective(what, [tensor], [tensor], async_op)


def _gather(races: Races, what: str) -> Callable[..., Work | None]:
    return lambda own, parts=None, *_, async_op=False, **__: races.collective(what, [own], parts or [], async_op)


def _unknown(_: Races, what: str) -> Callable[..., None]:
    def call(*_: Any, **__: Any) -> None:
        raise AssertionError(f"tests/races.py does not know what {what} reads and writes")

    return call


_COLLECTIVES: dict[str, Callable[[Races, str], Callable[..., Work | None]]] = {
    "all_gather_single": _out_and_in,
    "all_gather_into_tensor": _out_and_in,
    "reduce_scatter_single": _out_and_in,
    "reduce_scatter_tensor": _out_and_in,
    "all_to_all_single": _out_and_in,
    "all_reduce": _in_place,
    "broadcast": _in_place,
    "gather": _gather,
}
