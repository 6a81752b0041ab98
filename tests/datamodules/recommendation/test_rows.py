import numpy as np
import pyarrow as pa
import pytest
from tiny import batch_of

from malleable.datamodules.batch import AnswerBatch, PreferenceBatch
from malleable.datamodules.negative_samplers import Uniform
from malleable.datamodules.recommendation.prompt import PromptPieces
from malleable.datamodules.recommendation.rows import AnswerRows, PromptWindow, RaggedColumn
from malleable.datamodules.recommendation.splits import RowIndex

EOS = 1
TOKENS = [(100 + item,) * (item + 1) for item in range(6)]
PIECES = PromptPieces((7,), (9,), (5, 6), (8,), TOKENS, [(*ids, EOS) for ids in TOKENS], TOKENS, EOS)
SEQUENCES = [np.array([0, 1, 2, 3]), np.array([4, 5])]


def index(*rows, candidates=None):
    return RowIndex(np.array([row[0] for row in rows]), np.array([row[1] for row in rows]), candidates)


def prompt_length(items, candidates=()):
    return len(PIECES.prompt(items, candidates))


def test_a_ragged_column_gives_views():
    column = RaggedColumn(pa.chunked_array([[[1, 2], []], [[3]]], pa.list_(pa.int32())))
    assert [column[row].tolist() for row in range(len(column))] == [[1, 2], [], [3]]


def test_prompts_contain_the_history_and_seen_items_are_listed():
    table = PromptWindow(2, PIECES).make_rows("train", SEQUENCES, index((0, 1), (0, 3), (1, 1)), np.array([10, 11, 12]))
    rows = AnswerRows(table, SEQUENCES, PIECES)
    assert rows[1] == {
        "sample_id": 11,
        "prompt": PIECES.prompt([1, 2]),
        "answers": [(103, 103, 103, 103, EOS)],
        "item_ids": [3],
        "history": [1, 2],
        "earlier": [0, 1, 2],
        "seen": [0, 1, 2],
    }
    assert rows[2]["history"] == rows[2]["seen"] == [4]
    assert rows.row_tokens().tolist() == [3, 5, 7]
    batch = batch_of([rows[row] for row in range(3)])
    assert type(batch) is AnswerBatch
    assert batch.target.tolist() == [1, 3, 5]
    assert batch.seen.tolist() == [[0, -1, -1], [0, 1, 2], [4, -1, -1]]


def test_selected_rows_keep_their_ids():
    table = PromptWindow(2, PIECES).make_rows("train", SEQUENCES, index((0, 1), (0, 3), (1, 1)))
    rows = AnswerRows(table, SEQUENCES, PIECES, select=np.array([2, 0]), hide_seen=False)
    assert [rows[row]["sample_id"] for row in range(len(rows))] == [2, 0]
    assert rows.row_tokens().tolist() == [7, 3]
    assert rows[0]["seen"] == ()


def test_a_row_at_the_end_of_its_history_has_no_answer():
    table = PromptWindow(9, PIECES).make_rows("predict", SEQUENCES, index((0, 4), (1, 2)))
    rows = AnswerRows(table, SEQUENCES, PIECES)
    assert rows[1]["item_ids"] == [-1]
    assert rows[1]["answers"] == [()]
    batch = batch_of([rows[0], rows[1]])
    assert batch.answer_ids.shape == (2, 1, 0)
    assert batch.history.tolist() == [[0, 1, 2, 3], [-1, -1, 4, 5]]


def test_rows_without_text():
    rows = AnswerRows(PromptWindow(9).make_rows("train", SEQUENCES, index((0, 2))), SEQUENCES, None)
    assert (rows[0]["prompt"], rows[0]["answers"], rows[0]["item_ids"]) == ((), [()], [2])
    assert rows.row_tokens().tolist() == [0]


