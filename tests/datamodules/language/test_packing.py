import itertools

import numpy as np
import pytest
from tiny import batch_of

from malleable.datamodules.language.packing import Window, pack_windows, split_sequences
from malleable.datamodules.recommendation.packed_rows import PackedRows
from malleable.datamodules.recommendation.prompt import PromptPieces

EOS = 1
# Item i is written as i + 1 tokens of 100 + i.
TOKENS = [(100 + item,) * (item + 1) for item in range(5)]


def pieces(prefix=(), separator=(EOS,), suffix=(EOS,)):
    return PromptPieces(prefix, separator, suffix, None, TOKENS, [(*ids, EOS) for ids in TOKENS], [], EOS)


def arrays(*sequences):
    return [np.array(items) for items in sequences]


def test_windows_contain_the_maximum_number_of_items():
    # Items of 2, 3, 4, 5, 6 tokens with their separator; a row of 10 with 1 token of overhead has room for 9.
    windows = split_sequences(arrays([0, 1, 2, 3, 4], [4]), np.array([2, 3, 4, 5, 6]), 10, 1)
    assert windows == [Window(0, 0, 3, 10), Window(0, 3, 4, 6), Window(0, 4, 5, 7), Window(1, 0, 1, 7)]


def test_an_item_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match=r"pack_length 5 is less than the 7 tokens of the longest item; increase pack_length"):
        split_sequences(arrays([0]), np.array([2, 6]), 5, 1)


def test_best_fit_packs_each_window_once_and_within_the_length():
    rng = np.random.default_rng(0)
    windows = [Window(index, 0, 2, int(length)) for index, length in enumerate(rng.integers(2, 33, 300))]
    rows = pack_windows(windows, 32)
    assert sorted(itertools.chain.from_iterable(rows)) == sorted(windows)
    assert max(sum(window.length for window in row) for row in rows) <= 32
    # Best fit decreasing needs at most 11/9 of the least number of rows.
    assert len(rows) <= 11 / 9 * np.ceil(sum(window.length for window in windows) / 32) + 1


@pytest.mark.parametrize("template", [pieces(), pieces((7, 8), (9,), (5, 6)), pieces((7,), (), ())])
def test_every_history_occurs_once_in_the_form_of_the_template(template):
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 5, length) for length in rng.integers(2, 6, 40)]
    packed = PackedRows(sequences, template, 64)
    documents = []
    for row in range(len(packed)):
        example = packed[row]
        assert example["sample_id"] == packed.sample_ids[row]
        assert len(example["input_ids"]) == len(example["document_ids"]) <= 64
        pairs = zip(example["document_ids"], example["input_ids"], strict=True)
        own = [[token for _, token in group] for _, group in itertools.groupby(pairs, key=lambda pair: pair[0])]
        assert sorted(set(example["document_ids"])) == list(range(1, len(own) + 1))
        assert packed.row_tokens()[row] == sum(len(document) - 1 for document in own)
        documents += own
    assert sorted(documents) == sorted(template.document(items.tolist()) for items in sequences)


def test_a_long_history_is_cut_between_items():
    packed = PackedRows(arrays([4, 4, 4, 4, 4]), pieces(), 13)
    # Two items of 5 tokens and an end each make 12; the fifth stands alone and has nothing to learn from.
    assert [packed[row]["input_ids"] for row in range(len(packed))] == [[104] * 5 + [EOS] + [104] * 5 + [EOS]] * 2


def test_rows_collate_with_positions_of_each_document():
    batch = batch_of([PackedRows(arrays([0, 1], [1, 0]), pieces(), 16)[0]], pad_token_id=0, pad_to_multiple_of=1)
    assert batch.document_ids.tolist() == [[1] * 5 + [2] * 5]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4] * 2]
    assert batch.input_ids.tolist() == [[100, EOS, 101, 101, EOS, 101, 101, EOS, 100, EOS]]


def test_no_history_gives_no_row():
    assert len(PackedRows(arrays([3]), pieces(), 16)) == 0
    assert len(PackedRows([], pieces(), 16)) == 0
