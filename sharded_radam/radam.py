r"""The mathematics of RAdam on 1-D tensors; nothing of this module knows of other ranks.

Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", https://arxiv.org/abs/1908.03265, with the
threshold 5 of :class:`torch.optim.RAdam`. At step t (from 1), with gradient g::

    m = beta1 m + (1 - beta1) g                     bias1 = 1 - beta1^t
    v = beta2 v + (1 - beta2) g^2                   bias2 = 1 - beta2^t
    rho_inf = 2 / (1 - beta2) - 1                   rho = rho_inf - 2 t beta2^t / bias2

    rho >  5:   p = p - lr r (m / bias1) sqrt(bias2) / (sqrt(v) + eps)                      "rectified"
                r = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
    rho <= 5:   p = p - lr (m / bias1)                                                      "unrectified"

Four engines compute it. ``for-loop`` and ``foreach`` are torch's own functional ``radam`` and give its bits.
``fused`` is torch's fused Adam kernel, one pass over memory, with scalars for which Adam is RAdam. At step ``ENDLESS``
Adam's own corrections are 1, so that it does ``p = p - lr' m / (sqrt(v) + eps')``, hence:

* rectified: ``lr' = lr r sqrt(bias2) / bias1`` and ``eps' = eps``;
* unrectified: ``lr' = lr h / bias1`` and ``eps' = h``, h being a power of two so large that ``sqrt(v)`` vanishes beside
  it. Scaling by a power of two is exact, and the denominator is never 0, whatever eps is.

Decoupled decay multiplies p by ``1 - lr' wd'``, so ``wd' = wd lr / lr'``.

The fourth, ``compiled``, is one pass over memory in every precision: torch.compile makes one kernel of ``equation``
(see :mod:`sharded_radam.compiled`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim.radam import radam

from sharded_radam.compat import VERSION
from sharded_radam.dtypes import HALF_DTYPES

Engine = Literal["for-loop", "foreach", "fused", "compiled"]

CPU_CHUNK_NUMEL = 2**18
"""On CPU the engines that need temporaries work on so many elements at a time: 1 MiB of fp32 stays in the cache."""

ENDLESS = 2.0**62
"""A step after which no bias is left. Not infinity: on CPU torch 2.6 and newer read it as an int64."""

_VANISHING = {torch.float32: 2.0**64, torch.float64: 2.0**512}


def default_engine(device_type: str, dtype: torch.dtype) -> Engine:
    """How parameters are updated where the user has not said it.

    * On CPU ``fused``: one pass over memory, 3 to 4 times as fast as torch's others (measured; scripts/README.md).
    * Elsewhere ``foreach``, as torch.optim.RAdam, whose bits it has, until another is measured there.
    * But half precision on CUDA has masters, so RAdam's bits are not to be had: ``fused``, which reads and writes about
      70 bytes an element, and foreach 200.
    """
    if device_type == "cpu" or (device_type == "cuda" and dtype in HALF_DTYPES):
        return "fused"
    return "foreach"


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """What a param group says of its update; ``lr`` may be a 1-element tensor."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled_weight_decay: bool
    maximize: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """Those of a param group with RAdam's keys."""
        beta1, beta2 = group["betas"]
        names = ("lr", "eps", "weight_decay", "decoupled_weight_decay", "maximize")
        return cls(beta1=beta1, beta2=beta2, **{name: group[name] for name in names})


