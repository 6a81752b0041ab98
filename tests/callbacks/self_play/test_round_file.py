"""Which rows a round draws, and what its file holds, refuses and shows."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tiny import TOKENS, batch_of, tiny_catalog, tiny_rows

from malleable.callbacks.self_play.round_file import RoundFile, answer_statistics, draw_positions
from malleable.datamodules.batch import PreferenceBatch
from malleable.datamodules.loading import RowView

# Rows 5, 0 and 2 of the toy pool: true items 0 (after 5 6 7), 1 (after 0), 5 (after 2 3 4).
POSITIONS = [5, 0, 2]


def whole_file() -> RoundFile:
    """One wrong answer, one true one, one missing."""
    answers = [[list(TOKENS[3])], [list(TOKENS[1])], [[]]]
    return RoundFile(POSITIONS, [5, 0, 2], [[3], [1], [-1]], answers, [[-1.5, -2.5], [-0.25, -0.25], [-3.0, -3.0]])


def rows() -> RowView:
    return RowView(tiny_rows(), POSITIONS)


# --- drawing ---


def test_rounds_share_no_row_until_the_pool_cannot_fill_another():
    """10 rows in rounds of 3: three rounds from one shuffle, and one row left over; then the next shuffle."""
    rounds = [draw_positions(np.arange(10), 3, number, seed=4) for number in range(1, 7)]
    for three in (rounds[:3], rounds[3:]):
        drawn = [position for positions in three for position in positions]
        assert len(set(drawn)) == 9
        assert set(drawn) < set(range(10))
    assert rounds[:3] != rounds[3:]


def test_a_round_depends_on_its_number_alone():
    assert draw_positions(np.arange(10), 3, 5, seed=4) == draw_positions(np.arange(10), 3, 5, seed=4)
    assert draw_positions(np.arange(10), 3, 5, seed=4) != draw_positions(np.arange(10), 3, 5, seed=5)


def test_removed_row_does_not_change_the_order_of_others():
    ids = np.arange(100, 120)
    whole = draw_positions(ids, 20, 1, seed=4)
    less = np.delete(ids, 3)
    assert less[draw_positions(less, 19, 1, seed=4)].tolist() == [id for id in ids[whole].tolist() if id != 103]


def test_warm_up_has_an_independent_draw():
    """Round 0 takes neither round 1's rows nor keeps any from it."""
    assert draw_positions(np.arange(10), 3, 0, seed=4) != draw_positions(np.arange(10), 3, 1, seed=4)
    rounds = [draw_positions(np.arange(10), 3, number, seed=4) for number in range(1, 4)]
    draw_positions(np.arange(10), 3, 0, seed=4)
    assert rounds == [draw_positions(np.arange(10), 3, number, seed=4) for number in range(1, 4)]


def test_all_rows_in_every_round():
    assert draw_positions(np.arange(4), None, 7, seed=0) == [0, 1, 2, 3]
    assert sorted(draw_positions(np.arange(4), 4, 7, seed=0)) == [0, 1, 2, 3]
    assert draw_positions(np.arange(9), 9, 1, seed=0) != draw_positions(np.arange(9), 9, 2, seed=0)


def test_rounds_that_cannot_be_drawn():
    with pytest.raises(ValueError, match="a round needs 5 rows, but there are 4 training rows; lower rows_per_round"):
        draw_positions(np.arange(4), 5, 1, seed=0)
    with pytest.raises(ValueError, match="a round must have at least 1 row, got 0; null uses all rows"):
        draw_positions(np.arange(4), 0, 1, seed=0)


# --- the file ---


@pytest.mark.parametrize("known", ["rows", "answers", "reference"])
def test_what_is_written_is_read(tmp_path, known):
    """At each stage: only rows, then their answers, then the reference."""
    file = whole_file()
    if known != "reference":
        file.reference = None
    if known == "rows":
        file.items = file.answers = None
    file.write(tmp_path / "new/round_1.parquet")
    found = RoundFile.read(tmp_path / "new/round_1.parquet", file.digest())
    assert found == file
    assert found.digest() == file.digest()
    assert [path.name for path in tmp_path.rglob("*.p*")] == ["round_1.parquet"], "nothing half-written stays"
    columns = {"rows": 2, "answers": 4, "reference": 5}[known]
    assert len(pq.read_table(tmp_path / "new/round_1.parquet").column_names) == columns


def test_the_reference_is_kept_in_single_precision(tmp_path):
    """As it comes from the model: a third in float32, not the nearest double."""
    file = replace(whole_file(), reference=torch.tensor([[1 / 3, -1.0]] * 3).tolist())
    file.write(tmp_path / "round.parquet")
    assert RoundFile.read(tmp_path / "round.parquet", file.digest()).reference == file.reference


def test_checksum_depends_on_all_columns():
    file = whole_file()
    changes = {"positions": [5, 0, 1], "sample_ids": [5, 0, 1], "items": [[3], [1], [0]], "answers": [[[4]], [[4]], [[]]], "reference": None}
    digests = {replace(file, **{name: value}).digest() for name, value in changes.items()}
    assert len(digests | {file.digest()}) == 6


