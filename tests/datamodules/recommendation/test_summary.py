import logging

import numpy as np
import pandas as pd
import pytest

from malleable.datamodules.recommendation.splits import Split, prepare
from malleable.datamodules.recommendation.summary import DataSummary, log_summary, tied_share
from malleable.datamodules.sources.recommendation.base import InteractionTables, ReadyRow, ReadyRows, items_table

ITEMS = items_table(list("abcdefg"), ["Matrix, The", "B", "C", "D", "B", "<br>", "G"], [("x", "y")] * 7)


def summary(events, split=None, items=ITEMS, notes=()):
    tables = InteractionTables(pd.DataFrame(events, columns=["user_id", "item_id", "timestamp", "rating"][: len(events[0])]), items, notes)
    return prepare(tables, split or Split(min_user_events=1)).summary


def test_counts_after_each_filter():
    events = [
        ("u", "a", 1.6e9, 5), ("u", "b", 1.6e9 + 1, 5), ("u", "a", 1.6e9 + 2, 5), ("u", "c", 1.6e9 + 3, 5), ("u", "unknown", 1.6e9, 5),
        ("v", "a", 1.6e9, 5), ("v", "b", 1.6e9, 2), ("w", "c", 1.6e9, 1),
    ]  # fmt: skip
    found = summary(events, Split(min_rating=3, min_user_events=2))
    assert found.facts["interactions (users)"] == (
        "8 (3) read → 6 (2) rated >= 3 → 5 (2) of known items → 4 (2) first of a user and item → 3 (1) min_user_events 2, min_item_events 1"
    )
    assert found.warnings == []


def test_each_cause_of_dropped_interactions_has_a_count_and_examples(caplog):
    events = [("u", item, 1.6e9 + time) for time, item in enumerate(["a", "w", "x", "y", "z", "z", "f", "f", "c"])]
    found = summary(events)
    unknown = "5 of 9 interactions with items that are not in the items table (4 distinct, e.g. 'w', 'x', 'y')"
    untitled = "2 of 9 interactions with items without a readable title (1 distinct, e.g. 'f')"
    assert found.facts["dropped"] == f"{unknown}; {untitled}"
    assert [record.message for record in caplog.records if "interactions" in record.message] == [f"dropped {unknown}", f"dropped {untitled}"]
    assert "dropped" not in summary(events[:1] + events[-1:]).facts


def test_rows_without_a_rating_are_left_out_only_with_a_minimum():
    nan = float("nan")
    events = [("u", "a", 1.6e9, 5.0), ("u", "b", 1.6e9 + 1, nan), ("u", "c", 1.6e9 + 2, 2.0), ("u", "d", 1.6e9 + 3, 4.0), ("v", "a", 1.6e9, nan)]
    found = summary(events, Split(min_rating=3, min_user_events=1))
    assert found.facts["ratings"] == "2 rows without a rating left out (min_rating)"
    assert found.facts["interactions (users)"].startswith("5 (2) read → 3 (1) with a rating → 2 (1) rated >= 3")
    kept = summary(events)
    assert kept.facts["ratings"] == "2 rows without a rating kept"
    assert kept.facts["interactions (users)"] == "5 (2) read"
    assert "ratings" not in summary(events[:1] + events[2:4]).facts
    with pytest.raises(ValueError, match=r"none of 2 interactions has a rating >= min_rating=3: ratings are missing"):
        summary([events[1], events[4]], Split(min_rating=3, min_user_events=1))


def test_counts_of_merged_cleaned_and_dropped_items():
    found = summary([("u", item, 1.6e9 + time) for time, item in enumerate("abcd")], notes=("2 rows repeat an item_id",))
    assert found.facts["items"] == (
        "7 read, 5 distinct titles; 1 merged by title (e.g. ids b, e: 'B'); 1 titles cleaned (e.g. 'Matrix, The' → 'The Matrix'); "
        "1 without a readable title dropped"
    )
    assert found.facts["source"] == "2 rows repeat an item_id"
    assert found.facts["genres"] == "2 of 5 items, most frequent: x; y"


