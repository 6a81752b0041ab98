import itertools
from collections import Counter

import pytest
import torch
from small_lm import EOS, prompts, random_titles, real, score_all_in_trie, small_lm

from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.functional.language.trie_beam_search import beam_search
from malleable.lightning_modules.functional.language.trie_sampling import SamplingOptions, sample, truncated_log_softmax

TITLES = random_titles()
PROMPTS, MASK = prompts()
SEEDS = torch.arange(len(PROMPTS)) + 100
FEW = [[2, EOS], [2, 3, EOS], [2, 3, 4, EOS], [5, 6, EOS], [5, 7, EOS], [6, EOS]]


def exact(temperature=1.0, allowed=None):
    """Probabilities of ``FEW`` after the first prompt; temperature divides the logits at every step."""

    class Tempered(torch.nn.Module):
        def forward(self, ids):
            output = small_lm()(ids)
            output.logits = output.logits / temperature
            return output

    return score_all_in_trie(Tempered(), FEW, real(PROMPTS, MASK)[0], allowed).exp()


def chi_square(items, probabilities):
    expected = probabilities * items.numel()
    kept = expected > 0
    assert set(items.flatten().tolist()) <= set(kept.nonzero()[:, 0].tolist())
    counts = torch.bincount(items.flatten(), minlength=len(probabilities))
    return ((counts - expected) ** 2 / expected)[kept].sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_titles_have_the_probabilities_of_the_model(temperature):
    drawn = sample(small_lm(), Trie.build(FEW), PROMPTS[:1], MASK[:1], seeds=SEEDS[:1], num_samples=4000, temperature=temperature)
    probabilities = exact(temperature)
    assert chi_square(drawn.item_ids, probabilities) < 20.5  # 5 degrees of freedom, p = 0.001
    torch.testing.assert_close(drawn.scores, probabilities.log()[drawn.item_ids], atol=1e-4, rtol=1e-4)


def test_filters_hold():
    allowed = torch.tensor([False, True, True, False, True, False])
    drawn = sample(small_lm(), Trie.build(FEW), PROMPTS[:1], MASK[:1], seeds=SEEDS[:1], num_samples=2000, temperature=3.0, allowed=allowed)
    assert chi_square(drawn.item_ids, exact(3.0, allowed.tolist())) < 13.8  # 2 degrees of freedom, p = 0.001
    none = sample(small_lm(), Trie.build(FEW), PROMPTS, MASK, seeds=SEEDS, num_samples=2, allowed=torch.zeros(len(PROMPTS), 6, dtype=torch.bool))
    assert (none.item_ids == -1).all()
    assert (none.scores == -torch.inf).all()


@pytest.mark.parametrize("distinct", [False, True])
def test_a_row_gives_the_same_samples_in_any_batch(distinct):
    model, trie = small_lm(), Trie.build(TITLES)
    settings = {"num_samples": 6, "temperature": 2.0, "distinct": distinct}
    batch = sample(model, trie, PROMPTS, MASK, seeds=SEEDS, **settings)
    again = sample(model, trie, PROMPTS.flip(0), MASK.flip(0), seeds=SEEDS.flip(0), **settings)
    assert torch.equal(again.item_ids.flip(0), batch.item_ids)
    for row, prompt in enumerate(real(PROMPTS, MASK)):
        alone = sample(model, trie, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.bool), seeds=SEEDS[row : row + 1], **settings)
        assert alone.item_ids[0].tolist() == batch.item_ids[row].tolist()
        torch.testing.assert_close(alone.scores[0], batch.scores[row], atol=1e-5, rtol=1e-5)
    other = sample(model, trie, PROMPTS, MASK, seeds=SEEDS + 1, **settings)
    assert not torch.equal(other.item_ids, batch.item_ids)


def test_zero_temperature_is_one_beam():
    model, trie = small_lm(), Trie.build(TITLES)
    greedy = sample(model, trie, PROMPTS, MASK, seeds=SEEDS, num_samples=3, temperature=0)
    beam = beam_search(model, trie, PROMPTS, MASK, num_beams=1, k=1)
    assert torch.equal(greedy.item_ids, beam.item_ids.expand(-1, 3))
    assert (greedy.scores == 0).all()  # it was certain


