"""The code of README.md, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sharded_radam.cli import main
from tests.ranks import WORLD_SIZES, run

README = Path(__file__).parent.parent / "README.md"


def check_code(_rank: int, _world_size: int, code: str, folder: str) -> None:
    code = code.replace("step_1000", f"{folder}/step_1000").replace("checkpoint.pt", f"{folder}/checkpoint.pt")
    train = "for _ in range(7):\n    model(torch.ones(5, 3)).sum().backward(); optimizer.step(); optimizer.zero_grad()"
    code = code.replace('"checkpoints"', f'"{folder}/checkpoints"')
    code = re.sub(r"^\.\.\.  .*$", train, code, flags=re.MULTILINE)
    names: dict[str, Any] = {
        "model": nn.Linear(3, 200),
        "torch": torch,
        "dist": dist,
        "DistributedDataParallel": DistributedDataParallel,
    }
    exec(code, names)
    dist.barrier()
    resume = re.findall(r"`(optimizer\.load_state_dict\(.*?)`", README.read_text())[0]
    exec(resume.replace("checkpoint.pt", f"{folder}/checkpoint.pt"), names)
    saved = torch.load(f"{folder}/checkpoint.pt", weights_only=True)
    torch.optim.RAdam(nn.Linear(3, 200).parameters()).load_state_dict(saved["optimizer"])
    assert {int(state["step"]) for state in names["optimizer"].state.values()} == {7}


def check_sharded(_rank: int, _world_size: int, code: str) -> None:
    """Without DDP: 28 batches in 7 steps."""
    names: dict[str, Any] = {"model": nn.Linear(3, 200), "batches": [torch.ones(5, 3)] * 28}
    before = names["model"].weight.detach().clone()
    exec(code, names)
    assert {int(state["step"]) for state in names["optimizer"].state.values()} == {7}
    assert not torch.equal(names["model"].weight, before)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_code_of_the_readme(tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    sharded = blocks.pop(1)
    run(check_code, world_size, "\n".join(blocks), str(tmp_path))
    run(check_sharded, world_size, sharded)
    commands = re.findall(r"^sharded-radam (.*?)(?: +#.*)?$", README.read_text(), flags=re.MULTILINE)
    assert len(commands) == 5
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main(command.split()) == ("diff" in command)  # the consolidated file has no model
