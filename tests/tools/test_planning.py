"""What the planner says, beside what real optimizers of 1 to 4 ranks have and files of theirs hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.optim import ZeroRedundancyOptimizer

from sharded_radam import ShardedRAdam
from sharded_radam.checkpoint.convert.inspection import summary
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.compat import VERSION
from sharded_radam.plan import ParamSpec
from sharded_radam.preflight import describe
from sharded_radam.tools import simulate as simulation
from sharded_radam.tools.cli import main
from sharded_radam.tools.compare import estimates
from sharded_radam.tools.estimate import OURS, OURS_SHARDED, Bandwidth, Estimate
from sharded_radam.tools.layout import layout
from sharded_radam.tools.models import read_model
from sharded_radam.tools.simulate import simulate
from tests.cases import make_params, set_grads
from tests.ranks import WORLD_SIZES, run

CAP = 1e-2
DTYPES = (torch.float32, torch.bfloat16, torch.complex64)


def by_name(params: list[ParamSpec], world_size: int, **options: Any) -> dict[str, Estimate]:
    return {row.optimizer: row for row in estimates(params, world_size, **options)}


def check_ours(_rank: int, world_size: int, folder: str, replicas: int) -> None:
    mesh = init_device_mesh("cpu", (replicas, world_size // replicas)) if replicas > 1 else None
    for dtype in DTYPES:
        for transport in ("native", "gloo", "shared_memory"):
            for shard_gradients in (False, True):
                params = make_params(dtype)
                optimizer = ShardedRAdam(
                    params, bucket_cap_mb=CAP, transport=transport, shard_gradients=shard_gradients, mesh=mesh
                )
                set_grads(params, 1)
                optimizer.step()
                found = optimizer.stats()
                specs = describe(optimizer.param_groups, 0, False)[1]
                planned = layout(specs, world_size, CAP, replicas)
                options: dict[str, Any] = {"bucket_cap_mb": CAP, "device": "cpu", "replicas": replicas}
                rows = by_name(specs, world_size, transport=transport, **options)
                row = rows[OURS_SHARDED if shard_gradients else OURS]
                memory = row.memory
                assert memory.moments + memory.masters == found.state_bytes
                assert (planned.numel, planned.num_buckets) == (found.numel, found.num_buckets)
                assert planned.padding_numel == found.padding_numel
                assert memory.parameters == sum(flat.buffer.nbytes for flat in optimizer._shards.flats)
                assert row.parameters_received == found.received_bytes.get("all_gather", 0)
                if shard_gradients:
                    assert (memory.gradients, memory.buckets) == (found.gradient_bytes, found.bucket_bytes)
                    received = [found.received_bytes.get(kind, 0) for kind in ("reduce_scatter", "average")]
                    assert row.gradients_received == sum(received)
                    assert planned.received[transport] == (row.gradients_received, row.parameters_received)
        path = Path(folder) / str(dtype)
        optimizer.save(path)
        index = read_index(path)
        moments = [tensor for tensor in summary(index)["tensors"] if "exp_avg" in tensor["name"]]
        masters = [tensor for tensor in summary(index)["tensors"] if tensor["name"].endswith("master")]
        assert planned.checkpoint_optimizer_bytes == sum(tensor["bytes"] for tensor in moments + masters)
        if world_size == 1:  # of several, an index does not say who wrote what
            real = sum(tensor["chunks"] for tensor in moments + masters if tensor["bytes"])
            assert planned.chunks == real


@pytest.mark.parametrize(("world_size", "replicas"), [*((size, 1) for size in WORLD_SIZES), (2, 2), (3, 3), (4, 2)])
def test_figures_are_those_of_the_optimizer(world_size: int, replicas: int, tmp_path: Path) -> None:
    run(check_ours, world_size, str(tmp_path), replicas)


def check_peers(_rank: int, world_size: int) -> dict[str, int]:
    params = make_params()
    specs = describe([{"params": params, "capturable": False}], 0, False)[1]
    rows = by_name(specs, world_size)
    plain = torch.optim.RAdam(params, foreach=True)
    zero = ZeroRedundancyOptimizer(make_params(), torch.optim.RAdam, foreach=True)
    for optimizer in (plain, zero):
        set_grads(optimizer.param_groups[0]["params"], 1)
        optimizer.step()
    sizes = {
        name: sum(t.nbytes for state in local.state.values() for t in state.values() if t.numel() > 1 or t.dim())
        for name, local in (("DDP + RAdam", plain), ("DDP + ZeroRedundancyOptimizer", zero.optim))
    }
    scalars = 2 * 4  # the moments of the parameter without dimensions, which look like a count of steps
    assert rows["DDP + RAdam"].memory.moments == sizes["DDP + RAdam"] + scalars
    sizes["planned"] = rows["DDP + ZeroRedundancyOptimizer"].memory.moments
    return sizes


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_figures_are_those_of_the_peers(world_size: int) -> None:
    found = run(check_peers, world_size)
    largest = max(sizes["DDP + ZeroRedundancyOptimizer"] for sizes in found)
    assert found[0]["planned"] - largest in (0, 8)


def spec(numel: int, name: str = "a", dtype: torch.dtype = torch.float32) -> ParamSpec:
    return ParamSpec(name, (numel,), (0,), dtype, "cuda", 0)


def test_shares_of_bytes() -> None:
    """By hand: 1024 elements on 4 ranks."""
    rows = by_name([spec(1024)], 4)
    assert rows["DDP + RAdam"].memory.steady == 4096 * 4
    assert rows["DDP + RAdam"].gradients_received == 2 * 4096 * 3 // 4
    assert rows["FSDP2 + RAdam"].memory.steady == 1024 * 4
    assert rows["FSDP2 + RAdam"].parameters_received == 2 * 4096 * 3 // 4
    assert rows["ZeRO-2 (DeepSpeed)"].memory.masters == 1024
    assert rows[OURS].memory.steady == 4096 * 2 + 2 * 1024
    assert rows[OURS_SHARDED].memory.steady == 4096 + 3 * 1024 + 2 * 4096
    half = by_name([spec(1024, dtype=torch.bfloat16)], 4)[OURS].memory
    assert (half.parameters, half.moments, half.masters) == (2048, 2048, 1024)
    shared = by_name([spec(1024)], 4, transport="shared_memory, share_parameters", device="cpu")
    assert shared[OURS_SHARDED].memory.parameters == 1024
    assert shared[OURS].parameters_received == 0


def test_times_are_bytes_over_bandwidth() -> None:
    row = by_name([spec(1024)], 4, bandwidth=Bandwidth(memory=1e6, network=1e3))[OURS]
    seconds = row.update_bytes / 1e6 + (row.gradients_received + row.parameters_received) / 1e3
    assert row.milliseconds == pytest.approx(1e3 * seconds)
    fused = by_name([spec(1024)], 1, device="cpu")[OURS]
    assert fused.update_bytes == 28 * 1024  # 7 arrays of fp32 are read or written


def test_blocks_of_fsdp_are_told_by_names() -> None:
    params = [spec(512, f"layers.{index}.weight") for index in range(3)] + [spec(64, "head")]
    memory = by_name(params, 4)["FSDP2 + RAdam"].memory
    assert memory.temporaries == 2 * 2 * 512 * 4  # two blocks, with gradients


class Tied(nn.Module):
    """A model for the tests: tied weights, a frozen parameter, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.two.weight = self.one.weight
        self.frozen = nn.Parameter(torch.zeros(9), requires_grad=False)
        self.register_buffer("mean", torch.zeros(5))


