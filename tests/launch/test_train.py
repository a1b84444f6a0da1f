"""The training script: real files, real SIGKILL; test_launch.py and others start it by torchrun, as users do."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from sharded_radam.checkpoint.convert.inspection import differences
from sharded_radam.checkpoint.format.directory import committed_steps
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.verification import verify
from tests.programs import ROOT, SMALL, TRAIN, call, environment, metrics, torchrun, train, wait_for

psutil = pytest.importorskip("psutil")


def test_saves_resumes_and_continues_at_other_world_sizes(tmp_path: Path) -> None:
    """Resumed at the same number of ranks, bit-equal to an uninterrupted run; at another, the loss goes on."""
    one, whole_run, resumed_run = tmp_path / "8", tmp_path / "whole", tmp_path / "14"
    done = train(2, "--steps", 8, "--save", one, "--save-every", 3, "--keep", 2, "--metrics", tmp_path / "8.jsonl")
    assert "MB of this rank" in done.stdout
    assert sorted(path.name for path in one.iterdir()) == ["step_6", "step_8"]
    train(2, "--steps", 14, "--save", whole_run, "--metrics", tmp_path / "whole.jsonl")
    done = train(2, "--steps", 14, "--resume", one, "--save", resumed_run)
    assert "resumed: 16/16 parameters" in done.stdout
    found = differences(read_index(whole_run / "step_14"), read_index(resumed_run / "step_14"))
    assert [line for line in found if not line.startswith("rng.")] == []  # Python's is not seeded
    whole = [record for record in metrics(tmp_path / "whole.jsonl") if "loss" in record]
    assert [record["step"] for record in whole] == list(range(1, 15))
    assert whole[-1]["loss"] < whole[0]["loss"]
    assert {"loss", "grad_norm", "lr", "optimizer_ms", "tokens_per_s"} < whole[0].keys()
    for ranks in (1, 3):
        file = tmp_path / f"{ranks}.jsonl"
        file.write_text('{"step": 8, "lo')  # as a run leaves it that was killed
        train(ranks, "--steps", 14, "--resume", one, "--metrics", file)
        started, *resumed = metrics(file)
        assert started == {"step": 8, "started_ranks": ranks}
        assert resumed[0]["validation_loss"] == pytest.approx(
            metrics(tmp_path / "8.jsonl")[-2]["validation_loss"], rel=1e-5
        )
        assert resumed[-1]["ranks"] == ranks
        losses = [record["loss"] for record in resumed if "loss" in record]
        assert losses == pytest.approx([record["loss"] for record in whole[8:]], rel=1e-4)


def test_all_flags_and_peers(tmp_path: Path) -> None:
    """Accumulation, autocast, other data; each optimizer's file resumes with each other optimizer."""
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.txt").write_bytes(bytes(range(97, 123)) * 2000)
    flags = ["--steps", 4, "--accumulate", 3, "--bf16", "--clip", 0.1, "--data", text]
    losses = {}
    for name in ("sharded", "sharded-gradients", "radam", "zero"):
        train(
            2,
            *(*flags, "--optimizer", name, "--consolidated", "--save", tmp_path / f"{name}.pt"),
            *("--metrics", tmp_path / f"{name}.jsonl"),
        )
        losses[name] = [record["loss"] for record in metrics(tmp_path / f"{name}.jsonl") if "loss" in record]
    assert losses["sharded"] == pytest.approx(losses["radam"], rel=1e-3)
    assert losses["sharded-gradients"] == pytest.approx(losses["radam"], rel=1e-3)
    assert losses["zero"] == pytest.approx(losses["radam"], rel=1e-3)
    pairs = (("radam", "sharded"), ("zero", "sharded-gradients"), ("sharded-gradients", "radam"), ("sharded", "zero"))
    for saved, loaded in pairs:
        resume = ("--consolidated", "--resume", tmp_path / f"{saved}.pt", "--optimizer", loaded)
        train(0, "--steps", 5, "--data", text, *resume)
    shards = [metrics(tmp_path / f"{name}.jsonl")[-1] for name in ("sharded", "radam")]
    assert shards[0]["state_bytes"] < 0.6 * shards[1]["state_bytes"]
    assert shards[1]["state_bytes"] == shards[1]["replicated_bytes"]