@pytest.mark.parametrize("limit", range(8, 25))
def test_only_the_oldest_items_of_long_prompts_are_omitted(limit, caplog):
    """The naive loop: drop the oldest item until the prompt fits."""
    expected, end = [0, 1, 2], 3
    while prompt_length(expected) > limit:
        expected = expected[1:]
    table = PromptWindow(9, PIECES, limit).make_rows("test", SEQUENCES, index((0, end)))
    row = AnswerRows(table, SEQUENCES, PIECES)[0]
    assert row["history"] == expected
    assert row["prompt"][0] == 7
    assert row["prompt"][-2:] == [5, 6]
    assert row["seen"] == [0, 1, 2]
    assert ("1 of 1 test prompts exceed" in caplog.text) == (len(expected) < 3)


def test_candidates_reduce_the_space_of_the_history():
    candidates = [np.array([3, 0])]
    limit = prompt_length([1, 2], [3, 0])
    for room, expected in ((limit, [1, 2]), (limit - 1, [2])):
        table = PromptWindow(9, PIECES, room).make_rows("test", SEQUENCES, index((0, 3), candidates=candidates))
        row = AnswerRows(table, SEQUENCES, PIECES)[0]
        assert row["history"] == expected
        assert row["candidates"] == [3, 0]
        assert len(row["prompt"]) <= room


def test_a_prompt_without_space_for_an_item_is_an_error():
    needed = prompt_length([2])
    PromptWindow(9, PIECES, needed).make_rows("val", SEQUENCES, index((0, 3)))
    with pytest.raises(
        ValueError, match=f"max_prompt_length {needed - 2} is too small for a single item in 1 val prompts; increase it to at least {needed}"
    ):
        PromptWindow(9, PIECES, needed - 2).make_rows("val", SEQUENCES, index((0, 3)))


def test_negatives_follow_the_true_answer_and_are_not_items_of_the_user():
    table = PromptWindow(1, PIECES).make_rows("train", SEQUENCES, index((0, 2), (1, 1)))
    rows = AnswerRows(table, SEQUENCES, PIECES, negatives=Uniform(3).bind(6, (), 0))
    first = rows[0]
    assert first["item_ids"][0] == 2
    assert sorted(first["item_ids"][1:]) == [3, 4, 5]
    assert first["answers"] == [PIECES.answers[item] for item in first["item_ids"]]
    assert rows[0] == first
    for seed in range(20):  # item 0 is earlier than what the prompt shows
        drawn = AnswerRows(table, SEQUENCES, PIECES, negatives=Uniform(1).bind(6, (), seed))[0]["item_ids"][1]
        assert drawn in (3, 4, 5)
    assert type(batch_of([rows[0], rows[1]])) is PreferenceBatch


@pytest.mark.parametrize("hide_seen", [True, False])
def test_all_earlier_items_are_listed_for_any_prompt_length(hide_seen):
    rows = AnswerRows(PromptWindow(1, PIECES).make_rows("train", SEQUENCES, index((0, 2), (1, 1))), SEQUENCES, PIECES, hide_seen=hide_seen)
    assert [rows[0]["earlier"], rows[0]["history"]] == [SEQUENCES[0][:2].tolist(), SEQUENCES[0][1:2].tolist()]
    assert rows[0]["seen"] == (rows[0]["earlier"] if hide_seen else ())


def test_negatives_are_selected_among_candidates():
    table = PromptWindow(9, PIECES).make_rows("train", SEQUENCES, index((0, 2), candidates=[np.array([5, 2, 4])]))
    rows = AnswerRows(table, SEQUENCES, PIECES, negatives=Uniform(2).bind(6, (), 0))
    assert sorted(rows[0]["item_ids"][1:]) == [4, 5]


def test_predicted_rows_have_no_negatives():
    table = PromptWindow(9, PIECES).make_rows("predict", SEQUENCES, index((0, 4)))
    assert AnswerRows(table, SEQUENCES, PIECES, negatives=Uniform(2).bind(6, (), 0))[0]["item_ids"] == [-1]
