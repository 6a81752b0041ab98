import numpy as np
import pytest

from malleable.datamodules.sample_ids import content_ids, keyed_order, mix, text_hashes

USERS, ITEMS, TIMES = text_hashes(["u", "v", "u", "w"]), text_hashes(["a", "a", "b", "a"]), np.array([1.0, 2.0, 1.0, 2.5])


def test_ids_are_positive_distinct_and_the_same_in_every_process():
    ids = content_ids(USERS, ITEMS, TIMES)
    assert ids.dtype == np.int64
    assert (ids >= 0).all()
    assert len(set(ids.tolist())) == 4
    assert mix(np.zeros(1, dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF]  # first number of SplitMix64 from seed 0
    assert ids.tolist() == content_ids(USERS, ITEMS, TIMES).tolist()
    assert ids[0] == STORED


STORED = content_ids(text_hashes(["u"]), text_hashes(["a"]), np.array([1.0]))[0]


@pytest.mark.parametrize("dropped", range(4))
def test_a_dropped_row_changes_no_other_id(dropped):
    kept = [row for row in range(4) if row != dropped]
    ids = content_ids(USERS, ITEMS, TIMES)
    assert content_ids(USERS[kept], ITEMS[kept], TIMES[kept]).tolist() == ids[kept].tolist()


def test_equal_rows_have_different_ids():
    ids = content_ids(text_hashes(["u"] * 3), text_hashes(["a"] * 3), np.ones(3))
    assert len(set(ids.tolist())) == 3
    assert ids[0] == STORED


def test_no_rows():
    assert content_ids(text_hashes([]), np.zeros(0)).tolist() == []
    assert keyed_order(np.zeros(0, dtype=np.int64), 1).tolist() == []


def test_an_order_depends_on_the_key_and_is_kept_if_a_row_is_removed():
    ids = np.arange(1000)
    order = keyed_order(ids, 3, 1)
    assert sorted(order.tolist()) == ids.tolist()
    assert order.tolist() != keyed_order(ids, 3, 2).tolist()
    assert order.tolist() != keyed_order(ids, 4, 1).tolist()
    kept = np.delete(ids, 500)
    assert kept[keyed_order(kept, 3, 1)].tolist() == [row for row in order.tolist() if row != 500]


def test_orders_are_even():
    """Each of the first places is as likely to be in the first half of another key's order."""
    halves = [set(keyed_order(np.arange(100), seed)[:50].tolist()) for seed in range(200)]
    counts = np.array([sum(row in half for half in halves) for row in range(100)])
    assert counts.min() > 65
    assert counts.max() < 135
