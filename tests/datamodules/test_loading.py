"""The training loader: equal global batches on any number of devices, exact resumption, marked padding."""

import os
from itertools import chain

import numpy as np
import pytest
import torch
from tiny import batch_of
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from malleable.datamodules import global_batches as module
from malleable.datamodules.batch import QueryBatch
from malleable.datamodules.language.text_rows import TextRows
from malleable.datamodules.loading import PhasedLoader, RowView, row_tokens

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
    reference = [sorted(step) for step in ids(PhasedLoader(ROWS, 8, collate_fn=batch_of, seed=3))]
    assert len(reference) == 2
    found: list[list[int]] = [[], []]
    for rank in range(size):
        ranks(rank, size)
        loader = PhasedLoader(ROWS, batch_size, global_batch_size=8, collate_fn=batch_of, seed=3)
        assert loader.accumulation == accumulation
        for number, step in enumerate(steps(loader, accumulation)):
            found[number] += step
    assert [sorted(step) for step in found] == reference


def test_step_tokens_are_those_of_the_whole_step(ranks):
    """num_step_tokens x batches of the step over all ranks = tokens of the step's rows."""
    tokens = [1 + index % 3 for index in range(22)]
    whole = [batch.num_step_tokens.item() for batch in PhasedLoader(ROWS, 8, collate_fn=batch_of, row_tokens=tokens, seed=3)]
    rows = ids(PhasedLoader(ROWS, 8, collate_fn=batch_of, seed=3))
    assert whole == [sum(tokens[row] for row in step) for step in rows]
    ranks(1, 2)
    shared = [batch.num_step_tokens.item() for batch in PhasedLoader(ROWS, 2, global_batch_size=8, collate_fn=batch_of, row_tokens=tokens, seed=3)]
    assert [4 * value for value in shared] == [value for value in whole for _ in range(2)]


def test_epochs_differ_and_repeat():
    loader = PhasedLoader(ROWS, 4, collate_fn=batch_of)
    first = ids(loader)
    loader.sampler.set_epoch(1)
    second = ids(loader)
    loader.sampler.set_epoch(0)
    assert ids(loader) == first != second


def test_resumes_with_the_next_batch():
    loader = PhasedLoader(ROWS, 4, collate_fn=batch_of, seed=5)
    iterator = iter(loader)
    whole = ids(PhasedLoader(ROWS, 4, collate_fn=batch_of, seed=5))
    assert [next(iterator).sample_id.tolist() for _ in range(3)] == whole[:3]
    resumed = PhasedLoader(ROWS, 4, collate_fn=batch_of, seed=5)
    resumed.load_state_dict(loader.state_dict())
    assert ids(resumed) == whole[3:]
    assert ids(resumed) == whole, "the next epoch starts at its beginning"


@pytest.mark.parametrize("handed_out", [3, 5])
def test_a_restored_position_is_of_its_epoch_only(handed_out):
    # Killed after an epoch's last batch, a run goes on with the next epoch, whose batches were not handed out.
    loader, resumed, fresh = (PhasedLoader(ROWS, 4, collate_fn=batch_of) for _ in range(3))
    iterator = iter(loader)
    for _ in range(handed_out):
        next(iterator)
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(1)
    fresh.sampler.set_epoch(1)
    assert ids(resumed) == ids(fresh)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_has_each_row_once_and_marks_padding_rows(ranks, size):
    seen, lengths = [], set()
    for rank in range(size):
        ranks(rank, size)
        loader = PhasedLoader(ROWS, 4, collate_fn=batch_of, shuffle=False, drop_last=False)
        batches = ids(loader)
        lengths.add(len(batches))
        assert len(batches) == len(loader)
        seen += [row for batch in batches for row in batch]
    assert len(lengths) == 1, "all ranks make equally many batches"
    assert sorted(row for row in seen if row >= 0) == list(range(22))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 2}, "batches of a step 2 then, 4 now"),
        ({"batch_size": 8}, "batches of a step 2 then, 1 now"),
        ({"global_batch_size": 4}, "rows of a step 8 then, 4 now"),
        ({"seed": 1}, "seed 0 then, 1 now"),
        ({"dataset": ROWS[:20]}, "rows 22 then, 20 now"),
    ],
)
def test_other_batches_within_an_epoch_are_refused(change, named):
    """They would repeat some rows and leave out others."""
    options = {"dataset": ROWS, "batch_size": 4, "global_batch_size": 8, "collate_fn": batch_of}
    loader, resumed = PhasedLoader(**options), PhasedLoader(**options | change)
    iterator = iter(loader)
    next(iterator)
    resumed.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=rf"within epoch 0, after 1 batches of another layout \({named}.*end of an epoch"):
        next(iter(resumed))
    resumed.load_state_dict(loader.state_dict())
    resumed.sampler.set_epoch(1)
    assert ids(resumed), "at the end of an epoch anything may change"