def test_a_batch_that_does_not_divide_is_an_error(tmp_path: Path) -> None:
    done = train(2, "--steps", 1, "--batch", 7, check=False)
    assert done.returncode != 0
    assert "--batch 7 must be a multiple of ranks x --accumulate = 2 x 1" in done.stderr
    empty = tmp_path / "empty.txt"
    empty.write_text("nothing")
    done = train(0, "--steps", 1, "--data", empty, check=False)
    assert "found 7 bytes of text in 1 files" in done.stderr


def test_a_full_disk_is_an_error_on_every_rank(tmp_path: Path) -> None:
    done = train(2, "--steps", 1, "--consolidated", "--save", "/dev/full/x.pt", check=False)
    assert done.returncode != 0
    assert done.stderr.count("rank 0 could not save /dev/full/x.pt") >= 2
    (tmp_path / "file").touch()
    done = train(2, "--steps", 1, "--save", tmp_path / "file" / "folder", check=False)
    assert done.returncode != 0
    assert done.stderr.count("NotADirectoryError") >= 2
    done = train(0, "--steps", 1, "--resume", tmp_path / "nothing", check=False)
    assert f"there is no checkpoint in {tmp_path / 'nothing'}" in done.stderr


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_ranks_leave_the_last_checkpoint_and_nobody_hangs(tmp_path: Path, victim: int) -> None:
    """kill -9 of one rank between or during saves: torchrun ends, the file is whole, and training goes on from it."""
    folder = tmp_path / "checkpoints"
    flags = ("--steps", 100_000, "--schedule-steps", 100_000, "--save", folder, "--save-every", 2)
    log = (tmp_path / "log").open("w")
    command = torchrun(2, TRAIN, *SMALL, *flags)
    launcher = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        wait_for(lambda: committed_steps(folder), 150)
        time.sleep(0.3 * victim)
        ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "launch/train.py" in p.cmdline()]
        killed = next(p for p in ranks if p.environ().get("LOCAL_RANK") == str(victim))
        killed.send_signal(signal.SIGKILL)
        assert launcher.wait(timeout=90) != 0
    finally:
        for process in psutil.Process(launcher.pid).children(recursive=True) if launcher.poll() is None else []:
            process.kill()
        launcher.kill()
        log.close()
    saved = committed_steps(folder)
    assert 1 <= len(saved) <= 4  # 3 to keep, and one that was not removed yet
    assert all(step % 2 == 0 for step in saved)
    for step in saved:
        verify(read_index(folder / f"step_{step}"))
    train(3, "--steps", saved[-1] + 2, "--resume", folder, "--save", folder, "--save-every", 1)
    assert {path.name for path in folder.iterdir()} == {f"step_{saved[-1] + n}" for n in (0, 1, 2)}


def test_alone_without_torchrun(tmp_path: Path) -> None:
    train(0, "--steps", 3, "--save", tmp_path / "a")
    assert committed_steps(tmp_path / "a") == [3]


DETAIL = """
import torch.distributed as dist
from sharded_radam import ShardedRAdam
from tests.cases import make_params, set_grads

dist.set_debug_level_from_env()
dist.init_process_group("gloo")
for transport in ("gloo", "native"):
    params = make_params()
    optimizer = ShardedRAdam(params, transport=transport, bucket_cap_mb=1e-3)
    for step in range(1, 4):
        set_grads(params, step)
        optimizer.step()
    optimizer.consolidate_state_dict()
dist.barrier()
dist.destroy_process_group()
"""


def test_with_all_checks_of_torch_distributed(tmp_path: Path) -> None:
    """TORCH_DISTRIBUTED_DEBUG=DETAIL wraps process groups, and compares collectives between ranks.

    Without DDP, which that setting makes end with a segmentation fault in torch 2.13.0+cpu, also on its own.
    """
    script = tmp_path / "detail.py"
    script.write_text(DETAIL)
    call(2, str(script), TORCH_DISTRIBUTED_DEBUG="DETAIL")