class Operands(NamedTuple):
    """1-D tensors of equal length: one piece. ``master`` is the fp32 copy of a half-precision ``param``."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    master: Tensor | None = None


class Scalars(NamedTuple):
    """float64 scalars of a step; ``rect`` is None while unrectified."""

    bias_correction1: float
    bias_correction2: float
    rect: float | None


def scalars(step: int, beta1: float, beta2: float) -> Scalars:
    """The scalars of step ``step`` (from 1), in float64: in float32 rectification begins at the wrong step."""
    bias_correction2 = 1 - beta2**step
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / bias_correction2
    rect = None
    if rho > 5:
        rect = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return Scalars(1 - beta1**step, bias_correction2, rect)


def endless(device: torch.device) -> Tensor:
    """The number of a step that the fused kernel is told, to be made once: 0-d, on its device."""
    return torch.full((), ENDLESS, dtype=torch.float32, device=device)


def update_(
    operands: Sequence[Operands],
    engine: Engine,
    step: int | Tensor,
    hyper: Hyperparameters,
    endless_step: Tensor | None = None,
) -> None:
    """One step of RAdam on pieces of one dtype and device (param, exp_avg, exp_avg_sq, master: modified in place).

    Args:
        operands: any number of pieces; gradients are only read.
        engine: ``for-loop``, ``foreach`` or ``fused``.
        step: number of this step, from 1. If it is on the device (capturable), a 0-d float64 tensor, nothing waits for
            it, so that a CUDA graph can capture this: ``fused`` runs its kernel twice, of which one does nothing, and
            the others compute ``equation``.
        hyper: the group's hyperparameters.
        endless_step: what ``endless`` made for this device; made anew if None.
    """
    if not operands:
        return
    endless_step = endless(operands[0].param.device) if endless_step is None else endless_step
    if engine == "fused" and operands[0].master is None:
        _fused_(operands, step, hyper, endless_step)
        return
    for batch in _batches(operands):
        wide = _widen(batch)
        if engine == "fused":
            _fused_(wide, step, hyper, endless_step)
        elif isinstance(step, Tensor):
            _equation_(wide, step, hyper)
        else:
            functional_(wide, step, hyper, foreach=engine == "foreach")
        _round_(batch, wide)


def _batches(operands: Sequence[Operands]) -> Iterator[list[Operands]]:
    """The same pieces, on CPU cut and grouped so that a batch has at most CPU_CHUNK_NUMEL elements."""
    if operands[0].param.device.type != "cpu":
        yield list(operands)
        return
    batch, room = [], CPU_CHUNK_NUMEL
    for piece in operands:
        start, numel = 0, piece.param.numel()
        while start < numel:
            taken = min(room, numel - start)
            batch.append(piece if taken == numel else _narrow(piece, start, taken))
            start, room = start + taken, room - taken
            if room == 0:
                yield batch
                batch, room = [], CPU_CHUNK_NUMEL
    if batch:
        yield batch


def _narrow(piece: Operands, start: int, numel: int) -> Operands:
    return Operands(*(None if t is None else t.narrow(0, start, numel) for t in piece))  # type: ignore[arg-type]


def _widen(operands: Sequence[Operands]) -> list[Operands]:
    """Half-precision pieces as fp32 ones: the masters in the place of the parameters; others as they are."""
    wide = []
    for piece in operands:
        if piece.master is None:
            wide.append(piece)
        else:
            follow_(piece.master, piece.param)
            wide.append(Operands(piece.master, piece.grad.to(piece.master.dtype), piece.exp_avg, piece.exp_avg_sq))
    return wide


def _round_(operands: Sequence[Operands], wide: Sequence[Operands]) -> None:
    """Round the masters into half-precision parameters (modified in place)."""
    if operands[0].master is not None:
        torch._foreach_copy_([piece.param for piece in operands], [piece.param for piece in wide])


def follow_(master: Tensor, param: Tensor) -> None:
    """Set the master (modified in place) to the parameter wherever it does not round to it.

    Such an element of the parameter was changed by somebody else: weights were loaded, clamped, averaged.
    """
    torch.where(master.to(param.dtype) == param, master, param.to(master.dtype), out=master)


def functional_(
    operands: Sequence[Operands], step: int, hyper: Hyperparameters, *, foreach: bool, differentiable: bool = False
) -> None:
    """torch's own functional radam; it wants, and counts up, a step tensor for each piece."""
    params, grads, exp_avgs, exp_avg_sqs, _ = (list(column) for column in zip(*operands, strict=True))
    radam(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        list(torch.full((len(params),), step - 1.0, dtype=torch.float64, device="cpu").unbind()),
        foreach=foreach,
        differentiable=differentiable,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        lr=hyper.lr,  # type: ignore[arg-type]
        weight_decay=hyper.weight_decay,
        eps=hyper.eps,
        decoupled_weight_decay=hyper.decoupled_weight_decay,
        maximize=hyper.maximize,
    )


class FusedTerms(NamedTuple):
    """What the fused kernel takes of one step; ``lr`` is a 0-d fp32 tensor if the number of the step is on a device."""

    lr: float | Tensor
    weight_decay: float
    eps: float


def fused_terms(step: int, hyper: Hyperparameters, dtype: torch.dtype, device_type: str) -> FusedTerms:
    """Those of a step whose number is known, from scalars in float64.

    Args:
        step: number of this step, from 1.
        hyper: the group's hyperparameters.
        dtype: of the moments.
        device_type: whose kernel.
    """
    rect = scalars(step, hyper.beta1, hyper.beta2).rect
    beta1, beta2 = betas_of_kernel(hyper, dtype, device_type)
    lr = float(hyper.lr)
    scaled, eps = lr / (1 - beta1**step), hyper.eps
    if rect is None:
        scaled, eps = scaled * _VANISHING[dtype], _VANISHING[dtype]
    else:
        scaled *= rect * math.sqrt(1 - beta2**step)
    if _is_decoupled(hyper) and lr != 0:
        return FusedTerms(scaled, hyper.weight_decay * lr / scaled, eps)
    return FusedTerms(scaled, hyper.weight_decay, eps)