def test_a_small_top_p_is_one_beam_too():
    model, trie = small_lm(), Trie.build(TITLES)
    drawn = sample(model, trie, PROMPTS, MASK, seeds=SEEDS, num_samples=3, temperature=5.0, top_p=1e-6)
    assert torch.equal(drawn.item_ids, beam_search(model, trie, PROMPTS, MASK, num_beams=1, k=1).item_ids.expand(-1, 3))


def test_top_p_keeps_the_smallest_sufficient_set_of_children():
    probabilities = torch.tensor([[0.2, 0.5, 0.3, 0.6, 0.4]])
    segment = torch.tensor([[0, 0, 0, 1, 1]])
    draw = SamplingOptions(SEEDS, 1, 1.0, 0.7)
    # 0.5 alone is short of 0.7, with 0.3 it is not; 0.6 is short, too
    expected = torch.tensor([[0.0, 0.5 / 0.8, 0.3 / 0.8, 0.6, 0.4]])
    torch.testing.assert_close(truncated_log_softmax(probabilities.log(), segment, 2, draw).exp(), expected)
    torch.testing.assert_close(
        truncated_log_softmax(probabilities.log(), segment, 2, draw._replace(top_p=0.55)).exp(), torch.tensor([[0, 0.625, 0.375, 1, 0]])
    )


def test_without_replacement_all_titles_are_sampled_once():
    drawn = sample(small_lm(), Trie.build(TITLES), PROMPTS, MASK, seeds=SEEDS, num_samples=len(TITLES) + 2, temperature=2.0, distinct=True)
    assert [sorted(row) for row in drawn.item_ids.tolist()] == [[-1, -1, *range(len(TITLES))]] * len(PROMPTS)
    torch.testing.assert_close(drawn.scores.exp().sum(1), torch.ones(len(PROMPTS)))


def test_pairs_without_replacement_have_the_exact_frequencies():
    # the first by its probability, the second by its share of the rest
    count = 3000
    drawn = sample(
        small_lm(),
        Trie.build(FEW),
        PROMPTS[:1].expand(count, -1),
        MASK[:1].expand(count, -1),
        seeds=torch.arange(count),
        num_samples=2,
        temperature=4.0,
        distinct=True,
    )
    p = exact(4.0).tolist()
    seen = Counter(map(tuple, drawn.item_ids.tolist()))
    pairs = {(a, b): count * p[a] * p[b] / (1 - p[a]) for a, b in itertools.permutations(range(len(FEW)), 2)}
    assert set(seen) <= set(pairs)
    common = {pair: expected for pair, expected in pairs.items() if expected >= 5}
    rest = count - sum(common.values())
    statistic = sum((seen[pair] - expected) ** 2 / expected for pair, expected in common.items())
    statistic += (count - sum(seen[pair] for pair in common) - rest) ** 2 / rest
    assert len(common) > 10
    assert statistic < len(common) + 4 * (2 * len(common)) ** 0.5


def test_ranks_that_finish_early_run_equally_many_passes():
    asked = []

    def another_rank_needs_nine_steps(mine):
        asked.append(mine)
        return len(asked) <= 9

    sample(small_lm(), Trie.build(FEW), PROMPTS, MASK, seeds=SEEDS, sync_any=another_rank_needs_nine_steps)
    assert len(asked) == 10
    assert not asked[-1]


@pytest.mark.parametrize("setting", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"num_samples": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ValueError, match="sampling needs temperature >= 0, 0 < top_p <= 1 and num_samples >= 1, got"):
        sample(small_lm(), Trie.build(FEW), PROMPTS, MASK, seeds=SEEDS, **setting)


def test_one_seed_for_each_row_is_needed():
    with pytest.raises(ValueError, match=r"seeds must contain one number for each of the 4 rows, got shape \(1,\)"):
        sample(small_lm(), Trie.build(FEW), PROMPTS, MASK, seeds=SEEDS[:1])


@pytest.mark.parametrize("search", ["beams", "renormalised beams", "draws", "distinct draws"])
def test_scores_are_float32_under_another_default(search):
    """Precision plugins set the default number format."""

    def run():
        if "beams" in search:
            return beam_search(model, trie, PROMPTS, MASK, num_beams=8, k=8, renormalize=search != "beams")
        return sample(model, trie, PROMPTS, MASK, seeds=SEEDS, num_samples=8, temperature=2.0, distinct=search != "draws")

    model, trie = small_lm(), Trie.build(TITLES)
    expected = run()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.item_ids, expected.item_ids)
    assert torch.equal(found.scores, expected.scores)
