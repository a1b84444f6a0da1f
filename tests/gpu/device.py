"""What is the same on the device and on the CPU, and what stands in for it there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from sharded_radam.dtypes import wide
from sharded_radam.transport import native
from tests.cases import make_params, set_grads
from tests.ranks import DEVICE

IS_CUDA = DEVICE.type == "cuda"

IS_ASKED_FOR = "TEST_DEVICE" in os.environ
"""Not the suite of all tests, which has more thorough ones for the CPU, and takes a part of these."""

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)

SMALL = 8e-3
"""MiB of a bucket: a few for what these tests train."""

SLEEP_CYCLES = 20_000_000
"""Ten milliseconds and more: a kernel that does not wait for them runs long before they are over."""

NO_COMPILER = "" if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs g++ or clang++, not here"
if IS_CUDA:
    NO_COMPILER = "" if importlib.util.find_spec("triton") else "torch.compile needs Triton for a GPU, not here"
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)


def only_cuda(reason: str) -> pytest.MarkDecorator:
    """Skip on the CPU."""
    return pytest.mark.skipif(not IS_CUDA, reason=f"no GPU: {reason}")


_NO_NCCL = only_cuda("NCCL is for GPUs; Gloo runs the same here")
GROUPS = [pytest.param("nccl", size, marks=_NO_NCCL, id=f"nccl-{size}") for size in (2, 4)]
GROUPS += [pytest.param("gloo", size, id=f"gloo-{size}") for size in ((2, 4) if IS_ASKED_FOR and not IS_CUDA else (2,))]
"""Backends and world sizes. On a GPU, Gloo gets tensors that are there."""


# Streams


class Stream:
    """A stream of the device; on the CPU there is one, so nothing is to be ordered."""

    def __init__(self) -> None:
        self._stream: Any = torch.cuda.Stream() if IS_CUDA else None  # type: ignore[no-untyped-call]

    @contextmanager
    def current(self) -> Iterator[None]:
        """What is launched in here runs on this stream."""
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    def follow(self) -> None:
        """Let this stream wait for what the current one has now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def join(self) -> None:
        """Let the current stream wait for what this one has now."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)


def sleep() -> None:
    """Keep the current stream busy for a while; on the CPU, the thread for a short one."""
    if IS_CUDA:
        torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
    else:
        time.sleep(0.001)


def wait_for_device() -> None:
    """Return when all that was launched has run."""
    if IS_CUDA:
        torch.cuda.synchronize()


class _Deaf:
    """Work for which nobody waits. All of them are kept: they own their tensors."""

    known: ClassVar[list[Any]] = []

    def __init__(self, work: Any) -> None:
        self.known.append(work)

    def wait(self, *_: Any) -> None:
        pass


GATHERS, REDUCTIONS = {"all_gather_single", "all_gather_coalesced"}, {"reduce_scatter_single", "all_to_all_single"}
"""Of parameters, and of gradients."""


@contextmanager
def late_collectives(waits: bool = True, begun: set[str] | None = None) -> Iterator[None]:
    """Collectives of shards and gradients begin late, and the current stream goes on meanwhile.

    Args:
        waits: whether waiting for them does what it should.
        begun: takes the names of those that there were.
    """
    stream = Stream()

    def late(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def begin(*args: Any, **options: Any) -> Any:
            if begun is not None:
                begun.add(name)
            stream.follow()
            with stream.current():
                sleep()
                work = collective(*args, **options)
            return work if waits else _Deaf(work)

        return begin

    patches = []
    for name in GATHERS | REDUCTIONS:
        where: Any = native if hasattr(native, name) else dist
        patches.append(mock.patch.object(where, name, late(name, getattr(where, name))))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


# Parameters, gradients and comparisons


def params_and_reference(dtype: torch.dtype) -> tuple[list[Parameter], list[Parameter]]:
    """Parameters on the device; and the same for RAdam, in fp32 for half precision."""
    params = make_params(dtype, device=DEVICE)
    return params, [Parameter(param.detach().to(wide(dtype), copy=True)) for param in params]


def give_grads(params: Sequence[Parameter], others: Sequence[Parameter], step: int, missing: Iterable[int]) -> None:
    """The same gradients, with few bits, so that their mean over 2 or 4 equal ranks is exact.

    Each has the memory order of its parameter, as backward gives it; torch's foreach code takes another way otherwise.
    """
    set_grads(params, step, missing)
    for param, other in zip(params, others, strict=True):
        other.grad = None
        if param.grad is not None:
            few = reals(param.grad)
            few.copy_(few.bfloat16())
            param.grad = torch.empty_like(param).copy_(param.grad)
            other.grad = torch.empty_like(other).copy_(param.grad)


def reals(tensor: Tensor) -> Tensor:
    """Without autograd, as real numbers."""
    tensor = tensor.detach()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def assert_near(ours: Iterable[Tensor], theirs: Iterable[Tensor], units: float, what: object) -> None:
    """Within some times eps * max(1, the largest)."""
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if other.numel():
            mine, reference = reals(one), reals(other)
            unit = torch.finfo(reference.dtype).eps * max(1.0, float(reference.abs().max()))
            error = float((mine - reference).abs().max())
            assert error <= units * unit, (what, index, error / unit)
