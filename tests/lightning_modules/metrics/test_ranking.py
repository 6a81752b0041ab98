import math

import pytest
import torch

from malleable.lightning_modules.graphs.settings import LinkRanking
from malleable.lightning_modules.metrics.ranking import (
    RankingMetrics,
    ScoredRankingMetrics,
    average_precision,
    capped_recall,
    hit_rate,
    item_ranks,
    ndcg,
    precision,
    rank_in_list,
    rank_of_target,
    recall,
    reciprocal_rank,
)
from malleable.lightning_modules.metrics.significance import row_values
from malleable.lightning_modules.recommendation.baselines import ItemKNN
from malleable.lightning_modules.recommendation.sft import SFT


def test_rank_of_target_with_each_tie_policy():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]])
    target = torch.tensor([2])  # one better, two equal
    assert rank_of_target(scores, target, "optimistic").tolist() == [2]
    assert rank_of_target(scores, target, "realistic").tolist() == [3]
    assert rank_of_target(scores, target, "pessimistic").tolist() == [4]


@pytest.mark.parametrize("value", [0.5, math.nan, -math.inf])
def test_a_constant_scorer_is_ranked_in_the_middle(value):
    scores = torch.full((2, 9), value)
    ranks = rank_of_target(scores, torch.tensor([0, 8]))
    assert ranks.tolist() == [5, 5]
    assert hit_rate(ranks[:, None], torch.ones(2, 1), 1).tolist() == [0, 0]


def test_rank_of_target_treats_nan_as_worst():
    scores = torch.tensor([[math.nan, -5.0, 0.0]])
    assert rank_of_target(scores, torch.tensor([0])).tolist() == [3]
    assert rank_of_target(scores, torch.tensor([1])).tolist() == [2]


def test_rank_in_list_is_the_first_position_and_ignores_padding():
    recommended = torch.tensor([[4, 2, 7], [7, 7, -1], [1, -1, -1], [3, 1, -1]])
    ranks = rank_in_list(recommended, torch.tensor([2, 7, 5, -1]))
    assert ranks.tolist() == [2, 1, math.inf, math.inf]
    assert rank_in_list(recommended[:, :0], torch.tensor([2, 7, 5, -1])).isinf().all()


def test_item_ranks_by_policy_with_mask():
    scores = torch.tensor([[0.5, 0.5, 0.9, 0.5, 9.0]])
    labels = torch.tensor([[0, 1, 0, 2, 3]])
    mask = torch.tensor([[True, True, True, True, False]])
    inf = math.inf
    assert item_ranks(scores, labels, mask, "optimistic").tolist() == [[4, 3, 1, 2, inf]]
    assert item_ranks(scores, labels, mask, "pessimistic").tolist() == [[2, 3, 1, 4, inf]]
    assert item_ranks(scores, labels, mask, "realistic").tolist() == [[3, 3, 1, 3, inf]]


def test_item_ranks_of_masked_candidates_come_last():
    scores = torch.tensor([[math.nan, 1.0, -math.inf, 5.0]])
    labels = torch.tensor([[1, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, False]])
    assert item_ranks(scores, labels, mask, "pessimistic").tolist() == [[3, 1, 2, math.inf]]


def test_item_ranks_agree_with_rank_of_target_on_one_relevant_item():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (50, 12), generator=generator).float()
    target = torch.randint(12, (50,), generator=generator)
    labels = torch.nn.functional.one_hot(target, 12)
    for ties in ("optimistic", "realistic", "pessimistic"):
        ranks = item_ranks(scores, labels, None, ties).gather(1, target[:, None])[:, 0]
        assert torch.equal(ranks, rank_of_target(scores, target, ties))


def test_metrics_of_one_ranking_by_hand():
    # Relevant at ranks 2 and 4 and 5; cut at 4.
    ranks = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    labels = torch.tensor([[0, 1, 0, 1, 1]])
    assert hit_rate(ranks, labels, 4).item() == 1
    assert hit_rate(ranks, labels, 1).item() == 0
    assert precision(ranks, labels, 4).item() == pytest.approx(2 / 4)
    assert recall(ranks, labels, 4).item() == pytest.approx(2 / 3)
    assert capped_recall(ranks, labels, 2).item() == pytest.approx(1 / 2)
    assert recall(ranks, labels, 2).item() == pytest.approx(1 / 3)
    assert reciprocal_rank(ranks, labels, 4).item() == pytest.approx(1 / 2)
    assert reciprocal_rank(ranks, labels, 1).item() == 0
    assert average_precision(ranks, labels, 4).item() == pytest.approx((1 / 2 + 2 / 4) / 3)
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    assert ndcg(ranks, labels, 4).item() == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / ideal)


