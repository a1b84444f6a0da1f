"""Hugging Face's Trainer and Accelerate.

Both write what ``optimizer.state_dict()`` is on rank 0, where nothing can be gathered any more. So the state is
consolidated just before, on all ranks, or saved in shards beside what they save. Needs transformers, or accelerate
alone for ``consolidate_on_save``: ``pip install 'sharded_radam[hf]'``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from sharded_radam.checkpoint import CheckpointManager
from sharded_radam.optimizer import ShardedRAdam

if TYPE_CHECKING:
    from transformers import TrainerCallback
else:
    try:
        from transformers import TrainerCallback
    except ImportError:  # Accelerate without the Trainer
        TrainerCallback = object


def unwrap(optimizer: Any) -> ShardedRAdam:
    """The ShardedRAdam that Accelerate has wrapped, or that is one already.

    Raises:
        TypeError: it is something else.
    """
    while not isinstance(optimizer, ShardedRAdam) and isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, ShardedRAdam):
        raise TypeError(f"the optimizer is a {type(optimizer).__name__}, expected a ShardedRAdam")
    return optimizer


def consolidate_on_save(accelerator: Any, *optimizers: Any) -> Any:
    """Have ``accelerator.save_state`` write whole optimizers, which ``load_state`` loads at any number of ranks.

    Args:
        accelerator: an ``accelerate.Accelerator``; its ``save_state`` is called on all ranks, as always.
        optimizers: ShardedRAdam, before or after ``prepare``.

    Returns:
        A handle with ``remove()``.

    Raises:
        TypeError: an optimizer is no ShardedRAdam.
    """
    unwrapped = [unwrap(optimizer) for optimizer in optimizers]

    def consolidate(models: Any, weights: Any, output_dir: str) -> None:
        for optimizer in unwrapped:
            if optimizer.consolidate_state_dict(to=0) is None:
                optimizer._answer_with_part()  # Accelerate asks all ranks, and writes on the first

    return accelerator.register_save_state_pre_hook(consolidate)


class ConsolidateCallback(TrainerCallback):
    """Trainer's checkpoints have the whole optimizer in ``optimizer.pt``, which resumes at any number of ranks.

    The file is also one for ``torch.optim.RAdam``. Rank 0 needs host memory for the whole state while it saves; where
    that is too much, see :class:`ShardsCallback`.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """If a save follows: Trainer's own callback, which comes first, has decided that."""
        if control.should_save:
            unwrap(kwargs["optimizer"]).consolidate_state_dict(to=0)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With ``save_strategy="best"`` a save may follow, and nothing says so before."""
        if args.save_strategy == "best" and kwargs["optimizer"] is not None:
            unwrap(kwargs["optimizer"]).consolidate_state_dict(to=0)


class ShardsCallback(TrainerCallback):
    """Optimizer and schedule in directories of their own, each rank its part, beside Trainer's checkpoints.

    For ``TrainingArguments(save_only_model=True)``: Trainer itself then saves model and progress. They are saved before
    those, so that each of Trainer's checkpoints has its ``folder/step_<number>``, and loaded when a run resumes, at any
    number of ranks. A run that resumes earlier than it once was replaces what it comes to again, as Trainer does.

    Args:
        folder, keep: as for :class:`sharded_radam.CheckpointManager`; keep at least as many as Trainer does
            (``save_total_limit``).

    Raises:
        ValueError: when training begins, without ``save_only_model``, or in a folder of another run.
        CheckpointError: on all ranks the same, as CheckpointManager does.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int | None = None) -> None:
        self._folder, self._keep = folder, keep
        self._manager: CheckpointManager | None = None
        self._saved = 0
        self._is_to_load = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that this can work."""
        if not args.save_only_model:
            raise ValueError(
                "ShardsCallback needs TrainingArguments(save_only_model=True): otherwise Trainer asks rank 0 for the "
                "whole optimizer, too (ConsolidateCallback is for that)"
            )
        self._manager = CheckpointManager(self._folder, keep=self._keep)
        steps = self._manager.steps()
        if steps and not state.global_step:
            raise ValueError(
                f"{self._folder} has checkpoints of steps {steps}, of another run: choose another folder, remove "
                "them, or resume that run (resume_from_checkpoint=)"
            )
        self._saved = state.global_step
        self._is_to_load = state.global_step > 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the step that Trainer resumes at; not earlier, since it draws random numbers until then."""
        if self._is_to_load:
            self._is_to_load = False
            assert self._manager is not None
            optimizer, scheduler = unwrap(kwargs["optimizer"]), kwargs["lr_scheduler"]
            self._manager.load(state.global_step, optimizer=optimizer, scheduler=scheduler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before Trainer saves."""
        if control.should_save:
            self.on_save(args, state, control, **kwargs)

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After Trainer has saved, where nothing had said that it would (``save_strategy="best"``)."""
        assert self._manager is not None
        if self._saved != state.global_step:
            optimizer, scheduler = unwrap(kwargs["optimizer"]), kwargs["lr_scheduler"]
            self._manager.save(state.global_step, optimizer=optimizer, scheduler=scheduler)
            self._saved = state.global_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the folder."""
        assert self._manager is not None
        self._manager.close()
