"""Where these tests compute: TEST_DEVICE=cuda, or the CPU, as in the suite of all tests. See scripts/test_gpu.sh."""

from __future__ import annotations

import pytest
import torch

from tests.ranks import DEVICE


def pytest_configure() -> None:
    if DEVICE.type not in ("cpu", "cuda"):
        raise pytest.UsageError(f"TEST_DEVICE={DEVICE}: expected cpu or cuda")
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"TEST_DEVICE=cuda, but torch {torch.__version__} finds no GPU here: leave it away")


def pytest_report_header() -> str:
    return f"device: {torch.cuda.get_device_name() if DEVICE.type == 'cuda' else 'cpu'}"
