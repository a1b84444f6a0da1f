"""``param.grad`` where gradients are sharded: local gradients are taken out of it, and shards are left there.

It says whether there is a gradient, as everywhere in torch. While backward runs it is the local gradient. When all of
its hooks have run, it is taken, and a :class:`GradShard` is left in its place. If that is gone later, somebody has
dropped the gradient; if another tensor is there, somebody has assigned it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from sharded_radam.gradients.grad_shard import GradShard, Owner
from sharded_radam.gradients.measures import FiniteCheck
from sharded_radam.gradients.packing import Sums
from sharded_radam.gradients.schedule import Launch, SlotKey
from sharded_radam.streams import Lane


class Places:
    """``.grad`` of all parameters of some flats.

    Args:
        sums: where gradients go.
        owner: reduces them.
        finite: looks at them before; None if nobody does.
        lane: where the owner's kernels run; None on a device without streams.
    """

    def __init__(
        self, sums: Sums, owner: weakref.ref[Owner], finite: FiniteCheck | None, lane: Lane | None = None
    ) -> None:
        self._sums = sums
        self._finite = finite
        self._lane = lane
        self.shards = [
            [
                GradShard(param, spec, pieces, owner)
                for param, spec, pieces in zip(flat.params, flat.specs, sums.pieces(index), strict=True)
            ]
            for index, flat in enumerate(sums.flats)
        ]
        self._all = [
            ((index, slot), param) for index, flat in enumerate(sums.flats) for slot, param in enumerate(flat.params)
        ]
        self._at = {key: (param, self.shards[key[0]][key[1]]) for key, param in self._all}
        # Parameters that had a gradient on some rank when all was reduced last.
        self.has_grad: set[SlotKey] = set()
        # Parameters in whose ``.grad`` the shard was left.
        self._placed: set[SlotKey] = set()

    def params(self) -> Sequence[tuple[SlotKey, Tensor]]:
        """All parameters, flat by flat in the order of their slots."""
        return self._all

    def param(self, key: SlotKey) -> Tensor:
        """The parameter of a slot."""
        return self._at[key][0]

    def shard(self, key: SlotKey) -> GradShard:
        """The shard of a slot's gradient."""
        return self.shards[key[0]][key[1]]

    # Local gradients

    def take(self, key: SlotKey) -> None:
        """Move the local gradient out of ``.grad``, where its shard stays."""
        param, shard = self._at[key]
        grad = param.grad
        local = grad.fresh if isinstance(grad, GradShard) else grad
        if grad is None:  # dropped by a hook
            shard.forget()
        if local is not None:
            checked = self._checked(local, key)
            if self._lane is not None:
                self._lane.keep(checked, shard.sending)
            shard.send(checked)
            shard.fresh = None
            self._place(key)

    def _place(self, key: SlotKey) -> None:
        param, shard = self._at[key]
        param.grad = shard
        self._placed.add(key)

    def _checked(self, grad: Tensor, key: SlotKey) -> Tensor:
        if grad.is_sparse:
            raise RuntimeError(f"RAdam does not support sparse gradients (parameter '{self.shard(key).spec.name}')")
        if self._finite is not None:
            self._finite.look(self._sums.as_sent(grad, key[0]), self.shard(key).spec.name)
        return grad

    def to_send(self, launch: Launch) -> dict[int, Tensor]:
        """The local gradients of a launch that were taken, and not dropped since, by slot."""
        params, shards = self._sums.flats[launch.flat].params, self.shards[launch.flat]
        local = ((slot, shards[slot].sending) for slot in launch.slots)
        found = {slot: grad for slot, grad in local if grad is not None and params[slot].grad is not None}
        if self._lane is not None:
            self._lane.keep(*found.values())
        return found

    def release(self, flat: int, slots: Iterable[int]) -> None:
        """Let local gradients go that were sent."""
        shards = self.shards[flat]
        for slot in slots:
            shards[slot].sending = None

    # What stands in .grad

    def set_present(self, flags: Sequence[bool]) -> None:
        """Know which parameters have a gradient on some rank, in the order of ``params``."""
        self.has_grad = {key for (key, _), flag in zip(self.params(), flags, strict=True) if flag}

    def place_others(self) -> None:
        """Leave the shards of gradients that only other ranks have."""
        for key in self.has_grad:
            if self._at[key][0].grad is None:
                self._place(key)

    def is_present(self, key: SlotKey) -> bool:
        """Whether there is a gradient."""
        return key in self.has_grad and self._at[key][0].grad is not None

    def adopt(self, key: SlotKey) -> None:
        """Have a gradient that somebody has put into the sums."""
        self._place(key)
        self.has_grad.add(key)
        self._sums.note(key)

    def has_assigned(self) -> bool:
        """Whether something was assigned to ``.grad`` after backward, which ``follow_assigned`` will take."""
        return any(param.grad is not None and param.grad is not shard for param, shard in self._at.values())

    def follow_assigned(self) -> None:
        """Take what was assigned to ``.grad`` after backward, as it is: as under DDP, all ranks assign the same."""
        for key, (param, shard) in self._at.items():
            grad = param.grad
            if grad is not None and grad is not shard:
                shard.assign(self._checked(grad, key))
                self.adopt(key)

    def follow_dropped(self) -> None:
        """Forget gradients that somebody dropped since; where all that this rank knows of are, those of others too."""
        lost = [key for key in self._placed if not isinstance(self._at[key][0].grad, GradShard)]
        if lost and len(lost) == len(self._placed):
            self._sums.drop_all()
        for key in lost:
            self.shard(key).forget()
            self._sums.drop(key)
        self._placed.difference_update(lost)

    def drop_all(self) -> None:
        """Forget all gradients, which are about to be dropped or zeroed."""
        for shard in (shard for shards in self.shards for shard in shards):
            shard.forget()
        self._placed.clear()
        self._sums.drop_all()
        if self._finite is not None:
            self._finite.forget()

    def present(self, index: int) -> list[bool]:
        """Which parameters of a flat have gradients."""
        params, has_grad = self._sums.flats[index].params, self.has_grad
        return [(index, slot) in has_grad and param.grad is not None for slot, param in enumerate(params)]

    def pieces(self, index: int) -> Iterator[tuple[Tensor, range, Tensor]]:
        """Parameter, elements in memory order, and 1-D view of the gradient, of a flat's own pieces that have one."""
        for slot, param in enumerate(self._sums.flats[index].params):
            if self.is_present((index, slot)):
                for start, piece in self.shard((index, slot)).pieces:
                    yield param, range(start, start + piece.numel()), piece
