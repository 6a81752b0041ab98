"""Before and after self-play: what is measured, counted and put into the report."""

from types import SimpleNamespace

import pytest
import torch
from hostile import HOSTILE, is_inert
from matplotlib.figure import Figure
from tiny import TITLES, batch_of, tiny_rows
from tiny_data import TinyData, quiet_trainer
from tiny_module import ready
from torch.utils.data import DataLoader

from malleable.callbacks.report.comparison import evaluate_recommender, recommendation_counts, round_curves, self_play_sections
from malleable.callbacks.report.page import markdown

HISTORY = [
    {"phase": "warmup", "round": 0, "val_hr_10": 0.1, "val_loss": 3.0},
    {"phase": "negatives", "round": 1, "frac_identical": 0.25, "distinct_negs": 0.5},
    {"phase": "sft", "round": 1, "val_hr_10": 0.15},
    {"phase": "dpo", "round": 1, "val_hr_10": 0.2, "val_or_ratio_10": 0.4},
    {"phase": "negatives", "round": 2, "frac_identical": 0.5, "distinct_negs": 0.75},
    {"phase": "dpo", "round": 2, "val_hr_10": 0.3, "val_or_ratio_10": 0.3},
]


def test_counts_exclude_padding():
    """Rows that only fill a batch, and places where nothing could be recommended."""
    items = torch.tensor([[0, 2], [2, -1], [3, 3], [1, 1]])
    assert recommendation_counts(items, torch.tensor([0, 1, -3, 7]), 5).tolist() == [1, 2, 2, 0, 0]


def test_evaluation_equals_test(tmp_path):
    """Outside the test loop the same figures come out, and every recommended place is counted."""
    module = ready()
    trainer = quiet_trainer(tmp_path)
    (tested,) = trainer.test(module, TinyData(), verbose=False)
    module.train()
    found = evaluate_recommender(trainer, module, DataLoader(tiny_rows(13), batch_size=4, collate_fn=batch_of))
    assert {f"test_{name}": value for name, value in found["figures"].items()} == pytest.approx({k: v for k, v in tested.items() if k != "test_loss"})
    lists = module.eval().recommend(batch_of(tiny_rows(13))).item_ids
    assert found["counts"].tolist() == torch.bincount(lists.flatten(), minlength=8).tolist()


def test_evaluation_has_no_side_effects(tmp_path, monkeypatch):
    """It is done in evaluation mode, without gradients; neither the module's mode nor the metrics of the Trainer's own loops are touched."""
    module = ready()
    trainer = quiet_trainer(tmp_path)
    module.train()
    modes = []
    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *args: modes.append((module.training, torch.is_grad_enabled())) or evaluate(*args))
    evaluate_recommender(trainer, module, DataLoader(tiny_rows(8), batch_size=4, collate_fn=batch_of))
    assert modes == [(False, False)] * 2
    assert module.training
    assert not module.eval_metrics


def test_counts_are_summed_over_ranks(tmp_path):
    module = ready()
    trainer = quiet_trainer(tmp_path)
    summed = []

    def reduce(counts, reduce_op):
        summed.append(reduce_op)
        return 2 * counts

    strategy = SimpleNamespace(reduce=reduce, batch_to_device=trainer.strategy.batch_to_device)
    shared = SimpleNamespace(strategy=strategy, precision_plugin=trainer.precision_plugin)
    loader = DataLoader(tiny_rows(4), batch_size=4, collate_fn=batch_of)
    assert torch.equal(evaluate_recommender(shared, module, loader)["counts"], 2 * evaluate_recommender(trainer, module, loader)["counts"])
    assert set(summed) == {"sum"}


def test_curves_have_a_point_for_each_validated_phase():
    """A metric that was measured once is no curve, and what is no curve's metric is left out."""
    assert round_curves(HISTORY) == {"hr_10": ([0, 0.5, 1, 2], [0.1, 0.15, 0.2, 0.3]), "or_ratio_10": ([1, 2], [0.4, 0.3])}
    assert round_curves(HISTORY[:1]) == {}
    alone = [entry for entry in HISTORY if entry["phase"] in ("warmup", "sft")]
    assert round_curves(alone) == {"hr_10": ([0, 1], [0.1, 0.15])}


def test_sections_of_a_whole_run():
    before = {"counts": torch.tensor([9, 3, 0, 0, 0, 0, 0, 0]), "figures": {}}
    after = torch.tensor([4, 3, 2, 1, 1, 1, 0, 0])
    sections = {section.title: section for section in self_play_sections(HISTORY, before, after, TITLES)}
    assert list(sections) == ["Rejected answers", "Rounds", "Exposure", "Most recommended titles"]
    assert sections["Rejected answers"].table == (["round", "frac_identical", "distinct_negs"], [[1, 0.25, 0.5], [2, 0.5, 0.75]])
    for section in list(sections.values())[1:]:
        figure = Figure()
        section.figure(figure)
        assert any(axes.has_data() for axes in figure.axes)
    figure = Figure()
    sections["Rounds"].figure(figure)
    assert [axes.get_title() for axes in figure.axes] == ["hr_10", "or_ratio_10"]


def test_table_of_greedy_and_sampled_answers():
    entries = [
        {"phase": "decoding", "round": 1, "titles": titles, "distinct": distinct, "top_3_share": share}
        for titles, distinct, share in (("true", 8.0, 0.5), ("greedy", 2.0, 1.0), ("sample", 7.0, 0.6))
    ]
    (section,) = self_play_sections(entries, {}, None, TITLES)
    assert section.title == "Greedy and sampled answers"
    header, rows = section.table
    assert header == ["round", "titles", "distinct", "top_3_share"]
    assert rows == [[1, "true", 8.0, 0.5], [1, "greedy", 2.0, 1.0], [1, "sample", 7.0, 0.6]]


def test_settings_in_a_difference_are_not_interpreted():
    sections = self_play_sections([], {"counts": torch.ones(8)}, torch.ones(8), TITLES, difference=f"decoding: {HOSTILE} then, x in this test")
    assert is_inert(markdown("Page", sections))


def test_sections_of_incomplete_runs():
    """Nothing of what was not done: no rounds, no test, no measurement before."""
    assert self_play_sections([], {}, None, TITLES) == []
    assert self_play_sections(HISTORY[:1], {"counts": torch.ones(8)}, None, TITLES) == []
    assert [section.title for section in self_play_sections(HISTORY[1:2], {}, torch.ones(8), TITLES)] == ["Rejected answers"]
