"""Tests and benchmarks for a GPU run on a CPU, too, so that they work when there is one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_methods import BASELINES, baseline_results, edit_changes, self_play_round

ROOT = Path(__file__).parents[1]
PARTS = ["preference-16", "preference-64", "decoding-135m", "decoding-1b", "sprec", "nfe", "kg-epoch", "alpha-edit"]
PEERS = {"preference-16": "trl", "preference-64": "trl", "nfe": "pykeen", "kg-epoch": "pykeen"}


def run(*words, **variables):
    """Run Python in a process of its own, as a user would."""
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, timeout=900, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_benchmark(part):
    if part in PEERS and importlib.util.find_spec(PEERS[part]) is None:
        pytest.skip(f"compares with {PEERS[part]}: pip install -e '.[bench]'")
    done = run(ROOT / "tests/benchmarks/gpu_suite.py", "--device", "cpu", "--tiny", "--parts", part)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{part} (at most" in done.stdout
    if part != "sprec":
        assert "ratio:" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pykeen") is not None, reason="needs an environment without the packages of the benchmarks")
def test_a_part_without_its_peer_says_what_to_install():
    done = run(ROOT / "tests/benchmarks/gpu_suite.py", "--device", "cpu", "--tiny", "--parts", "nfe")
    assert done.returncode == 1
    assert "pip install -e '.[bench]'" in done.stdout


@pytest.mark.slow
def test_the_benchmark_lists_its_parts():
    done = run(ROOT / "tests/benchmarks/gpu_suite.py", "--list")
    budgets = dict(line.rsplit(": ", 1) for line in done.stdout.strip().splitlines())
    assert list(budgets) == PARTS
    assert sum(int(seconds.removesuffix(" s")) for seconds in budgets.values()) <= 480


@pytest.mark.parametrize("path", sorted((ROOT / "tests/benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_each_benchmark_has_an_option_for_the_device(path):
    text = path.read_text(encoding="utf-8")
    if '__name__ == "__main__"' in text:
        # `parser_of` of graph_sides.py adds the option.
        assert "add_device_arguments(parser" in text or '"--device"' in text or "parser_of(" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_edit_of_the_tests_for_a_gpu_runs_on_a_cpu(dtype):
    changes = edit_changes(torch.device("cpu"), dtype)
    assert set(changes) == {0, 1}
    assert all(change.isfinite().all() and change.any() for change in changes.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_self_play_of_the_tests_for_a_gpu_runs_on_a_cpu(precision, tmp_path):
    negatives, losses = self_play_round(torch.device("cpu"), tmp_path, precision)
    assert len(negatives) == 16
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize("name", BASELINES)
def test_the_baselines_of_the_tests_for_a_gpu_run_on_a_cpu(name, tmp_path):
    items, scores, figures = baseline_results(name, torch.device("cpu"), tmp_path)
    assert len(items) == len(scores) == 12
    assert figures["test_hr_3"] > 0


@pytest.mark.slow
def test_the_tests_for_a_gpu_pass_on_a_cpu():
    done = run("-m", "pytest", "-q", "-m", "gpu", ROOT / "tests/gpu", "--rootdir", ROOT, MALLEABLE_GPU_TESTS_ON="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]
