import pytest
import torch

from malleable.datamodules.batch import AnswerBatch, Batch, Catalog, KnowledgeGraph, PackedBatch, PreferenceBatch, QueryBatch
from malleable.datamodules.collate import collate
from malleable.datamodules.padding import pad

ROWS = [
    {"sample_id": 7, "prompt": [3, 4, 5], "answers": [[6, 2]], "item_ids": [1], "history": [8, 9], "seen": [1, 8, 9]},
    {"sample_id": 8, "prompt": [3], "answers": [[6, 7, 2]], "item_ids": [0], "history": [9], "seen": [0]},
]


@pytest.mark.parametrize(("side", "expected"), [("right", [[1, 2], [3, 0], [0, 0]]), ("left", [[1, 2], [0, 3], [0, 0]])])
def test_ragged_rows_are_padded_on_a_side(side, expected):
    assert pad([[1, 2], [3], []], 0, side).tolist() == expected


def test_no_rows_make_an_empty_table():
    assert pad([], 0).shape == (0, 0)


def test_one_answer_a_prompt():
    batch = collate(ROWS, pad_token_id=0, pad_to_multiple_of=1)
    assert type(batch) is AnswerBatch
    assert batch.sample_id.tolist() == [7, 8]
    assert batch.prompt_ids.tolist() == [[3, 4, 5], [0, 0, 3]]  # on the left: answers follow the last prompt token
    assert batch.prompt_mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.answer_ids.tolist() == [[[6, 2, 0]], [[6, 7, 2]]]
    assert batch.answer_mask.tolist() == [[[True, True, False]], [[True, True, True]]]
    assert batch.history.tolist() == [[8, 9], [-1, 9]]
    assert batch.seen.tolist() == [[1, 8, 9], [0, -1, -1]]
    assert batch.target.tolist() == [1, 0]
    assert batch.candidates is None


def test_several_answers_make_a_preference():
    rows = [{"sample_id": 0, "prompt": [3], "answers": [[4, 2], [5, 6, 2]], "item_ids": [1, 0], "candidates": [0, 1]}]
    batch = collate(rows, PreferenceBatch, pad_to_multiple_of=1)
    assert type(batch) is PreferenceBatch
    assert batch.answer_ids.tolist() == [[[4, 2, 0], [5, 6, 2]]]
    assert batch.item_ids.tolist() == [[1, 0]]
    assert batch.candidates.tolist() == [[0, 1]]
    assert batch.reference_logps is None


def test_rows_may_have_different_numbers_of_answers():
    rows = [
        {
            "sample_id": 0,
            "prompt": [3],
            "answers": [[4], [5], [6, 7]],
            "item_ids": [4, 5, 6],
            "reference_logps": [-1.0, -2.0, -3.0],
            "smoothing": 0.1,
        },
        {"sample_id": 1, "prompt": [3], "answers": [[4], [5]], "item_ids": [4, 5], "reference_logps": [-4.0, -5.0], "smoothing": 0.2},
    ]
    batch = collate(rows, PreferenceBatch, pad_to_multiple_of=1)
    assert batch.answer_mask.sum(-1).tolist() == [[1, 1, 2], [1, 1, 0]]
    assert batch.item_ids.tolist() == [[4, 5, 6], [4, 5, -1]]
    assert batch.reference_logps.tolist() == [[-1, -2, -3], [-4, -5, 0]]
    assert batch.smoothing.tolist() == pytest.approx([0.1, 0.2])


@pytest.mark.parametrize("kind", [None, AnswerBatch, PreferenceBatch, PackedBatch])
def test_the_type_of_a_batch_is_not_inferred(kind):
    rows = {
        AnswerBatch: {"sample_id": 5, "prompt": [3], "answers": [[4]]},
        PreferenceBatch: {"sample_id": 5, "prompt": [3], "answers": [[4], [5]]},
        PackedBatch: {"sample_id": 5, "input_ids": [3, 4], "document_ids": [1, 1]},
    }
    for own, row in rows.items():
        if own is (kind or AnswerBatch):
            assert type(collate([row], kind)) is own
        else:
            with pytest.raises(ValueError, match="row"):
                collate([row], kind)


def test_other_kinds_have_their_own_collation():
    with pytest.raises(ValueError, match="kind must be AnswerBatch, PreferenceBatch, PackedBatch or SequenceBatch, got QueryBatch"):
        collate(ROWS, QueryBatch)


