"""Dtypes that are too narrow to add up in."""

from __future__ import annotations

import torch

HALF_DTYPES = (torch.float16, torch.bfloat16)
"""Their gradients are summed in fp32; parameters of them have fp32 state and masters."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of state: fp32 for half precision, otherwise the same."""
    return torch.float32 if dtype in HALF_DTYPES else dtype
