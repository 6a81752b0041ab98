import numpy as np
import pandas as pd
import pytest

from malleable.datamodules.recommendation.events import k_core
from malleable.datamodules.recommendation.splits import Split, prepare
from malleable.datamodules.sources.recommendation.base import InteractionTables, ReadyRow, ReadyRows, items_table

TITLES = ["A", "B", "C", "D", "E", "F"]
ITEMS = items_table(list("abcdef"), TITLES, [("x",)] * 6)


def tables(events, items=ITEMS):
    return InteractionTables(pd.DataFrame(events, columns=["user_id", "item_id", "timestamp", "rating"][: len(events[0])]), items)


def rows_of(data, split):
    """Every row as (history, target) by walking the index naively."""
    index = data.rows[split]
    return [([int(i) for i in data.sequences[s][:e]], int(data.sequences[s][e])) for s, e in zip(index.sequence, index.end, strict=True)]


def one_user(text, user="u"):
    return [(user, item, time) for time, item in enumerate(text)]


def test_leave_last_out():
    data = prepare(tables(one_user("abcde") + one_user("fed", "v")), Split(min_user_events=1))
    assert rows_of(data, "train") == [([0], 1), ([0, 1], 2)]
    assert rows_of(data, "val") == [([0, 1, 2], 3), ([5], 4)]
    assert rows_of(data, "test") == [([0, 1, 2, 3], 4), ([5, 4], 3)]
    assert data.train_end.tolist() == [3, 1]
    assert data.popularity().tolist() == [1, 1, 1, 0, 0, 1]


def test_rows_of_short_histories():
    data = prepare(tables(one_user("a", "one") + one_user("ab", "two") + one_user("abc", "three")), Split(min_user_events=1))
    assert {split: rows_of(data, split) for split in data.rows} == {"train": [], "val": [([0], 1)], "test": [([0, 1], 2), ([0], 1)]}


def test_events_are_ordered_by_time_then_by_row():
    events = [("u", "c", 5), ("v", "a", 5), ("u", "b", 5), ("u", "a", 9), ("v", "b", 5), ("u", "d", 1)]
    assert prepare(tables(events), Split(min_user_events=1)).sequences[0].tolist() == [3, 2, 1, 0]
    assert prepare(tables(events[::-1]), Split(min_user_events=1)).sequences[0].tolist() == [3, 1, 2, 0]


def test_users_are_ordered_by_their_id():
    first = prepare(tables(one_user("ab", "2") + one_user("cd", "1")), Split(min_user_events=1))
    assert [items.tolist() for items in first.sequences] == [[2, 3], [0, 1]]


def test_min_rating():
    events = [("u", item, time, rating) for time, (item, rating) in enumerate(zip("abcd", [5, 3, 4, 4], strict=True))]
    assert prepare(tables(events), Split(min_rating=4, min_user_events=1)).sequences[0].tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="min_rating=4 needs ratings, but the interactions have no rating; omit min_rating"):
        prepare(tables(one_user("abc")), Split(min_rating=4))


def test_k_core_is_iterated_until_nothing_changes():
    # c falls with one user; then v has one item left and falls; then b falls.
    users, items = np.array([0, 0, 1, 1, 2, 2, 3]), np.array([0, 1, 1, 2, 0, 3, 3])
    keep = k_core(users, items, 2, 2)
    remaining = {(u, i) for u, i, k in zip(users, items, keep, strict=True) if k}
    changed = set(zip(users.tolist(), items.tolist(), strict=True))
    while True:  # naive loop
        smaller = {(u, i) for u, i in changed if sum(a == u for a, _ in changed) >= 2 and sum(b == i for _, b in changed) >= 2}
        if smaller == changed:
            break
        changed = smaller
    assert remaining == changed
    assert k_core(users, items, 1, 1).all()


def test_a_k_core_of_items_shrinks_the_catalogue_and_keeps_it_in_order():
    data = prepare(tables(one_user("fba", "u") + one_user("fbc", "v")), Split(min_user_events=2, min_item_events=2))
    assert data.titles == ["B", "F"]
    assert data.keys == [["b"], ["f"]]
    assert [items.tolist() for items in data.sequences] == [[1, 0], [1, 0]]


def test_cold_items_stay_in_the_catalogue_without_an_item_core():
    assert prepare(tables(one_user("abc")), Split(min_user_events=1)).titles == TITLES


def test_an_error_if_no_row_remains():
    with pytest.raises(ValueError, match=r"the source: none of 3 interactions of 1 users remains with .*; decrease them"):
        prepare(tables(one_user("abc")), Split())
    with pytest.raises(ValueError, match="no row remains: every history has fewer than two usable items"):
        prepare(tables(one_user("a")), Split(min_user_events=1))
    with pytest.raises(ValueError, match="no row remains"):
        prepare(tables(one_user("a")), Split(min_user_events=1, kind="global_time"))


def test_repeats_are_dropped_or_kept():
    assert prepare(tables(one_user("abac")), Split(min_user_events=1)).sequences[0].tolist() == [0, 1, 2]
    assert prepare(tables(one_user("abac")), Split(min_user_events=1, repeats="keep")).sequences[0].tolist() == [0, 1, 0, 2]


