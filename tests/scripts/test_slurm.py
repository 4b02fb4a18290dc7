"""The batch script for Slurm, with stand-ins for srun and scontrol: what it starts, and when it requeues."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from programs import ROOT, STOPPED, USAGE

SCRIPT = ROOT / "scripts/slurm_train.sh"
# srun notes what it was asked for and ends with $CODE, or with 75 once it gets a signal if there is none.
SRUN = """#!/usr/bin/env bash
trap 'echo got USR1 >>"$NOTES"; exit 75' USR1
{ echo "srun $*"; echo "$NNODES $RDZV_ENDPOINT $RDZV_ID"; } >>"$NOTES"
echo started
[ -n "${CODE:-}" ] && exit "$CODE"
while :; do read -r -t 1 <> <(:) || :; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$NOTES"
case "$1 $2" in
"show hostnames") printf 'node07\\nnode08\\n' ;;
"show job") echo "JobId=$3 JobState=${STATE:-RUNNING} Reason=None" ;;
esac
"""
JOB = {
    "SLURM_JOB_ID": "31234",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_SUBMIT_DIR": str(ROOT),
}


class Cluster:
    def __init__(self, folder: Path):
        self.notes = folder / "notes"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.copy = folder / "slurm_script"  # Slurm runs a copy from its spool folder
        self.copy.write_text(SCRIPT.read_text())
        self.path = f"{folder}:{os.environ['PATH']}"

    def start(self, *words: str, **env: str) -> subprocess.Popen:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RDZV_", "NNODES"))}
        return subprocess.Popen(
            ["bash", self.copy, *words],
            env={**kept, "PATH": self.path, "NOTES": str(self.notes), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def noted(self) -> list[str]:
        return self.notes.read_text().splitlines()


@pytest.fixture
def cluster(tmp_path):
    return Cluster(tmp_path)


@pytest.mark.parametrize(
    "code, state, requeues", [(0, "RUNNING", 0), (1, "RUNNING", 0), (75, "RUNNING", 1), (75, "CANCELLED", 0)]
)
def test_one_launcher_per_machine_and_a_requeue_if_the_run_was_stopped(cluster, code, state, requeues):
    job = cluster.start("--config", "recipe with a space.yaml", CODE=str(code), STATE=state, **JOB)
    _, err = job.communicate(timeout=60)
    assert job.returncode == code, err
    noted = cluster.noted()
    launcher = f"{ROOT}/distributed_train.sh 8 --config recipe with a space.yaml"
    assert f"srun --ntasks-per-node=1 --kill-on-bad-exit=1 {launcher}" in noted
    assert "2 node07:31234 volo-31234-0" in noted
    assert noted.count("scontrol requeue 31234") == requeues


def test_the_warning_of_slurm_reaches_the_run_which_then_goes_back_into_the_queue(cluster):
    job = cluster.start("--config", "r.yaml", **JOB, SLURM_RESTART_COUNT="3", PROCESSES="2")
    assert job.stdout is not None and job.stdout.readline() == "started\n"
    job.send_signal(signal.SIGUSR1)
    _, err = job.communicate(timeout=60)
    assert job.returncode == STOPPED, err
    noted = cluster.noted()
    assert "got USR1" in noted and noted[-1] == "scontrol requeue 31234"
    assert any(line.endswith("distributed_train.sh 2 --config r.yaml") for line in noted)
    assert "2 node07:31234 volo-31234-3" in noted


@pytest.mark.parametrize(
    "words, changes, message",
    [
        (["--config", "r.yaml"], {"SLURM_JOB_ID": ""}, "submit it: sbatch"),
        ([], {}, "give the options of train.py"),
        (["--config", "r.yaml"], {"SLURM_SUBMIT_DIR": "/tmp"}, "no distributed_train.sh in /tmp"),
        (["--config", "r.yaml"], {"SLURM_GPUS_ON_NODE": ""}, "set PROCESSES"),
    ],
)
def test_wrong_usage(cluster, words, changes, message):
    job = cluster.start(*words, **{**JOB, **changes})
    _, err = job.communicate(timeout=60)
    assert job.returncode == USAGE and message in err
    assert not cluster.notes.exists()
