"""The command line, on checkpoints of ours and of torch."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.optim import ZeroRedundancyOptimizer

from sharded_radam import CheckpointManager, ShardedRAdam
from sharded_radam.checkpoint.convert.inspection import summary
from sharded_radam.tools.cli import main
from tests.buckets.test_ranges import END, SAVED_AT, Net, train, uninterrupted
from tests.cases import set_grads
from tests.checkpoint.test_crashes import flip
from tests.ranks import WORLD_SIZES, run


def make(kind: type[Any] = ShardedRAdam) -> tuple[nn.Module, Any]:
    model = Net()
    named = dict(model.named_parameters())
    late = {"params": [("late", named.pop("late"))], "lr": 1e-3, "weight_decay": 0.0}
    options = {"bucket_cap_mb": 1e-3} if kind is ShardedRAdam else {}
    return model, kind([{"params": [*named.items()]}, late], foreach=True, **options)


def save(_rank: int, world_size: int, folder: str) -> None:
    model, optimizer = make()
    train(optimizer, model, 1, SAVED_AT)
    CheckpointManager(folder).save(world_size, model=model, optimizer=optimizer, user={"note": "hello"})


def command(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    assert main(["checkpoint", *map(str, arguments)]) == status
    out, err = capsys.readouterr()
    return out + (err if status else "")


def test_inspect_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(save, 3, str(tmp_path))
    folder = tmp_path / "step_3"
    text = command(capsys, "inspect", folder)
    assert f"{folder}: step 3, saved at world size 3, torch {torch.__version__}" in text
    assert "in 3 files, with checksums" in text
    row = next(line for line in text.splitlines() if line.startswith("optim.state.big.exp_avg "))
    assert row.split()[1:3] == ["float32", str(4 * 300 * 17)]
    assert row.endswith("(300, 17)")
    assert any(line.split() == ["user", "value"] for line in text.splitlines())
    found = json.loads(command(capsys, "inspect", folder, "--json"))
    assert (found["step"], found["world_size"], found["files"]) == (3, 3, 3)
    assert found["bytes"] == sum(file.stat().st_size for file in folder.glob("*.distcp"))
    assert {"name": "model.conv", "shape": [4, 3, 5, 5], "dtype": "float32", "bytes": 1200}.items() <= next(
        t for t in found["tensors"] if t["name"] == "model.conv"
    ).items()
    assert "complete; all checksums are right" in command(capsys, "verify", folder)
    assert json.loads(command(capsys, "verify", folder, "--json"))["ok"]
    flip(folder / "__1_0.distcp", 2000)
    text = command(capsys, "verify", folder, status=1)
    assert "__1_0.distcp, " in text
    assert "the file is damaged" in text
    assert "damaged" in json.loads(command(capsys, "verify", folder, "--json", status=1).splitlines()[0])["error"]
    assert "there is no" in command(capsys, "inspect", tmp_path / "nothing", status=1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_consolidate_and_import(tmp_path: Path, capsys: pytest.CaptureFixture[str], world_size: int) -> None:
    """There and back, at any world size: the file is what plain RAdam saves and loads."""
    run(save, world_size, str(tmp_path))
    folder, file = tmp_path / f"step_{world_size}", tmp_path / "radam.pt"
    assert "9 parameters" in command(capsys, "consolidate", folder, file)
    assert "exists: choose another name" in command(capsys, "consolidate", folder, file, status=1)
    assert not list(tmp_path.glob(".radam*"))
    content = torch.load(file, weights_only=True)
    model, plain = make(torch.optim.RAdam)
    train(plain, model, 1, SAVED_AT)
    wanted = plain.state_dict()
    assert content["param_groups"] == wanted["param_groups"]
    assert content["state"].keys() == wanted["state"].keys()
    for index, state in wanted["state"].items():
        assert all(torch.equal(content["state"][index][kind], value) for kind, value in state.items())
    plain.load_state_dict(content)
    train(plain, model, SAVED_AT + 1, END)
    assert all(map(torch.equal, model.parameters(), uninterrupted()))
    assert str(tmp_path / "back") in command(capsys, "import", file, tmp_path / "back")
    # All but the model, the user's values and random numbers, which are not in the file.
    differences = command(capsys, "diff", folder, tmp_path / "back", status=1).splitlines()
    assert all(line.startswith(("model.", "rng.", "user")) for line in differences), differences
    assert main(["checkpoint", "diff", str(folder), str(folder)]) == 0
    assert "no difference" in capsys.readouterr().out
    loaded = make()[1]
    assert loaded.load(tmp_path / "back").step == SAVED_AT


def zero(rank: int, _world_size: int, file: str) -> None:
    model = Net()
    options = {"lr": 0.02, "foreach": True}
    params = [p for name, p in model.named_parameters() if p.numel() and not p.is_complex() and name != "late"]
    optimizer = ZeroRedundancyOptimizer(params, torch.optim.RAdam, parameters_as_bucket_view=True, **options)  # type: ignore[arg-type]
    for step in range(1, 4):
        set_grads(params, step)
        optimizer.step()
    optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        torch.save({"epoch": 1, "optimizer": optimizer.state_dict(), "model": model.state_dict()}, file)


def test_import_of_zero_redundancy_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(zero, 2, str(tmp_path / "zero.pt"))
    model = Net()
    named = {n: p for n, p in model.named_parameters() if p.numel() and not p.is_complex() and n != "late"}
    (tmp_path / "names").write_text("\n".join(named))
    command(capsys, "import", tmp_path / "zero.pt", tmp_path / "a", "--names", tmp_path / "names")
    command(capsys, "import", tmp_path / "zero.pt", tmp_path / "b")
    saved = torch.load(tmp_path / "zero.pt", weights_only=True)["optimizer"]["state"]
    for folder, params in (("a", [*named.items()][::-1]), ("b", [*named.values()])):
        optimizer = ShardedRAdam(params)
        report = optimizer.load(tmp_path / folder)
        assert (report.loaded, report.step) == (len(named), 3)
        for index, param in enumerate(named.values()):
            assert torch.equal(optimizer.state[param]["exp_avg"], saved[index]["exp_avg"])
        assert optimizer.param_groups[0]["lr"] == 0.02
    found = json.loads(command(capsys, "inspect", tmp_path / "a", "--json"))
    assert "model.big" in [tensor["name"] for tensor in found["tensors"]]
    (tmp_path / "names").write_text("one two")
    text = command(capsys, "import", tmp_path / "zero.pt", tmp_path / "c", "--names", tmp_path / "names", status=1)
    assert f"2 names for {len(named)} parameters" in text
    torch.save({"a": 1}, tmp_path / "other.pt")
    assert "has 0 optimizer states" in command(capsys, "import", tmp_path / "other.pt", tmp_path / "c", status=1)


def test_checkpoints_of_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No checksums, and each form of names; all commands work."""
    model = Net()
    plain = torch.optim.RAdam(model.named_parameters(), foreach=True)
    train(plain, model, 1, SAVED_AT)
    wanted = plain.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for flat in (False, True):
            state = get_optimizer_state_dict(model, plain, options=StateDictOptions(flatten_optimizer_state_dict=flat))
            dcp_save({"x": state}, checkpoint_id=tmp_path / str(flat))
        dcp_save({"x": plain}, checkpoint_id=tmp_path / "numbers")
    for name in ("False", "True", "numbers"):
        assert "it has no checksums, and all of it can be read" in command(capsys, "verify", tmp_path / name)
        assert "saved at torch.distributed.checkpoint" in command(capsys, "inspect", tmp_path / name)
        command(capsys, "consolidate", tmp_path / name, tmp_path / f"{name}.pt")
        content = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.optim.RAdam(Net().named_parameters()).load_state_dict(copy.deepcopy(content))
        for index, values in wanted["state"].items():
            assert all(torch.equal(content["state"][index][kind], value) for kind, value in values.items())


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = make()
    manager = CheckpointManager(tmp_path)
    manager.save(1, model=model, optimizer=optimizer, user={"a": [1, torch.arange(3)]})
    train(optimizer, model, 1, 1)
    optimizer.param_groups[0]["lr"] = 0.5
    manager.save(2, model=model, optimizer=optimizer, user={"a": [1, torch.arange(3)]}, scheduler=optimizer_like())
    lines = command(capsys, "diff", tmp_path / "step_1", tmp_path / "step_2", status=1).splitlines()
    assert "optim.state.one.step: 1 of 1 elements differ, by 1 at most" in lines
    assert "optim.param_groups.0.lr: 0.001 and 0.5" in lines
    assert f"scheduler: only in {tmp_path / 'step_2'}" in lines
    assert any(re.fullmatch(r"model.big: \d{4} of 5100 elements differ, by .* at most", line) for line in lines)
    assert not any(line.startswith(("user", "optim.state.late", "model.late")) for line in lines)
    found = json.loads(
        command(capsys, "diff", tmp_path / "step_1", tmp_path / "step_2", "--json", status=1).splitlines()[0]
    )
    assert found["differences"] == lines


class optimizer_like:  # noqa: N801
    def state_dict(self) -> dict[str, int]:
        return {"a": 1}


def test_as_a_program(tmp_path: Path) -> None:
    optimizer = make()[1]
    optimizer.save(tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-m", "sharded_radam.tools.cli", "checkpoint", "verify", str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "all checksums are right" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "sharded_radam.tools.cli", "checkpoint"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert summary.__doc__
