"""Other libraries' training loops: the recipes of launch/README.md, on 2 ranks, where their libraries are installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, environment

LIBRARIES = {
    "trainer": "transformers",
    "trainer-shards": "transformers",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "fabric": "lightning",
    "checkpoint": "torch",
}


@pytest.mark.parametrize("program", [name for name, library in LIBRARIES.items() if importlib.util.find_spec(library)])
def test_recipe_trains_saves_and_resumes_as_radam_does(tmp_path: Path, program: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "tests/recipes.py", program, str(tmp_path)],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-15000:]
