"""Rejected answers of a round, chosen by every negative sampler."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny import EOS, TOKENS, batch_of, tiny_catalog, tiny_rows
from tiny_data import quiet_trainer
from tiny_module import ready

from malleable.callbacks.self_play.round_negatives import choose_negatives, row_items, titles
from malleable.datamodules.loading import PhasedLoader
from malleable.datamodules.negative_samplers import Hardest, Mixture, Popularity, SelfPlay, Semantic, Uniform, round_seed


@pytest.fixture
def module(tmp_path):
    module = ready()
    module.trainer = quiet_trainer(tmp_path)
    return module


def make(module, sampler, rows=None, seed: tuple[int, int] = (0, 1), batch_size: int = 2):
    loader = PhasedLoader(tiny_rows(), batch_size, collate_fn=batch_of)
    return choose_negatives(module.trainer, module, rows or tiny_rows(), loader, sampler, seed, "round 1")


FAMILY = {
    "uniform": Uniform,
    "popularity": Popularity,
    "square root of popularity": partial(Popularity, exponent=0.5),
    "semantic": partial(Semantic, pool=5),
    "hardest": Hardest,
    "mixture": lambda num_negatives=1: Mixture(num_negatives, [Uniform(num_negatives), Hardest(num_negatives)], [1, 2]),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("count", [1, 3])
def test_samplers_exclude_the_true_and_earlier_items(module, name, count):
    """Also those that the prompt does not show, and where they may be recommended again."""
    rows = [row | {"earlier": [(row["item_ids"][0] + 3) % 8], "seen": ()} for row in tiny_rows()]
    items, answers = make(module, FAMILY[name](count), rows=rows)
    for row, drawn, texts in zip(rows, items, answers, strict=True):
        assert len(set(drawn)) == count
        assert not set(drawn) & {-1, *row["item_ids"], *row["history"], *row["earlier"]}
        assert texts == [list(TOKENS[item]) for item in drawn]


@pytest.mark.parametrize("name", FAMILY)
def test_a_choice_depends_on_seed_row_and_round_only(module, name):
    items, _ = make(module, FAMILY[name](), batch_size=1)
    order = [7, 3, 20, 11]
    some, _ = make(module, FAMILY[name](), rows=[tiny_rows()[index] for index in order], batch_size=3)
    assert some == [items[index] for index in order]
    if name != "hardest":
        others = [make(module, FAMILY[name](), seed=seed)[0] for seed in ((0, 2), (1, 1))]
        assert items not in others


@pytest.mark.parametrize("name", FAMILY)
def test_choices_are_candidates(module, name):
    rows = [row | {"candidates": [(row["item_ids"][0] + step) % 8 for step in (0, 2, 3)]} for row in tiny_rows(9) if len(row["history"]) == 1]
    items, _ = make(module, FAMILY[name](), rows=rows)
    for row, (item,) in zip(rows, items, strict=True):
        assert item in row["candidates"][1:]


def test_semantic_negatives_are_the_nearest_titles(module):
    titles = module.items.title_embeddings(module.model)
    items, _ = make(module, Semantic(num_negatives=2, pool=2))
    for row, found in zip(tiny_rows(), items, strict=True):
        distance = (titles - titles[row["item_ids"][0]]).norm(dim=1)
        own = {*row["item_ids"], *row["history"]}
        assert set(found) == set([item for item in distance.argsort().tolist() if item not in own][:2])


def test_hardest_negatives_are_the_first_of_the_ranking(module):
    items, _ = make(module, Hardest(num_negatives=2))
    ranked = module.recommend(batch_of(tiny_rows()), k=8).item_ids.tolist()
    for row, found, ranking in zip(tiny_rows(), items, ranked, strict=True):
        assert found == [item for item in ranking if item != row["item_ids"][0]][:2]


def test_shares_of_a_mixture(module):
    rows = [row | {"sample_id": 1000 + row["sample_id"]} for row in tiny_rows(400)]
    mixture = Mixture(1, [Uniform(), Hardest()], [1, 3])
    chosen = Counter(mixture.choose(row["sample_id"], 5) for row in rows)
    assert chosen[1] == pytest.approx(300, abs=30)
    hard = make(module, Hardest(), rows=rows[:40], seed=(0, 5))[0]
    mixed = make(module, mixture, rows=rows[:40], seed=(0, 5))[0]
    own = [mixture.choose(row["sample_id"], round_seed(0, 5)) == 1 for row in rows[:40]]
    assert all(one == other for one, other, same in zip(hard, mixed, own, strict=True) if same)


def test_self_play_takes_the_answers_of_the_model(module):
    """In the order of the rows."""
    sampler = SelfPlay(decode="beam_k_random", num_beams=4)
    items, answers = make(module, sampler)
    assert items == module.generate_negatives(batch_of(tiny_rows()), sampler, seed=1).tolist()
    assert answers == [[list(TOKENS[item])] for (item,) in items]


def test_answers_of_another_round_or_seed_differ(module):
    found = [make(module, SelfPlay(decode="sample"), seed=seed)[0] for seed in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert found[0] == found[3]
    assert found[0] != found[1]
    assert found[0] != found[2]


def test_result_does_not_depend_on_batches(module):
    sampler = SelfPlay(decode="sample", num_negatives=2)
    assert make(module, sampler, batch_size=1) == make(module, sampler, batch_size=8)


@pytest.mark.parametrize(("eval_batch_size", "expected"), [(3, 3), (None, 2)])
def test_rows_of_a_pass(module, monkeypatch, eval_batch_size, expected):
    """The data module's batch size of evaluation; that of training where there is no data module."""
    sizes = []
    play = module.generate_negatives
    monkeypatch.setattr(module, "generate_negatives", lambda batch, **options: sizes.append(len(batch)) or play(batch, **options))
    if eval_batch_size is not None:
        monkeypatch.setattr(module.trainer, "datamodule", SimpleNamespace(eval_batch_size=eval_batch_size), raising=False)
    make(module, SelfPlay(), batch_size=2)
    assert max(sizes) == expected


