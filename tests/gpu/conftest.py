"""Tests of whole methods on a CUDA device. `MALLEABLE_GPU_TESTS_ON=cpu` runs the same code on a CPU, to see that it works."""

import os

import pytest
import torch


@pytest.fixture
def device():
    """The device under test."""
    name = os.environ.get("MALLEABLE_GPU_TESTS_ON", "cuda")
    if name == "cuda":
        # float32 means float32 here, or nothing would equal a CPU's figures.
        torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device(name)
