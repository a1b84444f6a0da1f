"""The package as its users get it: sdist and wheel, installed into an empty environment, away from the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from tests.programs import ROOT
from tests.test_readme import README, blocks

pytest.importorskip("build")
pytest.importorskip("setuptools")


def call(*command: object, folder: Path) -> str:
    """What a command prints, started as from a terminal in ``folder`` without the checkout in its way."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``python -m build`` makes."""
    folder = tmp_path_factory.mktemp("build")
    tree = folder / "tree"
    shutil.copytree(ROOT / "sharded_radam", tree / "sharded_radam", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", tree, folder=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that has the wheel, and the torch that runs this test."""
    folder = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", folder / "venv", folder=folder)
    programs = folder / "venv" / "bin"
    (wheel,) = distributions.glob("*.whl")
    call(programs / "python", "-m", "pip", "install", "--no-index", "--no-deps", wheel, folder=folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "torch.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return programs


def test_what_is_in_them(distributions: Path) -> None:
    (wheel,), (sdist,) = distributions.glob("*.whl"), distributions.glob("*.tar.gz")
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "sharded_radam").rglob("*.py")}
    sources |= {"sharded_radam/py.typed", "sharded_radam/README.md"}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("/METADATA"))
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert any(name.endswith("LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        assert sources <= {name.partition("/")[2] for name in archive.getnames()}
    headers = metadata.partition("\n\n")[0].splitlines()
    assert "Requires-Python: >=3.10" in headers
    needed = [line for line in headers if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert needed == ["Requires-Dist: torch<3,>=2.6"]


def test_first_example_of_the_readme(installed: Path, tmp_path: Path) -> None:
    """As it stands, on 2 ranks, and again on 1, which goes on where the first run ended; then by plain RAdam."""
    (tmp_path / "example.py").write_text(blocks(README, "python")[0])
    losses = []
    for ranks in (2, 1):
        torchrun = [installed / "python", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        out = call(*torchrun, "example.py", folder=tmp_path)
        assert out.count("resumes at step 201") == 2 - ranks
        losses.append(float(re.findall(r"loss (\S+)", out)[0]))
    assert losses[1] < losses[0] / 2
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    radam = torch.optim.RAdam(torch.nn.Linear(20, 1).parameters())
    radam.load_state_dict(saved["optimizer"])
    assert {int(state["step"]) for state in radam.state.values()} == {400}


def test_command_line(installed: Path, tmp_path: Path) -> None:
    where = call(installed / "python", "-c", "import sharded_radam; print(sharded_radam.__file__)", folder=tmp_path)
    assert where.startswith(str(installed.parent))
    out = call(installed / "sharded-radam", "doctor", "--mb", "1", folder=tmp_path)
    assert torch.__version__ in out
