"""The process group that a user means, and what it says of itself."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


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
    if type(group).__name__ != "DeviceMesh":
        return group
    if group.ndim != 1:
        names = group.mesh_dim_names or ("dp",)
        raise ValueError(
            f"process_group={group!r} has {group.ndim} dimensions: expected the one over which parameters are "
            f"replicated and their state is to be sharded, such as mesh['{names[-1]}'], or "
            f"mesh.get_group('{names[-1]}')"
        )
    return group.get_group()


def timeout_of(group: dist.ProcessGroup) -> float:
    """Seconds that a group's backend waits for a rank."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        if options is not None:
            return float(options._timeout.total_seconds())
    return dist.default_pg_timeout.total_seconds()