def not_a_module() -> int:
    return 3


def test_models_of_python() -> None:
    found = read_model("tests.tools.test_planning:Tied", torch.bfloat16, "cpu")
    assert [(param.name, param.shape, param.dtype) for param in found] == [
        ("one.weight", (7, 7), torch.bfloat16),
        ("one.bias", (7,), torch.bfloat16),
    ]


def test_models_of_safetensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file

    save_file({"a": torch.zeros(3, 5), "ids": torch.zeros(2, dtype=torch.int64)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(4, dtype=torch.float16)}, tmp_path / "2.safetensors", metadata={"format": "pt"})
    found = read_model(str(tmp_path / "1.safetensors"))
    assert [(param.name, param.shape, param.dtype) for param in found] == [("a", (3, 5), torch.float32)]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    assert [(param.name, param.numel, param.dtype) for param in read_model(str(index))] == [
        ("a", 15, torch.float32),
        ("b", 4, torch.float16),
    ]


def test_models_of_a_hugging_face_config(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=6)
    real = transformers.GPT2LMHeadModel(config)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        found = read_model(str(source))
        assert {(p.name, p.shape) for p in found} == {(name, tuple(p.shape)) for name, p in real.named_parameters()}
    config.architectures = ["NoSuchModel"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not know the architecture NoSuchModel"):
        read_model(str(tmp_path))


@pytest.mark.parametrize(("text", "numel"), [("124e6", 124_000_000), ("7B", 7 * 10**9), ("1.5m", 1_500_000), ("9", 9)])
def test_models_of_a_number(text: str, numel: int) -> None:
    assert [param.numel for param in read_model(text)] == [numel]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nothing", "expected package.module:function, a .safetensors file"),
        ("0", "has no parameters"),
        ("tests.no_module:x", "No module named"),
        ("tests.tools.test_planning:no_name", "no_name"),
        ("tests.tools.test_planning:not_a_module", "returned a int, expected a torch.nn.Module"),
        ("missing.safetensors", "No such file"),
        ("README.safetensors", "is not a safetensors file"),
    ],
)
def test_what_is_no_model(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("README.safetensors").write_text("# no tensors, but enough bytes")
    assert main(["plan", source]) == 1
    assert message in capsys.readouterr().err


def test_transformers_is_needed_for_a_config_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="pip install 'sharded_radam\\[hf\\]'"):
        read_model(str(tmp_path))


