"""Filtered ranks by hand and against the literal loops."""

import json
import runpy

import literal_kg
import pytest
import torch
from launch import launch

from malleable.lightning_modules.metrics import link_prediction
from malleable.lightning_modules.metrics.link_prediction import LinkPredictionMetrics, QueryEntities, filtered_ranks

TIES = ("optimistic", "realistic", "pessimistic")


def tails(*rows):
    """QueryEntities of each query."""
    pairs = [(entity, row) for row, entities in enumerate(rows) for entity in entities]
    entity, row = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)
    return QueryEntities(entity, row)


# Five entities; entity 4 was never seen in training.
SCORES = torch.tensor(
    [
        [0.9, 0.5, 0.5, 0.1, 0.0],  # tail 1: entity 0 is better but known; 2 ties
        [0.3, 0.8, 0.7, 0.2, 0.1],  # tail 4, unseen: 1 and 2 are known
        [0.2, 0.2, 0.2, 0.2, 0.2],  # tail 3: everything ties, 0 is known
    ]
)
TRUE = tails([1], [4], [3])
KNOWN = tails([0, 1], [1, 2, 4], [0, 3])


@pytest.mark.parametrize(("ties", "expected"), [("optimistic", [1, 3, 1]), ("realistic", [1.5, 3, 2.5]), ("pessimistic", [2, 3, 4])])
def test_a_toy_graph_by_hand(ties, expected):
    assert filtered_ranks(SCORES, TRUE, KNOWN, ties).tolist() == expected


@pytest.mark.parametrize(("ties", "expected"), [("optimistic", [2, 5, 1]), ("realistic", [2.5, 5, 3]), ("pessimistic", [3, 5, 5])])
def test_without_a_filter(ties, expected):
    assert filtered_ranks(SCORES, TRUE, tails([], [], []), ties).tolist() == expected


def test_the_ranked_tail_need_not_be_in_the_filter():
    others = tails([0], [2, 1], [0])
    assert torch.equal(filtered_ranks(SCORES, TRUE, others), filtered_ranks(SCORES, TRUE, KNOWN))


