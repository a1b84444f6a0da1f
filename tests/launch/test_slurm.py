"""launch/slurm.sh under a real Slurm: its daemons run here, with one node of 4 CPUs, so called, and no accounting."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sharded_radam.checkpoint.format.directory import committed_steps
from tests.launch.test_launch import is_training, losses, wait
from tests.programs import ROOT, SMALL, environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons need root"),
    pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="Slurm is not installed"),
]

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname={host} CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def run(*command: object) -> str:
    return subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Munge for passwords, Slurm's controller, and the daemon of one node."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    with socket.socket() as one, socket.socket() as two:
        for taken in (one, two):
            taken.bind(("127.0.0.1", 0))
        ports = [taken.getsockname()[1] for taken in (one, two)]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=ports))
    files = {name: folder / f"munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", *(f"--{n}={p}" for n, p in files.items())]
    daemons = [munge, ["slurmctld", "-D", "-f", str(config)], ["slurmd", "-D", "-f", str(config), "-N", "localhost"]]
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv("SLURM_CONF", str(config))
        started: list[subprocess.Popen[bytes]] = []
        stack.callback(end, started)
        log = stack.enter_context((folder / "log").open("wb"))
        for daemon in daemons:
            started.append(subprocess.Popen(daemon, stdout=log, stderr=log, env=environment()))
            if daemon == munge:
                wait(files["socket"].exists, folder / "log")
        wait(lambda: "idle" in subprocess.run(["sinfo"], capture_output=True, text=True).stdout, folder / "log")
        yield


def end(daemons: list[subprocess.Popen[bytes]]) -> None:
    for daemon in reversed(daemons):
        daemon.kill()
        daemon.wait()


def submit(folder: Path, *arguments: object) -> str:
    flags = [*SMALL, "--save", folder / "checkpoints", "--metrics", folder / "metrics.jsonl", "--save-every", 10**6]
    script = ("launch/slurm.sh", *flags, *arguments)
    exported = [f"--export=ALL,GLOO_SOCKET_IFNAME=lo,OMP_NUM_THREADS=1,PYTHON={shutil.which('python')}"]
    return run("sbatch", "--parsable", "--ntasks=2", f"--output={folder / 'log'}", *exported, *script).strip()


def field(job: str, name: str) -> str:
    words = run("scontrol", "show", "job", job, "--oneliner").split()
    return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


@pytest.mark.usefixtures("cluster")
def test_a_preempted_job_saves_is_requeued_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = submit(tmp_path, "--steps", 2000)
    wait(lambda: is_training(tmp_path), log)
    other = run("sbatch", "--parsable", "--partition=high", "--ntasks=4", "--output=/dev/null", "--wrap=true").strip()
    wait(lambda: field(job, "Restarts") == "1" and field(other, "JobState") == "COMPLETED", log, 150)
    stopped_at = committed_steps(tmp_path / "checkpoints")[-1]
    assert 3 < stopped_at < 2000
    assert f"asked to stop after step {stopped_at}: saving" in log.read_text()
    # Slurm itself waits for 2 minutes; within a few seconds the node would refuse a job that it has just ended.
    run("scontrol", "update", f"JobId={job}", "StartTime=now+10seconds")
    wait(lambda: field(job, "JobState") == "COMPLETED", log, 150)
    assert "resumed: 16/16 parameters" in log.read_text()
    assert committed_steps(tmp_path / "checkpoints")[-1] == 2000
    assert sorted(losses(tmp_path)) == list(range(1, 2001))


@pytest.mark.usefixtures("cluster")
def test_only_a_job_that_was_asked_to_stop_is_requeued(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("cancelled", "wrong")}
    for folder in folders.values():
        folder.mkdir()
    cancelled = submit(folders["cancelled"], "--steps", 10**6)
    wrong = submit(folders["wrong"], "--steps", 1, "--batch", 7)
    wait(lambda: is_training(folders["cancelled"]), folders["cancelled"] / "log")
    run("scancel", cancelled)
    wait(lambda: field(cancelled, "JobState") == "CANCELLED", folders["cancelled"] / "log")
    wait(lambda: committed_steps(folders["cancelled"] / "checkpoints"), folders["cancelled"] / "log")
    wait(lambda: field(wrong, "JobState") == "FAILED", folders["wrong"] / "log")
    assert (field(cancelled, "Restarts"), field(wrong, "Restarts")) == ("0", "0")
    assert "--batch 7 must be a multiple of ranks" in (folders["wrong"] / "log").read_text()
