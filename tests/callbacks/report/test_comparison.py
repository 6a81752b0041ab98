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

from malleable.callbacks.report.comparison import SelfPlayComparison, evaluate_recommender, recommendation_counts, self_play_sections
from malleable.callbacks.report.page import markdown
from malleable.callbacks.report.round_curves import draw_rounds, round_curves, validation_errors

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
    assert round_curves(HISTORY) == {"hr_10": ([0, 0.5, 1, 2], [0.1, 0.15, 0.2, 0.3], []), "or_ratio_10": ([1, 2], [0.4, 0.3], [])}
    assert round_curves(HISTORY[:1]) == {}
    alone = [entry for entry in HISTORY if entry["phase"] in ("warmup", "sft")]
    assert round_curves(alone) == {"hr_10": ([0, 1], [0.1, 0.15], [])}


def test_curves_have_intervals_or_axes_that_begin_at_zero():
    history = [
        {"phase": "sft", "round": number, "val_hr_10": value, "val_hr_10_error": 0.02, "val_mgu_10": value}
        for number, value in enumerate((0.160, 0.161))
    ]
    curves = round_curves(history)
    assert curves["hr_10"].half_widths == pytest.approx([0.0392, 0.0392])
    figure = Figure()
    draw_rounds(figure, curves)
    with_intervals, without = figure.axes
    low, high = with_intervals.get_ylim()
    assert low < 0.160 - 0.039
    assert high > 0.161 + 0.039
    assert without.get_ylim() == pytest.approx((0, 1.15 * 0.161))
    draw_rounds(Figure(), round_curves([entry | {"val_mgu_10": float("nan")} for entry in history]))


def test_errors_of_a_validation_are_those_of_its_rows(tmp_path):
    module = ready()
    quiet_trainer(tmp_path).validate(module, TinyData(), verbose=False)
    errors = validation_errors(module)
    metric = module.metrics("val")["ranking"]
    assert set(errors) == {f"val_{name}_{k}_error" for name in ("hr", "ndcg", "mrr") for k in metric.ks}
    assert all(0 <= error < 0.5 for error in errors.values())
    assert validation_errors(torch.nn.Linear(1, 1)) == {}


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


PLAYED = [{"phase": "dpo", "round": 1}]


def compared(before, inputs, difference=""):
    found = SelfPlayComparison()
    found.counts, found.titles, found.inputs, found.difference = torch.ones(8), TITLES, inputs, difference
    return found.columns(PLAYED, before), [section.title for section in found.sections(PLAYED, before)], found


def test_metrics_of_other_genres_are_not_compared():
    genres = {"mgu": {"genres": "3 (aa)"}, "arp": {"popularity": "of 9 training interactions (bb)"}}
    before = {"counts": torch.ones(8), "figures": {"hr_10": 0.5, "mgu_10": 0.1, "arp_10": 3.0}, "inputs": genres}
    (column,), titles, _ = compared(before, genres)
    assert column.values == before["figures"]
    assert titles == ["Exposure", "Most recommended titles"]
    (column,), titles, found = compared(before, genres | {"mgu": {"genres": "4 (cc)"}})
    assert column.values == {"hr_10": 0.5, "arp_10": 3.0}
    assert titles == ["Exposure", "Most recommended titles", "Supervised model"]
    assert "mgu_10 of the model before self-play are not shown, because they were computed with other inputs: genres 3 (aa) and 4 (cc)." in (
        found.sections(PLAYED, before)[-1].text
    )
    assert compared(before, genres, "decoding: x before, y in this test")[:2] == ([], ["Supervised model"])


def test_without_rounds_nothing_is_compared():
    before = {"counts": torch.ones(8), "figures": {"hr_10": 0.5}, "inputs": {}}
    _, _, found = compared(before, {})
    for history in (HISTORY[:1], []):
        assert found.columns(history, before) == []
        assert found.sections(history, before) == []