def test_other_devices_within_an_epoch_are_refused(ranks):
    loader = PhasedLoader(ROWS, 4, global_batch_size=8, collate_fn=batch_of)
    next(iter(loader))
    state = loader.state_dict()
    ranks(0, 2)
    resumed = PhasedLoader(ROWS, 4, global_batch_size=8, collate_fn=batch_of)
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="batches of a step 2 then, 1 now"):
        next(iter(resumed))


class Table:
    """Rows that are made into a batch at once."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self):
        return len(ROWS)

    sample_ids = np.arange(len(ROWS))

    def make_batch(self, rows):
        self.asked.append(len(rows))
        return QueryBatch(rows, *[rows] * 4, *[rows[:0]] * 2)


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_dataset_that_creates_batches_returns_the_same_batches(drop_last):
    options = {"global_batch_size": 8, "drop_last": drop_last, "seed": 5}
    table = Table()
    assert ids(PhasedLoader(table, 4, **options)) == ids(PhasedLoader(ROWS, 4, collate_fn=batch_of, **options))
    assert set(table.asked) <= {4, 2, 1}


def test_such_a_dataset_is_resumed_with_the_next_batch():
    loader, resumed = (PhasedLoader(Table(), 4, seed=5) for _ in range(2))
    whole = ids(loader)
    resumed.load_state_dict({"epoch": 0, "position": 3})
    assert ids(resumed) == whole[3:]


@pytest.mark.parametrize(("size", "batch_size"), [(1, 8), (1, 2), (1, 4), (2, 2), (2, 4), (4, 2), (4, 1)])
def test_the_short_last_step_is_kept_and_normalised_as_one(ranks, size, batch_size):
    """Each row once; sums over a batch divided by its share, averaged over batches and ranks, are means over the step's rows."""
    values = torch.arange(22.0) ** 2
    tokens = [1 + index % 3 for index in range(22)]
    order = list(chain(*ids(PhasedLoader(Table(), 8, drop_last=False, seed=3))))
    seen, lengths = [], set()
    sums = torch.zeros(3, 2)
    for rank in range(size):
        ranks(rank, size)
        loader = PhasedLoader(Table(), batch_size, global_batch_size=8, drop_last=False, row_tokens=tokens, seed=3)
        assert loader.num_steps == 3
        batches = list(loader)
        lengths.add(len(batches))
        assert len(batches) == len(loader) == 3 * loader.accumulation
        for number, batch in enumerate(batches):
            assert len(batch) > 0
            real = batch.sample_id[batch.sample_id >= 0]
            seen += real.tolist()
            share = torch.stack([values[real].sum() / batch.num_step_rows, values[real].sum() / batch.num_step_tokens])
            sums[number // loader.accumulation] += share / (loader.accumulation * size)
    assert len(lengths) == 1
    assert sorted(seen) == list(range(22))
    for step, (by_row, by_token) in enumerate(sums.tolist()):
        rows = order[8 * step : 8 * step + 8]
        assert by_row == pytest.approx(values[rows].mean().item())
        assert by_token == pytest.approx(values[rows].sum().item() / sum(tokens[row] for row in rows))


def test_more_batches_than_rows_in_the_last_step():
    """One row over four batches: those without a row of their own repeat one, marked."""
    rows = ROWS[:9]
    batches = list(PhasedLoader(rows, 2, global_batch_size=8, collate_fn=batch_of, drop_last=False))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 1, 1, 1, 1]
    assert [int((batch.sample_id >= 0).sum()) for batch in batches[4:]] == [1, 0, 0, 0]


