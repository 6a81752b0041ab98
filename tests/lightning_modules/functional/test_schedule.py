"""The course of the learning rate, by hand."""

import math

import pytest

from malleable.lightning_modules.functional.schedule import warmup_decay


def test_linear_warmup_and_decay():
    """A rise of 4 of 10 steps reaches the peak with its last step; the 6 that follow start at the peak and would be at 0 with one more."""
    factors = [warmup_decay(step, 10, warmup=4) for step in range(11)]
    assert factors == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])


def test_cosine():
    factors = [warmup_decay(step, 4, decay="cosine") for step in range(5)]
    assert factors == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0])


def test_constant():
    assert [warmup_decay(step, 4, warmup=2, decay="constant") for step in range(5)] == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_steps_beyond_the_end_stay_at_zero(decay):
    assert warmup_decay(25, 10, warmup=4, decay=decay) == 0


def test_a_warmup_longer_than_the_run_is_shortened():
    assert [warmup_decay(step, 2, warmup=20) for step in range(2)] == [0.5, 1]
    assert warmup_decay(0, 0, warmup=20) == 1


@pytest.mark.parametrize("step", [0, 9])
def test_an_unknown_decay_is_refused_at_once(step):
    with pytest.raises(ValueError, match="decay must be linear, cosine or constant, got 'sqrt'"):
        warmup_decay(step, 10, warmup=5, decay="sqrt")


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
def test_an_unbounded_run_keeps_the_peak_rate(decay):
    assert [warmup_decay(step, math.inf, warmup=2, decay=decay) for step in (0, 1, 2, 10_000)] == [0.5, 1, 1, 1]
