import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from boring import BoringDataModule, BoringModule
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from malleable.datamodules.base import BaseDataModule


def trainer(tmp_path, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    return Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=tmp_path, **quiet, **arguments)


class LateSetup(BoringDataModule):
    """Forgets the setup of its base."""

    def setup(self, stage):
        self.train_dataset = self.val_dataset = list(enumerate(range(8)))


@pytest.mark.parametrize("name", ["batch_size", "global_batch_size", "eval_batch_size"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
        BaseDataModule(**{name: 0})


def test_the_global_batch_sets_the_accumulation(tmp_path):
    fitted = trainer(tmp_path)
    fitted.fit(BoringModule(), BoringDataModule(num_rows=16, batch_size=2, global_batch_size=8))
    assert (fitted.accumulate_grad_batches, fitted.global_step) == (4, 2)


def test_an_accumulation_that_contradicts_the_global_batch(tmp_path):
    fitted = trainer(tmp_path, accumulate_grad_batches=3)
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches=3\) contradicts global_batch_size=8, which needs 4"):
        fitted.fit(BoringModule(), BoringDataModule(batch_size=2, global_batch_size=8))


def test_a_global_batch_that_cannot_be_distributed(tmp_path):
    with pytest.raises(ValueError, match="global_batch_size 6 must be a multiple of batch_size x devices = 4 x 1"):
        trainer(tmp_path).fit(BoringModule(), BoringDataModule(batch_size=4, global_batch_size=6))


def test_too_few_rows_for_a_step(tmp_path):
    with pytest.raises(ValueError, match="3 training rows do not fill one optimizer step of 4 rows"):
        trainer(tmp_path).fit(BoringModule(), BoringDataModule(num_rows=3, batch_size=4))


def test_a_short_last_step_is_kept_without_drop_last(tmp_path):
    class Whole(BoringDataModule):
        drop_last = False

    fitted = trainer(tmp_path)
    fitted.fit(BoringModule(), Whole(num_rows=11, batch_size=2, global_batch_size=4))
    assert (fitted.accumulate_grad_batches, fitted.global_step) == (2, 3)


def test_accumulating_strategies_need_super_setup(tmp_path, monkeypatch):
    # DeepSpeed reads the accumulation before the first loader is made; a number that comes later would be ignored in silence.
    data = LateSetup(batch_size=2, global_batch_size=4)
    data.trainer = trainer(tmp_path)
    data.setup("fit")
    monkeypatch.setattr(type(data.trainer.strategy), "handles_gradient_accumulation", True)
    with pytest.raises(MisconfigurationException, match=r"LateSetup.setup must call super\(\).setup"):
        data.train_dataloader()


def test_the_training_loader_stays_the_same(tmp_path):
    data = BoringDataModule()
    data.setup("fit")
    assert data.train_dataloader() is data.train_dataloader()


def test_a_split_that_was_not_set():
    with pytest.raises(MisconfigurationException, match=r"BaseDataModule has no predict data: `setup` did not set `predict_dataset`"):
        BaseDataModule().predict_dataloader()


def test_an_empty_split():
    data = BaseDataModule()
    data.test_dataset = []
    with pytest.raises(ValueError, match="the test split is empty"):
        data.test_dataloader()


def test_a_data_module_without_collation():
    with pytest.raises(NotImplementedError, match="add a method `collate` to the dataset"):
        BaseDataModule().collate([])


def test_loaders_of_a_split_stay_the_same_while_the_rows_do():
    """Their workers then live on, also where a Trainer asks for new loaders in each epoch."""
    data = BoringDataModule()
    data.setup("fit")
    first = data.val_dataloader()
    assert data.val_dataloader() is first
    assert data.test_dataloader() is not first
    data.eval_batch_size = 2
    assert data.val_dataloader().batch_size == 2
    data.setup("fit")
    assert data.val_dataloader().pool is data.val_dataset


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False), ("mps", False)])
def test_batches_for_a_gpu_are_pinned(device, pinned):
    data = BoringDataModule()
    data.setup("fit")
    strategy = SimpleNamespace(root_device=torch.device(device), handles_gradient_accumulation=False)
    data.trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=1, world_size=1)
    assert data.train_dataloader().pin_memory is pinned
    assert data.val_dataloader().pin_memory is pinned


def test_workers_end_with_the_run(tmp_path):
    data = BoringDataModule()
    data.num_workers = 1
    trainer(tmp_path).fit(BoringModule(), data)
    assert not multiprocessing.active_children()
