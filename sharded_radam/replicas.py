"""Whether what must be equal on all ranks is: hyperparameters, step counts and values of the parameters.

Ranks that differ do not see it: each shard comes from one rank, so afterwards all have the same mixture. Compared is a
checksum of 16 bytes; only where it differs, ranks tell each other what they have.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_radam.meeting import name_ranks
from sharded_radam.transport import Transport

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Facts(NamedTuple):
    """What a rank has: values of hyperparameters and step counts by their names, and parameters by theirs."""

    values: Mapping[str, str]
    names: Sequence[str]
    params: Sequence[Tensor]


def facts(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]], names: Mapping[Tensor, str]
) -> Facts:
    """The facts of an optimizer whose parameters have these names."""
    values: dict[str, str] = {}
    params: list[Tensor] = []
    for number, group in enumerate(groups):
        for option, value in group.items():
            if option not in ("params", "param_names"):
                values[f"{option} of param group {number}"] = repr(_plain(value))
        params += [param for param in group["params"] if param in names]  # others, such as integers, take no part
    for param in params:
        values[f"the step count of '{names[param]}'"] = repr(_plain(state.get(param, {}).get("step", 0)))
    return Facts(values, [names[param] for param in params], params)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def compare(here: Facts, transport: Transport) -> None:
    """Collective: raise on every rank if they differ; one all-reduce of four numbers if they do not.

    Raises:
        RuntimeError: names the first difference, the ranks and the values on both sides.
    """
    text = hashlib.sha256(repr(sorted(here.values.items())).encode()).digest()
    sums = checksums(here.params)
    weights = torch.arange(1, 2 * len(sums), 2, device=sums.device)  # so that exchanged parameters are seen
    own = torch.stack([torch.tensor(int.from_bytes(text[:7], "big"), device=sums.device), (sums * weights).sum()])
    largest, inverted = transport.all_reduce(torch.stack([own, ~own]), dist.ReduceOp.MAX).tolist()
    if largest != [~value for value in inverted]:
        raise RuntimeError(_first_difference(here, sums.tolist(), transport))


def checksums(params: Sequence[Tensor]) -> Tensor:
    """Of the bits of each parameter, 1-D int64, on their device."""
    device = params[0].device if params else torch.device("cpu")
    return torch.stack(
        [torch.zeros((), dtype=torch.int64, device=device), *(_bits(param).sum(dtype=torch.int64) for param in params)]
    )[1:]


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.detach().resolve_conj()) if tensor.is_complex() else tensor.detach()
    return real.view(_INTEGERS[real.element_size()])


def _first_difference(here: Facts, sums: Sequence[int], transport: Transport) -> str:
    everybody = transport.all_gather_objects((dict(here.values), sums))
    for what, value in everybody[0][0].items():
        if others := [rank for rank, (values, _) in enumerate(everybody) if values.get(what) != value]:
            return _differs(what, others, value, everybody[others[0]][0].get(what, "none"))
    for index, name in enumerate(here.names):
        others = [rank for rank, (_, found) in enumerate(everybody) if found[index] != everybody[0][1][index]]
        if others:
            return _first_element(here.params[index], name, others, transport)
    return _differs("something", [], "a checksum", "another")


def _first_element(param: Tensor, name: str, others: Sequence[int], transport: Transport) -> str:
    own = param.detach().reshape(-1)
    theirs = own.clone()
    transport.broadcast(theirs)
    differing = (_bits(own) != _bits(theirs)).view(own.numel(), -1).any(1).nonzero()
    place = int(differing[0]) if len(differing) else None
    found = transport.all_gather_objects(None if place is None else (place, own[place].item(), theirs[place].item()))
    place, value, of_rank_0 = found[others[0]]
    index = tuple(int(at) for at in torch.unravel_index(torch.tensor(place), param.shape)) if param.dim() else ()
    return _differs(f"parameter '{name}' at {index}", others, repr(of_rank_0), repr(value))


def _differs(what: str, others: Sequence[int], value: str, other: str) -> str:
    return (
        f"{what} differs: {value} on rank 0, {other} on {name_ranks(others)}. Each rank "
        "updates a part of all parameters for the others, so all must have the same. Expected: one seed, or the model "
        "in DistributedDataParallel; the same checkpoint loaded on all ranks; the same schedule of hyperparameters; "
        "parameters that belong to one rank in an optimizer of their own"
    )
