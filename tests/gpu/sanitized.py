"""A training for torch's CUDA sanitizer, which follows streams and events and ends a program that has a race.

    TORCH_CUDA_SANITIZER=1 python -m tests.gpu.sanitized          # branches on three streams, averages on another
    TORCH_CUDA_SANITIZER=1 python -m tests.gpu.sanitized --race   # reads weights that another stream is writing

One rank: what NCCL does on its stream the sanitizer takes for work of the current one.
"""

from __future__ import annotations

import sys

import torch

from tests.gpu.device import Stream, wait_for_device
from tests.gpu.training import make_model, train, train_branches


def race() -> None:
    """Two streams that nothing orders."""
    (weight, *_), reader = make_model().parameters(), Stream()
    with torch.no_grad():
        weight.mul_(2)
        with reader.current():
            weight.clone()


def main() -> None:
    if "--race" in sys.argv:
        race()
    else:
        for dtype in (torch.float32, torch.bfloat16):
            train(0, 7, dtype, True, True)
        train_branches(0, 7, [Stream() for _ in range(3)])
    wait_for_device()
    print("no race")


if __name__ == "__main__":
    main()
