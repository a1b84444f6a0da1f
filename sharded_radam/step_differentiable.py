"""The step that autograd can run through: ``differentiable=True``, which is for one rank."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sharded_radam.buckets.flat import Flat
from sharded_radam.radam import Hyperparameters, Operands, functional_


def update(
    flat: Flat, steps: Mapping[int, int], hyper: Hyperparameters, state: Mapping[Tensor, dict[str, Tensor]]
) -> None:
    """One step of the parameters of a flat, recorded by autograd, by torch's own RAdam.

    Parameters are modified in place. Moments in ``state`` are replaced, and the flat keeps copies of their values.

    Args:
        flat: whose parameters are no views of its buffer.
        steps: for each slot that has a gradient, the number of this step, from 1.
        hyper: of the group.
        state: of the optimizer.
    """
    for slot, step in steps.items():
        param, own = flat.params[slot], state[flat.params[slot]]
        assert param.grad is not None
        # Moments that somebody keeps, or that are leaves, stay as they are.
        moments = {name: own[name].clone() for name in ("exp_avg", "exp_avg_sq")}
        wide = param.to(moments["exp_avg"].dtype)  # another tensor only where it has half precision
        operands = Operands(wide, param.grad.to(wide.dtype), **moments)
        functional_([operands], step, hyper, foreach=False, differentiable=True)
        if wide is not param:
            param.copy_(wide)
        own.update(moments)
        flat.set_state(slot, {name: moment.detach() for name, moment in moments.items()})