MIXED = [spec(5000, "a"), spec(7, "b", torch.bfloat16), ParamSpec("c", (5, 64, 7), (0, 2, 1), torch.float32, "cuda", 0)]


needs_fake_collectives = pytest.mark.skipif(VERSION < (2, 8), reason="torch 2.6 has no collectives of fake tensors")


@pytest.mark.skipif(VERSION >= (2, 8), reason="torch is new enough for it")
def test_simulation_with_an_older_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1000", "--simulate", "2"]) == 1
    assert "--simulate needs torch 2.8 or newer" in capsys.readouterr().err


@needs_fake_collectives
@pytest.mark.parametrize(
    ("world_size", "replicas"), [(2, 1), (3, 1), (64, 1), (4096, 1), (4, 4), (6, 3), (64, 8), (4096, 512)]
)
def test_simulation_agrees(world_size: int, replicas: int) -> None:
    checks = simulate(MIXED, world_size, CAP, replicas)
    assert [check for check in checks if not check.agrees] == []
    assert {check.rank for check in checks} == {0, world_size // 2, world_size - 1}
    assert len(checks) == 16 * len({check.rank for check in checks})


@needs_fake_collectives
def test_simulation_can_disagree(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(params: list[ParamSpec], *others: Any) -> Any:
        return layout([*params, spec(64, "more")], *others)

    monkeypatch.setattr(simulation, "layout", wrong)
    assert main(["plan", "1000", "--simulate", "2"]) == 1
    assert "DDP + ShardedRAdam: elements: planned 1064, built 1000" in capsys.readouterr().out


@pytest.mark.parametrize("world_size", [1, 4097])
def test_simulation_of_too_many_ranks(world_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1000", "--simulate", str(world_size)]) == 1
    assert "expected 2 to 4096 ranks" in capsys.readouterr().err


def check_grouped(_rank: int, _world_size: int) -> None:
    with pytest.raises(ValueError, match="without torchrun"):
        simulate(MIXED, 2)


def test_simulation_beside_a_process_group() -> None:
    run(check_grouped, 2)


@needs_fake_collectives
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user calls it, in a folder with a module of the user's own."""
    (tmp_path / "mine.py").write_text("import torch\ndef model():\n    return torch.nn.Linear(1000, 1000)\n")
    command = [sys.executable, "-m", "sharded_radam", "plan", "mine:model", "--world-size", "2", "3", "--simulate", "3"]
    measured = tmp_path / "doctor.json"
    measured.write_text(json.dumps({"bandwidth": {"update": 1e10, "all_gather": 1e9, "memcpy": 5e9}}))
    command += ["--device", "cpu", "--measured", str(measured)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "1,001,000 elements in 2 parameters, float32: 3.8 MiB"
    rows = [line.split() for line in lines if line.startswith("DDP + ShardedRAdam")]
    assert [row[3:8] for row in rows] == [["3.8", "3.8", "3.8", "0.0", "0.0"], ["3.8", "3.8", "2.5", "0.0", "0.0"]]
    assert "simulated 3 ranks, as ranks [0, 1, 2]: 48 of 48 figures agree" in lines
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main([*command[3:], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [size["layout"]["world_size"] for size in found["world_sizes"]] == [2, 3]
    row = next(r for r in found["world_sizes"][0]["optimizers"] if r["optimizer"] == OURS_SHARDED)
    expected = (row["gradients_received"] + row["parameters_received"]) / 1e9 + row["update_bytes"] / 1e10
    assert row["milliseconds"] == pytest.approx(1e3 * expected)
    assert all(check["agrees"] for check in found["simulated"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--world-size", "0"), "--world-size 0: expected at least 1"),
        (("--bucket-cap-mb", "0"), "expected a size in MiB above 0"),
        (("--memory-bandwidth", "3"), "times need both"),
        (("--memory-bandwidth", "-3", "--network-bandwidth", "1"), "times need both"),
        (("--measured", "/dev/null"), "is not the output of sharded-radam doctor --json"),
    ],
)
def test_wrong_flags(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "1000", *flags]) == 1
    assert message in capsys.readouterr().err