def random_case(seed, rows=13, entities=31):
    """Scores of few values, so that many tie; several true tails a query; the filter in any order."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(7, (rows, entities), generator=generator).float()
    known = [torch.randperm(entities, generator=generator)[: row % 6].tolist() for row in range(rows)]
    true = [torch.randperm(entities, generator=generator)[: row % 3 + 1].tolist() for row in range(rows)]
    filters = [sorted({*k, *t[:1]}) for k, t in zip(known, true, strict=True)]
    shuffled = tails(*filters)
    order = torch.randperm(len(shuffled.row), generator=generator)
    return scores, true, filters, tails(*true), QueryEntities(shuffled.entity[order], shuffled.row[order])


@pytest.mark.parametrize("compared", [1, 100, 1 << 20])
def test_equals_the_literal_loops(compared, monkeypatch):
    monkeypatch.setitem(link_prediction.COMPARED, "cpu", compared)
    for seed in range(3):
        scores, true, filters, pairs, known = random_case(seed)
        for ties in TIES:
            expected = [literal_kg.rank(scores[row], tail, set(filters[row]) - {tail}, ties) for row, own in enumerate(true) for tail in own]
            assert filtered_ranks(scores, pairs, known, ties).tolist() == expected
        official = [literal_kg.official_rank(scores[row], own[0], filters[row]) for row, own in enumerate(true)]
        first = tails(*([own[0]] for own in true))
        assert filtered_ranks(scores, first, known).tolist() == official


def test_properties():
    scores, _, _, true, known = random_case(5)
    best, middle, worst = (filtered_ranks(scores, true, known, ties) for ties in TIES)
    assert (best <= middle).all()
    assert (middle <= worst).all()
    assert (worst <= filtered_ranks(scores, true, QueryEntities(known.entity[:0], known.row[:0]))).all()
    # A margin changes no rank.
    assert torch.equal(filtered_ranks(scores + 3, true, known), worst)
    # A constant scorer: last of the unfiltered candidates, and half-way.
    flat = torch.zeros(1, 10)
    one, filters = tails([3]), tails([0, 1, 3])
    assert filtered_ranks(flat, one, filters).item() == 7 + 1
    assert filtered_ranks(flat, one, filters, "realistic").item() == (1 + 8) / 2


def test_counts_beyond_single_precision(monkeypatch):
    monkeypatch.setattr(link_prediction, "EXACT", 4)
    assert filtered_ranks(SCORES, TRUE, KNOWN).tolist() == [2, 3, 4]


def test_nan_scores_are_an_error():
    for cell in ((0, 1), (1, 0), (2, 4)):
        scores = SCORES.clone()
        scores[cell] = torch.nan
        with pytest.raises(ValueError, match="1 of 3 queries have nan scores: training has diverged"):
            filtered_ranks(scores, TRUE, KNOWN)
    infinite = SCORES.clone()
    infinite[0, 0], infinite[0, 3] = torch.inf, -torch.inf
    assert filtered_ranks(infinite, TRUE, KNOWN).tolist() == [2, 3, 4]


RELATION = torch.tensor([0, 1, 3])


def test_figures_by_hand():
    metric = LinkPredictionMetrics(4, ks=(3, 1))
    metric.update(SCORES, TRUE, KNOWN, RELATION, torch.arange(3))
    figures = {name: value.item() for name, value in metric.compute().items()}
    expected = {"mr": 3, "mrr": (1 / 2 + 1 / 3 + 1 / 4) / 3, "hits_1": 0, "hits_3": 2 / 3, "mrr_tail": (1 / 2 + 1 / 3) / 2, "mrr_head": 1 / 4}
    assert figures == pytest.approx(expected)
    assert metric.relation_figures["mr"].tolist() == pytest.approx([2, 3, torch.nan, 4], nan_ok=True)
    assert metric.relation_figures["queries"].tolist() == [1, 1, 0, 1]
    assert metric.relation_figures["hits_3"].tolist() == pytest.approx([1, 1, torch.nan, 0], nan_ok=True)
    metric.reset()
    assert metric.compute()["mrr"].isnan()


def test_a_direction_without_queries_has_no_figure():
    metric = LinkPredictionMetrics(4)
    metric.update(SCORES[:2], tails([1], [4]), tails([0, 1], [1, 2, 4]), RELATION[:2], torch.arange(2))
    assert sorted(metric.compute()) == ["hits_1", "hits_10", "hits_3", "mr", "mrr", "mrr_tail"]


@pytest.mark.parametrize("ties", TIES)
def test_batches_and_repeats_do_not_change_metrics(ties):
    scores, _, _, true, known = random_case(9)
    relation, ids = torch.arange(13) % 6, torch.arange(13)
    whole = LinkPredictionMetrics(6, ties=ties)
    whole.update(scores, true, known, relation, ids)
    parts = LinkPredictionMetrics(6, ties=ties)
    for rows in torch.randperm(13).split(4):
        rows = torch.cat([rows, torch.tensor([0])])  # repeated to fill the batch
        picked = [[t.entity[t.row == row].tolist() for row in rows] for t in (true, known)]
        parts.update(scores[rows], tails(*picked[0]), tails(*picked[1]), relation[rows], torch.cat([ids[rows[:-1]], torch.tensor([-1])]))
    assert torch.equal(whole.sums, parts.sums)
    assert whole.compute() == parts.compute()


def test_refusals():
    with pytest.raises(ValueError, match="an even number >= 2, got 3"):
        LinkPredictionMetrics(3)
    with pytest.raises(ValueError, match="ties must be one of"):
        LinkPredictionMetrics(2, ties="first")
    with pytest.raises(ValueError, match="ks must be cut-offs"):
        LinkPredictionMetrics(2, ks=())


SCRIPT = """
import json, os
import torch
from torch import distributed
from malleable.lightning_modules.metrics.link_prediction import LinkPredictionMetrics, QueryEntities

rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
if size > 1:
    distributed.init_process_group("gloo")
generator = torch.Generator().manual_seed(0)
number, entities = 101, 37
scores = torch.randint(9, (number, entities), generator=generator).float()
target, relation = torch.randint(entities, (number,), generator=generator), torch.randint(6, (number,), generator=generator)
mask = torch.rand(number, entities, generator=generator) < 0.1
# As a distributed loader deals them: shuffled, and filled up with repeats that are marked.
order = torch.randperm(number, generator=generator) if size > 1 else torch.arange(number)
rows = torch.cat([order, order[: -number % size]])
ids = torch.where(torch.arange(len(rows)) < number, rows, -1 - rows)
result = []
for ties in ("optimistic", "realistic", "pessimistic"):
    metric = LinkPredictionMetrics(6, ties=ties)
    for part in torch.arange(rank, len(rows), size).split(7):
        at = rows[part]
        row, known = mask[at].nonzero().unbind(1)
        metric.update(scores[at], QueryEntities(target[at], torch.arange(len(at))), QueryEntities(known, row), relation[at], ids[part])
    result.append({name: value.item() for name, value in metric.compute().items()})
    result.append(metric.relation_figures["mrr"].tolist())
print(json.dumps(result))
"""


@pytest.mark.ddp
def test_shuffled_and_padded_shards_give_equal_metrics(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    one = runpy.run_path(str(script))["result"]
    assert [json.loads(out) for out in launch([script], ranks=2)] == [one, one]
    assert 0 < one[0]["mrr"] < 1
