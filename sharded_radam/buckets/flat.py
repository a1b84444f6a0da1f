"""Flats as storage: parameters become views of one buffer, the own shards have their state beside it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sharded_radam.buckets.counters import Counters
from sharded_radam.buckets.memory import (
    addresses_of,
    as_real,
    changed,
    dim_order,
    flatten,
    is_dense,
    num_users,
    unflatten,
    window,
    zeros,
)
from sharded_radam.buckets.range_tensor import RangeTensor
from sharded_radam.buckets.replaced import Replaced
from sharded_radam.buckets.stretches import Stretches, memory_of
from sharded_radam.compat import increment_versions
from sharded_radam.dtypes import HALF_DTYPES, wide
from sharded_radam.plan import FlatPlan, ParamSpec, Piece, cut
from sharded_radam.radam import endless, follow_

DTYPES = (*HALF_DTYPES, torch.float32, torch.float64, torch.complex64, torch.complex128)
"""Dtypes that can be updated; parameters of others (quantized, frozen) take no part."""


class ShardPiece(NamedTuple):
    """A piece with its memory: views of the bucket and of the state, complex ones as real numbers."""

    piece: Piece
    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None


class Flat:
    """The buffer of one :class:`FlatPlan` on one rank, with the state of the shards that the rank owns.

    Args:
        plan: the layout.
        specs: what the plan was made from, for all parameters.
        params: the parameters of the plan's slots, in their order. They become views of the buffer if ``as_views``,
            with the strides they have; otherwise they stay what they are, and the buffer is a copy of them.
        rank: whose shards have their state here.
        buffer: memory to use, 1-D, of the plan's size; new memory if None.
        elsewhere: of the parameters, those that do not become views: others have their memory too, or it has gaps.

    ``exp_avg``, ``exp_avg_sq`` and ``master`` are 1-D, ``plan.local_numel`` elements: the own shards one after the
    other. Moments of half-precision parameters are fp32, and there is an fp32 ``master``. ``local_state`` has, for each
    slot, views of its own elements: 1-D, or shaped as the parameter where one rank owns all. ``counters`` are the
    slots' steps, ``endless_step`` is what the fused kernel gets in their place. ``reals`` is how many real numbers an
    element is. ``copied`` are slots whose parameters are no views of the buffer: they are copied into it before an
    update and out of it after.
    """

    def __init__(
        self,
        plan: FlatPlan,
        specs: Sequence[ParamSpec],
        params: Sequence[Tensor],
        rank: int,
        as_views: bool,
        buffer: Tensor | None = None,
        elsewhere: Set[Tensor] = frozenset(),
    ) -> None:
        self.plan = plan
        self.specs = [specs[slot.param] for slot in plan.slots]
        self.params = list(params)
        self.rank = rank
        self.as_views = as_views
        self.is_half = params[0].dtype in HALF_DTYPES
        self.reals = 2 if params[0].is_complex() else 1
        device, dtype = params[0].device, params[0].dtype
        state_dtype = wide(dtype)
        self.buffer = zeros(plan.numel, dtype, device) if buffer is None else buffer
        self.state = {
            name: zeros(plan.local_numel, state_dtype, device)
            for name in ("exp_avg", "exp_avg_sq", *(("master",) if self.is_half else ()))
        }
        self._addresses = [self._elements(slot).data_ptr() for slot in range(len(plan.slots))]
        self.copied = {at for at, param in enumerate(self.params) if not as_views or param in elsewhere}
        self._take_in(range(len(self.params)))
        self.pieces = self._make_pieces()
        self._pieces_of: list[list[ShardPiece]] = [[] for _ in self.params]
        for own in (own for pieces in self.pieces for own in pieces):
            self._pieces_of[own.piece.slot].append(own)
        self.stretches = Stretches(self.buffer, self.state, [[own.piece for own in each] for each in self.pieces])
        self.local_state = [self._views_of_state(slot) for slot in range(len(plan.slots))]
        self._state_addresses = self._addresses_of_state()
        self.counters = Counters([0.0] * len(plan.slots), torch.device("cpu"))
        self.endless_step = endless(device)
        for slot in range(len(plan.slots)):
            self._complete_state(slot, None)
        self._index = {id(param): index for index, param in enumerate(self.params)}
        self.replaced = Replaced(self.params)

    def bucket(self, index: int) -> Tensor:
        """1-D view of a bucket, padding included."""
        start, stop = self.plan.bucket_range(index)
        return self.buffer.narrow(0, start, stop - start)

    def shard_of(self, local: Tensor, bucket: int) -> Tensor:
        """1-D view of the own shard of a bucket in a tensor with the layout of ``state``."""
        start, stop = self.plan.local_range(bucket)
        return local.narrow(0, start, stop - start)

    def copy_own(self, slot: int, whole: Tensor, local: Tensor) -> None:
        """Copy the own elements of a whole tensor into one with the layout of ``state`` (modified in place)."""
        source = flatten(whole, self.specs[slot].dim_order)
        for at in self._own(slot):
            local.narrow(0, at.local_start, at.numel).copy_(source.narrow(0, at.start, at.numel))

    def is_laid_out_as(self, plan: FlatPlan, specs: Sequence[ParamSpec]) -> bool:
        """Whether this is the flat of a plan for its parameters, whatever their group and names."""
        ours, theirs = self.specs, [specs[slot.param] for slot in plan.slots]
        return self.plan.bucket_numel == plan.bucket_numel and all(
            (ours.shape, ours.dim_order, ours.dtype) == (theirs.shape, theirs.dim_order, theirs.dtype)
            for ours, theirs in zip(ours, theirs, strict=True)
        )

    def release(self) -> None:
        """Give parameters that are still here memory of their own, so that the buffer can go."""
        for slot, param in enumerate(self.params):
            if self.as_views and param.numel() and param.data_ptr() == self._addresses[slot]:
                param.data = param.data.clone()

    def range_tensors(
        self, slot: int, state: Mapping[str, Tensor] | None = None, within: range | None = None
    ) -> dict[str, RangeTensor]:
        """The state of a slot as tensors of the parameter's shape, with the own elements: live views.

        Args:
            slot: its number.
            state: other buffers with the layout of ``state``.
            within: the own elements that count; all if None.
        """
        spec, found = self.specs[slot], {}
        own = self._own(slot) if within is None else cut(self._own(slot), within)
        for name, local in (self.state if state is None else state).items():
            pieces = [(at.start, local.narrow(0, at.local_start, at.numel)) for at in own]
            found[name] = RangeTensor(spec.shape, pieces, spec.dim_order, local.dtype, local.device)
        return found

    def spans(self, slot: int) -> list[tuple[int, int]]:
        """The ranges of a parameter's elements that the rank owns, in memory order."""
        return [(at.start, at.start + at.numel) for at in self._own(slot)]

    def _own(self, slot: int) -> list[Piece]:
        return [own.piece for own in self._pieces_of[slot]]

    def check(self, is_known: Callable[[Tensor], bool], among: Set[Tensor] | None = None) -> list[int]:
        """Raise RuntimeError if a parameter is no longer what this was built for, or has a sparse gradient.

        Args:
            is_known: whether the optimizer has a parameter.
            among: the parameters to look at; all if None.

        Returns:
            Slots to ``take_back``: their parameters are elsewhere.
        """
        for param, (place, new) in self.replaced.by.items():
            if not is_known(new) and (among is None or param in among):
                name = self.specs[self._index[id(param)]].name
                raise RuntimeError(_moved(name, f"was replaced by another Parameter in {place}"))
        for param, spec in zip(self.params, self.specs, strict=True):
            if among is not None and param not in among:
                continue
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError(f"RAdam does not support sparse gradients (parameter '{spec.name}')")
            if param.dtype != spec.dtype:
                raise RuntimeError(_moved(spec.name, f"was {spec.dtype} and is now {param.dtype}"))
            if param.device != self.buffer.device:
                raise RuntimeError(_moved(spec.name, f"was on {self.buffer.device} and is now on {param.device}"))
            if param.shape != spec.shape:
                raise RuntimeError(_moved(spec.name, f"was of shape {spec.shape} and is now {tuple(param.shape)}"))
        return [slot for slot in self._find_elsewhere() if among is None or self.params[slot] in among]

    def _find_elsewhere(self) -> list[int]:
        """Slots whose parameters were views of the buffer and are none any more."""
        moved = changed(addresses_of(self.params), self._addresses) if self.as_views else []
        return [slot for slot in moved if self.params[slot].numel() > 0]

    def params_of_others(self) -> set[Tensor]:
        """Parameters that are elsewhere, in memory that others have too."""
        pairs = [(self.params[slot], self.specs[slot]) for slot in self._find_elsewhere()]
        return {param for param, spec in pairs if not has_memory_of_its_own(param, spec)}

    def take_back(self, slots: Sequence[int]) -> None:
        """Follow parameters whose ``.data`` was assigned, or that were moved to where they are.

        Those whose memory nobody else has become views again. What others have too (who remembers ``param.data``, or
        the vector of ``vector_to_parameters``) must be where the new values are: it is copied.
        """
        if self.as_views:
            alone = [slot for slot in slots if has_memory_of_its_own(self.params[slot], self.specs[slot])]
            self.copied = set(slots).difference(alone)
            if alone:
                self._take_in(alone)

    def copy_in(self, bucket: int) -> None:
        """Parameters to the own shard, where they are not views."""
        if self.copied:
            for own in self.pieces[bucket]:
                self._copy_in(own)

    def _copy_in(self, own: ShardPiece) -> None:
        at = own.piece
        if at.slot not in self.copied:
            return
        flat = flatten(self.params[at.slot].detach(), self.specs[at.slot].dim_order)
        own.param.copy_(as_real(flat.narrow(0, at.start, at.numel)))

    def copy_out(self) -> None:
        """Buckets to parameters, where they are not views."""
        for slot in self.copied:
            param, order = self.params[slot], self.specs[slot].dim_order
            # By .data: note_updated counts, as it does for views.
            param.data.copy_(unflatten(self._elements(slot), param.shape, order))

    def note_updated(self, slots: Iterable[int]) -> None:
        """Increment the version counters of parameters, which writing to the buffer does not.

        Autograd then refuses a backward pass through a graph that was made with the values before, as it does after a
        step of RAdam.
        """
        increment_versions([self.params[slot] for slot in slots])

    def set_state(self, slot: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Copy the own elements of a parameter's state, or zeros; masters from the parameter if it has none.

        Tensors are whole, or range tensors of the own ranges.
        """
        for name, tensor in (tensors or {}).items():
            if not isinstance(tensor, RangeTensor):
                self.copy_own(slot, tensor, self.state[name])
                continue
            ranges = dict(tensor.pieces)
            for at in self._own(slot):
                local = self.state[name].narrow(0, at.local_start, at.numel)
                if not ranges[at.start].is_set_to(local):  # it was read into its place
                    local.copy_(ranges[at.start])
        self._complete_state(slot, tensors)

    def follow(self) -> None:
        """Masters follow parameters that somebody else changed, as they do in the next step."""
        for own in (own for pieces in self.pieces for own in pieces):
            if own.master is not None:
                self._copy_in(own)
                follow_(own.master, own.param)

    def _complete_state(self, slot: int, tensors: Mapping[str, Tensor] | None) -> None:
        for name, view in self.local_state[slot].items():
            if name not in (tensors or {}):
                view.zero_()
        if self.is_half and "master" not in (tensors or {}):
            self._reset_master(slot)

    def _reset_master(self, slot: int) -> None:
        for own in self._pieces_of[slot]:
            assert own.master is not None
            self._copy_in(own)
            torch._foreach_copy_([own.master], [own.param])

    def _elements(self, slot: int) -> Tensor:
        at = self.plan.slots[slot]
        return self.buffer.narrow(0, at.start, at.numel)

    def _take_in(self, slots: Sequence[int]) -> None:
        params, places = [self.params[slot] for slot in slots], [self.plan.slots[slot] for slot in slots]
        windows = [window(self.buffer, place.start, place.numel) for place in places]
        specs = [self.specs[slot] for slot in slots]
        views = [unflatten(view, spec.shape, spec.dim_order) for view, spec in zip(windows, specs, strict=True)]
        torch._foreach_copy_(views, [param.detach() for param in params])
        for slot, param, view in zip(slots, params, views, strict=True):
            if slot not in self.copied and param.numel():
                param.data = view if view.stride() == param.stride() else _restride(view, param)

    def _make_pieces(self) -> list[list[ShardPiece]]:
        found: list[list[ShardPiece]] = [[] for _ in range(self.plan.num_buckets)]
        for piece in self.plan.pieces(self.rank):
            found[piece.bucket].append(ShardPiece(piece, *memory_of(piece, self.buffer, self.state)))
        return found

    def _views_of_state(self, slot: int) -> dict[str, Tensor]:
        pieces, spec = self._own(slot), self.specs[slot]
        start = pieces[0].local_start if pieces else 0
        numel = sum(piece.numel for piece in pieces)  # they adjoin
        windows = {name: window(local, start, numel) for name, local in self.state.items()}
        if self.plan.world_size == 1:
            return {name: unflatten(view, spec.shape, spec.dim_order) for name, view in windows.items()}
        return windows

    def _addresses_of_state(self) -> list[int]:
        return addresses_of([view for views in self.local_state for view in views.values()])

    def slots_of_others(self, state: Mapping[Tensor, Mapping[Any, Any]], moments: bool) -> list[int]:
        """Slots whose entries in the optimizer's state are no longer the views, or whose views are elsewhere.

        Args:
            state: of the optimizer.
            moments: whether to look at more than the step counters.
        """
        found = set(self.counters.moved())
        nothing: Mapping[Any, Any] = {}
        entries = [state.get(param, nothing) for param in self.params]
        views_of: dict[str, list[Tensor]] = {"step": self.counters.views}
        if moments:
            views_of |= {name: [views[name] for views in self.local_state] for name in self.state}
        for name, views in views_of.items():
            now = [entry.get(name) for entry in entries]
            if not all(map(operator.is_, now, views)):
                found |= {slot for slot, (here, view) in enumerate(zip(now, views, strict=True)) if here is not view}
        if moments:
            found |= {at // len(self.state) for at in changed(self._addresses_of_state(), self._state_addresses)}
        return sorted(found)

    def take_back_state(self, slot: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Copy what somebody has put into the state, whole or the own part, into new views; zeros where it is None."""
        self.local_state[slot] = self._views_of_state(slot)
        views = self.local_state[slot]
        if tensors and tensors["exp_avg"].shape == views["exp_avg"].shape:
            for name, tensor in tensors.items():
                views[name].copy_(tensor)
            self._complete_state(slot, tensors)
        else:
            self.set_state(slot, tensors)
        self._state_addresses = self._addresses_of_state()


def find_slot(flats: Sequence[Flat], param: Tensor) -> tuple[int, int]:
    """The number of the flat that has a parameter, and its slot there.

    Raises:
        ValueError: none of them has it.
    """
    for index, flat in enumerate(flats):
        if (slot := flat._index.get(id(param))) is not None:
            return index, slot
    raise ValueError(f"a parameter of shape {tuple(param.shape)} is not one of this optimizer's")


def adopt_master(param: Tensor, master: Tensor) -> bool:
    """Let a parameter that is not of half precision be what it was rounded from, wherever it is that.

    Elsewhere it was changed since: weights were loaded from something else. Returns whether it is so anywhere.
    """
    param = param.detach()
    wide = master.to(param)
    is_rounded = (wide.to(torch.bfloat16) == param) | (wide.to(torch.float16) == param) | (wide == param)
    param.copy_(torch.where(is_rounded, wide, param))
    return bool(is_rounded.any())


def _restride(view: Tensor, param: Tensor) -> Tensor:
    """Strides of dimensions of size 1 mean nothing, but are kept all the same."""
    return view.as_strided(param.size(), param.stride()) if is_dense(param) else view


def has_memory_of_its_own(param: Tensor, spec: ParamSpec) -> bool:
    """As after ``module.to()`` or ``param.data = ...``, and nobody else's: no other tensor, no other process."""
    users = num_users(param)  # before ``storage``, which is one of them in torch 2.8 and older
    storage = param.untyped_storage()
    is_alone = users == num_users(torch.empty(1, device=param.device)) and storage.nbytes() == param.nbytes
    is_shared = param.device.type == "cpu" and storage.is_shared()
    return is_alone and not is_shared and is_dense(param) and dim_order(param) == spec.dim_order


def _moved(name: str, what: str) -> str:
    return (
        f"parameter '{name}' {what} since this optimizer was built, so its step would update memory that the model "
        "does not use. Expected: the model gets its final dtype, device and Parameters first, then the optimizer is "
        "built. Build it anew now and give it the state by load_state_dict(); to load weights, copy them in place "
        "(load_state_dict without assign=True, or param.copy_)."
    )
