"""Edits, self-play and counting baselines on a device: the CPU's results in float32, finite results in half precision."""

import math

import pytest
import torch
from device_methods import BASELINES, baseline_results, edit_changes, self_play_round

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


def test_an_edit_equals_that_of_a_cpu(device):
    changes, expected = edit_changes(device), edit_changes(CPU)
    assert changes.keys() == expected.keys()
    for layer, change in expected.items():
        # Target vectors are optimised, which amplifies rounding.
        torch.testing.assert_close(changes[layer], change, rtol=0, atol=0.02 * change.abs().max().item())


def test_an_edit_of_bfloat16_weights(device):
    for change in edit_changes(device, torch.bfloat16).values():
        assert change.isfinite().all()
        assert change.abs().max() > 0


def test_a_round_of_self_play_equals_that_of_a_cpu(device, tmp_path):
    negatives, losses = self_play_round(device, tmp_path / "device")
    expected_negatives, expected_losses = self_play_round(CPU, tmp_path / "cpu")
    assert negatives == expected_negatives
    assert losses == pytest.approx(expected_losses, rel=1e-3)


def test_a_round_of_self_play_in_mixed_precision(device, tmp_path):
    negatives, losses = self_play_round(device, tmp_path, "bf16-mixed")
    assert len(negatives) == 16
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_equals_that_of_a_cpu(name, device, tmp_path):
    items, scores, figures = baseline_results(name, device, tmp_path)
    expected_items, expected_scores, expected_figures = baseline_results(name, CPU, tmp_path)
    assert items == expected_items
    torch.testing.assert_close(scores, expected_scores, rtol=1e-6, atol=1e-6)
    assert figures == pytest.approx(expected_figures, rel=1e-6)
