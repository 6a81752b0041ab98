"""Rejected answers of a round: asked of the model or drawn, by row and seed alone."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny import EOS, TOKENS, batch_of, tiny_catalog, tiny_rows
from tiny_data import quiet_trainer
from tiny_module import ready

from malleable.callbacks.self_play.negatives import draw, negatives, titles
from malleable.datamodules.loading import PhasedLoader
from malleable.datamodules.recommendation.sampling import ItemSampler
from malleable.lightning_modules.language.negatives import SelfPlay


@pytest.fixture
def module(tmp_path):
    module = ready()
    module.trainer = quiet_trainer(tmp_path)
    return module


def make(module, source: str, play: SelfPlay, rows=None, seed: tuple[int, int] = (0, 1), batch_size: int = 2):
    loader = PhasedLoader(tiny_rows(), batch_size, collate_fn=batch_of)
    return negatives(module.trainer, module, rows or tiny_rows(), loader, source, play, seed, "round 1")


@pytest.mark.parametrize("source", ["pre_round", "post_sft"])
def test_the_model_is_asked(module, source):
    """Its own answers to the rows in their order."""
    play = SelfPlay(decode="beam_k_random", num_beams=4)
    items, answers = make(module, source, play)
    assert items == module.generate_negatives(batch_of(tiny_rows()), play, seed=1).tolist()
    assert answers == [[list(TOKENS[item])] for (item,) in items]


def test_answers_of_another_round_or_seed_differ(module):
    play = SelfPlay(decode="sample")
    found = [make(module, "pre_round", play, seed=seed)[0] for seed in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert found[0] == found[3]
    assert found[0] != found[1]
    assert found[0] != found[2]


def test_batches_do_not_matter(module):
    play = SelfPlay(decode="sample", num_negatives=2)
    assert make(module, "pre_round", play, batch_size=1) == make(module, "pre_round", play, batch_size=8)


@pytest.mark.parametrize(("eval_batch_size", "expected"), [(3, 3), (None, 2)])
def test_rows_of_a_pass(module, monkeypatch, eval_batch_size, expected):
    """The data module's batch size of evaluation; that of training where there is no data module."""
    sizes = []
    play = module.generate_negatives
    monkeypatch.setattr(module, "generate_negatives", lambda batch, **options: sizes.append(len(batch)) or play(batch, **options))
    if eval_batch_size is not None:
        monkeypatch.setattr(module.trainer, "datamodule", SimpleNamespace(eval_batch_size=eval_batch_size), raising=False)
    make(module, "pre_round", SelfPlay(), batch_size=2)
    assert max(sizes) == expected


def test_free_text_is_kept_as_it_is(module):
    items, answers = make(module, "pre_round", SelfPlay(grounding="none", max_new_tokens=4))
    assert {len(row) for row in items} == {len(row) for row in answers} == {1}
    for (item,), (answer,) in zip(items, answers, strict=True):
        assert answer.count(EOS) == 1
        assert answer[-1] == EOS
        assert min(answer) >= 0
        assert item == (TOKENS.index(tuple(answer)) if tuple(answer) in TOKENS else -1)


@pytest.mark.parametrize("source", ["random", "popularity"])
@pytest.mark.parametrize("count", [1, 3])
def test_drawn_items_are_others_than_the_rows_own(module, source, count):
    items, answers = make(module, source, SelfPlay(num_negatives=count))
    for row, drawn, texts in zip(tiny_rows(), items, answers, strict=True):
        assert len(set(drawn)) == count
        assert not set(drawn) & {*row["item_ids"], *row["history"]}
        assert texts == [list(TOKENS[item]) for item in drawn]


@pytest.mark.parametrize("source", ["random", "popularity"])
def test_a_draw_depends_on_the_row_and_the_seed_alone(module, source):
    items, _ = make(module, source, SelfPlay())
    order = [7, 3, 20, 11]
    some, _ = make(module, source, SelfPlay(), rows=[tiny_rows()[index] for index in order])
    assert some == [items[index] for index in order]
    assert make(module, source, SelfPlay(), seed=(0, 2))[0] != items


def test_popular_items_are_drawn_more_often(module):
    """Weights 8, 7, ..., 1: in rows that exclude none of them item 0 comes eight times as often as item 7 (3,000 draws: 667 against 83)."""
    rows = [{"sample_id": index, "prompt": [2], "answers": [[9]], "item_ids": [-1]} for index in range(3000)]
    drawn = {source: Counter(item for (item,) in make(module, source, SelfPlay(), rows=rows)[0]) for source in ("random", "popularity")}
    assert drawn["popularity"][0] == pytest.approx(667, abs=100)
    assert drawn["popularity"][7] == pytest.approx(83, abs=40)
    assert drawn["random"][0] == pytest.approx(375, abs=80)
    assert drawn["random"][7] == pytest.approx(375, abs=80)


@pytest.mark.parametrize("weights", [None, [8, 7, 6, 5, 4, 3, 2, 1]])
def test_no_earlier_item_is_drawn_whether_the_prompt_shows_it_or_not(weights):
    row = {"item_ids": [0], "history": [1], "earlier": [2, 3, 1], "seen": [4]}
    drawn = {item for number in range(50) for item in draw(ItemSampler(range(8), weights), {**row, "sample_id": number}, 2)}
    assert drawn == {5, 6, 7}


def test_a_row_that_excludes_no_more_draws_the_same():
    """A draw depends on the row's id; further items change those draws only that would have taken them."""
    sampler = ItemSampler(range(1000), seed=3)
    rows = [{"sample_id": number, "item_ids": [0], "history": [1]} for number in range(200)]
    before = [draw(sampler, row, 1) for row in rows]
    after = [draw(sampler, {**row, "earlier": [*range(2, 100), 1]}, 1) for row in rows]
    assert all(one == other for one, other in zip(before, after, strict=True) if one[0] >= 100)
    assert min(item for (item,) in after) >= 100


def test_drawn_items_come_from_the_candidates_where_there_are_some():
    row = {"sample_id": 4, "item_ids": [0], "earlier": [5], "candidates": [7, 0, 5, 6]}
    assert sorted(draw(ItemSampler(range(8), [1.0] * 8), row, 2)) == [6, 7]
    with pytest.raises(ValueError, match="row 4 needs 3 items besides its own 2, but only 2 exist"):
        draw(ItemSampler(range(8)), row, 3)


def test_more_than_there_are():
    row = {"sample_id": 4, "item_ids": [0], "history": [1, 2]}
    with pytest.raises(ValueError, match="row 4 needs 6 items besides its own 3, but only 5 exist"):
        draw(ItemSampler(range(8)), row, 6)
    assert sorted(draw(ItemSampler(range(8)), row, 5)) == [3, 4, 5, 6, 7]


def test_no_item_has_no_title():
    assert titles([[2, -1], [0, 1]], tiny_catalog()) == [[[7, EOS], []], [[4, 5, EOS], [4, 5, 6, EOS]]]


def test_a_missing_answer_is_none(module):
    """A model that may name nothing but what the user has seen answers nothing."""
    rows = [row | {"seen": list(range(8))} for row in tiny_rows(3)]
    items, answers = make(module, "pre_round", SelfPlay(exclude_seen=True), rows=rows)
    assert items == [[-1]] * 3
    assert answers == [[[]]] * 3
    assert torch.tensor(items).dtype == torch.long