def test_dropped_interactions_with_unknown_or_untitled_items_are_logged(caplog):
    items = items_table(list("abc"), ["A", "<br>", "C"], [(), (), ()])
    data = prepare(tables(one_user("abczx"), items), Split(min_user_events=1))
    assert data.titles == ["A", "C"]
    assert data.sequences[0].tolist() == [0, 1]
    assert "dropped 1 items without a readable title" in caplog.text
    assert "dropped 2 of 5 interactions with items that are not in the items table (2 distinct, e.g. 'z', 'x')" in caplog.text
    assert "dropped 1 of 5 interactions with items without a readable title (1 distinct, e.g. 'b')" in caplog.text


def test_equal_titles_are_one_item():
    items = items_table(list("abc"), ["Chasing Amy (1997)", "Heat", "Chasing  Amy (1997)"], [("x",), (), ("y", "x")])
    data = prepare(tables(one_user("bac"), items), Split(min_user_events=1))
    assert data.titles == ["Chasing Amy (1997)", "Heat"]
    assert data.genres == [("x", "y"), ()]
    assert data.keys == [["a", "c"], ["b"]]
    assert data.sequences[0].tolist() == [1, 0]


def test_global_time_has_no_training_target_after_a_test_target():
    rng = np.random.default_rng(0)
    events = [(str(user), "abcdef"[item], int(time)) for user in range(30) for item, time in enumerate(rng.permutation(1000)[:6])]
    split = Split(kind="global_time", min_user_events=1, fractions=(0.6, 0.2, 0.2))
    data = prepare(tables(events), split)
    time_of = {(int(user), "abcdef".index(item)): time for user, item, time in events}
    user_of = sorted(range(30), key=str)
    times = {
        name: [time_of[user_of[s], data.sequences[s][e]] for s, e in zip(rows.sequence, rows.end, strict=True)] for name, rows in data.rows.items()
    }
    assert max(times["train"]) < min(times["val"]) <= max(times["val"]) < min(times["test"])
    assert sum(map(len, times.values())) == 30 * 5
    assert abs(len(times["train"]) - 90) <= 3
    # What trains is exactly what happened before the first validation target.
    cut = min(times["val"])
    assert data.train_end.tolist() == [sum(time_of[user_of[s], i] < cut for i in items) for s, items in enumerate(data.sequences)]


def test_global_time_keeps_equal_times_in_one_split():
    events = [(user, item, 0 if item in "ab" else 7) for user in "uv" for item in "abcd"]
    data = prepare(tables(events), Split(kind="global_time", min_user_events=1, fractions=(0.5, 0.25, 0.25)))
    assert {name: len(rows) for name, rows in data.rows.items()} == {"train": 2, "val": 0, "test": 4}


def test_global_time_without_a_test_share():
    data = prepare(tables(one_user("abcdef")), Split(kind="global_time", min_user_events=1, fractions=(1.0, 0.0, 0.0)))
    assert {name: len(rows) for name, rows in data.rows.items()} == {"train": 5, "val": 0, "test": 0}


def test_ready_rows_keep_their_split(caplog):
    rows = {
        "train": [ReadyRow([0, 1], 2), ReadyRow([-1, 3], 4), ReadyRow([], 1), ReadyRow([-1], 1)],
        "test": [ReadyRow([0], -1), ReadyRow([0, 5], 3, [3, -1, 2]), ReadyRow([4, 5], 4, [4, 5])],
    }
    data = prepare(ReadyRows(ITEMS, rows), Split())
    assert rows_of(data, "train") == [([0, 1], 2), ([3], 4)]
    assert rows_of(data, "val") == []
    assert rows_of(data, "test") == [([0, 5], 3)]
    assert [items.tolist() for items in data.rows["test"].candidates] == [[3, 2]]
    assert data.rows["train"].candidates is None
    assert data.train_end.tolist() == [3, 2, 0]
    assert data.popularity().tolist() == [1, 1, 1, 1, 1, 0]
    for message in (
        "omitted 2 items in the history of train rows",
        "dropped 2 of 4 train rows without any history",
        "omitted 1 items in the candidates of test rows",
        "dropped 1 of 3 test rows: their target is not in the catalogue",
        "dropped 1 of 3 test rows: their target is in their history (set repeats: keep to use these rows)",
    ):
        assert message in caplog.text
    assert rows_of(prepare(ReadyRows(ITEMS, rows), Split(repeats="keep")), "test") == [([0, 5], 3), ([4, 5], 4)]


def test_ready_rows_without_any_usable_row_are_an_error():
    with pytest.raises(ValueError, match="no row remains"):
        prepare(ReadyRows(ITEMS, {"test": [ReadyRow([0], -1)]}), Split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history_length": 0}, "history_length must be >= 1, got 0"),
        ({"train_limit": 0}, "train_limit must be >= 1, got 0"),
        ({"candidates": 1}, "candidates must be >= 2"),
        ({"fractions": (0.5, 0.1, 0.1)}, "fractions must be three shares >= 0 with a sum of 1"),
        ({"fractions": (1.2, -0.1, -0.1)}, "fractions must be three shares"),
    ],
)
def test_settings_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Split(**arguments)