def betas_of_kernel(hyper: Hyperparameters, dtype: torch.dtype, device_type: str) -> tuple[float, float]:
    """The betas that moments are made with, from which their corrections follow.

    From torch 2.11 on CUDA's kernel rounds them to fp32. (Other engines, and the CPU's, round ``beta`` and ``1 - beta``
    by themselves, and torch corrects them as if they had not.)

    Raises:
        ValueError: a beta is 1 then: moments would stay 0 for ever.
    """
    if device_type != "cuda" or dtype != torch.float32 or VERSION < (2, 11):
        return hyper.beta1, hyper.beta2
    rounded = ctypes.c_float(hyper.beta1).value, ctypes.c_float(hyper.beta2).value
    if 1.0 in rounded:
        raise ValueError(
            f"betas={(hyper.beta1, hyper.beta2)}: torch's fused kernel computes with them in float32, where one of "
            "them is 1. Expected betas of at most 1 - 6e-8, or foreach=True"
        )
    return rounded


def _is_decoupled(hyper: Hyperparameters) -> bool:
    return hyper.decoupled_weight_decay and hyper.weight_decay != 0


def _fused_(operands: Sequence[Operands], step: int | Tensor, hyper: Hyperparameters, endless_step: Tensor) -> None:
    first = operands[0].param
    if not isinstance(step, Tensor):
        terms = fused_terms(step, hyper, first.dtype, first.device.type)
        _call_fused(operands, terms, hyper, _is_decoupled(hyper), endless_step)
    elif first.dtype == torch.float64:  # the kernel takes an lr on the device in fp32 only
        _equation_(operands, step, hyper)
    else:
        _fused_on_device_(operands, step, hyper, endless_step)


def _fused_on_device_(operands: Sequence[Operands], step: Tensor, hyper: Hyperparameters, endless_step: Tensor) -> None:
    """The unrectified and the rectified update, each with its eps; that of the other kind of step does nothing."""
    sizes = _sizes_on_device(step, hyper, betas_of_kernel(hyper, torch.float32, step.device.type))
    weight_decay = hyper.weight_decay
    if _is_decoupled(hyper):  # not by the kernel, whose factor is that lr times a number on the host
        torch._foreach_mul_([piece.param for piece in operands], 1 - _lr_of(hyper) * weight_decay)
        weight_decay = 0.0
    vanishing = _VANISHING[torch.float32]
    unrectified = FusedTerms((sizes.unrectified * vanishing).float(), weight_decay, vanishing)
    rectified = FusedTerms(sizes.rectified.float(), weight_decay, hyper.eps)
    is_rectified = sizes.is_rectified.float()
    _call_fused(operands, unrectified, hyper, False, endless_step, skip=is_rectified)
    _call_fused(operands, rectified, hyper, False, endless_step, skip=1 - is_rectified)


def _call_fused(
    operands: Sequence[Operands],
    terms: FusedTerms,
    hyper: Hyperparameters,
    is_decoupled: bool,
    endless_step: Tensor,
    skip: Tensor | None = None,
) -> None:
    """Call the kernel, which looks on the device whether ``skip`` is 1, and then does nothing."""
    params, grads, exp_avgs, exp_avg_sqs, _ = (list(column) for column in zip(*operands, strict=True))
    kernel = torch._fused_adamw_ if is_decoupled else torch._fused_adam_
    kernel(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [endless_step] * len(params),
        lr=terms.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        weight_decay=terms.weight_decay,
        eps=terms.eps,
        amsgrad=False,
        maximize=hyper.maximize,
        found_inf=skip,
    )


class Terms(NamedTuple):
    """What the equation takes of one step: numbers, or 0-d tensors of the moments' dtype (``is_rectified``: bool)."""

    one_minus_beta1: float | Tensor
    beta2: float | Tensor
    one_minus_beta2: float | Tensor
    eps: float | Tensor
    weight_decay: float | Tensor
    decay: float | Tensor
    """``1 - lr wd``, for decoupled decay."""
    is_rectified: Tensor
    rectified_size: Tensor
    """``lr r sqrt(bias2) / bias1``."""
    unrectified_size: Tensor
    """``lr / bias1``."""


class Form(NamedTuple):
    """Which of the equation's forms a param group has."""

    has_decay: bool
    is_decoupled: bool
    maximize: bool

    @classmethod
    def of(cls, hyper: Hyperparameters) -> Form:
        """That of some hyperparameters."""
        return cls(hyper.weight_decay != 0, hyper.decoupled_weight_decay, hyper.maximize)


