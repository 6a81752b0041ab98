import torch
from torchmetrics import MeanMetric

from malleable.datamodules.batch import Catalog, Recommendations
from malleable.datamodules.collate import collate_answers
from malleable.lightning_modules.recommendation.evaluation import allowed_items, recommendation_metrics, update_metrics


def batch(**extra):
    rows = [
        {"sample_id": 0, "prompt": (), "answers": [()], "item_ids": [2], "history": [0], "seen": [0, 1]},
        {"sample_id": 1, "prompt": (), "answers": [()], "item_ids": [3], "history": [1], "seen": [1]},
    ]
    return collate_answers([{**row, **{name: values[place] for name, values in extra.items()}} for place, row in enumerate(rows)])


def test_seen_items_are_excluded():
    assert allowed_items(batch(), 4).tolist() == [[False, False, True, True], [True, False, True, True]]
    assert allowed_items(batch(), 4, exclude_seen=False) is None
    assert allowed_items(batch(seen=[(), ()]), 4) is None


def test_candidates_restrict_the_choice():
    rows = batch(candidates=[[1, 2], [0, 3, 2]])
    assert allowed_items(rows, 4).tolist() == [[False, False, True, False], [True, False, True, True]]
    assert allowed_items(rows, 4, exclude_seen=False).tolist() == [[False, True, True, False], [True, False, True, True]]


def test_known_metrics_are_updated_and_others_are_not():
    catalog = Catalog(("a", "b", "c", "d"), popularity=(4, 3, 2, 1))
    metrics = recommendation_metrics(catalog, (1, 2)) | {"other": MeanMetric()}
    update_metrics(metrics, Recommendations(torch.tensor([[2, 3], [0, 3]]), torch.zeros(2, 2)), batch())
    assert metrics["ranking"].compute()["hr_2"] == 1
    assert metrics["ranking"].compute()["hr_1"] == 0.5
    assert metrics["exposure"].compute()["coverage_2"] == 0.75
    assert "coverage_1" not in metrics["exposure"].compute()
    assert not metrics["other"].update_called


def test_a_single_cut_off_of_one_still_has_exposure():
    assert recommendation_metrics(Catalog(("a", "b")), (1,))["exposure"].ks == (1,)
