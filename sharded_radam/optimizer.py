"""ShardedRAdam: the facade. What it has is in its ``Shards``, and what it does in build, step, state and checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable, JoinHook
from torch.optim import RAdam
from torch.optim.optimizer import ParamsT

from sharded_radam.arguments import Arguments, Options  # noqa: F401  (pickled optimizers name Options here)
from sharded_radam.arrivals import Arrivals
from sharded_radam.build import Shards, build, check_is_whole, find_groupless, follow_groups, lay_out, rebuild
from sharded_radam.checkpoint.load import load_checkpoint
from sharded_radam.checkpoint.optimizer import Entries, OptimizerPart
from sharded_radam.checkpoint.report import LoadReport
from sharded_radam.checkpoint.save import Save, SaveReport
from sharded_radam.compat import check_graph_capture
from sharded_radam.gradients import measures
from sharded_radam.preflight import broadcast_
from sharded_radam.state import consolidate, load
from sharded_radam.state.edits import take_back
from sharded_radam.stats import Stats, ownership, stats
from sharded_radam.step import check_replicas, evaluate, heed_scaler, prepare, update
from sharded_radam.store.groups import Groups
from sharded_radam.store.peers import Peers
from sharded_radam.transport import Alone, Choice, Transport
from sharded_radam.uneven_inputs import ShadowSteps, share_gradients

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

logger = logging.getLogger("sharded_radam")


class ShardedRAdam(RAdam, Joinable):
    r"""``torch.optim.RAdam`` with its state partitioned over the ranks of a process group (ZeRO stages 1 and 2).

    Use it in the place of RAdam, with DistributedDataParallel as it is; the results are RAdam's. Each step

    1. takes the gradients of the own shard out of ``p.grad`` (DDP has averaged them), or, with ``shard_gradients``,
       from what was reduce-scattered during backward,
    2. updates the own shard of each bucket in place (parameters are views of the buckets),
    3. all-gathers the buckets in place; bucket i travels while bucket i+1 is updated.

    Args:
        params: as for torch.optim.RAdam: parameters, dicts, or (name, parameter) pairs; the same on every rank.
        lr, betas, eps, weight_decay, decoupled_weight_decay, maximize, capturable, differentiable:
            as for torch.optim.RAdam; differentiable is for one rank.
        foreach: True for torch's foreach update, False for its for-loop; bit-equal to RAdam's of that flag.
        fused: True for one pass over memory by torch's fused Adam kernel (see :mod:`sharded_radam.radam`), which
            differs from RAdam in the last bits. If neither is given: fused on CPU, RAdam's choice elsewhere.
        compiled: True for one pass over memory in every precision, by what torch.compile makes of the equation (see
            :mod:`sharded_radam.compiled`). It differs from RAdam in the last bits. Compiled at construction, which
            takes 5 to 40 seconds, and needs a compiler: g++ or clang++ on CPU, Triton on CUDA.
        process_group: whose ranks share the state, or a DeviceMesh of one dimension; the default group if None. Without
            one, or with one rank, nothing is communicated.
        mesh: a DeviceMesh, in the place of ``process_group``. One dimension shards. Of two, whatever their names, the
            last one shards, and the first one replicates: each row is a shard group, which has one copy of the state,
            and each column a replica group, whose ranks hold the same shard. Gradients are averaged over all ranks; all
            replicas end with the same bits. See :func:`sharded_radam.make_mesh`.
        bucket_cap_mb: size of a bucket in MiB. If None, 25 on CPU, and 4 a rank elsewhere, but from 64 to 256.
        parameters_as_bucket_view: if False, parameters keep their own memory, and the buckets cost as much again.
        transport: "native", "gloo", "shared_memory", or None to choose: native on CUDA, shared memory where all ranks
            are on CPUs of one host, otherwise gloo.
        shard_gradients: replaces DistributedDataParallel (ZeRO stage 2): gradients are averaged while backward runs,
            each rank keeps its shards', and ``p.grad`` becomes a
            :class:`~sharded_radam.gradients.grad_shard.GradShard`. The model is not wrapped.
            See ``no_sync``, ``clip_grad_norm_``, ``full_grad``, ``map_grads_``. Between two steps
            all ranks run the same number of backward passes, and each of them reaches one parameter that the others
            reach too.
        reduce_dtype: with ``shard_gradients``, the dtype in which gradients travel; that of their parameters if None.
            Half precision is summed in fp32.
        check_gradients: with ``shard_gradients``, log local gradients that are not finite before they are reduced, with
            rank and name, and raise on all ranks before the update. Reads every gradient once more.
        check_replicas: compare what must be equal on all ranks (see the method of this name) every so many steps. With
            0, only at the first step, or every 100 steps under ``TORCH_DISTRIBUTED_DEBUG=INFO`` or ``DETAIL``.
        share_parameters: one copy of the parameters for all ranks of a host (shared memory only). Nobody but this
            optimizer may write to them while training goes on, and a step waits until every rank has come to it.
            What one rank writes, all see: load weights on all ranks, then let them meet (``dist.barrier()``).
        module: the model, with ``shard_gradients``: its buffers are broadcast from rank 0 too, and while its
            ``require_backward_grad_sync`` is False, backward passes are as in ``no_sync``.

    fp16 and bf16 parameters have fp32 moments and an fp32 master, and are updated in fp32. All state exists from
    construction on. Construction, ``add_param_group``, ``consolidate_state_dict`` and ``load_state_dict`` are
    collective, as ``step`` is; with ``shard_gradients`` or ``share_parameters`` the first two broadcast the parameters
    from rank 0. Whatever one rank raises in them is raised on all, in the same words: its type if that is ValueError,
    TypeError or MemoryError, or if all ranks raise the same, otherwise RuntimeError.

    Raises:
        ValueError: what RAdam refuses; arguments that exclude each other; parameters that do not fit into buckets;
            arguments or layouts that differ between ranks.
        RuntimeError: from ``step``, if a parameter was moved, recast or replaced since construction, or for sparse
            gradients; the state is unchanged then.
    """

    _connect: Callable[[Choice], Transport] = staticmethod(Choice.connect)
    """Makes the transport; tools/simulate.py has another one."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        compiled: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        process_group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        bucket_cap_mb: float | None = None,
        parameters_as_bucket_view: bool = True,
        transport: str | None = None,
        shard_gradients: bool = False,
        reduce_dtype: torch.dtype | None = None,
        check_gradients: bool = False,
        check_replicas: int = 0,
        share_parameters: bool = False,
        module: nn.Module | None = None,
    ) -> None:
        Joinable.__init__(self)
        numbers = (lr, betas, eps, weight_decay, decoupled_weight_decay)
        flags = {"foreach": foreach, "maximize": maximize, "capturable": capturable, "differentiable": differentiable}
        initialise: Callable[[], None] = partial(super().__init__, params, *numbers, **flags)  # type: ignore[arg-type]
        arguments = Arguments(
            process_group=process_group,
            mesh=mesh,
            bucket_cap_mb=bucket_cap_mb,
            fused=fused,
            compiled=compiled,
            foreach=foreach,
            differentiable=differentiable,
            parameters_as_bucket_view=parameters_as_bucket_view,
            transport=transport,
            shard_gradients=shard_gradients,
            reduce_dtype=reduce_dtype,
            check_gradients=check_gradients,
            check_replicas=check_replicas,
            share_parameters=share_parameters,
            module=module,
        )
        self._shards = build(self, initialise, arguments, self._connect)
        if self._shards.transport.meeting.rank == 0:
            logger.info("%s", self.stats())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as ``torch.optim.Optimizer.add_param_group``; collective, as construction is.

        Raises:
            ValueError: as at construction; the optimizer is unchanged then.
        """
        if not hasattr(self, "_shards"):  # the constructor of the base class is adding the first groups
            super().add_param_group(param_group)
            return
        follow_groups(self, self._shards)
        before = len(self.param_groups)
        try:
            what = f"add_param_group() {self._shards.when}"
            lay_out(self, self._shards, what, partial(super().add_param_group, param_group))
        except BaseException:
            del self.param_groups[before:]
            raise

    @torch.no_grad()
    def broadcast_buffers(self, module: nn.Module) -> None:
        """Collective: rank 0's buffers (running statistics and the like) to all ranks, as DDP does in each forward.

        Without DistributedDataParallel nobody else does: call it before validation or saving, if the model has some.
        """
        broadcast_(list(module.buffers()), self._shards.transport.everyone)

    def stats(self) -> Stats:
        """Figures of this rank since construction: bytes, collectives, time by phase; see :class:`Stats`.

        Not collective. Waits for the device if its phases are timed.
        """
        return stats(self, self._shards)

    def time_phases(self, enabled: bool = True) -> None:
        """Whether ``stats()`` has the time of each phase. On CPU it has; elsewhere that takes two events a phase."""
        self._shards.transport.meter.times_phases = enabled

    def describe(self) -> str:
        """Who owns what, of all ranks: a line for each shard of each bucket. Not collective."""
        plans = [(flat.plan, flat.specs) for flat in self._shards.flats]
        return f"{self.stats()}\n{ownership(plans, self._shards.groups.rows)}"

    # Step

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimization step; every rank enters the same collectives, whatever its gradients are.

        What was edited since in ``param_groups``, ``state`` or ``param.data`` takes effect as with RAdam; all ranks
        must do the same. Groups with other parameters are laid out anew first, which takes their memory once more.

        Args:
            closure: reevaluates the model and returns the loss, with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a parameter was moved, recast or replaced, or has a sparse gradient. Checked before anything
                is changed or sent. With ``shard_gradients``: a rank is gone or does something else; on all ranks, with
                ``check_gradients``, a gradient is not finite.
        """
        check_graph_capture(self)
        shards = self._shards
        with shards.transport.together():
            loss = evaluate(closure)
            share_gradients(self, shards)  # in Join, with ranks that have run out of data
            if heed_scaler(self, shards):
                cohorts = prepare(self, shards)  # all that can fail; the last gradients; step counts
                update(self, shards, cohorts)  # 1. gradients of the own shards  2. update  3. all-gather
        shards.transport.operation = f"step {shards.steps + 1}"
        return loss

    def check_replicas(self) -> None:
        """Collective: compare hyperparameters, step counts and parameters of all ranks, to the bit.

        The first step does it by itself, unless ``capturable``, since it waits for the device; see ``check_replicas=``.
        So do ``save`` and ``CheckpointManager.save``, before they write anything.

        Raises:
            RuntimeError: on every rank; names the first difference, the ranks, and both values.
        """
        check_replicas(self, self._shards)

    # Gradients

    @property
    def shards_gradients(self) -> bool:
        """Whether gradients are in the shards, and not in ``param.grad``."""
        return self._shards.options.shard_gradients

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch.amp.GradScaler then leaves unscaling and skipping to step().
        return self.shards_gradients

    def unscale_gradients_(self, inv_scale: Tensor, found_inf: Tensor) -> Tensor:
        """Collective, for :class:`sharded_radam.GradScaler`: unscale the shards, agree on infs.

        Args:
            inv_scale: 1-element tensor to multiply by.
            found_inf: 1-element tensor, set to 1 on all ranks if a gradient of any rank is inf or nan.

        Returns:
            ``found_inf``.
        """
        assert self._shards.gradients is not None, "only with shard_gradients=True"
        measures.unscale_(self._shards.gradients, inv_scale, found_inf)
        return found_inf

    def no_sync(self) -> AbstractContextManager[None]:
        """With ``shard_gradients``: backward passes in here accumulate in ``.grad``, as in DDP's ``no_sync``."""
        return nullcontext() if self._shards.gradients is None else self._shards.gradients.no_sync()

    def grad_norm(self, norm_type: float = 2.0) -> Tensor:
        """Collective: the norm of all gradients taken as one vector, as ``torch.nn.utils.get_total_norm`` has it.

        Args:
            norm_type: above 0, or inf.

        Returns:
            0-d, equal on all ranks.
        """
        return measures.norm(self._shards.all_gradients(self.param_groups), norm_type)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Collective: scale all gradients so that their norm is ``max_norm`` at most, as ``torch.nn.utils`` does.

        Returns:
            The norm before, 0-d, equal on all ranks.

        Raises:
            RuntimeError: on all ranks, with ``error_if_nonfinite``, if the norm is inf or nan.
        """
        norm = self.grad_norm(norm_type)
        measures.check_norm(norm, norm_type, error_if_nonfinite)
        measures.clip_to_norm_(self._shards.all_gradients(self.param_groups), max_norm, norm)
        return norm

    def clip_grads_with_norm_(self, max_norm: float, total_norm: Tensor) -> None:
        """Scale all gradients so that their norm, which is ``total_norm`` now, is ``max_norm`` at most.

        As ``torch.nn.utils.clip_grads_with_norm_``. Collective with ``shard_gradients``.
        """
        gradients = self._shards.all_gradients(self.param_groups)
        gradients.finish()
        measures.clip_to_norm_(gradients, max_norm, total_norm)

    def clip_grad_value_(self, clip_value: float) -> None:
        """Limit each element of the gradients to ``-clip_value`` to ``clip_value``, as ``torch.nn.utils`` does.

        Collective with ``shard_gradients``.
        """
        measures.clip_values_(self._shards.all_gradients(self.param_groups), clip_value)

    def full_grad(self, param: Tensor) -> Tensor | None:
        """The whole mean gradient of a parameter. Collective with ``shard_gradients``.

        Returns:
            Of the parameter's shape and dtype; ``param.grad`` itself without ``shard_gradients``. None if it has none.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        return param.grad if self._shards.gradients is None else self._shards.gradients.whole(param)

    def map_grads_(self, fn: Callable[[Tensor, range, Tensor], Tensor | None]) -> None:
        """Change gradients between backward and step: masks, noise, scales for each layer.

        Collective with ``shard_gradients``, where each rank changes the elements that it has. Otherwise each rank
        changes all, and all must do the same.

        Args:
            fn: called with each parameter, the range of its elements in memory order (row-major for a contiguous one),
                and these elements of the gradient, 1-D; fp32 for half precision with ``shard_gradients``. It changes
                them in place, or returns new ones.
        """
        measures.map_(self._shards.all_gradients(self.param_groups), fn)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``, the shards' gradients included."""
        if self._shards.gradients is not None:
            follow_groups(self, self._shards)  # what is in no group any more keeps its gradient
            self._shards.gradients.reset()
        super().zero_grad(set_to_none)

    # Overlap with the next forward

    def overlap_forward(self, model: nn.Module) -> None:
        """From now on, ``step`` returns while parameters still arrive; the forward of each module waits for its own.

        Whoever reads a parameter otherwise waits for it too: ``state_dict()``, a norm, ``param.data``. Does nothing
        with shared memory, which is read by the very thread that would go on with the forward.

        Args:
            model: all modules that use the parameters; not one that torch.compile made.

        Raises:
            ValueError: a module of the model is compiled, or parameters are not views of buckets.
        """
        if not self._shards.options.as_views:
            raise ValueError("overlap_forward() needs parameters_as_bucket_view=True, and no differentiable=True")
        self._shards.arrivals = self._shards.arrivals or Arrivals()
        self._shards.arrivals.hook(model)

    # State dicts

    def consolidate_state_dict(self, to: int | None = None) -> dict[str, Any] | None:
        """Collective: the whole state on one rank, as ``torch.optim.RAdam.state_dict()`` would have it.

        Bucket by bucket: beyond the result, rank ``to`` allocates one bucket. Tensors are on CPU, and the dict is
        plain: ``torch.optim.RAdam`` and this optimizer load it at any world size, ``torch.load(weights_only=True)``
        reads it. Half-precision parameters have a "master" beside their moments.

        Args:
            to: global rank that gets it, also where ``process_group`` has only some of the ranks; the first of the
                optimizer's ranks if None.

        Returns:
            The dict on rank ``to``, None elsewhere. Until the next step (or the next loading, or a new param group),
            ``state_dict()`` on rank ``to`` returns the same state.

        Raises:
            ValueError: on every rank, if on one a group or the state has something that cannot be saved.
            RuntimeError: on every rank: one did not come within the process group's time-out, or does something else.
        """
        return consolidate.consolidate(self, self._shards, to)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, where it is in this process; not collective.

        With one rank what RAdam returns. With several ranks, after ``consolidate_state_dict``, on its target rank and
        until the next step: the consolidated state, with the options that the param groups have now. For
        torch.distributed.checkpoint, whose functions call this, ``sharded_state_dict()``; or, by a collective, whole
        tensors, where it was told ``StateDictOptions(full_state_dict=True)``.

        Raises:
            RuntimeError: there is only this rank's part of the state, and someone else asks.
        """
        return consolidate.state_dict(self, self._shards)

    def sharded_state_dict(self) -> dict[str, Any]:
        """This rank's part of the state, for torch.distributed.checkpoint; not collective.

        As in ``dcp.save({"optimizer": optimizer.sharded_state_dict()})``, on all ranks. With one rank it is the whole
        state, as RAdam's. With several, moments are
        :class:`~sharded_radam.buckets.range_tensor.RangeTensor` with this rank's
        elements: live views, which ``load_state_dict`` takes back, and which refuse to be pickled.
        """
        return consolidate.sharded_state_dict(self, self._shards)

    def full_state(self, param: Tensor) -> dict[str, Any]:
        """Collective: the whole state of a parameter, as ``torch.optim.RAdam`` has it in ``optimizer.state[param]``.

        For code that edits moments and puts them back: cut, append, permute, average. What is put into
        ``optimizer.state[p]`` may be whole, or of the shape that was there.

        Returns:
            Copies: "step" (0-d), "exp_avg" and "exp_avg_sq" of the parameter's shape on its device, "master" with half
            precision; and what users keep there. Empty if the state has been deleted.

        Raises:
            ValueError: it is not a parameter of this optimizer.
        """
        return consolidate.full_state(self, self._shards, param)

    def _answer_with_part(self) -> None:
        """Until the next step, ``state_dict()`` returns this rank's part: for those who ask it and write nothing."""
        self._shards.consolidated = consolidate.local_state(self, self._shards)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Collective: load a consolidated state, at any world size; each rank copies its own elements.

        Args:
            state_dict: from ``consolidate_state_dict``, ``torch.optim.RAdam.state_dict()``, or
                ``ZeroRedundancyOptimizer(RAdam).state_dict()``; or this optimizer's own local one. Not changed.

        Raises:
            ValueError: on every rank, if one has a dict of other groups, names or shapes than this optimizer's; nothing
                is changed then.
            RuntimeError: a rank did not come within the process group's time-out, or does something else.
        """
        load.load_state_dict(self, self._shards, state_dict)

    def take_over(self, groups: list[dict[str, Any]], entries: Entries) -> int:
        """Take over what was checked before, for CheckpointManager; parameters without an entry keep their state.

        Returns:
            Of how many parameters, which are not of half precision, the weights are now the saved masters.
        """
        return load.take_over(self, self._shards, groups, entries)

    def full_precision_state_dict(self, model: nn.Module, to: int | None = None) -> dict[str, Any] | None:
        """Collective: the state dict of a half-precision model as it would be in fp32, on one rank.

        Parameters are their fp32 masters; what has none (other parameters, buffers) is converted. Tensors of full
        precision, integers and extra state are as they are. Beyond the result, rank ``to`` allocates one bucket.

        Args:
            model: the model, wrapped or not; names have no prefix of a wrapper, and a tied weight has each of its names
                with one tensor for all.
            to: global rank that gets it; the first of the optimizer's ranks if None.

        Returns:
            Copies on CPU on rank ``to``, for ``load_state_dict`` of an fp32 model; None elsewhere.

        Raises:
            Exception: on every rank, in the same words: one failed, did not come, or does something else.
        """
        return consolidate.full_precision_state_dict(self, self._shards, model, to)

    # Checkpoints

    def save(
        self, path: str | os.PathLike[str], *, model: nn.Module | None = None, timeout: float = 600.0
    ) -> SaveReport:
        """Collective: write a checkpoint directory, each rank its own part; nothing is gathered.

        It is written beside ``path``, brought to the disk, and then renamed: there is a whole checkpoint of this name,
        or none. It is one of torch.distributed.checkpoint's, with the optimizer under the key "optim", and with
        checksums. Beyond the state, a rank allocates one chunk (64 MiB at most), on CPU nothing.

        Args:
            path: of the directory, on a file system that all ranks share. It must not exist.
            model: whose parameters' names to use; needed only if the optimizer was built without names and the
                checkpoint is to be loaded by name.
            timeout: seconds to wait for a rank that does not come, or is silent; a slow disk is waited for.

        Raises:
            CheckpointError: on every rank the same, if one of them failed or did not come; nothing is left behind.
        """
        peers = Peers.of(self._shards.groups)
        return Save.begin(path, lambda: self.checkpoint_part(model).collect(), peers, timeout).write()

    def load(
        self,
        path: str | os.PathLike[str],
        *,
        model: nn.Module | None = None,
        strict: bool = True,
        prefix: str | None = None,
        timeout: float = 600.0,
    ) -> LoadReport:
        """Collective: load a checkpoint directory that any number of ranks saved, by the names of parameters.

        Of this optimizer, or of plain or FSDP2's RAdam by torch.distributed.checkpoint. All is read and checked before
        anything is changed; until then it takes the memory of the own shard once more, on CPU, and one chunk. Moments
        that are zero take what is read at once, as in a new optimizer, and are zeros again if the load fails.

        Args:
            path: of the directory.
            model: as for ``save``.
            strict: whether missing, unexpected and mismatched parameters are errors; they are in the report otherwise,
                and what is missing or mismatched is left as it is.
            prefix: the key that the optimizer was saved under, where there are several in the checkpoint.
            timeout: seconds to wait for a rank that does not come, or is silent; a slow disk is waited for.

        Raises:
            CheckpointError: on every rank the same: no checkpoint, a damaged one, or other parameters. The optimizer is
                unchanged then.
        """
        peers = Peers.of(self._shards.groups)
        plan = load_checkpoint(
            path, peers, timeout, lambda index, files: self.checkpoint_part(model).prepare(index, files, strict, prefix)
        )
        return plan.report_taken_over(self.take_over(plan.groups, plan.entries()))

    def checkpoint_part(self, model: nn.Module | None = None) -> OptimizerPart:
        """What a checkpoint needs of this optimizer; for CheckpointManager."""
        shards = self._shards
        shards.wait()
        follow_groups(self, shards)
        for flat in shards.flats:
            take_back(self, flat)
        is_fused, has_one_copy = bool(shards.options.fused), shards.transport.has_one_copy
        replicas = shards.transport.replicas
        # After destroy_process_group() a rank whose shard is the whole state saves alone.
        is_one_of_many = replicas is not None and len(shards.ranks()) > 1
        replica = (replicas.rank, replicas.world_size) if replicas is not None and is_one_of_many else (0, 1)
        return OptimizerPart(shards.flats, self.param_groups, self.state, model, is_fused, has_one_copy, replica)

    @property
    def ranks(self) -> list[int]:
        """Global ranks of all that this optimizer is on, of all replicas, in increasing order."""
        return self._shards.ranks()

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The group whose ranks share the state: the shard group; None where torch.distributed is not initialised."""
        return self._shards.transport.group

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        check_is_whole(self._shards)
        return self._content()

    def _content(self) -> dict[str, Any]:
        groupless = find_groupless(self, self._shards)
        return {**super().__getstate__(), "_options": self._shards.options, "_groupless": groupless}

    def __setstate__(self, state: dict[str, Any]) -> None:
        shards: Shards | None = self.__dict__.get("_shards")
        self._restore(state, shards.transport if shards else Alone(torch.device("cpu")), shards)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedRAdam:
        self._shards.wait()
        follow_groups(self, self._shards)
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new._restore(deepcopy(self._content(), memo), self._shards.transport.copy(), self._shards)
        return new

    def _restore(self, content: dict[str, Any], transport: Transport, shards: Shards | None) -> None:
        """Become a copy, between the same ranks as some shards."""
        Joinable.__init__(self)
        content = dict(content)
        options, groupless = content.pop("_options", None), content.pop("_groupless", [])
        super().__setstate__(content)  # type: ignore[no-untyped-call]
        groups = shards.groups if shards else Groups(None)
        self._shards = rebuild(self, transport, options or self._shards.options, groups, groupless)

    # Join

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """For ``torch.distributed.algorithms.Join([ddp_model, optimizer])``: ranks without data step along.

        Raises:
            ValueError: with ``shard_gradients``, since Join is for DistributedDataParallel; or with a mesh of two
                dimensions.
        """
        if self._shards.groups.replica is not None:
            raise ValueError("Join is for one process group, and this optimizer has a mesh of two dimensions")
        if self.shards_gradients:
            raise ValueError("Join works with DistributedDataParallel, which shard_gradients=True replaces")
        return ShadowSteps(self, self._shards)

    @property
    def join_device(self) -> torch.device:
        """Where Join's own collectives are."""
        return self._shards.flats[0].buffer.device

    @property
    def join_process_group(self) -> dist.ProcessGroup | None:
        """The group of Join's own collectives."""
        return self._shards.transport.group