@pytest.mark.parametrize(("shuffle", "drop_last"), [(True, True), (False, True), (True, False), (False, False)])
def test_settings_of_a_data_loader_are_used(shuffle, drop_last):
    """Batch size, order, last batch and collation are its own."""
    loader = PhasedLoader(DataLoader(ROWS, batch_size=4, shuffle=shuffle, drop_last=drop_last, collate_fn=batch_of), seed=3)
    assert ids(loader) == ids(PhasedLoader(ROWS, 4, shuffle=shuffle, drop_last=drop_last, collate_fn=batch_of, seed=3))
    assert len(loader) == (5 if drop_last else 6)
    assert (next(iter(loader)).sample_id.tolist() == [0, 1, 2, 3]) is not shuffle


def test_arguments_override_settings_of_a_data_loader():
    loader = PhasedLoader(DataLoader(ROWS, batch_size=4, collate_fn=batch_of, num_workers=2, prefetch_factor=3), 2, drop_last=True, num_workers=0)
    assert ids(loader) == [[row, row + 1] for row in range(0, 22, 2)]


def test_workers_and_pinning_of_a_data_loader_are_kept(monkeypatch):
    options = {"num_workers": 2, "prefetch_factor": 3, "worker_init_fn": print, "timeout": 5, "multiprocessing_context": "fork"}
    loader = PhasedLoader(DataLoader(ROWS, batch_size=4, collate_fn=batch_of, persistent_workers=True, pin_memory=True, **options))
    made = loader._reader.read([[0, 1]])
    assert isinstance(made, DataLoader)
    assert (made.num_workers, made.prefetch_factor, made.worker_init_fn, made.timeout, made.persistent_workers) == (2, 3, print, 5, True)
    assert made.multiprocessing_context.get_start_method() == "fork"
    assert loader.pin_memory


class Stream(IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        return iter(ROWS)


@pytest.mark.parametrize(("what", "arguments"), [
    ("an IterableDataset", {"dataset": Stream()}),
    ("a batch_sampler", {"batch_sampler": [[0, 1], [2]]}),
    ("a batch_sampler", {"batch_size": None}),
    ("a sampler", {"sampler": [3, 1, 2]}),
    ("a sampler", {"sampler": WeightedRandomSampler([1.0] * 22, 22)}),
    ("a sampler", {"sampler": RandomSampler(ROWS, replacement=True)}),
    ("a sampler", {"sampler": RandomSampler(ROWS, num_samples=3)}),
    ("a generator", {"shuffle": True, "generator": torch.Generator()}),
    ("the default collate_fn", {"collate_fn": None}),
])  # fmt: skip
def test_unsupported_settings_of_a_data_loader_are_an_error(what, arguments):
    given = DataLoader(**{"dataset": ROWS, "collate_fn": batch_of, **arguments})
    with pytest.raises(ValueError, match=f"PhasedLoader does not support {what} of a DataLoader: .* torch.utils.data.Subset"):
        PhasedLoader(given)


@pytest.mark.parametrize("rows", [ROWS, Table()], ids=["rows", "batches"])
def test_all_tensors_of_batches_are_pinned(rows, monkeypatch):
    """The normalisers, too: one pageable tensor would wait for the device."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    options = {} if isinstance(rows, Table) else {"collate_fn": batch_of}
    batch = next(iter(PhasedLoader(rows, 4, row_tokens=[1] * 22, pin_memory=True, **options)))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert {id(tensor) for tensor in tensors} <= {id(tensor) for tensor in pinned}
    assert batch.num_step_tokens is not None


def test_set_rows_replaces_the_rows():
    loader = PhasedLoader(ROWS, 4, collate_fn=batch_of)
    loader.set_rows(RowView(ROWS, [3, 5, 7, 9], [{"answers": [[2], [3]]}] * 4), [1, 1, 1, 1])
    assert len(loader) == 1
    (batch,) = list(loader)
    assert sorted(batch.sample_id.tolist()) == [3, 5, 7, 9]
    assert batch.answer_ids.shape == (4, 2, 1)
    assert batch.num_step_tokens.item() == 4
    assert ROWS[3]["answers"] == [[2]], "the pool is left alone"
    assert len(loader.pool) == 22


class Processes:
    """Rows that carry the process that read them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"sample_id": index, "prompt": [1], "answers": [[2]], "item_ids": [os.getpid()]}


