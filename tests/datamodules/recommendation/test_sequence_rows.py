"""Rows of items: each target exactly once, in parts and packed; times and types of interactions; rows to rank items for."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_shop

from malleable import RecommendationDataModule, SequenceBatch, Split, Tables, Uniform, collate
from malleable.datamodules.batch import AnswerBatch
from malleable.datamodules.recommendation.rows import RowTable
from malleable.datamodules.recommendation.sequence_rows import SequenceColumns, SequenceRows

SEQUENCES = [np.arange(1, 13), np.array([20, 21]), np.array([5, 3, 5, 9, 8])]
TITLES = np.arange(30, dtype=np.uint64) * np.uint64(7919)


def answer_table(sequences=SEQUENCES):
    sequence = np.concatenate([np.full(len(items) - 1, number) for number, items in enumerate(sequences)])
    end = np.concatenate([np.arange(1, len(items)) for items in sequences])
    target = np.concatenate([items[1:] for items in sequences])
    return RowTable(np.arange(100, 100 + len(end)), sequence, np.zeros_like(end), end, target)


def make(max_length=4, pack_length=None, select=None, columns=None):
    table = answer_table()
    select = np.arange(len(table)) if select is None else np.array(select, dtype=np.int64)
    return SequenceRows(columns or SequenceColumns(SEQUENCES), table, select, TITLES, max_length, pack_length)


def targets_of(rows):
    """Pairs of the items before a target and the target, of all rows."""
    found = []
    for index in range(len(rows)):
        row = rows[index]
        documents = row.get("document_ids", np.ones(len(row["items"])))
        for number in np.unique(documents):
            items, marks = (np.asarray(row[name])[documents == number] for name in ("items", "supervised"))
            found += [(tuple(items[:end].tolist()), int(items[end])) for end in range(len(items)) if marks[end]]
    return sorted(found)


@pytest.mark.parametrize("pack_length", [None, 5, 9, 100])
def test_each_target_is_in_exactly_one_row(pack_length):
    rows = make(pack_length=pack_length)
    found = targets_of(rows)
    assert len(found) == len(answer_table())
    for before, target in found:
        assert 1 <= len(before) <= 4
        assert len(before) >= 2 or before[0] in (1, 20, 5), "at least half of the items are before a target, except at the start of a history"
        assert any([*before, target] == items[start : start + len(before) + 1].tolist() for items in SEQUENCES for start in range(len(items)))
    assert sum(rows.row_tokens()) == len(found)
    if pack_length is not None:
        assert all(len(rows[index]["items"]) <= pack_length for index in range(len(rows)))
    assert len(set(rows.sample_ids.tolist())) == len(rows)


def test_a_long_history_is_split_after_each_full_part():
    rows = make()
    items = [rows[index]["items"].tolist() for index in range(6)]
    assert items == [[1, 2, 3, 4, 5], [3, 4, 5, 6, 7], [5, 6, 7, 8, 9], [7, 8, 9, 10, 11], [9, 10, 11, 12], [20, 21]]
    assert rows[0]["supervised"].tolist() == [False, True, True, True, True]
    assert rows[1]["supervised"].tolist() == [False, False, False, True, True]


def test_only_selected_targets_contribute():
    table = answer_table()
    select = [0, 5, 12]
    found = targets_of(make(select=select))
    assert sorted(target for _, target in found) == sorted(table.target[select].tolist())
    assert sum(make(select=select).row_tokens()) == 3
    assert len(make(select=[])) == 0


def test_an_id_depends_on_the_content_of_the_row_only():
    all_rows, some = make(), make(select=range(11, 16))
    ids = {tuple(all_rows[index]["items"].tolist()): int(all_rows.sample_ids[index]) for index in range(len(all_rows))}
    assert len(some) == 2
    for index in range(len(some)):
        assert ids[tuple(some[index]["items"].tolist())] == some.sample_ids[index]


def test_equal_histories_of_two_users_have_different_ids():
    sequences = [np.array([1, 2, 3]), np.array([1, 2, 3])]
    table = answer_table(sequences)
    rows = SequenceRows(SequenceColumns(sequences), table, np.arange(len(table)), TITLES, 4)
    assert rows.sample_ids[0] != rows.sample_ids[1]


def test_times_and_types_are_those_of_the_items():
    columns = SequenceColumns(SEQUENCES, [items * 10.0 for items in SEQUENCES], [items % 3 for items in SEQUENCES])
    for pack_length in (None, 20):
        rows = make(columns=columns, pack_length=pack_length)
        batch = rows.collate([rows[index] for index in range(len(rows))])
        real = batch.item_ids >= 0
        assert (batch.times[real] == batch.item_ids[real] * 10.0).all()
        assert (batch.behaviors[real] == batch.item_ids[real] % 3).all()
        assert (batch.behaviors[~real] == -1).all()
        assert (batch.document_ids is not None) == (pack_length is not None)


def test_a_row_shorter_than_a_part_is_refused():
    with pytest.raises(ValueError, match=r"pack_length 4 must be larger than the 4 items before a target \(split.sequence_length\)"):
        make(pack_length=4)


def shop(folder: Path, **options) -> RecommendationDataModule:
    settings = {
        "tokenizer": "none",
        "train_view": "sequence",
        "split": Split(sequence_length=4, min_user_events=2),
        "cache_dir": str(folder / "cache"),
    }
    data = small_shop.shop(folder, **settings | options)
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.mark.parametrize("view", ["sequence", "packed_sequence"])
def test_the_data_module_makes_sequence_batches(view, tmp_path):
    data = shop(tmp_path, train_view=view, batch_size=1)
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, SequenceBatch)
    assert not batch.is_query
    assert batch.num_step_tokens > 0
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert all(isinstance(batch, SequenceBatch) and batch.is_query for batch in loader)
    targets = sum(int((batch.targets >= 0).sum()) for batch in data.train_dataloader())
    assert targets <= len(data.answer_dataset)
    assert data.behaviors == ()


def test_rows_to_rank_items_for_are_those_of_prompts(tmp_path):
    data, other = shop(tmp_path), shop(tmp_path, train_view="answer")
    for name in ("val_dataset", "test_dataset"):
        queries, answers = getattr(data, name), getattr(other, name)
        assert queries.sample_ids.tolist() == answers.sample_ids.tolist()
        first = queries.collate([queries[index] for index in range(len(queries))])
        second = answers.collate([answers[index] for index in range(len(answers))])
        assert isinstance(second, AnswerBatch)
        assert first.target.tolist() == second.target.tolist()
        assert [[item for item in row if item >= 0] for row in first.history.tolist()] == [
            [item for item in row if item >= 0] for row in second.history.tolist()
        ]
        assert first.seen.tolist() == second.seen.tolist()
        assert (first.times[first.item_ids >= 0] >= 0).all()
        assert all(own == sorted(own) for own in first.times.tolist())


def test_limits_of_the_split_select_targets(tmp_path):
    split = Split(sequence_length=4, min_user_events=2)
    every = shop(tmp_path, split=split)
    limited = shop(tmp_path, split=replace(split, train_limit=7))
    assert sum(limited.sequence_dataset.row_tokens()) == 7
    omitted = int(every.answer_dataset.sample_ids[3])
    (tmp_path / "omitted.txt").write_text(f"{omitted}\n")
    without = shop(tmp_path, split=replace(split, train_without=str(tmp_path / "omitted.txt")))
    assert sum(without.sequence_dataset.row_tokens()) == sum(every.sequence_dataset.row_tokens()) - 1


def test_types_of_interactions_come_from_a_column(tmp_path):
    small_shop.write(tmp_path)
    lines = (tmp_path / "events.csv").read_text().splitlines()
    kinds = ("view", "purchase", "")
    rows = [f"{line},{kinds[number % 3]}" for number, line in enumerate(lines[1:])]
    (tmp_path / "events.csv").write_text("\n".join([f"{lines[0]},kind", *rows]) + "\n")
    source = Tables(str(tmp_path / "events.csv"), str(tmp_path / "items.csv"), interaction_columns={"behavior": "kind"})
    split = Split(sequence_length=6, min_user_events=2)
    data = RecommendationDataModule(source, "none", train_view="sequence", split=split, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("fit")
    assert data.behaviors == ("purchase", "view")
    row = data.train_dataset[0]
    assert set(row["behaviors"].tolist()) == {-1, 0, 1}
    number = {"view": 1, "purchase": 0, "": -1}
    first_user = [number[line.rpartition(",")[2]] for line in rows if line.startswith("u0,")]
    own = next(data.train_dataset[index] for index in range(len(data.train_dataset)) if data.train_dataset.rows[index][0].sequence == 0)
    assert own["behaviors"].tolist() == first_user[: len(own["behaviors"])]


def test_prediction_rows_of_users_have_times_and_those_of_a_file_have_none(tmp_path):
    data = shop(tmp_path, predict_users="all")
    batch = next(iter(data.predict_dataloader()))
    assert batch.times is not None
    assert (batch.targets == -1).all()
    (tmp_path / "histories.csv").write_text("title\nThe Silver River,The Broken River\n")
    data = shop(tmp_path, predict_file=str(tmp_path / "histories.csv"))
    batch = next(iter(data.predict_dataloader()))
    assert batch.times is None
    assert batch.history[0, -2:].tolist() == [data.catalog.titles.index(title) for title in ("The Silver River", "The Broken River")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"sample_id": 0, "items": [1, 2]}, {"sample_id": 1, "items": [1], "target": 2}],
            "either all rows of a SequenceBatch have the field 'target'",
        ),
        ([{"sample_id": 7, "items": []}], "the field 'items' of the row with sample_id 7 must be a list of item numbers >= 0, not empty"),
        ([{"sample_id": 7, "items": [1, -2]}], "must be a list of item numbers >= 0"),
        ([{"sample_id": 7, "items": [1, 2], "times": [1.0]}], "the field 'times' of the row with sample_id 7 has 1 values for 2 items"),
    ],
)
def test_rows_that_cannot_be_collated_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        collate(rows, SequenceBatch)


def test_a_sequence_of_one_item_has_no_target():
    batch = collate([{"sample_id": 0, "items": [4]}, {"sample_id": 1, "items": [4, 5]}], SequenceBatch)
    assert batch.supervised.tolist() == [8]
    assert batch.longest == 2


def test_an_omitted_target_does_not_change_the_ids_of_rows():
    """Also the first or the last target of a part."""
    every = make()
    for omitted in range(len(answer_table())):
        some = make(select=[row for row in range(len(answer_table())) if row != omitted])
        ids = set(some.sample_ids.tolist())
        assert ids <= set(every.sample_ids.tolist())
        assert len(every) - len(some) <= 1
        assert sum(some.row_tokens()) == len(answer_table()) - 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"document_ids": [0, 1, 1]}, "the field 'document_ids' of the row with sample_id 7 must have numbers >= 1"),
        ({"document_ids": [1, 2, 1]}, "with the items of a sequence next to each other; got"),
        ({"items": [1.5, 2.0, 3.0]}, "the field 'items' of the row with sample_id 7 must be a list of item numbers >= 0"),
        ({"items": ["a", "b", "c"]}, "must be a list of item numbers >= 0"),
    ],
)
def test_fields_that_would_be_misread_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        collate([{"sample_id": 7, "items": [1, 2, 3], **fields}], SequenceBatch)


def test_candidates_may_be_an_array():
    batch = collate([{"sample_id": 0, "items": [1], "target": 2, "candidates": np.array([2, 3])}], SequenceBatch)
    assert batch.candidates.tolist() == [[2, 3]]


def test_settings_without_effect_are_refused(tmp_path):
    with pytest.raises(ValueError, match="negatives has no effect with train_view='sequence': set negatives of the model"):
        small_shop.shop(tmp_path, tokenizer="none", train_view="sequence", negatives=Uniform())
    with pytest.raises(ValueError, match="train_view must be one of answer, packed, sequence, packed_sequence, got 'pack'"):
        small_shop.shop(tmp_path, train_view="pack")
