"""Figures of edits as sums over requests, batches and devices."""

import math

import pytest
import torch

from malleable.lightning_modules.functional.editing.word_statistics import Tfidf
from malleable.lightning_modules.metrics.editing import Consistency, EditingMetrics, EditSurvival, Fluency, Perplexity, RequestFigures

ROWS = [
    RequestFigures(1, 0.5, 1, 1, 0.5, 0.5, 1, 0.75, 0.6),
    RequestFigures(0, math.nan, 0.5, 0, math.nan, 0, 0.5, math.nan, 0.2),
    RequestFigures(1, 1, math.nan, 0, 1, math.nan, 0.5, 1, math.nan),
]


def merged(metrics):
    """What two devices would make of their sums."""
    first, *others = metrics
    for other in others:
        first.total += other.total
        first.count += other.count
    return first


def test_means_are_over_requests_that_have_the_figure():
    metric = EditingMetrics()
    metric.update(ROWS)
    figures = {name: float(value) for name, value in metric.compute().items()}
    assert figures["efficacy"] == pytest.approx(200 / 3)
    assert figures["generalization"] == pytest.approx(75)
    assert figures["specificity"] == pytest.approx(75)
    assert figures["specificity_accuracy"] == pytest.approx(40)
    assert figures["score"] == pytest.approx(3 / (3 / 200 + 1 / 75 + 1 / 75))


def test_a_figure_that_nobody_has_is_not_there():
    metric = EditingMetrics()
    metric.update([RequestFigures(*(1 if name.startswith("efficacy") else math.nan for name in RequestFigures._fields))])
    assert metric.compute().keys() == {"efficacy", "efficacy_exact", "efficacy_accuracy", "efficacy_generated"}


def test_batches_and_devices_do_not_matter():
    whole = EditingMetrics()
    whole.update(ROWS)
    parts = [EditingMetrics(), EditingMetrics()]
    parts[0].update(ROWS[:1])
    parts[1].update(ROWS[1:2])
    parts[1].update(ROWS[2:])
    parts[1].update([])
    for name, value in merged(parts).compute().items():
        torch.testing.assert_close(value, whole.compute()[name])


def test_perplexity_weighs_batches_by_their_tokens():
    metric = Perplexity()
    metric.update(torch.tensor(1.5), torch.tensor(2))  # two tokens of -1 and -2 nats
    metric.update(torch.tensor(0.0), torch.tensor(0))
    metric.update(torch.tensor(3.0), torch.tensor(1))
    assert float(metric.compute()["perplexity"]) == pytest.approx(math.exp(2))


def test_fluency_and_consistency():
    fluent = Fluency()
    fluent.update(["dog dog dog", "a b a b"])
    assert float(fluent.compute()["fluency"]) == pytest.approx(50 * (2 / 3 * 0.9182958 + 4 / 3) / 2, rel=1e-5)
    consistent = Consistency(Tfidf(["the dog", "the cat"]))
    consistent.update(["the dog", "the dog"], ["the dog"])
    consistent.update(["nothing"], ["the cat"])
    assert float(consistent.compute()["consistency"]) == pytest.approx(50)


def test_survival_by_batch():
    metric = EditSurvival(3)
    metric.update(0, torch.tensor([0, 0]), torch.tensor([1, 1]))
    metric.update(1, torch.tensor([0, 0, 1]), torch.tensor([1, 0, 1]))
    metric.update(2, torch.tensor([0, 0, 1, 2]), torch.tensor([False, False, True, True]))
    found = metric.compute()
    expected = torch.tensor([[100, math.nan, math.nan], [50, 100, math.nan], [0, 100, 100]], dtype=torch.double)
    torch.testing.assert_close(found["matrix"], expected, equal_nan=True)
    torch.testing.assert_close(found["curve"], torch.tensor([100, 200 / 3, 50], dtype=torch.double))