@pytest.mark.parametrize(
    ("times", "fact", "warning"),
    [
        ([1.6e9, 1.6e9 + 86400], "2020-09-13 to 2020-09-14 (seconds)", None),
        ([1.6e12, 1.6e12 + 86400e3], "2020-09-13 to 2020-09-14 (milliseconds)", None),
        ([1.6e15, 1.6e15], "2020-09-13 to 2020-09-13 (microseconds)", None),
        ([1.6e18, 1.6e18], "2020-09-13 to 2020-09-13 (nanoseconds)", None),
        ([0, 11], "0 to 11 (no dates)", None),
        ([1.6e9, 1.6e12, 1.7e12], "1.6e+09 to 1.7e+12", "1 in seconds, 2 in milliseconds"),
        ([3, 1.6e9], "3 to 1.6e+09", "1 below 1973 in any unit, 1 in seconds"),
        ([1.6e9, np.inf], "2020-09-13 to 2020-09-13 (seconds)", "1 timestamps are infinite"),
    ],
)
def test_times_have_a_unit(times, fact, warning):
    found = DataSummary()
    found.describe_times(np.array(times, dtype=float))
    assert found.facts["time"] == fact
    assert len(found.warnings) == (warning is not None)
    assert warning is None or warning in found.warnings[0]


def test_ties_at_the_split_are_counted_and_ordered_by_row():
    # u's last two events have one time; v's have not.
    events = [("u", "d", 1), ("u", "c", 2), ("u", "a", 2), ("v", "a", 1), ("v", "b", 2), ("v", "c", 3)]
    assert summary(events).facts["tied times"] == (
        "0.0% of val, 50.0% of test targets have the same time as the item before; the order of rows in the file is used"
    )
    assert summary(events[3:]).facts["tied times"] == "none at the split"


def test_tied_share_equals_a_loop():
    rng = np.random.default_rng(0)
    lengths = [4, 1, 6, 3]
    sequences = [np.sort(rng.integers(4, size=length)).astype(float) for length in lengths]
    rows = [(sequence, end) for sequence, length in enumerate(lengths) for end in range(1, length)]
    expected = np.mean([sequences[sequence][end] == sequences[sequence][end - 1] for sequence, end in rows])
    starts = np.cumsum([0, *lengths[:-1]])
    assert tied_share(np.concatenate(sequences), starts, *np.array(rows).T) == pytest.approx(expected)
    assert tied_share(np.zeros(2), np.array([0]), np.array([], dtype=int), np.array([], dtype=int)) == 0


@pytest.mark.parametrize("genre", ["Drama, Comedy", "['Drama', 'Comedy']", "Drama;Comedy"])
def test_genres_that_look_like_lists_give_a_warning(genre):
    found = DataSummary()
    found.describe_genres([(genre,), ("Drama",), ()])
    assert f"1 genres look like lists that were not split, e.g. {genre!r}" in found.warnings[0]
    other = DataSummary()
    other.describe_genres([("Children's",), ("Sci-Fi",), ("Film-Noir",)])
    assert other.warnings == []


def test_ready_rows_have_a_summary_without_users_and_times():
    items = items_table(list("abc"), list("ABC"), [()] * 3)
    found = prepare(ReadyRows(items, {"train": [ReadyRow([0, 1], 2)]}), Split()).summary
    assert found.facts == {"items": "3 read, 3 distinct titles"}


def test_a_summary_is_logged_as_lines_and_warnings(caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        log_summary("data of X", [("items", "3"), ("time", "now"), ("warning", "old")])
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "data of X:\n  items  3\n  time   now"),
        ("WARNING", "old"),
    ]
    caplog.clear()
    monkeypatch.setattr("malleable.datamodules.recommendation.summary.world", lambda: (1, 2))
    log_summary("data of X", [("items", "3")])
    assert not caplog.records


def test_unordered_repeated_and_single_interactions_are_counted():
    events = [("u", "a", 3.0), ("u", "b", 1.0), ("u", "c", 2.0), ("v", "a", 0.0), ("u", "c", 2.0), ("w", "a", 5.0), ("w", "b", 6.0)]
    found = summary(events)
    assert found.facts["order"] == "1 of 7 interactions are earlier than the user's previous row; interactions are sorted by time"
    assert found.facts["repeated"] == "1 of 7 interactions repeat user, item and time of an earlier row"
    assert found.facts["short"] == "1 of 3 users have a single item and therefore no row"
    ordered = summary([("u", "a", 1.0), ("u", "b", 2.0), ("u", "c", 3.0)])
    assert not {"order", "repeated", "short"} & set(ordered.facts)
