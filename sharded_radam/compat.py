"""What differs between releases of torch; each part says which release ends it, so raising the floor deletes lines."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

OLDEST = (2, 6)
"""The oldest release of torch that is supported."""

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
"""Of the torch that is installed."""

if VERSION < OLDEST:
    raise ImportError(
        f"sharded_radam needs torch {'.'.join(map(str, OLDEST))} or newer, and torch {torch.__version__} is installed: "
        "pip install --upgrade torch"
    )

# Until 2.13: all_gather_single and reduce_scatter_single had other names, of which newer releases warn.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def all_gather_single(output: Tensor, own: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begin ``dist.all_gather_single``."""
    return cast("dist.Work", getattr(dist, ALL_GATHER)(output, own, group=group, async_op=True))


def can_coalesce() -> bool:
    """Whether several all-gathers may be one call: under TORCH_DISTRIBUTED_DEBUG=DETAIL only from 2.13 on."""
    names: Any = dist  # stubs do not have its levels
    return VERSION >= (2, 13) or names.get_debug_level() != names.DebugLevel.DETAIL


def all_gather_coalesced(outputs: Sequence[Tensor], owns: Sequence[Tensor], group: dist.ProcessGroup) -> dist.Work:
    """Begin several of ``dist.all_gather_single`` as one call of the backend."""
    with c10d._coalescing_manager(group, async_ops=True) as manager:
        for output, own in zip(outputs, owns, strict=True):
            getattr(dist, ALL_GATHER)(output, own, group=group, async_op=True)
    (work,) = manager.works
    return cast("dist.Work", work)


def reduce_scatter_single(own: Tensor, bucket: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begin ``dist.reduce_scatter_single``."""
    return cast("dist.Work", getattr(dist, REDUCE_SCATTER)(own, bucket, group=group, async_op=True))


def increment_versions(tensors: Sequence[Tensor]) -> None:
    """Call ``torch.autograd.graph.increment_version`` for all: lists are not for every release until 2.11."""
    for each in [tensors] if VERSION >= (2, 11) else tensors:
        torch.autograd.graph.increment_version(each)


def check_fake_collectives() -> None:
    """Raise ValueError if collectives of fake tensors are missing: until 2.8."""
    if VERSION < (2, 8):
        raise ValueError(f"--simulate needs torch 2.8 or newer, and torch {torch.__version__} is installed")


def check_graph_capture(optimizer: torch.optim.Optimizer) -> None:
    """Raise RuntimeError, as torch's optimizers do, if a graph is captured and a param group is not capturable."""
    # Until 2.11 it had another name.
    newer = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    cast("Any", newer or optimizer._cuda_graph_capture_health_check)()


def own_connection(store: Any) -> Any:
    """Return a store with the same content, and a connection that does not wait for other users of ``store``."""
    if hasattr(store, "clone"):
        return store.clone()
    # Until 2.8. Prefixes cannot be read, so the ranks agree on one of their own, within those of ``store``.
    stores: Any = dist  # stubs do not have its stores
    bare = store
    while isinstance(bare, stores.PrefixStore):
        bare = bare.underlying_store
    if not isinstance(bare, stores.TCPStore):
        return store  # only a TCPStore has a connection
    prefix = store.compare_set("sharded_radam/prefix", "", uuid.uuid4().hex).decode()
    connection = stores.TCPStore(bare.host, bare.port, is_master=False, wait_for_workers=False, timeout=bare.timeout)
    return stores.PrefixStore(prefix, connection)
