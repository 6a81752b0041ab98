"""Threshold of the null space: number of retained directions, and its checks."""

import logging

import pytest
import torch

from malleable.lightning_modules.functional.editing.null_space_threshold import Threshold


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (Threshold("absolute", 1.0), 2),
        (Threshold("relative_to_max", 0.5), 3),
        (Threshold("relative_energy", 0.25), 3),
        (Threshold("rank", 3), 3),
    ],
)
def test_threshold_modes(threshold, expected):
    assert threshold.retained(torch.tensor([0.1, 0.9, 1.0, 6.0])) == expected


def test_threshold_that_retains_no_or_all_directions(caplog):
    values = torch.tensor([0.5, 1.0])
    with pytest.raises(ValueError, match=r"retains none of 2 directions .* between 0.5 and 1"):
        Threshold("absolute", 0.1).retained(values)
    with caplog.at_level(logging.WARNING):
        assert Threshold("absolute", 2.0).retained(values) == 2
    assert "edits are not restricted" in caplog.text


@pytest.mark.parametrize(("mode", "value"), [("absolute", 0.0), ("relative_energy", 1.5), ("rank", 2.5)])
def test_threshold_out_of_range(mode, value):
    with pytest.raises(ValueError, match=r"threshold\.value"):
        Threshold(mode, value)
