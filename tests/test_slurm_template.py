"""The template of a SLURM job requeues the job at the signal, and resumes it."""

import os
import signal
import subprocess
import time

import pytest
from shared import ROOT

TEMPLATE = ROOT / "configs" / "base" / "slurm.sbatch"
# Stands for SLURM: `srun` runs for a while and leaves a checkpoint, `scontrol requeue` ends it.
SRUN = """#!/bin/bash
echo "$@" >> calls
mkdir -p runs/slurm-7/sprec/tiny/version_0/checkpoints
touch runs/slurm-7/sprec/tiny/version_0/checkpoints/last.ckpt
echo $$ > srun.pid
exec sleep "$SLEEP"
"""
SCONTROL = """#!/bin/bash
echo "$@" > requeued
kill "$(cat srun.pid)"
"""


@pytest.fixture
def start(tmp_path):
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}

    def run(seconds):
        environment = {**os.environ, **job, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLEEP": str(seconds)}
        return subprocess.Popen(["bash", str(TEMPLATE), "sprec/tiny.yaml", "--seed_everything", "1"], cwd=tmp_path, env=environment)

    return run


def test_a_job_is_requeued_and_resumed(start, tmp_path):
    first = start(60)
    waited = time.monotonic()
    while not (tmp_path / "srun.pid").exists():
        assert time.monotonic() - waited < 30
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(timeout=30) != 0
    assert (tmp_path / "requeued").read_text().split() == ["requeue", "7"]
    assert start(0).wait(timeout=30) == 0
    options = "--config sprec/tiny.yaml --config base/ddp.yaml --trainer.num_nodes 2 --trainer.devices 8 --trainer.default_root_dir runs/slurm-7"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"malleable fit {options} --seed_everything 1",
        f"malleable fit {options} --ckpt_path last --seed_everything 1",
    ]


def test_a_failure_of_the_run_is_that_of_the_job(start, tmp_path):
    assert start("never").wait(timeout=30) != 0
    assert not (tmp_path / "requeued").exists()
