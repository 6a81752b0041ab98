"""A short form of ``tests/kill.py``: each part is killed a few times, resumed, and compared with the uninterrupted run."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("part", ["self_play", "nfe", "sequential", "editing", "patches", "cache", "report", "predict"])
def test_killed_jobs_end_as_if_nothing_had_happened(part, tmp_path):
    command = [sys.executable, Path(__file__).with_name("kill.py"), "--kills", "2", "--parts", part, "--folder", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.startswith(f"{part}: 2 kills, 0 problems")