def test_ndcg_gains():
    ranks = torch.tensor([[1.0, 2.0, 3.0]])
    labels = torch.tensor([[1, 2, 3]])
    assert ndcg(ranks, labels, 3, "linear").item() == pytest.approx(0.7900, abs=5e-5)
    assert ndcg(ranks, labels, 3, "exp").item() == pytest.approx(0.6806, abs=5e-5)


def test_a_row_without_relevant_candidates_is_zero_everywhere():
    ranks, labels = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2)
    for function in (hit_rate, precision, recall, capped_recall, reciprocal_rank, ndcg, average_precision):
        assert function(ranks, labels, 2).item() == 0


def naive_row(scores, labels, k):
    """Sort one row in Python and count."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    rel = [labels[i] for i in order]
    total = sum(label > 0 for label in labels)
    hits = [label > 0 for label in rel[:k]]
    found = [i for i, hit in enumerate(hits) if hit]
    dcg = sum(label / math.log2(i + 2) for i, label in enumerate(rel[:k]))
    ideal = sum(label / math.log2(i + 2) for i, label in enumerate(sorted(labels, reverse=True)[:k]))
    return {
        "hr": float(any(hits)),
        "recall": sum(hits) / total,
        "recall_cap": sum(hits) / min(k, total),
        "precision": sum(hits) / k,
        "mrr": 1 / (found[0] + 1) if found else 0.0,
        "map": sum((j + 1) / (i + 1) for j, i in enumerate(found)) / min(k, total),
        "ndcg": dcg / ideal,
    }


def scored_rows(seed=0, rows=30):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, 15, generator=generator)
    labels = (torch.rand(rows, 15, generator=generator) * 4).long() * (torch.rand(rows, 15, generator=generator) < 0.3)
    mask = torch.rand(rows, 15, generator=generator) < 0.8
    return scores, labels, mask


def test_scored_metrics_equal_a_naive_loop():
    scores, labels, mask = scored_rows()
    metric = ScoredRankingMetrics(ks=(1, 3, 20))
    metric.update(scores, labels, mask, torch.arange(30))
    result = metric.compute()
    rows = [(s[m].tolist(), y[m].tolist()) for s, y, m in zip(scores, labels, mask, strict=True) if (y * m).any()]
    assert 10 < len(rows) < 30
    for k in (1, 3, 20):
        expected = [naive_row(*row, k) for row in rows]
        for name in expected[0]:
            assert result[f"{name}_{k}"].item() == pytest.approx(sum(row[name] for row in expected) / len(rows), abs=1e-7), name


def test_scored_metrics_count_empty_rows_as_zero_without_skip_empty():
    scores, labels, mask = torch.rand(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), torch.ones(2, 3, dtype=torch.bool)
    for skip, expected in ((True, 1.0), (False, 0.5)):
        metric = ScoredRankingMetrics(ks=(1,), skip_empty=skip)
        metric.update(scores, labels, mask, torch.arange(2))
        assert metric.compute()["hr_1"].item() == expected


@pytest.mark.parametrize("ties", ["realistic", "pessimistic"])
def test_constant_scores_never_reach_one(ties):
    metric = ScoredRankingMetrics(ks=(1, 10), ties=ties)
    labels = torch.tensor([[1, 0, 0], [0, 0, 1]])
    metric.update(torch.zeros(2, 3), labels, torch.ones_like(labels, dtype=torch.bool), torch.arange(2))
    result = metric.compute()
    assert result["mrr_10"] < 1
    assert result["ndcg_10"] < 1
    assert result["hr_1"] == 0


def test_recommended_lists_by_hand():
    # The toy of the exposure tests: ranks 2, 2, missing, 1 among two.
    metric = RankingMetrics(ks=(1, 2))
    metric.update(torch.tensor([[0, 1], [0, 2], [0, 1], [3, 1]]), torch.tensor([1, 2, 5, 3]), torch.arange(4))
    result = metric.compute()
    assert result["hr_2"].item() == 0.75
    assert result["ndcg_2"].item() == pytest.approx(0.5654648768, abs=1e-7)
    assert result["mrr_2"].item() == pytest.approx((0.5 + 0.5 + 1) / 4)
    assert result["hr_1"] == result["ndcg_1"] == result["mrr_1"] == 0.25


def test_repeated_rows_and_targets_outside_the_catalogue():
    metric = RankingMetrics(ks=(2,))
    # Row 1 repeats row 0; row 2 has no target in the catalogue and meets padding: a miss that counts.
    metric.update(torch.tensor([[5, -1], [5, -1], [4, -1]]), torch.tensor([5, 5, -1]), torch.tensor([0, -1, 1]))
    assert metric.compute()["hr_2"].item() == 0.5


def test_splitting_and_shuffling_rows_does_not_change_metrics():
    generator = torch.Generator().manual_seed(1)
    recommended, target = torch.randint(30, (200, 10), generator=generator), torch.randint(30, (200,), generator=generator)
    scores, labels, mask = scored_rows(1, 200)
    ids = torch.arange(200)
    lists, scored = [RankingMetrics(), RankingMetrics()], [ScoredRankingMetrics(), ScoredRankingMetrics()]
    lists[0].update(recommended, target, ids)
    scored[0].update(scores, labels, mask, ids)
    for rows in ids[torch.randperm(200, generator=generator)].split(7):
        lists[1].update(recommended[rows], target[rows], ids[rows])
        scored[1].update(scores[rows], labels[rows], mask[rows], ids[rows])
    assert lists[0].compute() == lists[1].compute()
    assert scored[0].compute() == scored[1].compute()


def test_states_do_not_grow_and_support_inference_mode():
    metric = RankingMetrics(ks=(2,))
    with torch.inference_mode():
        metric.update(torch.tensor([[0, 1]]), torch.tensor([1]), torch.tensor([0]))
        metric.compute()
        metric.reset()
    metric.update(torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([0]))
    assert metric.compute()["mrr_2"] == 1
    assert metric.rank_counts.shape == (2,)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_standard_errors_are_those_of_the_values_of_rows():
    recommended = torch.tensor([[1, 2, 3]] * 6)
    target = torch.tensor([1, 2, 3, 9, 2, -1])
    metric = RankingMetrics(ks=(1, 3))
    with pytest.raises(RuntimeError, match="call compute"):
        metric.standard_errors()
    metric.update(recommended, target, torch.arange(6))
    metric.compute()
    metric.reset()
    ranks = rank_in_list(recommended, target)
    for name, error in metric.standard_errors().items():
        values = torch.from_numpy(row_values(name, ranks))
        assert error == pytest.approx(float(values.std(correction=0)) / math.sqrt(6))


def test_metrics_without_rows_are_nan():
    assert RankingMetrics().compute()["hr_10"].isnan()
    assert ScoredRankingMetrics().compute()["map_10"].isnan()


def test_refusals():
    with pytest.raises(ValueError, match=r"ks must be cut-offs >= 1, got \(0, 5\)"):
        RankingMetrics(ks=(0, 5))
    with pytest.raises(ValueError, match=r"K >= 10, got \(4, 5\); pad it to 10 columns"):
        RankingMetrics().update(torch.zeros(4, 5, dtype=torch.long), torch.zeros(4, dtype=torch.long), torch.arange(4))
    with pytest.raises(ValueError, match=r"ties must be one of .*'optimistic'.*, got 'lucky'"):
        rank_of_target(torch.zeros(1, 2), torch.tensor([0]), "lucky")
    with pytest.raises(ValueError, match="gain must be 'linear' or 'exp', got 'square'"):
        ScoredRankingMetrics(gain="square")


@pytest.mark.parametrize("ks", [(0,), (), (5, -1)])
def test_modules_check_cut_offs_before_data_is_read(ks):
    for make in (SFT, ItemKNN, LinkRanking):
        with pytest.raises(ValueError, match="ks must be cut-offs >= 1, got"):
            make(ks=ks)
