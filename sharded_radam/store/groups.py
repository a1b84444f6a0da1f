"""The process groups that a user means, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Groups:
    """Between whom an optimizer communicates.

    Attributes:
        shard: the ranks that share one copy of the state; None if there is no process group.
        replica: the ranks that hold the same shard; None if there is one copy of the state.
        rows: of a mesh with several copies, global ranks: each row is a shard group, each column a replica group.
    """

    shard: dist.ProcessGroup | None
    replica: dist.ProcessGroup | None = None
    rows: Rows = ()

    @property
    def shard_size(self) -> int:
        """Ranks that share one copy of the state."""
        return 1 if self.shard is None else dist.get_world_size(self.shard)

    def names(self) -> list[int]:
        """What the ranks of the shard group are called where all ranks of the mesh meet."""
        return self._names(self.shard) if self.rows else [*range(self.shard_size)]

    def names_of_replicas(self) -> list[int]:
        """The same for the ranks of the replica group."""
        return self._names(self.replica)

    def _names(self, group: dist.ProcessGroup | None) -> list[int]:
        everybody = sorted(rank for row in self.rows for rank in row)
        return [everybody.index(rank) for rank in dist.get_process_group_ranks(group)]


def groups_of(group: dist.ProcessGroup | None, mesh: Any) -> Groups:
    """The groups that ``process_group=`` and ``mesh=``, a DeviceMesh, mean; not collective.

    Raises:
        TypeError: ``process_group`` is something else.
        ValueError: both are given, this process is in none, or the groups of a mesh are not its rows and columns.
    """
    if mesh is None:
        is_there = dist.is_available() and dist.is_initialized()
        return Groups(own_group(group) if is_there else None)
    if group is not None:
        raise ValueError("process_group= and mesh= exclude each other: a mesh has process groups of its own")
    _check_dimensions(mesh)
    if mesh.ndim == 1:
        return Groups(own_group(mesh))
    rows: Rows = tuple(map(tuple, _read(mesh)))
    _check_members(rows, dist.get_rank())
    shard, replica = own_group(mesh.get_group(1)), own_group(mesh.get_group(0))
    _check_rows(rows, shard, replica)
    return Groups(shard, replica, rows) if len(rows) > 1 else Groups(shard)


def ranks_of_mesh(mesh: Any) -> list[int]:
    """Global ranks in increasing order, each once.

    Raises:
        TypeError: it is no DeviceMesh.
        ValueError: this process is not in it.
    """
    if not is_mesh(mesh):
        raise TypeError(
            f"mesh= is a {type(mesh).__name__}: expected a torch.distributed.device_mesh.DeviceMesh, or process_group="
        )
    ranks = sorted(set(_leaves(_read(mesh))))
    if dist.get_rank() not in ranks:
        raise ValueError(
            f"mesh={mesh!r} does not contain this process (global rank {dist.get_rank()}): build the optimizer only "
            "on the ranks of its mesh"
        )
    return ranks


def _read(mesh: Any) -> Any:
    """Global ranks in nested lists, also under fake tensors."""
    with _disable_current_modes():
        return mesh.mesh.tolist()


def _leaves(nested: Any) -> list[int]:
    return [leaf for each in nested for leaf in _leaves(each)] if isinstance(nested, list) else [nested]


def is_mesh(group: Any) -> bool:
    """Whether it is a DeviceMesh."""
    return type(group).__name__ == "DeviceMesh"


def own_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """The group given, that of a DeviceMesh of one dimension, or the default one.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in it, or a mesh has more dimensions.
    """
    group = dist.group.WORLD if group is None else _group_of_mesh(group)
    if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            f"process_group={group!r}: expected a torch.distributed.ProcessGroup, as dist.new_group() "
            "returns, or a DeviceMesh of one dimension"
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"process_group does not contain this process (global rank {dist.get_rank()}): build the optimizer only "
            "on the ranks of its group, and give it the group that they are in"
        )
    return group


def _group_of_mesh(group: Any) -> Any:
    if not is_mesh(group):
        return group
    if group.ndim != 1:
        names = group.mesh_dim_names or ("dp",)
        raise ValueError(
            f"process_group={group!r} has {group.ndim} dimensions: expected the one over which parameters are "
            f"replicated and their state is to be sharded, such as mesh['{names[-1]}'], or "
            f"mesh.get_group('{names[-1]}'); or, as mesh=, two of them: (replicate, shard)"
        )
    return group.get_group()


def _check_dimensions(mesh: Any) -> None:
    if mesh.ndim not in (1, 2):
        names = mesh.mesh_dim_names or ("replicate", "shard")
        raise ValueError(
            f"mesh={mesh!r} has {mesh.ndim} dimensions: expected one, over which the state is sharded, or two, "
            f"(replicate, shard), whatever their names, such as mesh{[*names[:2]]}"
        )


def _check_members(rows: Sequence[Sequence[int]], own: int) -> None:
    everybody = [rank for row in rows for rank in row]
    if twice := sorted({rank for rank in everybody if everybody.count(rank) > 1}):
        raise ValueError(f"mesh={[*map(list, rows)]} has {twice} more than once: expected each rank in one place")
    if own not in everybody:
        raise ValueError(f"mesh={[*map(list, rows)]} does not contain this process (global rank {own})")


def _check_rows(rows: Rows, shard: dist.ProcessGroup, replica: dist.ProcessGroup) -> None:
    """Raise ValueError unless the groups are this rank's row and column: else nobody would own some shards."""
    own = dist.get_rank()
    row = next(row for row in rows if own in row)
    column = tuple(each[row.index(own)] for each in rows)
    for group, wanted, which in ((shard, row, "last"), (replica, column, "first")):
        if (ranks := tuple(dist.get_process_group_ranks(group))) != wanted:
            raise ValueError(
                f"mesh={[*map(list, rows)]}: the process group of its {which} dimension has the ranks {[*ranks]}, in "
                f"this order, where the mesh has {[*wanted]}. Expected each row to be a shard group and each column a "
                "replica group, of increasing ranks, as init_device_mesh makes them"
            )


def backend_of(group: dist.ProcessGroup, device_type: str) -> str | None:
    """The backend that a group has for a device; ``dist.get_backend`` is "undefined" after init_process_group()."""
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return backends.get(device_type)


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that a group's backend waits for a rank."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return float(options._timeout.total_seconds())
    return dist.default_pg_timeout.total_seconds()
