import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from malleable.datamodules.graphs.queries import Answers, GroupedQueries, Lists, QueryRows, group
from malleable.datamodules.graphs.report import both_directions
from malleable.datamodules.loading import BatchDataset, PhasedLoader

# Five entities, two relations: (0, 0, ?) has the answers 1, 2, and 1 once more.
TRAIN = np.array([[0, 0, 1], [0, 0, 2], [3, 1, 1], [0, 0, 1]], dtype=np.int32)
TEST = np.array([[0, 0, 4], [4, 1, 1]], dtype=np.int32)
QUERIES, TESTED = both_directions(TRAIN, 2), both_directions(TEST, 2)
ANSWERS = Answers.of(np.concatenate([QUERIES, TESTED]), 4)


def answers_by_loop(head: int, relation: int) -> list[int]:
    return sorted({int(t) for h, r, t in np.concatenate([QUERIES, TESTED]) if (h, r) == (head, relation)})


def test_lists():
    lists = Lists(np.array([0, 2, 2, 5]), np.array([7, 8, 4, 5, 6]))
    values, row = lists.take(np.array([2, 1, -1, 0, 2]))
    assert values.tolist() == [4, 5, 6, 7, 8, 4, 5, 6]
    assert row.tolist() == [0, 0, 0, 3, 3, 4, 4, 4]
    assert (len(lists), lists.lengths().tolist()) == (3, [2, 0, 3])
    assert [part.tolist() for part in lists.take(np.array([], dtype=np.int64))] == [[], []]


def test_grouping_keeps_the_order_and_the_repeats_of_targets():
    keys, tails = group(QUERIES, 4)
    assert dict(zip(map(tuple, np.stack(np.divmod(keys, 4), 1).tolist()), np.split(tails.values, tails.offsets[1:-1]), strict=True))[
        0, 0
    ].tolist() == [1, 2, 1]


def test_every_query_finds_all_its_answers_and_no_others():
    for head in range(5):
        for relation in range(4):
            values, _ = ANSWERS.tails.take(ANSWERS.find(np.array([head]), np.array([relation])))
            assert values.tolist() == answers_by_loop(head, relation)


def test_answers_of_queries_without_any():
    assert ANSWERS.find(np.array([4, 4]), np.array([0, 3])).tolist() == [-1, -1]


def test_a_training_batch():
    rows = QueryRows(QUERIES, 100 + np.arange(8))
    assert isinstance(rows, BatchDataset)
    batch = rows.make_batch(torch.tensor([5, 0, 7]))
    assert batch.sample_id.tolist() == [105, 100, 107]
    assert (batch.head.tolist(), batch.relation.tolist(), batch.target.tolist()) == ([1, 0, 1], [3, 0, 2], [3, 1, 0])
    assert batch.target_row.tolist() == [0, 1, 2]
    assert batch.known.tolist() == batch.known_row.tolist() == []
    assert {part.dtype for part in (batch.head, batch.relation, batch.target, batch.target_row, batch.known, batch.sample_id)} == {torch.int64}
    assert all(part.is_contiguous() for part in (batch.head, batch.relation, batch.target))
    assert rows.row_tokens().tolist() == [1] * 8


def test_a_test_batch_contains_the_known_answers():
    batch = QueryRows(TESTED, np.arange(4), ANSWERS).make_batch(torch.arange(4))
    for row in range(4):
        assert batch.known[batch.known_row == row].tolist() == answers_by_loop(int(batch.head[row]), int(batch.relation[row]))
        assert batch.target[row] in batch.known[batch.known_row == row], "the target is known, too"
    assert batch.known_row.tolist() == sorted(batch.known_row.tolist())


def test_a_plain_loader_loads_positions():
    rows = QueryRows(QUERIES, np.arange(8))
    loader = DataLoader(range(len(rows)), batch_size=3, collate_fn=lambda positions: rows.make_batch(torch.tensor(positions)))
    assert [batch.sample_id.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_queries_without_target_have_known_answers():
    batch = QueryRows(np.array([[0, 0, -1], [4, 0, -1]]), np.arange(2), ANSWERS).make_batch(torch.arange(2))
    assert batch.target.tolist() == batch.target_row.tolist() == []
    assert (batch.known.tolist(), batch.known_row.tolist()) == ([1, 2, 4], [0, 0, 0])


def test_queries_for_relations_contain_the_known_relations():
    """(0, ?, 1) is known by relation 0 and (3, ?, 1) by 1, as is (1, ?, 3) by no relation but its reciprocal; (0, 0, ?) stands between."""
    asked = np.array([[3, -1, 1], [0, 0, -1], [1, -1, 3], [0, -1, 1]])
    batch = QueryRows(asked, np.arange(4), ANSWERS).make_batch(torch.tensor([0, 1, 2, 3]))
    assert (batch.head.tolist(), batch.relation.tolist(), batch.tail.tolist()) == ([3, 0, 1, 0], [-1, 0, -1, -1], [1, -1, 3, 1])
    assert (batch.known.tolist(), batch.known_row.tolist()) == ([1, 1, 2, 4, 0], [0, 1, 1, 1, 3])
    assert batch.target.tolist() == batch.target_row.tolist() == []
    without = QueryRows(asked, np.arange(4)).make_batch(torch.arange(4))
    assert without.known.tolist() == without.known_row.tolist() == []
    assert QueryRows(TESTED, np.arange(4), ANSWERS).make_batch(torch.arange(4)).tail is None


def test_known_relations_of_every_pair():
    everything = np.concatenate([QUERIES, TESTED]).tolist()
    pairs = np.array([(head, tail) for head in range(5) for tail in range(5)])
    relations, row = ANSWERS.relations(*pairs.T)
    for place, (head, tail) in enumerate(pairs.tolist()):
        assert relations[row == place].tolist() == sorted({r for h, r, t in everything if (h, t) == (head, tail) and r < 2})


def test_grouped_queries_hold_the_same_triples():
    grouped = GroupedQueries(QUERIES, np.arange(8), 4)
    batch = grouped.make_batch(torch.arange(len(grouped)))
    triples = zip(batch.head[batch.target_row].tolist(), batch.relation[batch.target_row].tolist(), batch.target.tolist(), strict=True)
    assert sorted(triples) == sorted(map(tuple, QUERIES.tolist()))
    assert len({*zip(batch.head.tolist(), batch.relation.tolist(), strict=True)}) == len(grouped) == 5
    assert grouped.row_tokens().sum() == 8
    assert batch.target_row.tolist() == sorted(batch.target_row.tolist())
    first = [
        next(i for i, (h, r, _) in enumerate(QUERIES.tolist()) if (h, r) == pair)
        for pair in zip(batch.head.tolist(), batch.relation.tolist(), strict=True)
    ]
    assert batch.sample_id.tolist() == first


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_has_each_triple_once_in_both_directions(grouped):
    rows = GroupedQueries(QUERIES, np.arange(8), 4) if grouped else QueryRows(QUERIES, np.arange(8))
    loader = PhasedLoader(rows, 3, drop_last=False, row_tokens=rows.row_tokens())
    seen = []
    for batch in loader:
        seen += zip(batch.head[batch.target_row].tolist(), batch.relation[batch.target_row].tolist(), batch.target.tolist(), strict=True)
        assert batch.num_step_tokens.item() == len(batch.target)
        assert batch.num_step_rows.item() == len(batch)
    assert sorted(seen) == sorted(map(tuple, QUERIES.tolist()))