def test_a_changed_file_is_refused(tmp_path):
    path = tmp_path / "round_2.parquet"
    digest = whole_file().digest()
    replace(whole_file(), items=[[3], [1], [0]]).write(path)
    with pytest.raises(MisconfigurationException, match=r"round_2\.parquet is damaged, or is not the round file that belongs to the checkpoint"):
        RoundFile.read(path, digest)
    assert RoundFile.read(path).items == [[3], [1], [0]]


@pytest.mark.parametrize("damage", ["empty", "cut off", "another table"])
def test_an_unreadable_file_is_refused(tmp_path, damage):
    path = tmp_path / "round_2.parquet"
    whole_file().write(path)
    if damage == "another table":
        pq.write_table(pq.read_table(path).rename_columns(["a", "b", "c", "d", "e"]), path)
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 300])
    with pytest.raises(MisconfigurationException, match=r"round_2\.parquet is damaged, or is not the round file that belongs to the checkpoint"):
        RoundFile.read(path, whole_file().digest())


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"the file of the interrupted round is missing: .*round_3\.parquet does not exist; restore"):
        RoundFile.read(tmp_path / "round_3.parquet", "any")


# --- pairs ---


def test_pairs_start_with_the_true_answer():
    pairs = whole_file().pairs(tiny_rows())
    shown = [pairs[index] for index in range(len(pairs))]
    assert [row["sample_id"] for row in shown] == POSITIONS
    assert [row["answers"] for row in shown] == [
        [list(TOKENS[0]), list(TOKENS[3])],
        [list(TOKENS[1]), list(TOKENS[1])],
        # Where the model gave no answer the true one stands in: such a pair has no gradient.
        [list(TOKENS[5]), list(TOKENS[5])],
    ]
    assert [row["item_ids"] for row in shown] == [[0, 3], [1, 1], [5, -1]]
    batch = batch_of(shown)
    assert isinstance(batch, PreferenceBatch)
    assert batch.reference_logps.tolist() == whole_file().reference


def test_pairs_before_the_reference_is_known():
    pairs = replace(whole_file(), reference=None).pairs(tiny_rows())
    assert batch_of([pairs[0], pairs[1]]).reference_logps is None


def test_rows_with_identical_or_missing_answers_are_removed():
    kept = whole_file().without_identical(rows())
    assert kept == RoundFile([5], [5], [[3]], [[list(TOKENS[3])]])


def test_row_with_one_identical_answer_is_removed():
    answers = [[list(TOKENS[3]), list(TOKENS[0])], [list(TOKENS[2]), list(TOKENS[3])], [list(TOKENS[2]), []]]
    file = RoundFile(POSITIONS, [5, 0, 2], [[3, 0], [2, 3], [2, -1]], answers)
    assert file.without_identical(rows()).positions == [0]


# --- figures ---


def test_figures_by_hand():
    """Three answers: one is the true title, one names no item; of the items 3 and 1 with 5 and 7 interactions the mean is 6."""
    assert whole_file().figures(rows(), tiny_catalog()) == {
        "frac_identical": pytest.approx(1 / 3),
        "frac_invalid": pytest.approx(1 / 3),
        "distinct_negs": 1.0,
        "top_neg_share": 1.0,
        "mean_pop_neg": 6.0,
    }


def test_concentrated_answers_by_hand():
    """24 answers: item 3 in twelve rows, twelve others once: 13 distinct; the ten most frequent are 12 + 9 of 24."""
    others = [[20 + index] for index in range(12)]
    answers = [[list(TOKENS[3])]] * 12 + [[other] for other in others]
    file = RoundFile(list(range(24)), list(range(24)), [[3]] * 12 + [[-1]] * 12, answers)
    figures = file.figures(tiny_rows(), None)
    assert figures["distinct_negs"] == pytest.approx(13 / 24)
    assert figures["top_neg_share"] == pytest.approx(21 / 24)
    assert figures["frac_invalid"] == 0.5
    assert "mean_pop_neg" not in figures, "nothing is known of popularity"
    unknown = file.figures(tiny_rows(), replace(tiny_catalog(), popularity=()))
    assert unknown == figures


def test_statistics_of_answers_by_hand():
    """Ten answers, one of them no item: three distinct and the fourth; the first three make up 8 of 9."""
    popularity = [10, 20, 30, 40]
    items = [0, 0, 0, 0, 1, 1, 2, 2, 3, -1]
    assert answer_statistics(items, popularity) == {
        "distinct": 4.0,
        "top_3_share": pytest.approx(8 / 9),
        "mean_popularity": pytest.approx((4 * 10 + 2 * 20 + 2 * 30 + 40) / 9),
    }
    assert answer_statistics(items) == {"distinct": 4.0, "top_3_share": pytest.approx(8 / 9)}
    assert answer_statistics([-1], popularity) == {"distinct": 0.0, "top_3_share": 0.0, "mean_popularity": 0.0}


def test_answers_without_items():
    file = RoundFile([0], [0], [[-1]], [[[9, 9]]])
    assert file.figures(tiny_rows(), tiny_catalog())["mean_pop_neg"] == 0.0
