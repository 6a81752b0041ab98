from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from malleable.lightning_modules.distributed_rows import mark_padding_rows


def trainer_of(loader):
    return SimpleNamespace(train_dataloader=None, val_dataloaders=loader, test_dataloaders=[loader])


@pytest.mark.parametrize("split", ["val", "test"])
def test_rows_that_the_sampler_repeats_get_negative_ids(split):
    sampler = DistributedSampler(range(5), num_replicas=2, rank=1, shuffle=False)
    trainer = trainer_of(DataLoader(range(5), batch_size=3, sampler=sampler))
    # Rank 1 has rows 1 and 3 of five, then the repeated row 0.
    assert mark_padding_rows(torch.tensor([1, 3, 0]), trainer, split, 0).tolist() == [1, 3, -1]
    assert mark_padding_rows(torch.tensor([0, -1, 2]), trainer, split, 0).tolist() == [0, -1, -3]


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_loader_without_distributed_sampler_has_no_padding_rows(split):
    assert mark_padding_rows(torch.tensor([0, -1, 2]), trainer_of(DataLoader([0.0])), split, 0).tolist() == [0, -1, 2]


def test_without_trainer_ids_are_not_changed():
    assert mark_padding_rows(torch.tensor([0, 2]), None, "val", 0).tolist() == [0, 2]
