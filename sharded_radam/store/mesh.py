"""A mesh of nodes by ranks per node, from what torchrun has told each process."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch.distributed as dist

from sharded_radam.store.meeting import Meeting

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_VARIABLES = ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "LOCAL_RANK")


def make_mesh(device_type: str) -> DeviceMesh:
    """Collective: the mesh whose rows are the nodes that torchrun has started, for ``ShardedRAdam(mesh=)``.

    The state is sharded within each node and replicated across nodes. With one node, it is sharded over all ranks.

    Args:
        device_type: of the parameters: ``"cuda"``, ``"cpu"``.

    Returns:
        A DeviceMesh of two dimensions, "replicate" and "shard".

    Raises:
        ValueError: on every rank: torchrun's variables are missing on some rank, nodes have different numbers of ranks,
            or ranks are not numbered node by node.
        RuntimeError: torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("make_mesh() before torch.distributed.init_process_group(): call that first")
    nodes, per_node = Meeting.of(None).agree("making a mesh of nodes", _own_place(), decide=_shape)
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (nodes, per_node), mesh_dim_names=("replicate", "shard"))


def _own_place() -> list[int] | None:
    """Values of torchrun's variables; None if they are not there."""
    values = [os.environ.get(name, "") for name in _VARIABLES]
    return [int(value) for value in values] if all(value.isdecimal() for value in values) else None


def _shape(places: list[list[int] | None]) -> list[int]:
    """Nodes and ranks per node."""
    if None in places:
        raise ValueError(
            f"rank {places.index(None)} has not all of {', '.join(_VARIABLES)}: start the ranks by torchrun, or make "
            "the mesh by torch.distributed.device_mesh.init_device_mesh(device_type, (nodes, ranks_per_node))"
        )
    found = [place for place in places if place is not None]
    sizes = sorted({(place[2], place[1]) for place in found})
    if len({size for _, size in sizes}) > 1:
        counts = ", ".join(f"{size} on node {node}" for node, size in sizes)
        raise ValueError(
            f"nodes have different numbers of ranks ({counts}), so they cannot each hold one copy of the state: "
            "expected one --nproc-per-node everywhere, or an optimizer without mesh="
        )
    nodes, per_node = found[0][0], found[0][1]
    for rank, (_, _, node, local) in enumerate(found):
        if len(found) != nodes * per_node or rank != node * per_node + local:
            raise ValueError(
                f"{len(found)} ranks, of which rank {rank} is number {local} of node {node}, are not {nodes} nodes "
                f"with {per_node} ranks each, node by node: make the mesh by DeviceMesh(device_type, rows)"
            )
    return [nodes, per_node]
