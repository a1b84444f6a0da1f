"""Other libraries' training loops: the recipes of launch/README.md, on 2 ranks, where their libraries are installed."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from tests.programs import ROOT, call, environment, torchrun

LIBRARIES = {
    "trainer": "transformers",
    "trainer-shards": "transformers",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "lightning-finetuning": "lightning",
    "fabric": "lightning",
    "checkpoint": "torch",
}
BY_TORCHRUN = {"accelerate", "lightning"}
"""One of each library, which reads torchrun's variables; the others get the same ones without it."""
SCRIPT = "tests/recipes.py"


@pytest.mark.parametrize("program", [name for name, library in LIBRARIES.items() if importlib.util.find_spec(library)])
def test_recipe_trains_saves_and_resumes_as_radam_does(tmp_path: Path, program: str) -> None:
    if program in BY_TORCHRUN:
        command = torchrun(2, SCRIPT, program, tmp_path)
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False
        )
    else:
        done = call(2, SCRIPT, program, tmp_path, seconds=200, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-15000:]
