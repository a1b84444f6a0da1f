"""Whether what must be equal on all ranks is: hyperparameters, step counts and values of the parameters.

Ranks that differ do not see it: each shard comes from one rank, so afterwards all have the same mixture. Compared is a
checksum of 16 bytes; only where it differs, ranks tell each other what they have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.buckets.memory import dim_order, flatten
from sharded_radam.store.verdicts import name_ranks
from sharded_radam.transport import Everyone, Transport

_HYPERPARAMETERS = (
    *("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize"),
    *("foreach", "capturable", "differentiable"),
)
"""Options of a param group that a step depends on, compared at the first step; what users add to it may differ."""

_CUTS = 1000
"""Into so many parts a parameter is cut, again and again, until the first element that differs is found."""

Gather = Callable[[Any], list[Any]]
"""Collective: returns the values of all ranks, which are made of numbers, text, lists and dicts."""


class Facts(NamedTuple):
    """What a rank has: values of hyperparameters and step counts, and parameters, each by a name."""

    values: Mapping[str, str]
    params: Sequence[tuple[str, Tensor]]


NO_FACTS = Facts({}, ())


def facts(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, Mapping[str, Any]],
    names: Mapping[Tensor, str],
    has_one_copy: bool = False,
) -> Facts:
    """The facts of an optimizer whose parameters have these names; with one copy of them for all, not their values."""
    values: dict[str, str] = {}
    params: list[tuple[str, Tensor]] = []
    for number, group in enumerate(groups):
        for option in _HYPERPARAMETERS:
            values[f"{option} of param group {number}"] = repr(_plain(group.get(option)))
        # Others, such as integers, take no part.
        params += [(names[param], param) for param in group["params"] if param in names]
    for name, param in params:
        values[f"the step count of '{name}'"] = repr(_plain(state.get(param, {}).get("step", 0)))
    return Facts(values, () if has_one_copy else params)


def _plain(value: Any) -> Any:
    """As Python's numbers, which are compared as text."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.tolist() if hasattr(value, "tolist") else value  # of torch or numpy


class Fingerprint(NamedTuple):
    """Facts as integers, on the device: the digest of all, which are two, and the checksum of each parameter."""

    digest: Tensor
    sums: Tensor


def fingerprint(here: Facts) -> Fingerprint:
    """Reads every parameter once; nothing waits for their device."""
    text = hashlib.sha256(repr(sorted(here.values.items())).encode()).digest()
    sums = checksums([param for _, param in here.params])
    weights = 2 * torch.arange(len(sums), device=sums.device) + 1  # so that exchanged parameters are seen
    own = [torch.tensor(int.from_bytes(text[:7], "big"), device=sums.device), (sums * weights).sum()]
    return Fingerprint(torch.stack(own), sums)


def compare(here: Facts, transport: Transport | Everyone) -> None:
    """Collective: raise on every rank if they differ; one all-reduce of four numbers if they do not.

    Raises:
        RuntimeError: names the first difference, the ranks and the values on both sides.
    """
    own = fingerprint(here)
    largest, inverted = transport.all_reduce(torch.stack([own.digest, ~own.digest]), dist.ReduceOp.MAX).tolist()
    if largest != [~value for value in inverted]:
        raise RuntimeError(first_difference(here, own.sums, transport.all_gather_objects))


def checksums(params: Sequence[Tensor]) -> Tensor:
    """Of the bits of each parameter in its memory order, 1-D int64, on their device."""
    device = params[0].device if params else torch.device("cpu")
    return torch.stack([torch.zeros((), dtype=torch.int64, device=device), *(_sum(_flat(p)) for p in params)])[1:]


def _flat(param: Tensor) -> Tensor:
    return flatten(param.detach().resolve_conj().resolve_neg(), dim_order(param))


def _sum(flat: Tensor) -> Tensor:
    """The sum of the bytes of a 1-D tensor, eight at a time: torch takes 30 times as long for fewer."""
    if flat.storage_offset() * flat.element_size() % 8 or flat.data_ptr() % 8:
        flat = flat.clone()
    in_bytes = (torch.view_as_real(flat).view(-1) if flat.is_complex() else flat).view(torch.uint8)
    whole = in_bytes.numel() // 8 * 8
    rest = torch.nn.functional.pad(in_bytes[whole:], (0, whole + 8 - in_bytes.numel()))
    return in_bytes[:whole].view(torch.int64).sum() + rest.view(torch.int64)[0]


def first_difference(here: Facts, sums: Tensor, gather: Gather) -> str:
    """Collective: what differs first between rank 0 and others, in words.

    Args:
        here: this rank's facts.
        sums: checksums of its parameters.
        gather: asks all ranks.
    """
    everybody = gather([dict(here.values), sums.tolist()])
    for what, value in everybody[0][0].items():
        if others := [rank for rank, (values, _) in enumerate(everybody) if values.get(what) != value]:
            return _differs(what, others, value, everybody[others[0]][0].get(what, "none"))
    for index, (name, param) in enumerate(here.params):
        if others := [rank for rank, (_, found) in enumerate(everybody) if found[index] != everybody[0][1][index]]:
            return _first_element(param, name, others, gather)
    return _differs("something", [], "a checksum", "another")


def _first_element(param: Tensor, name: str, others: Sequence[int], gather: Gather) -> str:
    flat, start, stop = _flat(param), 0, param.numel()
    while stop - start > 1:
        size = -(-(stop - start) // _CUTS)
        everybody = gather([int(_sum(flat[at : min(at + size, stop)])) for at in range(start, stop, size)])
        pairs = zip(everybody[0], everybody[others[0]], strict=True)
        at = next(at for at, (of_rank_0, other) in enumerate(pairs) if of_rank_0 != other)
        start, stop = start + at * size, min(start + (at + 1) * size, stop)
    values = gather([repr(value) for value in flat[start:stop].tolist()])
    return _differs(f"parameter '{name}' at {_index(param, start)}", others, values[0][0], values[others[0]][0])


def _index(param: Tensor, place: int) -> tuple[int, ...]:
    """Where an element is, of its place in memory order."""
    found = dict.fromkeys(range(param.dim()), 0)
    for dim in reversed(dim_order(param)):
        place, found[dim] = divmod(place, param.shape[dim])
    return tuple(found.values())


def _differs(what: str, others: Sequence[int], value: str, other: str) -> str:
    return (
        f"{what} differs: {value} on rank 0, {other} on {name_ranks(others)}. Each rank "
        "updates a part of all parameters for the others, so all must have the same. Expected: one seed, or the model "
        "in DistributedDataParallel; the same checkpoint loaded on all ranks; the same schedule of hyperparameters; "
        "parameters that belong to one rank in an optimizer of their own"
    )
