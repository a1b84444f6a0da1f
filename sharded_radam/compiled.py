"""The compiled engine: torch.compile makes one kernel of the equation, for each dtype and form of a param group.

It reads and writes each element once, also in half precision, where other engines need four passes: the master follows
the parameter, is updated, and is rounded into it. All numbers of a step are 0-d tensors, so that no step and no other
lr compiles anything anew. What does: another form, and another setting of torch, such as its number of threads.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sharded_radam.dtypes import HALF_DTYPES, wide
from sharded_radam.plan import ALIGNMENT
from sharded_radam.radam import Form, Hyperparameters, Operands, Terms, equation, terms_on_device, terms_on_host

logger = logging.getLogger("sharded_radam")

Update = Callable[[Tensor, Tensor, Tensor, Tensor, "Tensor | None", Terms, Form], None]


def _update_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, terms: Terms, form: Form
) -> None:
    if master is None:
        param.copy_(equation(param, grad, exp_avg, exp_avg_sq, terms, form))
        return
    followed = torch.where(_rounds_to(master, param), master, param.to(master.dtype))
    updated = equation(followed, grad.to(master.dtype), exp_avg, exp_avg_sq, terms, form)
    master.copy_(updated)
    param.copy_(updated)


def _rounds_to(master: Tensor, param: Tensor) -> Tensor:
    """Where ``master.to(param.dtype) == param``. Not written so: compilers drop a rounding whose result is widened.

    Floats of one sign are ordered as their bits: the distance from the parameter, in units of the master's last place,
    is at most half of the parameter's unit, and less if that has an odd last digit.
    """
    seen: Tensor = param.to(torch.float32)
    bits = seen.view(torch.int32)
    dropped = 16 if param.dtype == torch.bfloat16 else 13
    distance, is_odd, half = master.view(torch.int32) - bits, (bits >> dropped) & 1, 2 ** (dropped - 1)
    is_near: Tensor = (distance >= is_odd - half) & (distance <= half - is_odd)
    if param.dtype == torch.bfloat16:
        return is_near
    # The numbers of fp16 are 2^-24 apart up to 2^-14, and beyond 65504 comes infinity.
    size, gap = seen.abs(), (master - seen).abs()
    is_even = (seen * 2.0**24).to(torch.int32) & 1 == 0
    is_near_small = (gap < 2.0**-25) | ((gap == 2.0**-25) & is_even)
    overflows = (size == math.inf) & (master.abs() >= 65520) & (master * seen > 0)
    return torch.where(size <= 2.0**-14, is_near_small, is_near) | overflows


@cache
def _compiled(param: torch.dtype, grad: torch.dtype, device_type: str, form: Form) -> Update:
    """A compiled ``_update_``, with code of its own: torch compiles one piece of code a few times only."""
    code = _update_.__code__
    function = FunctionType(
        code.replace(co_name=f"radam_{param}_{grad}_{device_type}".replace("torch.", "")), globals()
    )
    update: Update = torch.compile(function, dynamic=True, fullgraph=True)
    return update


@torch.no_grad()
def compiled_update_(operands: Sequence[Operands], step: int | Tensor, hyper: Hyperparameters) -> None:
    """One step of RAdam (param, moments, master: modified in place).

    Args:
        operands: any number of them, of one dtype and device.
        step: number of this step, from 1; on the device if it is a tensor, and not read then.
        hyper: the group's hyperparameters.
    """
    if not operands:
        return
    first, form = operands[0], Form.of(hyper)
    dtype = first.exp_avg.dtype
    find_terms: Any = terms_on_device if isinstance(step, Tensor) else terms_on_host
    terms = _as_tensors(find_terms(step, hyper, dtype), dtype)
    update = _compiled(first.param.dtype, first.grad.dtype, first.param.device.type, form)
    # What is compiled depends on whether autocast is on.
    with torch.autocast(first.param.device.type, enabled=False):
        for param, grad, exp_avg, exp_avg_sq, master in operands:
            update(param, grad, exp_avg, exp_avg_sq, master, terms, form)


def _as_tensors(terms: Terms, dtype: torch.dtype) -> Terms:
    return Terms(
        *(term if isinstance(term, Tensor) else torch.tensor(term, dtype=dtype, device="cpu") for term in terms)
    )


_known: set[tuple[torch.dtype, torch.dtype, str, Form, bool]] = set()


def compile_for(
    param: torch.dtype, grad: torch.dtype, device: torch.device, hyper: Hyperparameters, capturable: bool
) -> None:
    """Compile what some parameters need, before their first step.

    Args:
        param: dtype of the parameters.
        grad: dtype of their gradients.
        device: of both.
        hyper: of their group.
        capturable: whether the numbers of steps will be on the device.

    Raises:
        RuntimeError: torch.compile cannot.
    """
    key = (param.to_real(), grad.to_real(), device.type, Form.of(hyper), capturable)
    if key in _known:
        return
    begin = time.monotonic()
    try:
        _try(param.to_real(), grad.to_real(), device, hyper, capturable)
    except Exception as error:
        raise RuntimeError(
            f"compiled=True: torch.compile made no update for {param} on {device} ({_first_line(error)}). Expected a "
            "compiler: g++ or clang++ for the CPU (such as apt install g++), Triton for a GPU (pip install triton); or "
            "leave compiled=True away"
        ) from error
    _known.add(key)
    logger.info("compiled the update of %s on %s in %.1f s", param, device, time.monotonic() - begin)


def _try(param: torch.dtype, grad: torch.dtype, device: torch.device, hyper: Hyperparameters, capturable: bool) -> None:
    """Take a step with a few zeros."""
    numel, state = 2 * ALIGNMENT, wide(param)
    dtypes = (param, grad, state, state, state) if param in HALF_DTYPES else (param, grad, state, state)
    tensors = [torch.zeros(numel, dtype=dtype, device=device) for dtype in dtypes]
    step = torch.ones((), dtype=torch.float64, device=device) if capturable else 1
    compiled_update_([Operands(*tensors)], step, hyper)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
