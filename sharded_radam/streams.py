"""Which kernels run after which. Only CUDA has streams; elsewhere there is one order, and nothing to do."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def has_streams(device: torch.device) -> bool:
    """Whether kernels of a device may run in another order than that of their launches."""
    return device.type == "cuda" and torch.cuda.is_available()


def is_captured(stream: Any) -> bool:
    """Whether a graph is made of what is launched on a stream."""
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


def keep(tensor: Tensor) -> None:
    """Let no stream use the memory of a tensor again before the current one has read it, however soon it is freed."""
    if has_streams(tensor.device):
        tensor.record_stream(torch.cuda.current_stream(tensor.device))


class Lane:
    """One order for the kernels of somebody whose functions are called on several streams.

    They are launched on the stream where ``move`` was called last, after those before them, and after all that was
    launched on the streams where ``note`` was called.

    Args:
        device: with streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.current_stream(device)
        self._noted: set[Any] = set()
        self._is_shared = False

    @classmethod
    def on(cls, device: torch.device) -> Lane | None:
        """A lane, if the device needs one."""
        return cls(device) if has_streams(device) else None

    def note(self) -> None:
        """Let the next kernels run after all that the current stream will have been given by then."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            self._noted.add(stream)
            self._is_shared = True

    def move(self) -> None:
        """Go on, on the current stream; what the caller launches there is in the order, too."""
        stream = torch.cuda.current_stream(self._device)
        if stream != self._stream:
            self._noted.add(self._stream)
            self._is_shared = True
            self._stream = stream
        self._wait()

    def entered(self) -> AbstractContextManager[Any]:
        """Launch on the lane's stream what is in here."""
        self._wait()
        is_here = torch.cuda.current_stream(self._device) == self._stream
        return nullcontext() if is_here else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        self._noted.discard(self._stream)
        while self._noted:
            other = self._noted.pop()
            # No event may cross the border of a graph. All that was launched before a capture has ended when it begins.
            if is_captured(other) == is_captured(self._stream):
                self._stream.wait_stream(other)

    def keep(self, *tensors: Tensor | None) -> None:
        """Let no stream use the memory of tensors again before the lane has read them, however soon they are freed."""
        if self._is_shared:
            for tensor in tensors:
                if tensor is not None and tensor.device == self._device:
                    tensor.record_stream(self._stream)
