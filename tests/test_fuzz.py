"""A short form of tests/fuzz.py: a few dozen damaged files for each reader."""

import os
import subprocess
import sys

import pytest
from readers import READERS
from shared import ROOT


@pytest.mark.slow
def test_damaged_files_are_read_or_refused_by_name():
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--count", "24", "--seed", "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.slow == 1 and name not in ("checkpoint", "weights folder")])
def test_whole_files_are_read(tmp_path, name):
    reader = READERS[name]
    reader.make(tmp_path)
    reader.read(tmp_path)
    assert all((tmp_path / file).is_file() for file in reader.files)
