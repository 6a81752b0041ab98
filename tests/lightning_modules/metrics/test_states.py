"""States of all metrics of the package: device tensors that are summed over ranks and survive a reset in inference mode."""

import importlib
import pkgutil

import pytest
import torch
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_sum

import malleable.callbacks
import malleable.lightning_modules
from malleable.lightning_modules.functional.editing.word_statistics import Tfidf
from malleable.lightning_modules.metrics import editing, exposure, link_prediction, ranking

TEXT = "the cat sat on the mat and the cat sat"
LISTS, IDS = torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([3, 4])
SCORES = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
TAILS = link_prediction.QueryEntities(torch.tensor([1, 0]), torch.tensor([0, 1]))
# A metric with arguments of an update for each class.
CASES = {
    "EditingMetrics": (lambda: editing.EditingMetrics(), lambda: [[editing.RequestFigures(*([1.0] * len(editing.RequestFigures._fields)))]]),
    "Perplexity": (lambda: editing.Perplexity(), lambda: [torch.tensor(1.5), torch.tensor(2)]),
    "Fluency": (lambda: editing.Fluency(), lambda: [[TEXT]]),
    "Consistency": (lambda: editing.Consistency(Tfidf([TEXT, "a dog"])), lambda: [[TEXT], ["the cat"]]),
    "EditSurvival": (lambda: editing.EditSurvival(2), lambda: [1, torch.tensor([0, 1]), torch.tensor([1.0, 0.0])]),
    "RankingMetrics": (lambda: ranking.RankingMetrics((1, 3)), lambda: [LISTS, torch.tensor([1, 2]), IDS]),
    "ScoredRankingMetrics": (
        lambda: ranking.ScoredRankingMetrics((1, 3)),
        lambda: [SCORES, (SCORES > 0.4).long(), torch.ones_like(SCORES, dtype=torch.bool), IDS],
    ),
    "ExposureMetrics": (lambda: exposure.ExposureMetrics(3, (1, 3)), lambda: [LISTS, LISTS, IDS]),
    "LinkPredictionMetrics": (lambda: link_prediction.LinkPredictionMetrics(2), lambda: [SCORES, TAILS, TAILS, torch.tensor([0, 1]), IDS]),
}


def metric_classes():
    """All public metrics of the package, by name."""
    for package in (malleable.callbacks, malleable.lightning_modules):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found, unseen = {}, [Metric]
    while unseen:
        kinds = unseen.pop().__subclasses__()
        unseen += kinds
        found |= {kind.__name__: kind for kind in kinds if kind.__module__.startswith("malleable.") and not kind.__name__.startswith("_")}
    return found


def test_every_metric_has_a_case():
    assert metric_classes().keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_states_are_device_tensors_summed_over_ranks(name):
    make, arguments = CASES[name]
    metric = make()
    assert metric._defaults, "no state"
    assert all(isinstance(value, torch.Tensor) for value in metric._defaults.values())
    assert all(reduction is dim_zero_sum for reduction in metric._reductions.values())
    metric.update(*arguments())
    moved = metric.to("meta")
    assert {getattr(moved, state).device.type for state in metric._defaults} == {"meta"}
    moved.reset()
    assert {getattr(moved, state).device.type for state in metric._defaults} == {"meta"}


@pytest.mark.parametrize("name", CASES)
def test_an_update_after_a_reset_in_inference_mode_counts(name):
    make, arguments = CASES[name]
    metric, fresh = make(), make()
    with torch.inference_mode():
        metric.update(*arguments())
        metric.reset()
    for _ in range(2):
        metric.update(*arguments())
        fresh.update(*arguments())
    for key, value in fresh.compute().items():
        torch.testing.assert_close(metric.compute()[key], value, equal_nan=True)
