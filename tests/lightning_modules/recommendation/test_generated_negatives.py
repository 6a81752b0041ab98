"""How the model answers itself: every mode, whatever the batches, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from tiny import EOS, TOKENS, batch_of, tiny_rows
from tiny_module import ready

from malleable.datamodules.negative_samplers import SelfPlay
from malleable.lightning_modules.functional.language.trie_beam_search import beam_search
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.recommendation.generated_negatives import row_seeds

MODES = {
    "greedy": SelfPlay(),
    "two greedy": SelfPlay(num_negatives=2, num_beams=4),
    "sample": SelfPlay(decode="sample"),
    "two samples": SelfPlay(decode="sample", num_negatives=2, temperature=1.5, top_p=0.9),
    "beam": SelfPlay(decode="beam_k_random", num_beams=5),
    "two of the beam": SelfPlay(decode="beam_k_random", num_beams=5, num_negatives=2),
    "text": SelfPlay(grounding="none", max_new_tokens=5),
    "sampled text": SelfPlay(grounding="none", decode="sample", max_new_tokens=5, top_p=0.9),
    "nearest": SelfPlay(grounding="embedding", max_new_tokens=5),
    "nearest to a sample": SelfPlay(grounding="embedding", decode="sample", max_new_tokens=5),
}
DRAWN = ("sample", "two samples", "beam", "two of the beam", "sampled text", "nearest to a sample")


@pytest.fixture(scope="module")
def module():
    return ready(decoding=Decoding(exclude_seen=False))


@pytest.mark.parametrize("name", MODES)
def test_answers_do_not_depend_on_batches(module, name):
    """A row answers the same alone, in any company and in any order: its id and the seed are all the randomness."""
    rows, play = tiny_rows(12), MODES[name]
    together = module.generate_negatives(batch_of(rows), play, seed=3)
    order = [7, 2, 11, 0, 5, 9, 1, 3, 10, 8, 6, 4]
    for start in (0, 1, 5):
        some = order[start : start + 4]
        assert torch.equal(module.generate_negatives(batch_of([rows[index] for index in some]), play, seed=3), together[some])
    assert torch.equal(module.generate_negatives(batch_of(rows[4:5]), play, seed=3), together[4:5])


@pytest.mark.parametrize("name", MODES)
def test_the_seed_determines_the_samples(module, name):
    batch = batch_of(tiny_rows(24))
    first, second = (module.generate_negatives(batch, MODES[name], seed=seed) for seed in (1, 2))
    assert torch.equal(first, second) == (name not in DRAWN)


@pytest.mark.parametrize("name", [name for name, play in MODES.items() if play.grounding != "none"])
def test_answers_are_distinct_real_items(module, name):
    play = MODES[name]
    found = module.generate_negatives(batch_of(tiny_rows(24)), play, seed=0)
    assert found.shape == (24, play.num_negatives)
    assert (found >= 0).all()
    assert (found < 8).all()
    assert all(len(set(row)) == play.num_negatives for row in found.tolist())


def test_greedy_returns_the_most_probable_title(module):
    """One greedy answer follows the most probable token; several are the best of a beam."""
    batch = batch_of(tiny_rows(8))
    best = module.recommend(batch, 3).item_ids
    assert torch.equal(module.generate_negatives(batch, SelfPlay(num_negatives=3, num_beams=8, exclude_seen=False)), best)
    wide = module.generate_negatives(batch, SelfPlay(decode="beam_k_random", num_beams=1))
    assert torch.equal(wide, module.generate_negatives(batch, SelfPlay())), "the best of one is no draw"


def test_beam_k_random_samples_the_best_uniformly(module):
    """400 draws of a row among its beam of 4: each about 100 times, none else. The standard deviation is 8.7."""
    row = tiny_rows(1)[0]
    batch = batch_of([row | {"sample_id": index} for index in range(400)])
    drawn = module.generate_negatives(batch, SelfPlay(decode="beam_k_random", num_beams=4), seed=0)[:, 0]
    best = beam_search(module.model, module.items.trie(module.device), batch.prompt_ids[:1], batch.prompt_mask[:1], num_beams=4, k=4).item_ids[0]
    counts = torch.bincount(drawn, minlength=8)
    assert counts[best].sum() == 400
    assert counts[best].min() > 65


def test_seen_items_are_not_generated(module):
    batch = batch_of(tiny_rows(12))
    for play in (MODES["greedy"], MODES["sample"], MODES["two of the beam"], MODES["nearest"]):
        found = module.generate_negatives(batch, replace(play, exclude_seen=True), seed=0)
        assert not any(set(row) & set(seen) for row, seen in zip(found.tolist(), batch.seen.tolist(), strict=True))
    found = module.generate_negatives(batch, SelfPlay(num_negatives=8, num_beams=8))
    assert any(set(row) & set(seen) for row, seen in zip(found.tolist(), batch.seen.tolist(), strict=True))


@pytest.mark.parametrize("decode", ["greedy", "beam_k_random", "sample"])
def test_missing_answers_come_last(module, decode):
    """Six films may not be named, so of three answers one is missing, wherever the draw would have put it."""
    rows = [row | {"seen": [item for item in range(8) if item not in (1, 4)]} for row in tiny_rows(8)]
    found = module.generate_negatives(batch_of(rows), SelfPlay(decode=decode, num_negatives=3, num_beams=5, exclude_seen=True), seed=0)
    assert [sorted(row[:2]) for row in found.tolist()] == [[1, 4]] * 8
    assert found[:, 2].tolist() == [-1] * 8


@pytest.mark.parametrize("name", ["text", "sampled text"])
def test_free_text_is_the_item_then_the_tokens(module, name):
    """The item or -1, then at most five tokens and the end-of-sequence token, then padding of -1."""
    found = module.generate_negatives(batch_of(tiny_rows(24)), MODES[name], seed=0)
    assert found.shape == (24, 2 + 5)
    for item, *text in found.tolist():
        end = text.index(EOS)
        assert min(text[: end + 1]) >= 0
        assert text[end + 1 :] == [-1] * (5 - end)
        assert item == (TOKENS.index(tuple(text[: end + 1])) if tuple(text[: end + 1]) in TOKENS else -1)


def test_free_text_is_grounded_in_the_nearest_title(module, monkeypatch):
    """A title's own text is nearest to itself, and another where that may not be answered."""
    texts = torch.tensor([[*title[:-1], *[EOS] * (5 - len(title))] for title in TOKENS])
    monkeypatch.setattr("malleable.lightning_modules.language.free_answers.generate_text", lambda *args, **kwargs: texts)
    play, rows = SelfPlay(grounding="embedding", max_new_tokens=4), tiny_rows(8)
    assert module.generate_negatives(batch_of(rows), replace(play, exclude_seen=False)).tolist() == [[item] for item in range(8)]
    hidden = batch_of([row | {"seen": [item]} for item, row in enumerate(rows)])
    found = module.generate_negatives(hidden, play)
    assert (found[:, 0] != torch.arange(8)).all()