def equation(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, terms: Terms, form: Form) -> Tensor:
    """One step of RAdam, as plain tensor code (exp_avg, exp_avg_sq: modified in place).

    Zeros stay zeros if eps is above 0.

    Returns:
        The new values of the parameter: a kernel that writes to a tensor twice passes over memory twice.
    """
    if form.maximize:
        grad = -grad
    if form.has_decay and form.is_decoupled:
        param = param * terms.decay
    elif form.has_decay:
        grad = grad + param * terms.weight_decay
    exp_avg.lerp_(grad, terms.one_minus_beta1)
    exp_avg_sq.mul_(terms.beta2).addcmul_(grad * terms.one_minus_beta2, grad)
    # Chosen elementwise and not multiplied by 0, since 0 / 0 of an unrectified step with eps = 0 would be NaN.
    denominator = exp_avg_sq.sqrt().add_(terms.eps)
    size = torch.where(terms.is_rectified, terms.rectified_size / denominator, terms.unrectified_size)
    return param.addcmul(exp_avg, size, value=-1)


def terms_on_device(step: Tensor, hyper: Hyperparameters, dtype: torch.dtype) -> Terms:
    """Those of a step whose number is on the device, without waiting for it.

    The scalars are computed in float64, unlike torch's, whose float32 begins rectification at the wrong step for some
    beta2.

    Args:
        step: 0-d float64 tensor, the number of this step, from 1.
        hyper: the group's hyperparameters; ``lr`` may be a tensor on that device.
        dtype: of the moments.
    """
    sizes = _sizes_on_device(step, hyper, (hyper.beta1, hyper.beta2))
    decay = 1 - _lr_of(hyper) * hyper.weight_decay
    return Terms(
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        hyper.eps,
        hyper.weight_decay,
        decay.to(dtype) if isinstance(decay, Tensor) else decay,
        sizes.is_rectified,
        sizes.rectified.to(dtype),
        sizes.unrectified.to(dtype),
    )


class _Sizes(NamedTuple):
    """Whether a step is rectified, and what the update is multiplied by if it is and if it is not: 0-d, float64."""

    is_rectified: Tensor
    rectified: Tensor
    unrectified: Tensor


def _sizes_on_device(step: Tensor, hyper: Hyperparameters, betas: tuple[float, float]) -> _Sizes:
    """Those of a step whose number is on the device; ``betas`` are what the corrections are made from."""
    rho_inf = 2 / (1 - hyper.beta2) - 1
    rho = rho_inf - 2 * step * hyper.beta2**step / (1 - hyper.beta2**step)
    rect = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).sqrt()
    size = _lr_of(hyper) / (1 - betas[0] ** step)
    return _Sizes(rho > 5, size * rect * (1 - betas[1] ** step).sqrt(), size)


def _lr_of(hyper: Hyperparameters) -> float | Tensor:
    """A number, or 0-d float64 on its device."""
    return hyper.lr.reshape(()).to(torch.float64) if isinstance(hyper.lr, Tensor) else hyper.lr


def terms_on_host(step: int, hyper: Hyperparameters, dtype: torch.dtype) -> Terms:
    """Those of a step whose number is known, as tensors on the CPU, from scalars in float64.

    Args:
        step: number of this step, from 1.
        hyper: the group's hyperparameters.
        dtype: of the moments.
    """
    lr, (bias_correction1, bias_correction2, rect) = float(hyper.lr), scalars(step, hyper.beta1, hyper.beta2)
    size = lr / bias_correction1
    rectified_size = 0.0 if rect is None else size * rect * math.sqrt(bias_correction2)
    decay = 1 - lr * hyper.weight_decay
    numbers = (1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.eps, hyper.weight_decay, decay)
    *tensors, rectified, unrectified = torch.tensor(
        [*numbers, rectified_size, size], dtype=dtype, device="cpu"
    ).unbind()
    return Terms._make([*tensors, torch.tensor(rect is not None, device="cpu"), rectified, unrectified])


def _equation_(operands: Sequence[Operands], step: Tensor, hyper: Hyperparameters) -> None:
    """The equation, one operation after the other, for a step whose number is on the device."""
    terms, form = terms_on_device(step, hyper, operands[0].exp_avg.dtype), Form.of(hyper)
    for param, grad, exp_avg, exp_avg_sq, _ in operands:
        # Not ``copy_``, which fake CUDA tensors do not have without CUDA.
        torch._foreach_copy_([param], [equation(param, grad, exp_avg, exp_avg_sq, terms, form)])
