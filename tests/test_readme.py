"""The code of all pages, run as it stands; only paths and sizes are others. And what they quote, and their links."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.run import get_args_parser
from torch.nn.parallel import DistributedDataParallel

from sharded_radam import CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint.format.directory import committed_steps
from sharded_radam.tools.cli import main
from tests.integrations.test_integrations import LIBRARIES
from tests.programs import ROOT, SMALL, TRAIN, call, environment
from tests.ranks import WORLD_SIZES, run

README, GUIDE = ROOT / "README.md", ROOT / "sharded_radam" / "README.md"
LAUNCH, SCRIPTS, CONTRIBUTING = ROOT / "launch" / "README.md", ROOT / "scripts" / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = (README, GUIDE, LAUNCH, SCRIPTS, CONTRIBUTING)


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [code for of, code in found if of == language]


def lines(path: Path) -> list[str]:
    """Commands, without comments and continuations."""
    text = "".join(blocks(path, "bash")).replace("\\\n", " ")
    return [re.sub(r"\s{2,}#.*", "", line).strip() for line in text.splitlines()]


def test_every_block_is_of_a_language_that_is_run_here() -> None:
    for path in PAGES:
        fences = re.findall(r"^ *```(.*)$", path.read_text(), flags=re.MULTILINE)[::2]
        assert set(fences) <= {"python", "bash", ""}, path
    drawing, floors = blocks(CONTRIBUTING, "")
    assert drawing.startswith("rank 0   bucket 0")
    assert "0  compat" in floors
    assert not any(blocks(path, "") for path in PAGES if path != CONTRIBUTING)
    assert not any(blocks(path, "python") for path in (SCRIPTS, CONTRIBUTING))
    assert blocks(CONTRIBUTING, "bash") == []


def check_manager(_rank: int, _world_size: int, code: str, folder: str) -> None:
    code = code.replace("step_1000", f"{folder}/step_1000").replace('"checkpoints"', f'"{folder}/checkpoints"')
    model = nn.Linear(3, 200)
    optimizer = ShardedRAdam(DistributedDataParallel(model).parameters())
    for _ in range(7):
        model(torch.ones(5, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    exec(code, {"model": model, "optimizer": optimizer, "torch": torch, "dist": dist})
    assert {int(state["step"]) for state in optimizer.state.values()} == {7}


def check_loop(_rank: int, _world_size: int, code: str, folder: str) -> None:
    """Saves every 10 steps of 40, and has nothing left to do when it is started again."""
    code = code.replace('"checkpoints"', f'"{folder}/loop"').replace("1001", "41").replace("100", "10")
    steps: list[None] = []
    for _ in range(2):
        model = nn.Linear(3, 200)
        optimizer = ShardedRAdam(DistributedDataParallel(model).parameters())
        names: dict[str, Any] = {"model": model, "optimizer": optimizer, "train_one_step": lambda: steps.append(None)}
        exec(code, names)
        dist.barrier()  # rank 0 removes the first one after it has told the others that the last one is committed
        assert names["manager"].steps() == [20, 30, 40]
    assert len(steps) == 40
    assert names["restored"].step == 40


def check_sharded(_rank: int, _world_size: int, code: str, batches_of_a_step: int) -> None:
    """Without DDP: 7 steps."""
    names: dict[str, Any] = {"model": nn.Linear(3, 200), "batches": [torch.ones(5, 3)] * 7 * batches_of_a_step}
    before = names["model"].weight.detach().clone()
    exec(code, names)
    assert {int(state["step"]) for state in names["optimizer"].state.values()} == {7}
    assert not torch.equal(names["model"].weight, before)


def check_mesh(rank: int, world_size: int, code: str) -> None:
    """Two nodes where that is possible, otherwise one."""
    nodes = 1 if world_size % 2 else 2
    size = world_size // nodes
    places = {
        "GROUP_WORLD_SIZE": nodes,
        "LOCAL_WORLD_SIZE": size,
        "GROUP_RANK": rank // size,
        "LOCAL_RANK": rank % size,
    }
    model = nn.Linear(3, 200)
    names = {"model": model, "DistributedDataParallel": DistributedDataParallel, "ShardedRAdam": ShardedRAdam}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in places.items():
            patch.setenv(name, str(value))
        exec(code, names)
    optimizer: Any = names["optimizer"]
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    assert (optimizer.stats().num_replicas, optimizer.stats().world_size) == (nodes, world_size)


def check_edit(_rank: int, _world_size: int, code: str) -> None:
    """Rows of a parameter are pruned, with their moments."""
    param = torch.ones(200, 3, requires_grad=True)
    optimizer, mask = ShardedRAdam([param]), torch.arange(200) % 3 == 0
    param.grad = torch.arange(600.0).view(200, 3)
    optimizer.step()
    exec(code, {"optimizer": optimizer, "param": param, "mask": mask, "torch": torch})
    (new,) = optimizer.param_groups[0]["params"]
    new.grad = torch.zeros_like(new)
    optimizer.step()
    assert int(optimizer.state[new]["step"]) == 2
    assert torch.allclose(optimizer.full_state(new)["exp_avg"], 0.09 * param.grad[mask])


def check_from_zero(rank: int, _world_size: int, code: str, figures: str, folder: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(3, 200)
    was = re.findall(r"# was: (.*)", code)[0]
    zero: Any = eval(was, {"ZeroRedundancyOptimizer": ZeroRedundancyOptimizer, "model": model, "torch": torch})
    for _ in range(7):
        model(torch.ones(5, 3)).sum().backward()
        zero.step()
    zero.consolidate_state_dict(to=0)
    file = f"{folder}/zero.pt"
    if rank == 0:
        torch.save(zero.state_dict(), file)
    dist.barrier()
    names: dict[str, Any] = {"model": model, "torch": torch}
    exec(code.replace("zero.pt", file), names)
    optimizer = names["optimizer"]
    saved = torch.load(file, weights_only=True)
    found = optimizer.consolidate_state_dict(to=0)
    if found is not None:
        for index, state in saved["state"].items():
            assert all(torch.equal(state[name], found["state"][index][name]) for name in state)
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(figures, names)
    assert shown.getvalue().startswith(f"1 {names['figures'].state_bytes} {{")
    assert "bucket  rank  elements  parameters" in shown.getvalue()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_code_of_the_readme(tmp_path: Path, world_size: int) -> None:
    _, sharded, loop = blocks(README, "python")  # tests/test_wheel.py runs the first one
    run(check_sharded, world_size, sharded, 1)
    run(check_loop, world_size, loop, str(tmp_path))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_code_of_the_guide(tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edit, sharded, mesh, manager, dcp, zero, figures = blocks(GUIDE, "python")
    run(check_edit, world_size, edit)
    run(check_sharded, world_size, sharded, 4)
    run(check_mesh, world_size, mesh)
    run(check_manager, world_size, f"{manager}\n{dcp}", str(tmp_path))
    run(check_from_zero, world_size, zero, figures, str(tmp_path))
    commands = [line for line in lines(GUIDE) if line.startswith("sharded-radam checkpoint")]
    assert len(commands) == 7
    monkeypatch.chdir(tmp_path)
    for command in commands:
        # The consolidated file has no model.
        assert main(command.removeprefix("sharded-radam ").split()) == (" diff " in command)


def test_commands_of_the_readme() -> None:
    *installing, demo, test = lines(README)
    assert installing == ["pip install .", "torchrun --standalone --nproc-per-node=2 example.py"]  # by test_wheel.py
    # The latter runs this; the former is run by tests/scripts/test_scripts.py.
    assert [demo, test] == ["scripts/demo.sh", "scripts/test.sh"]
    assert all(os.access(ROOT / script, os.X_OK) for script in (demo, test))


def test_commands_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    tools = [line for line in lines(GUIDE) if not line.startswith("sharded-radam checkpoint")]
    assert [command.split()[1] for command in tools] == ["plan", "plan", "plan", "doctor"]
    for command in tools:
        assert main(shlex.split(command)[1:]) == 0
        assert capsys.readouterr().out


def test_commands_of_the_scripts() -> None:
    """Which tests/scripts/test_scripts.py runs."""
    tested = (ROOT / "tests" / "scripts" / "test_scripts.py").read_text()
    for command in lines(SCRIPTS):
        start, script = command.rsplit(" ", 1)
        assert start in ("OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node=2", "python")
        assert f'"{script}"' in tested or f"import {Path(script).stem}," in tested, script


def test_commands_of_launching(tmp_path: Path) -> None:
    """With small models, and one node of two ranks in the place of several nodes of eight.

    The first is run as it stands; of the others torchrun reads the flags, and does not start the ranks: tests/launch
    has it do so.
    """
    changes = {"runs/": f"{tmp_path}/", "/shared/": f"{tmp_path}/", "--nproc-per-node=8": "--nproc-per-node=2"}
    small = [*SMALL, "--batch", "12", "--save-every", "4"]
    for number, line in enumerate(lines(LAUNCH)):
        command = re.sub(r"--steps (\d)00+", r"--steps \1", line)
        for old, new in changes.items():
            command = command.replace(old, new)
        words = [word for word in shlex.split(command) if not re.match("[A-Z_]+=", word)]
        if number == 0 or words[0] != "torchrun":
            words += small if TRAIN in words else []
            done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, line + done.stdout + done.stderr
        else:
            asked = get_args_parser().parse_args(words[1:])
            call(int(asked.nproc_per_node), asked.training_script, *asked.training_script_args, *small)
    assert committed_steps(tmp_path / "a") == [2, 3]
    assert committed_steps(tmp_path / "run1") == [1]
    assert "<svg" in (tmp_path / "a.html").read_text()
    assert {json.loads(line)["step"] for line in (tmp_path / "a.jsonl").read_text().splitlines()} == {0, 1, 2}


def check_stop(rank: int, world_size: int, code: str, folder: str) -> None:
    def batches() -> Iterator[Tensor]:
        for step in itertools.count():
            if step == 3 and rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield torch.ones(5, 3)

    model = nn.Linear(3, 200)
    optimizer = ShardedRAdam(model.parameters())
    with CheckpointManager(folder) as manager:
        names = {"model": model, "optimizer": optimizer, "manager": manager, "batches": batches()}
        try:
            exec(code, {**names, "torch": torch, "dist": dist})
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert manager.steps() == [3]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_stopping_together(tmp_path: Path, world_size: int) -> None:
    (code,) = (block for block in blocks(LAUNCH, "python") if "SIGTERM" in block)
    run(check_stop, world_size, code, str(tmp_path))


def test_the_other_blocks_of_launching_are_recipes() -> None:
    """Which tests/integrations/test_integrations.py runs."""
    parts = re.split(r"^##+ ", LAUNCH.read_text(), flags=re.MULTILINE)
    with_code = [part.partition("\n")[0] for part in parts if "```python" in part and "SIGTERM" not in part]
    programs = (ROOT / "tests" / "recipes.py").read_text()
    assert len(with_code) == len(LIBRARIES) - 2  # Trainer and Lightning have two
    assert all(f'recipe("{heading}")' in programs for heading in with_code)


def test_errors_of_the_guide_are_those_of_the_code() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "sharded_radam").rglob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    table = GUIDE.read_text().partition("## Errors, and what they mean")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| ", table, flags=re.MULTILINE)
    assert len(rows) > 10
    for text in (text for row in rows for text in re.findall(r"`(.*?)`", row)):
        for part in filter(None, (part.strip() for part in text.split("..."))):
            assert part in source, part


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for path in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", path.read_text()):
            if not target.startswith("https://"):
                page = path.parent / target if target else path
                assert page.exists(), f"{path}: {target}"
                assert not anchor or anchor in anchors(page), f"{path}: {target}#{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    links = {(README.parent / target).resolve() for target in re.findall(r"\]\(([^)#:]+)", README.read_text())}
    assert {path.resolve() for path in PAGES[1:]} <= links