@pytest.mark.parametrize("name", ["greedy", "sample", "beam", "text", "nearest"])
def test_ranks_synchronise_before_each_step(module, name):
    """Where weights are sharded, a rank whose rows have ended goes on as long as any other."""
    flags: list[bool] = []

    def another_rank_needs_four_steps(flag: bool) -> bool:
        flags.append(flag)
        return flag or len(flags) < 5

    answers = []
    for sync_any in (None, another_rank_needs_four_steps):
        batch = batch_of(tiny_rows(2))
        answers.append(module.items.generate_negatives(module.model, batch, MODES[name], 0, sync_any=sync_any))
    assert torch.equal(*answers)
    assert len(flags) >= 5


# --- settings ---


def test_seeds_of_rows():
    """By id and seed alone; different for each."""
    first = row_seeds(torch.arange(1000), 5)
    assert first.dtype == torch.long
    assert torch.equal(first[[3, 8]], row_seeds(torch.tensor([3, 8]), 5))
    assert len(set(first.tolist()) | set(row_seeds(torch.arange(1000), 6).tolist())) == 2000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_negatives": 0}, "num_negatives must be >= 1, got 0"),
        ({"num_beams": 0}, "num_beams must be >= 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be >= 1, got -1"),
        ({"temperature": 0.0}, r"temperature must be > 0, got 0.0; use decode='greedy'"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"decode": "beam_k_random", "num_beams": 2, "num_negatives": 3}, "num_beams 2 must be at least num_negatives 3"),
        (
            {"grounding": "none", "num_negatives": 2},
            "grounding 'none' generates one free answer for each row; several negatives or beams need grounding 'trie'",
        ),
        ({"grounding": "embedding", "decode": "beam_k_random"}, "grounding 'embedding' generates one free answer for each row"),
    ],
    ids=str,
)
def test_bad_values(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfPlay(**settings)
