"""A run that was killed goes on to the same weights, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import HELPERS, launch
from safetensors.torch import load_file

SCRIPT = HELPERS / "self_play_run.py"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    launch([SCRIPT, folder], ranks=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "every"),
    [("play:2", 0), ("sft:5", 0), ("dpo:4", 0), ("play:2", 1), ("sft:5", 3), ("dpo:4", 3)],
    ids=["generation", "sft", "dpo", "generation after the last step of a phase", "sft by steps", "dpo by steps"],
)
def test_killed_run_resumes_to_the_same_weights(tmp_path, uninterrupted, where, every):
    """SIGKILL in the second batch of round 2's answers, in its sixth supervised step, in its fifth preference step."""
    often = ["--every_n_train_steps", str(every)] if every else []
    killed = subprocess.run([sys.executable, SCRIPT, tmp_path, "--kill", where, *often], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert not (tmp_path / "final.safetensors").exists()
    launch([SCRIPT, tmp_path, "--resume", *often], ranks=1)
    expected, found = (load_file(folder / "final.safetensors") for folder in (uninterrupted, tmp_path))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for name in ("test.json", "history.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((uninterrupted / name).read_text())
