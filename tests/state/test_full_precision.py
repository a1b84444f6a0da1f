"""Masters of half-precision training as weights: loaded in fp32, exported, or as a dict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sharded_radam import CheckpointManager, ShardedRAdam
from sharded_radam.tools.cli import main
from tests.buckets.test_ranges import under_ddp
from tests.cases import set_grads
from tests.ranks import WORLD_SIZES, run

pytestmark = pytest.mark.quick


class Mixed(nn.Module):
    """A tied weight, a frozen one, one of fp32, one that is not the optimizer's, buffers and extra state."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = nn.Embedding(11, 7), nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.alone = nn.Parameter(torch.randn(5, 3))
        self.to(dtype)
        self.register_buffer("numbers", torch.arange(4))
        self.wide = nn.Parameter(torch.randn(3, 2))

    def get_extra_state(self) -> Any:
        return {"kept": torch.ones(2, dtype=torch.bfloat16)}

    def set_extra_state(self, state: Any) -> None:
        pass

    def optimized(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self.named_parameters() if name != "alone"]


def trained(dtype: torch.dtype) -> tuple[Mixed, ShardedRAdam]:
    model = Mixed(dtype)
    optimizer = ShardedRAdam(model.optimized(), lr=1e-3, bucket_cap_mb=1e-4)
    for step in range(1, 4):
        set_grads(model.parameters(), step)
        optimizer.step()
    return model, optimizer


def expected(model: Mixed, optimizer: ShardedRAdam) -> dict[str, Tensor] | None:
    """By the masters of a consolidated state, on rank 0."""
    saved = optimizer.consolidate_state_dict(to=0)
    if saved is None:
        return None
    names = saved["param_groups"][0]["param_names"]
    state = {
        name: t.float() if t.is_floating_point() else t for name, t in model.state_dict().items() if "extra" not in name
    }
    state |= {names[at]: entry["master"] for at, entry in saved["state"].items() if "master" in entry}
    state["head.weight"] = state["embed.weight"]
    assert not torch.equal(state["head.weight"], model.head.weight.float())
    return state


def save(rank: int, world_size: int, folder: str, dtype: torch.dtype) -> None:
    model, optimizer = trained(dtype)
    wanted = expected(model, optimizer)
    found = optimizer.full_precision_state_dict(under_ddp(model), to=0)
    assert (found is None) == (wanted is None) == (rank != 0)
    if found is not None and wanted is not None:
        kept = found.pop("_extra_state")["kept"]
        assert kept.dtype == torch.bfloat16
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
        assert found["embed.weight"] is found["head.weight"]
        found["wide"].zero_()  # a copy
        torch.save(wanted, Path(folder, f"{world_size}.pt"))
    assert model.wide.any()
    last = optimizer.full_precision_state_dict(model, to=world_size - 1)
    assert (last is not None) == (rank == world_size - 1)
    with pytest.raises(ValueError, match="expected a rank of the group"):
        optimizer.full_precision_state_dict(model, to=world_size)
    CheckpointManager(folder).save(world_size, model=model, optimizer=optimizer)


def load(_rank: int, _world_size: int, folder: str, saved_at: int) -> None:
    wanted = torch.load(Path(folder, f"{saved_at}.pt"), weights_only=True)
    model = Mixed(torch.float32)
    optimizer = ShardedRAdam(model.optimized(), bucket_cap_mb=1e-4)
    report = CheckpointManager(folder).load(saved_at, model=model, optimizer=optimizer).optimizer
    assert report is not None
    assert report.from_masters == 5
    assert "weights of 5 parameters from fp32 masters" in str(report)
    for name, tensor in model.state_dict().items():
        assert "extra" in name or torch.equal(tensor, wanted[name]), name
    set_grads(model.parameters(), 4)
    optimizer.step()
    # Weights that were changed since, or are of something else, stay.
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(wanted[name].bfloat16() if name == "norm.weight" else torch.full_like(param, 0.3))
    assert optimizer.load(Path(folder, f"step_{saved_at}")).from_masters == 1
    assert torch.equal(model.norm.weight, wanted["norm.weight"])
    assert (model.embed.weight == 0.3).all()


@pytest.mark.parametrize("saved_at", WORLD_SIZES)
def test_masters_become_weights(tmp_path: Path, saved_at: int, capsys: pytest.CaptureFixture[str]) -> None:
    dtype = torch.float16 if saved_at == 2 else torch.bfloat16
    run(save, saved_at, str(tmp_path), dtype)
    for world_size in {1, saved_at, 3} if dtype == torch.bfloat16 else ():
        run(load, world_size, str(tmp_path), saved_at)
    wanted = torch.load(tmp_path / f"{saved_at}.pt", weights_only=True)
    folder, out = tmp_path / f"step_{saved_at}", tmp_path / "weights.pt"
    assert main(["checkpoint", "export", "--fp32", "--json", str(folder), str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tensors"], result["from_masters"]) == (len(wanted), 6)
    found = torch.load(out, weights_only=True)
    assert found.pop("_extra_state")["kept"].dtype == torch.bfloat16
    compare(found, wanted)
    assert main(["checkpoint", "export", "--fp32", str(folder), str(out)]) == 1
    assert "exists: choose another name" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(folder), str(tmp_path / "as saved.pt")]) == 0
    as_saved = torch.load(tmp_path / "as saved.pt", weights_only=True)
    assert as_saved["embed.weight"].dtype == dtype
    compare({name: as_saved[name].float() for name in ("alone", "norm.running_mean")}, wanted, some=True)
    safetensors = pytest.importorskip("safetensors.torch")
    assert main(["checkpoint", "export", "--fp32", str(folder), str(out.with_suffix(".safetensors"))]) == 0
    compare(safetensors.load_file(out.with_suffix(".safetensors")), wanted)


def compare(found: dict[str, Tensor], wanted: dict[str, Tensor], some: bool = False) -> None:
    assert some or found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


def test_consolidated(tmp_path: Path) -> None:
    model, optimizer = trained(torch.bfloat16)
    saved = optimizer.consolidate_state_dict()
    assert saved is not None
    wide = Mixed(torch.float32)
    wide.load_state_dict(model.state_dict())
    loaded = ShardedRAdam(wide.optimized())
    loaded.load_state_dict(saved)
    found = optimizer.full_precision_state_dict(model)
    assert found is not None
    for name, tensor in wide.state_dict().items():
        assert "extra" in name or torch.equal(tensor, found[name]), name


def test_weights_that_were_changed_after_the_last_step() -> None:
    model, optimizer = trained(torch.bfloat16)
    with torch.no_grad():
        model.alone.fill_(0.5)
        model.embed.weight[0].fill_(0.25)
    found = optimizer.full_precision_state_dict(model)
    assert found is not None
    assert (found["alone"] == 0.5).all()
    assert (found["head.weight"][0] == 0.25).all()


def test_what_cannot_be_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ParameterDict({"z": torch.zeros(2, dtype=torch.complex64), "none": torch.zeros(0, 3)})
    manager = CheckpointManager(tmp_path)
    manager.save(1, model=model)
    manager.save(2, user=1)
    out = tmp_path / "a.safetensors"
    assert main(["checkpoint", "export", "--fp32", str(tmp_path / "step_1"), str(out)]) == 1
    assert "z is torch.complex64, which safetensors do not have" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(tmp_path / "step_2"), str(out)]) == 1
    assert "has no model" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]
    assert main(["checkpoint", "export", str(tmp_path / "step_1"), str(out.with_suffix(".pt"))]) == 0
    assert torch.load(out.with_suffix(".pt"), weights_only=True)["none"].shape == (0, 3)
