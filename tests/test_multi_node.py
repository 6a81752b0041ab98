"""The command of torchrun on the page about several machines runs, on two processes of this machine."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from launch import free_port
from shared import ROOT

PAGE = ROOT / "configs/base/MULTI_NODE.md"
HERE = {
    "--nnodes 2": "--nnodes 1",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--trainer.devices 8": "--trainer.devices 2",
    "--trainer.num_nodes 2": "--trainer.num_nodes 1",
    "sprec/goodreads_llama.yaml": "sprec/tiny.yaml",
}


@pytest.mark.slow(minutes=1)
@pytest.mark.ddp
def test_torchrun(tmp_path):
    (printed,) = re.findall(r"^torchrun (?:.*\\\n)*.*", PAGE.read_text(), re.MULTILINE)
    command = printed.replace("\\\n", " ")
    changes = HERE | {"gpu01:29500": f"127.0.0.1:{free_port()}"}
    for old, new in changes.items():
        assert old in command
        command = command.replace(old, new)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    options = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)[1:], *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs/sprec/tiny/version_0"
    assert {"checkpoints", "model", "report"} <= {path.name for path in run.iterdir()}