def readers(loader) -> set[int]:
    return {int(item) for batch in loader for item in batch.item_ids.flatten()}


def test_workers_are_kept_between_epochs():
    loader = PhasedLoader(Processes(), 2, collate_fn=batch_of, num_workers=1)
    first = readers(loader)
    loader.sampler.set_epoch(1)
    next(iter(loader))  # an epoch that is broken off
    loader.sampler.set_epoch(2)
    assert readers(loader) == first
    assert os.getpid() not in first
    loader.stop_workers()
    assert readers(loader).isdisjoint(first)


def test_workers_of_each_epoch():
    loader = PhasedLoader(Processes(), 2, collate_fn=batch_of, num_workers=1, persistent_workers=False)
    assert readers(loader).isdisjoint(readers(loader))


def test_workers_do_not_change_batches():
    """Nor over epochs, shown rows and a resumption within an epoch."""
    found = []
    for options in ({"num_workers": 2}, {}):
        loader, batches = PhasedLoader(ROWS, 4, collate_fn=batch_of, seed=1, **options), []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batches.append(ids(loader))
        iterator = iter(loader)
        next(iterator)
        loader.load_state_dict(loader.state_dict())
        batches.append(ids(loader))
        loader.set_rows(ROWS[:9])
        batches.append(ids(loader))
        found.append(batches)
    assert found[0] == found[1]


def test_bad_values(ranks):
    with pytest.raises(ValueError, match="global_batch_size 8 must be a multiple of batch_size x devices = 3 x 1"):
        len(PhasedLoader(ROWS, 3, global_batch_size=8, collate_fn=batch_of))
    with pytest.raises(ValueError, match="needs a collate_fn"):
        PhasedLoader(ROWS, 3)
    ranks(0, 3)
    with pytest.raises(ValueError, match="batch_size x devices = 8 x 3, or a smaller multiple of the number of devices"):
        len(PhasedLoader(ROWS, 8, global_batch_size=8, collate_fn=batch_of))
    with pytest.raises(KeyError, match="no rows 'packed'"):
        PhasedLoader(ROWS, 3, collate_fn=batch_of).view("packed")
    assert torch.is_tensor(batch_of(ROWS[:1]).sample_id)


def test_the_order_depends_on_the_ids_only():
    """A row that is left out does not change the order of the others, in any epoch."""
    for epoch in range(3):
        whole = PhasedLoader(ROWS, 1, collate_fn=batch_of, seed=3)
        less = PhasedLoader([row for row in ROWS if row["sample_id"] != 7], 1, collate_fn=batch_of, seed=3)
        for loader in (whole, less):
            loader.sampler.set_epoch(epoch)
        assert [batch for batch in ids(whole) if batch != [7]] == ids(less)


def test_the_batch_sampler_works_in_a_standard_data_loader():
    sampler = module.GlobalBatchSampler(4, seed=3)
    sampler.set_rows(len(ROWS), np.arange(len(ROWS)))
    assert ids(DataLoader(ROWS, batch_sampler=sampler, collate_fn=batch_of)) == ids(PhasedLoader(ROWS, 4, collate_fn=batch_of, seed=3))


def test_row_tokens_of_datasets_views_and_plain_rows():
    documents = TextRows([[1, 2, 3], [4, 5], [6, 7, 8, 9]], pack_length=5)
    tokens = documents.row_tokens().tolist()
    assert sum(tokens) == 2 + 1 + 3
    assert row_tokens(RowView(documents, [1, 0])) == tokens[::-1]
    assert row_tokens([documents[0], documents[1]]) == tokens
    assert row_tokens(RowView(ROWS, [2, 0], [{"answers": [[2, 2, 2], [5]]}, {}])) == [3, 1]
