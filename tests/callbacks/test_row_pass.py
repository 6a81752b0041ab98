"""A pass over rows shared among ranks: each row once, in order, without dropout and gradients."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from tiny import batch_of, tiny_rows
from tiny_data import quiet_trainer
from torch import nn

from malleable.callbacks import row_pass as module
from malleable.callbacks.row_pass import apply_to_rows, inference_mode
from malleable.datamodules import global_batches as loader
from malleable.lightning_modules.recommendation.sft import SFT


def ids_and_tens(batch):
    return batch.sample_id[:, None] * torch.tensor([1, 10])


def expected(count: int) -> list[list[int]]:
    return [[index, 10 * index] for index in range(count)]


@pytest.fixture
def trainer(tmp_path):
    return quiet_trainer(tmp_path)


def attached(trainer) -> SFT:
    part = SFT()
    part.trainer = trainer
    return part


@pytest.mark.parametrize(("count", "batch_size"), [(11, 2), (8, 4), (3, 16), (1, 1)])
def test_each_row_once_and_in_order(trainer, count, batch_size):
    found = apply_to_rows(trainer, attached(trainer), tiny_rows(count), batch_of, batch_size, ids_and_tens, "test")
    assert found.tolist() == expected(count)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("count", "batch_size"), [(11, 2), (8, 4), (2, 4), (13, 1)])
def test_results_of_ranks_are_gathered_in_order(trainer, monkeypatch, size, count, batch_size):
    """The ranks one after the other: first each one's share is noted, then each gets them all."""
    shares: list[torch.Tensor] = []

    def run(rank: int, all_gather) -> list[list[int]]:
        monkeypatch.setattr(loader, "world", lambda: (rank, size))
        part = SFT()
        part.all_gather = all_gather
        return apply_to_rows(trainer, part, tiny_rows(count), batch_of, batch_size, ids_and_tens, "test").tolist()

    def note(own):
        shares.append(own)
        return torch.stack([own] * size)

    monkeypatch.setattr(type(trainer), "world_size", size)
    for rank in range(size):
        run(rank, note)
    assert len({len(share) for share in shares}) == 1, "all ranks make equally many calls"
    for rank in range(size):
        assert run(rank, lambda own: torch.stack(shares)) == expected(count)


@pytest.mark.ddp
def test_two_ranks_get_all_rows(two_ranks):
    """11 rows in batches of 2 on two processes: 3 calls each, and the whole table on both."""
    assert json.loads((two_ranks / "rows.json").read_text()) == [expected(11)] * 2


def test_pass_has_no_dropout_and_no_gradients(trainer):
    part = attached(trainer)
    part.model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2).eval())
    seen = []

    def function(batch):
        output = part.model(torch.ones(len(batch), 4))
        seen.append((part.training, part.model[0].training, output.requires_grad))
        return output

    found = apply_to_rows(trainer, part, tiny_rows(4), batch_of, 2, function, "test")
    assert seen == [(False, False, False)] * 2
    assert torch.equal(found[0], found[3])
    assert [part.training, part.model[0].training, part.model[1].training] == [True, True, False], "each part as it was"


def test_modes_are_restored_after_an_error(trainer):
    part = SFT()
    with pytest.raises(RuntimeError, match="lost"), inference_mode(trainer, part):
        raise RuntimeError("lost")
    assert part.training


def test_precision_of_the_trainer_is_used(tmp_path):
    part = SFT()
    part.model = nn.Linear(4, 2)
    with inference_mode(quiet_trainer(tmp_path, precision="bf16-mixed"), part):
        assert part.model(torch.ones(1, 4)).dtype == torch.bfloat16


def test_progress_is_logged_at_intervals_and_at_the_end(trainer, monkeypatch, caplog):
    """A clock that jumps four seconds a look: a line at most every ten, and the last."""
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with caplog.at_level(logging.INFO):
        apply_to_rows(trainer, attached(trainer), tiny_rows(9), batch_of, 1, ids_and_tens, "answers")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("answers: ")]
    assert 2 <= len(lines) < 9
    assert lines[-1].startswith("answers: 9 of 9 rows, ")
