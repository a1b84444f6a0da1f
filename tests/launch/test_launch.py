"""Starting, stopping and restarting, as schedulers do it: real torchrun, real signals, network namespaces as hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sharded_radam.checkpoint.format.directory import committed_steps
from sharded_radam.checkpoint.format.index import read_index
from sharded_radam.checkpoint.format.verification import verify
from tests import programs
from tests.programs import ROOT, SMALL, TRAIN, Program, environment, metrics, train, wait_for

psutil = pytest.importorskip("psutil")

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STOPPED = 75
pytestmark = pytest.mark.timeout(300)


@contextlib.contextmanager
def started(log: Path, *command: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process with its output in a file; it and its children are gone afterwards."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            kill_all(process)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """As if the machine of a launcher lost its power."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def workers(launcher: subprocess.Popen[bytes]) -> dict[int, Any]:
    """Ranks -> their processes."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    return {int(p.environ()["RANK"]): p for p in children if TRAIN in p.cmdline()}


def flags(folder: Path, steps: int, **more: object) -> list[object]:
    extra = [text for name, value in more.items() for text in (f"--{name.replace('_', '-')}", value)]
    save = ["--save", folder / "checkpoints", "--auto-resume", "--metrics", folder / "metrics.jsonl"]
    return [TRAIN, *SMALL, "--steps", steps, "--schedule-steps", 20, *save, *extra]


def losses(folder: Path) -> dict[int, float]:
    """Of each step, as it was computed last."""
    return {record["step"]: record["loss"] for record in metrics(folder / "metrics.jsonl") if "loss" in record}


def wait(condition: Callable[[], object], log: Path, seconds: float = 150) -> None:
    try:
        wait_for(condition, seconds)
    except AssertionError:
        raise AssertionError(log.read_text()) from None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of 60 steps, of one rank that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(1, "--steps", 60, "--metrics", folder / "metrics.jsonl")
    return losses(folder)


def is_training(folder: Path) -> bool:
    """With some steps done."""
    return (folder / "metrics.jsonl").exists() and len(losses(folder)) > 3


def check_continued(folder: Path, uninterrupted: dict[int, float]) -> None:
    """All steps are there, and the losses of the first 60 are those of a run without interruption."""
    found = losses(folder)
    last = max(found)
    assert sorted(found) == list(range(1, last + 1))
    for step in range(1, min(last, 60) + 1):
        assert found[step] == pytest.approx(uninterrupted[step], rel=1e-3)
    assert committed_steps(folder / "checkpoints")[-1] == last
    verify(read_index(folder / "checkpoints" / f"step_{last}"))


def check_stopped(folder: Path, text: str, uninterrupted: dict[int, float], ranks: int) -> None:
    """All have saved the same step, and go on from it at another world size."""
    stopped_at = max(losses(folder))
    assert f"asked to stop after step {stopped_at}: saving" in text
    assert committed_steps(folder / "checkpoints") == [stopped_at]
    train(ranks, *flags(folder, max(stopped_at + 3, 20))[1:])
    check_continued(folder, uninterrupted)


@pytest.mark.parametrize(("ranks", "victim", "number"), [(2, "all", "SIGTERM"), (3, "0", "SIGUSR1")])
def test_asked_to_stop_all_ranks_save_the_same_step(
    tmp_path: Path, uninterrupted: dict[int, float], ranks: int, victim: str, number: str
) -> None:
    """One rank is asked, or torchrun, as a scheduler does it, which asks all; they go on at another world size.

    Where torchrun may restart them, with its own store, there is a warning.
    """
    log = tmp_path / "log"
    restarts = int(victim == "all")
    launch = (*TORCHRUN, "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}")
    command = (*launch, *flags(tmp_path, 10**6, save_every=10**6))
    with started(log, *command) as launcher:
        wait(lambda: is_training(tmp_path), log)
        if victim == "all":
            launcher.send_signal(signal.Signals[number])
        else:
            workers(launcher)[int(victim)].send_signal(signal.Signals[number])
        assert launcher.wait(timeout=60) != 0
    text = log.read_text()
    if victim != "all":
        assert f"exitcode  : {STOPPED}" in text  # torchrun reports who was first
        assert "exitcode  : -" not in text
    assert ("start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in text) == (restarts > 0)
    check_stopped(tmp_path, text, uninterrupted, 5 - ranks)


def ask_to_stop(program: Program, folder: Path, rank: int, number: signal.Signals) -> str:
    """What the ranks say, of which one gets a signal."""
    wait(lambda: is_training(folder), program.err)
    os.kill(program.processes[rank].pid or 0, number)
    assert program.wait() == [STOPPED] * len(program.processes), program.text()
    return program.text()


@pytest.mark.parametrize(
    ("ranks", "number"), [(2, signal.SIGTERM), (3, signal.SIGTERM), (4, signal.SIGUSR1)], ids=["2", "3", "4"]
)
def test_one_rank_is_asked_to_stop_and_all_exit_as_asked(
    tmp_path: Path, uninterrupted: dict[int, float], ranks: int, number: signal.Signals
) -> None:
    """Without torchrun, which ends the others as soon as it sees the first one's status: the last rank is asked."""
    with programs.started(ranks, *flags(tmp_path, 10**6, save_every=10**6)) as program:
        text = ask_to_stop(program, tmp_path, ranks - 1, number)
    check_stopped(tmp_path, text, uninterrupted, 5 - ranks)


