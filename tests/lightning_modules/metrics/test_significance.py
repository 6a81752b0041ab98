import subprocess
import sys

import pytest
import torch

from malleable.lightning_modules.metrics.significance import bootstrap_interval, paired_bootstrap, randomization_test, row_values


def test_interval_covers_the_mean_with_the_known_width():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    interval = bootstrap_interval(values)
    assert interval.mean == pytest.approx(values.mean().item(), abs=1e-7)
    # 1.96 standard errors either way for a mean of 400 normal values.
    width = 2 * 1.96 * values.std(correction=0).item() / 20
    assert interval.high - interval.low == pytest.approx(width, rel=0.08)
    assert interval == bootstrap_interval(values)
    assert interval != bootstrap_interval(values, seed=1)


def test_paired_interval_detects_a_constant_gain_in_noise():
    first = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    interval = paired_bootstrap(first, first + 0.25)
    assert interval.low == pytest.approx(0.25)
    assert interval.high == pytest.approx(0.25)


def test_randomization_equals_enumeration():
    # Differences 1, 1, 1, 1, -1: of 32 sign patterns |sum| >= 3 in 2 * (1 + 5) of them.
    first = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    second = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    assert randomization_test(first, second, samples=20_000) == pytest.approx(12 / 32, abs=0.015)


def test_equal_runs_are_never_significant():
    values = torch.rand(30)
    assert randomization_test(values, values, samples=100) == 1


def test_refusals():
    with pytest.raises(ValueError, match=r"both runs must have the same rows, got shapes \(3,\) and \(4,\)"):
        paired_bootstrap(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match=r"one number for each row, \(R,\) with R >= 1, got shape \(2, 2\)"):
        randomization_test(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"level must be in \(0, 1\), got 95"):
        bootstrap_interval(torch.zeros(3), level=95)


def test_row_values_are_the_terms_of_the_means():
    ranks = torch.tensor([1.0, 3.0, 11.0, torch.inf])
    assert row_values("hr_10", ranks).tolist() == [1, 1, 0, 0]
    assert row_values("hits_1", ranks).tolist() == [1, 0, 0, 0]
    assert row_values("ndcg_10", ranks).tolist() == pytest.approx([1, 0.5, 0, 0])
    assert row_values("mrr_10", ranks).tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert row_values("mrr", ranks[:3]).tolist() == pytest.approx([1, 1 / 3, 1 / 11])
    assert row_values("mr", ranks[:3]).tolist() == [1, 3, 11]
    for name in ("mr_10", "hr", "ndcg", "mrr_tail", "div_ratio_10", "loss"):
        assert row_values(name, ranks) is None


def test_the_module_does_not_import_torch():
    code = "import sys, malleable.lightning_modules.metrics.significance; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
