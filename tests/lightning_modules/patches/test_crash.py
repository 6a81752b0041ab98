import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_patch import DOWN, UP, llama, random_patch, save_checkpoint

from malleable.lightning_modules.patches.storage import open_container

SCRIPT = Path(__file__).resolve().parents[2] / "helpers" / "crash_run.py"


@pytest.mark.parametrize("name", ["model.ckpt", "model"])
def test_kill_at_any_step_leaves_the_old_or_the_new_state(tmp_path, name):
    folder = tmp_path / "start"
    folder.mkdir()
    if name == "model":
        llama().save_pretrained(folder / name, max_shard_size="12KB")
    else:
        save_checkpoint(llama(), folder / name)
    patch = random_patch(open_container(folder / name).tensors, (DOWN, UP)).write(tmp_path / "edit")
    command = [sys.executable, SCRIPT, folder, name, patch]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split()
    switch = found.index("new")
    assert found == ["old"] * switch + ["new"] * (len(found) - switch)
    assert switch >= (15 if name == "model" else 3)