def test_alone_the_exit_status_says_that_there_is_more_to_do(tmp_path: Path) -> None:
    with programs.started(0, *flags(tmp_path, 10**6)) as program:
        ask_to_stop(program, tmp_path, 0, signal.SIGTERM)
    stopped_at = committed_steps(tmp_path / "checkpoints")[-1]
    log = tmp_path / "log"
    with started(log, sys.executable, *flags(tmp_path, stopped_at + 2)) as process:
        assert process.wait(timeout=60) == 0, log.read_text()
    train(0, *flags(tmp_path, stopped_at + 2)[1:])  # nothing is left to do
    assert max(losses(tmp_path)) == stopped_at + 2


@pytest.fixture
def store_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it workers that are restarted find in torchrun's own store what those before them wrote (torch 2.13)."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")


STUCK = """
import os, runpy, sys, threading
from sharded_radam.checkpoint.format import directory
from sharded_radam.checkpoint import save as saving

write = saving.Save.write

def stuck(self):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if directory.committed_steps(self.final.parent):
            threading.Event().wait()
    return write(self)

saving.Save.write = stuck
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a script; the first time that there is a checkpoint already, the disk of rank 1 does not write another one."""


@pytest.mark.usefixtures("store_of_workers")
def test_a_worker_that_is_killed_comes_back(tmp_path: Path, uninterrupted: dict[int, float]) -> None:
    """kill -9: torchrun starts all workers again, and they go on from the last checkpoint by themselves.

    The worker has joined a save that the other one waits for, which must not wait for longer than that it lives.
    """
    log, script = tmp_path / "log", tmp_path / "stuck.py"
    script.write_text(STUCK)
    command = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1", script)
    with started(log, *command, *flags(tmp_path, 20, save_every=5)) as launcher:
        wait(lambda: (tmp_path / "metrics.jsonl").exists() and 15 in losses(tmp_path), log)
        assert committed_steps(tmp_path / "checkpoints") == [5]
        workers(launcher)[1].send_signal(signal.SIGKILL)
        assert launcher.wait(timeout=60) == 0, log.read_text()
    resumed = [record["step"] for record in metrics(tmp_path / "metrics.jsonl") if record.get("ranks") == 2]
    assert resumed == [0, 5, 20, 20]
    assert "resumed: 16/16 parameters" in log.read_text()
    assert "forcefully exiting" not in log.read_text()  # torchrun, after 30 s
    check_continued(tmp_path, uninterrupted)


