"""torch's CUDA sanitizer, which wants to be there from the beginning of a program."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.gpu.device import only_cuda
from tests.programs import ROOT


def sanitized(*flags: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_CUDA_SANITIZER": "1"}
    command = [sys.executable, "-m", "tests.gpu.sanitized", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)


@only_cuda("the sanitizer follows CUDA's streams")
def test_no_stream_is_ahead_of_another() -> None:
    done = sanitized()
    assert (done.returncode, done.stdout.strip()) == (0, "no race"), done.stderr


@only_cuda("the sanitizer follows CUDA's streams")
def test_the_check_itself_can_fail() -> None:
    done = sanitized("--race")
    assert done.returncode != 0
    assert "CUDASanitizerErrors" in done.stderr