def test_missing_fields_of_a_row():
    batch = collate([{"sample_id": 0, "prompt": [3], "answers": [[4]]}])
    assert batch.item_ids.tolist() == [[-1]]
    assert batch.history.shape == (1, 0)


def test_packed_rows_restart_positions_with_each_document():
    rows = [
        {"sample_id": 0, "input_ids": [5, 6, 7, 8], "document_ids": [1, 1, 2, 2]},
        {"sample_id": 1, "input_ids": [5, 6, 7], "document_ids": [1, 1, 1]},
    ]
    batch = collate(rows, PackedBatch, pad_token_id=9, pad_to_multiple_of=1)
    assert type(batch) is PackedBatch
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 9]]
    assert batch.document_ids.tolist() == [[1, 1, 2, 2], [1, 1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]


@pytest.mark.parametrize("multiple", [1, 4, 8])
def test_widths_are_multiples(multiple):
    """So are the columns of answers behind a shared prompt, where an answer's last token is not fed."""
    batch = collate([*ROWS, {**ROWS[0], "answers": [[4] * 7]}], pad_token_id=9, pad_to_multiple_of=multiple)
    assert batch.prompt_ids.shape[1] == {1: 3, 4: 4, 8: 8}[multiple]
    assert batch.answer_ids.shape[2] == {1: 7, 4: 9, 8: 9}[multiple]
    assert batch.answer_columns == {1: 6, 4: 8, 8: 8}[multiple]
    assert batch.prompt_mask.sum(1).tolist() == [3, 1, 3]
    assert batch.prompt_ids[1].tolist()[-1] == 3
    assert batch.answer_mask.sum(2).tolist() == [[2], [3], [7]]
    packed = collate([{"sample_id": 0, "input_ids": [5, 6, 7], "document_ids": [1, 1, 1]}], PackedBatch, pad_token_id=9, pad_to_multiple_of=multiple)
    assert packed.input_ids.shape[1] % multiple == 0
    assert packed.document_ids[0].tolist() == [1, 1, 1] + [0] * (packed.input_ids.shape[1] - 3)


def test_answer_columns_are_the_maximum_over_rows():
    answers = [[[4] * 9, [5]], [[4] * 3, [5] * 4]]
    rows = [{"sample_id": number, "prompt": [3], "answers": pair} for number, pair in enumerate(answers)]
    assert collate(rows, PreferenceBatch, pad_to_multiple_of=1).answer_columns == 8
    assert collate(rows, PreferenceBatch).answer_columns == 8


def test_rows_without_text_have_no_tokens():
    batch = collate([{"sample_id": 0, "prompt": (), "answers": [()], "item_ids": [3]}])
    assert (batch.prompt_ids.shape, batch.answer_ids.shape) == ((1, 0), (1, 1, 0))


@pytest.mark.parametrize("others", [[], ROWS])
def test_an_empty_prompt_is_refused(others):
    with pytest.raises(ValueError, match="empty prompt in the row with sample_id 4"):
        collate([*others, {"sample_id": 4, "prompt": [], "answers": [[6, 2]]}])


def test_all_tensors_of_a_batch_are_moved():
    batch = collate(ROWS)
    moved = batch.to("meta")
    assert {moved.sample_id.device.type, moved.prompt_ids.device.type, moved.answer_mask.device.type} == {"meta"}
    assert moved.candidates is None
    assert batch.sample_id.device.type == "cpu"
    assert len(moved) == 2


def test_map_applies_to_every_tensor():
    assert Batch(torch.tensor([1, 2])).map(lambda tensor: tensor + 1).sample_id.tolist() == [2, 3]


def test_a_catalogue_counts_its_titles():
    assert len(Catalog(titles=("A", "B"))) == 2


def test_a_graph_counts_reciprocal_relations():
    graph = KnowledgeGraph(("a", "b", "c"), ("near", "in"), (1, 2, 1))
    assert (graph.num_entities, graph.num_relations) == (3, 4)


def test_all_tensors_of_queries_are_moved():
    ids, none = torch.arange(3), torch.empty(0, dtype=torch.long)
    moved = QueryBatch(ids, ids, ids, ids, ids, none, none, num_step_tokens=torch.tensor(1.5)).to("meta")
    assert len(moved) == 3
    assert {part.device.type for part in (moved.head, moved.relation, moved.target, moved.known, moved.num_step_tokens)} == {"meta"}
    assert moved.num_step_rows is None