@pytest.mark.usefixtures("store_of_workers")
def test_hosts_come_and_go(tmp_path: Path, uninterrupted: dict[int, float]) -> None:
    """Two launchers of one job: one loses its power, the other goes on alone, and a new one joins."""
    rendezvous = ("--rdzv-backend=c10d", f"--rdzv-endpoint={tmp_path / 'store'}", "--rdzv-id=1")
    timings = "--rdzv-conf=store_type=file,last_call_timeout=1,keep_alive_interval=1"
    launch = (*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--monitor-interval=0.1")
    command = (*launch, *rendezvous, timings, "--local-addr=127.0.0.1", *flags(tmp_path, 10**6, save_every=5))

    def sizes() -> list[int]:
        """World sizes in the order of starts."""
        file = tmp_path / "metrics.jsonl"
        return [record["ranks"] for record in metrics(file) if "ranks" in record] if file.exists() else []

    def went_on(since: int) -> bool:
        saved = committed_steps(tmp_path / "checkpoints")
        return bool(saved) and saved[-1] > since + 5

    logs = [tmp_path / name for name in ("one", "two", "three")]
    with started(logs[0], *command) as one:
        with started(logs[1], *command) as two:
            wait(lambda: sizes() and sizes()[-1] == 2 and went_on(0), logs[0])
            kill_all(two)
        lost_at = committed_steps(tmp_path / "checkpoints")[-1]
        wait(lambda: sizes()[-1] == 1 and went_on(lost_at), logs[0], 100)
        with started(logs[2], *command) as three:
            wait(lambda: sizes()[-1] == 2, logs[2])
            joined_at = max(losses(tmp_path))
            wait(lambda: went_on(joined_at), logs[2])
            for launcher in (one, three):
                launcher.send_signal(signal.SIGTERM)
            assert one.wait(timeout=60) != 0
            assert three.wait(timeout=60) != 0
    assert "resumed: 16/16 parameters" in logs[2].read_text() + logs[0].read_text()
    check_continued(tmp_path, uninterrupted)


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, 10.99.0.1 and 10.99.0.2; "first" is the name of the former."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: there is no ip (iproute2)")
    names = [f"radam{os.getpid()}_{index}" for index in (1, 2)]
    files = [Path("/etc/netns") / name for name in names]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth1", "netns", names[0], "type", "veth", "peer", "name", "eth1", "netns", names[1])
        for index, (name, folder) in enumerate(zip(names, files, strict=True), 1):
            ip("-n", name, "addr", "add", f"10.99.0.{index}/24", "dev", "eth1")
            for device in ("lo", "eth1"):
                ip("-n", name, "link", "set", device, "up")
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n10.99.0.1 sharded-radam-0.sharded-radam first\n")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    finally:
        for name, folder in zip(names, files, strict=True):
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def pod(manifest: str, folder: Path) -> list[str]:
    """The command of a manifest's container, with other paths and numbers: 2 pods, 2 ranks in each, a small model."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    *_, job = yaml.safe_load_all((ROOT / "launch" / "kubernetes" / manifest).read_text())
    replicas = job["spec"].get("pytorchReplicaSpecs")
    (container,) = (replicas["Worker"] if replicas else job["spec"])["template"]["spec"]["containers"]
    changes: dict[str, object] = {
        "/checkpoints/run1.jsonl": folder / "metrics.jsonl",
        "/checkpoints/run1": folder / "checkpoints",
    }
    changes |= {"--nnodes=4": "--nnodes=2", "--nproc-per-node=8": "--nproc-per-node=2"}
    variables = ["env", *(f"{variable['name']}={variable['value']}" for variable in container["env"])]
    words = [*variables, *container["command"], *container.get("args", [])]
    for old, new in changes.items():
        assert any(old in word for word in words) or replicas
        words = [word.replace(old, str(new)) for word in words]
    return [*words, *SMALL, "--steps", "20", "--verbose"]


@pytest.mark.parametrize(("manifest", "ranks"), [("indexed-job.yaml", 4), ("pytorchjob.yaml", 2)])
def test_two_hosts(
    tmp_path: Path, hosts: list[str], uninterrupted: dict[int, float], manifest: str, ranks: int
) -> None:
    """One launcher on each, two ranks or one, as pods start them: Gloo, since memory is not shared between hosts."""
    operator = ["PET_RDZV_BACKEND=c10d", "PET_RDZV_ENDPOINT=first:29400", "PET_RDZV_ID=sharded-radam"]
    operator += ["PET_NNODES=1:2", f"PET_NPROC_PER_NODE={ranks // 2}", "PET_MAX_RESTARTS=3"]
    with contextlib.ExitStack() as stack:
        launchers = []
        for index, host in enumerate(hosts):
            inside = ["ip", "netns", "exec", host, "env", "GLOO_SOCKET_IFNAME=eth1", f"JOB_COMPLETION_INDEX={index}"]
            inside += [f"PET_LOCAL_ADDR=10.99.0.{index + 1}"]  # a pod's host name is its own
            if manifest == "pytorchjob.yaml":
                inside += [*operator, f"PET_RDZV_CONF=is_host={index == 0},last_call_timeout=10"]
            command = (*inside, *pod(manifest, tmp_path))
            launchers.append(stack.enter_context(started(tmp_path / f"log{index}", *command)))
        for launcher in launchers:
            assert launcher.wait(timeout=120) == 0, "\n".join((tmp_path / f"log{i}").read_text() for i in (0, 1))
    text = "".join((tmp_path / f"log{index}").read_text() for index in (0, 1))
    assert "transport gloo, since there is no shared memory between the ranks" in text
    assert [record["ranks"] for record in metrics(tmp_path / "metrics.jsonl") if "ranks" in record][-1] == ranks
    check_continued(tmp_path, uninterrupted)


def test_flags_that_exclude_each_other(tmp_path: Path) -> None:
    for wrong, message in (
        (["--auto-resume"], "--auto-resume goes on from --save, and excludes --resume"),
        (["--auto-resume", "--save", tmp_path, "--resume", tmp_path], "--auto-resume goes on from --save"),
        (["--optimizer", "zero", "--save", tmp_path], "--optimizer zero saves and resumes with --consolidated only"),
    ):
        done = train(0, *wrong, check=False)
        assert done.returncode == 2
        assert message in done.stderr


def test_tensorboard(tmp_path: Path) -> None:
    """The figures of the JSON lines."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    train(2, "--steps", 3, "--tensorboard", tmp_path, "--metrics", tmp_path / "m.jsonl")
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    written = {event.step: event.value for event in found.Scalars("loss")}
    assert written == pytest.approx({r["step"]: r["loss"] for r in metrics(tmp_path / "m.jsonl") if "loss" in r})
    assert {"grad_norm", "phases_ms/update", "memory_bytes/1", "validation_loss"} <= set(found.Tags()["scalars"])


def test_a_warning_of_restarts() -> None:
    """With torchrun's own store they do not work; test_asked_to_stop_all_ranks_save_the_same_step has torchrun's."""
    warning = "start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    assert warning not in train(1, "--steps", 1).stderr
    assert warning in programs.call(1, TRAIN, *SMALL, "--steps", 1, TORCHELASTIC_MAX_RESTARTS="1").stderr