def test_free_text_is_kept_as_it_is(module):
    items, answers = make(module, SelfPlay(grounding="none", max_new_tokens=4))
    assert {len(row) for row in items} == {len(row) for row in answers} == {1}
    for (item,), (answer,) in zip(items, answers, strict=True):
        assert answer.count(EOS) == 1
        assert answer[-1] == EOS
        assert min(answer) >= 0
        assert item == (TOKENS.index(tuple(answer)) if tuple(answer) in TOKENS else -1)


def test_popular_items_are_drawn_more_often(module):
    """Weights 8, 7, ..., 1: in rows that exclude none of them item 0 comes eight times as often as item 7 (3,000 draws: 667 against 83)."""
    rows = [{"sample_id": index, "prompt": [2], "answers": [[9]], "item_ids": [-1]} for index in range(3000)]
    drawn = {kind: Counter(item for (item,) in make(module, kind(), rows=rows)[0]) for kind in (Uniform, Popularity)}
    assert drawn[Popularity][0] == pytest.approx(667, abs=100)
    assert drawn[Popularity][7] == pytest.approx(83, abs=40)
    assert drawn[Uniform][0] == pytest.approx(375, abs=80)
    assert drawn[Uniform][7] == pytest.approx(375, abs=80)
    even = Counter(item for (item,) in make(module, Popularity(exponent=0.0), rows=rows)[0])
    assert even[7] == pytest.approx(375, abs=80)


def test_a_row_that_excludes_no_more_draws_the_same():
    """A draw depends on the row's id; further items change those draws only that would have taken them."""
    sampler = Uniform().bind(1000, (), 3)
    rows = [{"sample_id": number, "item_ids": [0], "history": [1]} for number in range(200)]
    before = [sampler(row_items(row)) for row in rows]
    after = [sampler(row_items({**row, "earlier": [*range(2, 100), 1]})) for row in rows]
    assert all(one == other for one, other in zip(before, after, strict=True) if one[0] >= 100)
    assert min(item for (item,) in after) >= 100


def test_more_negatives_than_items():
    row = {"sample_id": 4, "item_ids": [0], "history": [1, 2]}
    with pytest.raises(ValueError, match="row 4 needs 6 sampled items, but only 5 can be sampled: its own 3 items are excluded"):
        Uniform(6).bind(8, (), 0)(row_items(row))
    assert sorted(Uniform(5).bind(8, (), 0)(row_items(row))) == [3, 4, 5, 6, 7]


def test_missing_item_has_no_title():
    assert titles([[2, -1], [0, 1]], tiny_catalog()) == [[[7, EOS], []], [[4, 5, EOS], [4, 5, 6, EOS]]]


def test_a_missing_answer_is_none(module):
    """A model that may name nothing but what the user has seen answers nothing."""
    rows = [row | {"seen": list(range(8))} for row in tiny_rows(3)]
    items, answers = make(module, SelfPlay(exclude_seen=True), rows=rows)
    assert items == [[-1]] * 3
    assert answers == [[[]]] * 3
    assert torch.tensor(items).dtype == torch.long
