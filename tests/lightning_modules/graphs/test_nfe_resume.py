"""A run of NFE that was killed goes on to the same weights, bit for bit, and to the same figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import HELPERS, launch
from safetensors.torch import load_file
from toy_graph import write_toy_graph

SCRIPT = HELPERS / "graph_run.py"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_toy_graph(folder / "graph")
    launch([SCRIPT, folder / "run"], ranks=1)
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", ["every epoch", "every five steps"])
@pytest.mark.parametrize("where", ["2:7", "4:0", "val:3"], ids=["within an epoch", "between epochs", "within validation"])
def test_killed_run_resumes_to_the_same_weights(tmp_path, uninterrupted, where, checkpoints):
    """Six epochs of steps of two batches, validated every second."""
    write_toy_graph(tmp_path / "graph")
    folder = tmp_path / "run"
    often = ["--every_n_train_steps", "5"] if checkpoints != "every epoch" else []
    killed = subprocess.run([sys.executable, SCRIPT, folder, "--kill", where, *often], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert not (folder / "final.safetensors").exists()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0
    launch([SCRIPT, folder, "--resume", *often], ranks=1)
    expected, found = (load_file(run / "final.safetensors") for run in (uninterrupted, folder))
    assert expected.keys() == found.keys() >= {"entity.weight", "relation.weight", "gamma"}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for name in ("val.json", "test.json"):
        assert json.loads((folder / name).read_text()) == json.loads((uninterrupted / name).read_text()), name
