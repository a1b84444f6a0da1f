"""Parameters, gradients and the independent reference that several tests use."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from sharded_radam.checkpoint.format import chunks as files

SHAPES: tuple[tuple[int, ...], ...] = ((17,), (257, 3), (), (1,), (0, 4), (5, 64, 7), (64,), (130, 11))

HYPERPARAMETERS: tuple[dict[str, Any], ...] = (
    {},
    {"weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
    {"maximize": True},
    {"maximize": True, "weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    {"betas": (0.9, 0.5)},
    {"betas": (0.1, 0.2), "eps": 0.25, "weight_decay": 0.1},
    {"betas": (0.0, 0.99)},
    {"betas": (0.9, 0.9995)},
    {"eps": 1e-15},
    {"eps": 1e-1},
    {"lr": 0.0},
    {"lr": 0.5, "betas": (0.8, 0.95)},
)

STEPS = 13
"""Past the switch of rho_t: with beta2 = 0.999 steps 1 to 5 are unrectified."""


def make_params(
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    device: torch.device | str = "cpu",
) -> list[Parameter]:
    """The same values on every rank, call and device; beside the shapes, memory orders other than contiguous."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    params.append(torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64))
    params.append(torch.randn(9, 14, generator=generator, dtype=torch.float64))
    made = [_as(param, dtype).to(device) for param in params]
    made[-2] = made[-2].contiguous(memory_format=torch.channels_last)
    made[-1] = made[-1].t()
    return [Parameter(param) for param in made]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        torch.complex(tensor, tensor.flip(0) if tensor.dim() else -tensor).to(dtype)
        if dtype.is_complex
        else tensor.to(dtype)
    )


def set_grads(params: Iterable[Parameter], step: int, missing: Iterable[int] = ()) -> None:
    """Gradients that depend on the step and the parameter's index only; None for the indices missing."""
    absent = set(missing)
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        spread = 10 ** torch.randn((), generator=generator, dtype=torch.float64)
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * spread
        param.grad = None if index in absent else _as(grad, param.dtype).to(param.device)


def missing_at(step: int) -> tuple[int, ...]:
    """Which parameters have no gradient at a step: some now and then, the second from last never any."""
    return tuple(index for index in range(10) if (index + step) % 5 == 0 and index % 3 == 0) + (
        (8,) if step < 9 else ()
    )


def assert_same(ours: Iterable[Tensor], theirs: Iterable[Tensor], what: object = "") -> None:
    """Bit-equal, with the strides."""
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert one.stride() == other.stride(), (what, index)
        assert torch.equal(one, other), (what, index, (one - other).abs().max())


def reference_radam(
    param: Tensor,
    grads: Sequence[Tensor | None],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Tensor:
    """The equation of arXiv 1908.03265 in float64, written for reading; shares no code with torch.optim or ours."""
    p, m, v, t = param.detach().double().clone(), torch.zeros_like(param).double(), torch.zeros_like(param).double(), 0
    rho_inf = 2 / (1 - betas[1]) - 1
    for grad in grads:
        if grad is None:
            continue
        t += 1
        g = grad.double() * (-1 if maximize else 1)
        if decoupled_weight_decay:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat = m / (1 - betas[0] ** t)
        rho = rho_inf - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
        if rho > 5:
            r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
            m_hat = m_hat * r * (1 - betas[1] ** t) ** 0.5 / (v.sqrt() + eps)
        p = p - lr * m_hat
    return p


def quietly(action: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action(*args, **options)


@contextmanager
def noted_reads() -> Iterator[list[files.Extent]]:
    """The chunks that are read from checkpoints meanwhile."""
    read: list[files.Extent] = []
    original = files.DataFiles._note

    def noted(self: files.DataFiles, extent: files.Extent) -> None:
        read.append(extent)
        original(self, extent)

    with mock.patch.object(files.DataFiles, "_note", noted):
        yield read


def num_descriptors() -> int:
    """How many files this process has open, on Linux."""
    return len(os.listdir("/proc/self/fd")) - 1  # that of the folder itself
