"""The training loader: equal global batches on any number of devices, exact resumption, marked padding."""

from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader

from malleable.datamodules import loader as module
from malleable.datamodules.batch import collate
from malleable.datamodules.loader import PhasedLoader, RowView

ROWS = [{"sample_id": index, "prompt": [1], "answers": [[2] * (1 + index % 3)], "item_ids": [index]} for index in range(22)]


@pytest.fixture
def ranks(monkeypatch):
    """Pretend to be a rank."""

    def become(rank: int, size: int) -> None:
        monkeypatch.setattr(module, "world", lambda: (rank, size))

    return become


def ids(loader) -> list[list[int]]:
    return [batch.sample_id.tolist() for batch in loader]


def steps(loader, accumulation: int) -> list[list[int]]:
    batches = ids(loader)
    return [list(chain(*batches[start : start + accumulation])) for start in range(0, len(batches), accumulation)]


@pytest.mark.parametrize(("size", "batch_size", "accumulation"), [(1, 8, 1), (1, 2, 4), (2, 2, 2), (4, 2, 1), (4, 1, 2), (2, 8, 1), (4, 3, 1)])
def test_step_holds_the_same_rows_on_any_devices(ranks, size, batch_size, accumulation):
    reference = [sorted(step) for step in ids(PhasedLoader(ROWS, 8, collate_fn=collate, seed=3))]
    assert len(reference) == 2
    found: list[list[int]] = [[], []]
    for rank in range(size):
        ranks(rank, size)
        loader = PhasedLoader(ROWS, batch_size, global_batch_size=8, collate_fn=collate, seed=3)
        assert loader.accumulation == accumulation
        for number, step in enumerate(steps(loader, accumulation)):
            found[number] += step
    assert [sorted(step) for step in found] == reference


def test_step_tokens_are_those_of_the_whole_step(ranks):
    """num_step_tokens x batches of the step over all ranks = tokens of the step's rows."""
    tokens = [1 + index % 3 for index in range(22)]
    whole = [batch.num_step_tokens.item() for batch in PhasedLoader(ROWS, 8, collate_fn=collate, row_tokens=tokens, seed=3)]
    rows = ids(PhasedLoader(ROWS, 8, collate_fn=collate, seed=3))
    assert whole == [sum(tokens[row] for row in step) for step in rows]
    ranks(1, 2)
    shared = [batch.num_step_tokens.item() for batch in PhasedLoader(ROWS, 2, global_batch_size=8, collate_fn=collate, row_tokens=tokens, seed=3)]
    assert [4 * value for value in shared] == [value for value in whole for _ in range(2)]


def test_epochs_differ_and_repeat():
    loader = PhasedLoader(ROWS, 4, collate_fn=collate)
    first = ids(loader)
    loader.set_epoch(1)
    second = ids(loader)
    loader.set_epoch(0)
    assert ids(loader) == first != second


def test_resumes_with_the_next_batch():
    loader = PhasedLoader(ROWS, 4, collate_fn=collate, seed=5)
    iterator = iter(loader)
    whole = ids(PhasedLoader(ROWS, 4, collate_fn=collate, seed=5))
    assert [next(iterator).sample_id.tolist() for _ in range(3)] == whole[:3]
    resumed = PhasedLoader(ROWS, 4, collate_fn=collate, seed=5)
    resumed.load_state_dict(loader.state_dict())
    assert ids(resumed) == whole[3:]
    assert ids(resumed) == whole, "the next epoch starts at its beginning"


@pytest.mark.parametrize("handed_out", [3, 5])
def test_a_restored_position_is_of_its_epoch_only(handed_out):
    # Killed after an epoch's last batch, a run goes on with the next epoch, whose batches were not handed out.
    loader, resumed, fresh = (PhasedLoader(ROWS, 4, collate_fn=collate) for _ in range(3))
    iterator = iter(loader)
    for _ in range(handed_out):
        next(iterator)
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(1)
    fresh.set_epoch(1)
    assert ids(resumed) == ids(fresh)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_sees_each_row_once_and_marks_repeats(ranks, size):
    seen, lengths = [], set()
    for rank in range(size):
        ranks(rank, size)
        loader = PhasedLoader(ROWS, 4, collate_fn=collate, shuffle=False, drop_last=False)
        batches = ids(loader)
        lengths.add(len(batches))
        assert len(batches) == len(loader)
        seen += [row for batch in batches for row in batch]
    assert len(lengths) == 1, "all ranks make equally many batches"
    assert sorted(row for row in seen if row >= 0) == list(range(22))


def test_takes_a_data_loader_apart():
    loader = PhasedLoader(DataLoader(ROWS, batch_size=4, collate_fn=collate))
    assert loader.batch_size == 4
    assert len(loader) == 5
    assert len(next(iter(loader))) == 4


def test_shown_rows_replace_the_old_ones():
    loader = PhasedLoader(ROWS, 4, collate_fn=collate)
    loader.show(RowView(ROWS, [3, 5, 7, 9], [{"answers": [[2], [3]]}] * 4), [1, 1, 1, 1])
    assert len(loader) == 1
    (batch,) = list(loader)
    assert sorted(batch.sample_id.tolist()) == [3, 5, 7, 9]
    assert batch.answer_ids.shape == (4, 2, 1)
    assert batch.num_step_tokens.item() == 4
    assert ROWS[3]["answers"] == [[2]], "the pool is left alone"
    assert len(loader.pool) == 22


def test_workers_change_nothing():
    assert ids(PhasedLoader(ROWS, 4, collate_fn=collate, num_workers=2)) == ids(PhasedLoader(ROWS, 4, collate_fn=collate))


def test_bad_values(ranks):
    with pytest.raises(ValueError, match="global_batch_size 8 must be a multiple of batch_size x devices = 3 x 1"):
        len(PhasedLoader(ROWS, 3, global_batch_size=8, collate_fn=collate))
    with pytest.raises(ValueError, match="needs a collate_fn"):
        PhasedLoader(ROWS, 3)
    ranks(0, 3)
    with pytest.raises(ValueError, match="batch_size x devices = 8 x 3, or less than that and a multiple of the devices"):
        len(PhasedLoader(ROWS, 8, global_batch_size=8, collate_fn=collate))
    with pytest.raises(KeyError, match="no view 'packed'"):
        PhasedLoader(ROWS, 3, collate_fn=collate).view("packed")
    assert torch.is_tensor(collate(ROWS[:1]).sample_id)
