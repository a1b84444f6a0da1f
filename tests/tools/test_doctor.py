"""``sharded-radam doctor``: alone, under torchrun, and with something that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import sharded_radam
from sharded_radam import ShardedRAdam
from sharded_radam.tools import diagnosis
from sharded_radam.tools.cli import main
from tests.programs import call
from tests.ranks import WORLD_SIZES, run

CHECKS = ["bits of torch.optim.RAdam(foreach=True)", "sharded gradients"]


def test_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--mb", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["sharded_radam"] == sharded_radam.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert (found["ranks"], found["device"]) == (1, "cpu")
    assert found["transport"] == {"name": "none", "reason": "torch.distributed is not initialised"}
    assert found["engine"]["name"] == "fused"
    assert found["mesh"]["shape"] == [1, 1]
    assert found["checks"] == dict.fromkeys(CHECKS, "ok")
    assert found["bandwidth"]["all_gather"] is None
    assert min(found["bandwidth"]["memcpy"], found["bandwidth"]["update"]) > 1e6
    assert main(["doctor", "--mb", "0"]) == 1
    assert "--mb 0.0: expected a size in MiB above 0" in capsys.readouterr().err


def test_under_torchrun_and_what_plan_makes_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "shared"
    done = call(3, "sharded_radam", "doctor", "--mb", 2, "--folder", folder, "--json")
    found = json.loads(done.stdout)
    assert (found["ranks"], len(found["hosts"])) == (3, 3)
    assert found["transport"] == {"name": "shared_memory", "reason": "all ranks are on CPUs of one host"}
    assert found["checks"] == dict.fromkeys([*CHECKS, f"saves and loads in {folder}"], "ok")
    assert list(folder.iterdir()) == []
    assert all(rate > 1e6 for rate in found["bandwidth"].values())
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    (tmp_path / "doctor.json").write_text(done.stdout)
    plan = [
        "plan",
        "1e6",
        "--world-size",
        "3",
        "--device",
        "cpu",
        "--measured",
        str(tmp_path / "doctor.json"),
        "--json",
    ]
    assert main(plan) == 0
    (of_three,) = json.loads(capsys.readouterr().out)["world_sizes"]
    assert all(row["milliseconds"] > 0 for row in of_three["optimizers"])


def test_text_and_a_failed_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["doctor", "--mb", "1", "--folder", str(tmp_path / "file")]) == 1
    text = capsys.readouterr().out
    assert f"saves and loads in {tmp_path / 'file'}: ranks [0]: FileExistsError" in text
    assert "engine fused: the default on CPU: one pass over memory" in text
    assert f"torch {torch.__version__}" in text


def test_the_mesh_of_hosts() -> None:
    def shape(hosts: str) -> list[int] | None:
        found: list[int] | None = diagnosis.mesh([{"host": host} for host in hosts])["shape"]
        return found

    assert shape("aaa") == [1, 3]
    assert shape("aabb") == [2, 2]
    assert shape("abc") == [3, 1]
    assert shape("aab") is None
    assert shape("abab") is None
    assert diagnosis.mesh([{"host": "a"}, {"host": "a"}, {"host": "b"}])["reason"].endswith("(2 on a, 1 on b)")


class Wrong(ShardedRAdam):
    """With another learning rate, on all ranks: if one had it, the first step would say so."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.param_groups[0]["lr"] = 0.02


def check_wrong(rank: int, world_size: int) -> None:
    transport = diagnosis.join()
    assert set(diagnosis.check(transport, None).values()) == {"ok"}
    with mock.patch.object(diagnosis, "ShardedRAdam", Wrong):
        found = diagnosis.check(transport, None)
    ranks = list(range(world_size))
    for check in CHECKS:
        assert f"ranks {ranks}: parameters" in found[check], found
    rates, engine = diagnosis.bandwidth(transport, 10_000, rounds=2)
    assert engine == "fused"
    assert [name for name, rate in rates.items() if rate is None] == (
        ["all_gather", "reduce_scatter"] if world_size == 1 else []
    )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_wrong_results_are_found_and_all_ranks_know(world_size: int) -> None:
    run(check_wrong, world_size)


def test_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {"host": "a", "cores": 8, "threads": 4, "gpus": [], "shm_bytes": 2**33}
    gpu = {**cpu, "host": "b", "gpus": [{}]}
    versions = {"torch": "2.13.0"}
    assert diagnosis.advice([cpu] * 2, [versions] * 2) == []
    (text,) = diagnosis.advice([cpu] * 4, [versions] * 4)
    assert text == "a: 4 ranks x 4 threads on 8 cores: set OMP_NUM_THREADS to 2, or start fewer ranks"
    (text,) = diagnosis.advice([gpu, gpu, cpu], [versions] * 3)
    assert "b: 2 ranks share 1 GPUs" in text
    (text,) = diagnosis.advice([{**gpu, "gpus": [{}] * 2, "shm_bytes": 2**26}] * 2, [versions] * 2)
    assert "/dev/shm" in text
    (text,) = diagnosis.advice([cpu] * 2, [versions, {"torch": "2.14.1"}])
    assert "different versions" in text
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    (text,) = diagnosis.advice([cpu], [versions])
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text
