import pytest
import torch
from boring import BoringDataModule, BoringModule
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from malleable.callbacks.restart import extend_max_steps, finish_epoch

ROWS = (12, 20, 8)  # of each epoch: 3, 5 and 2 batches


class Lengths(Callback):
    """Show another number of rows in each epoch, and note what happens."""

    def __init__(self):
        self.epoch = 0
        self.limit = None
        self.began = []
        self.ended = []
        self.validated = []
        self.batches = []

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state_dict):
        self.epoch = state_dict["epoch"]

    def show(self, trainer, epoch):
        self.epoch = epoch
        data = trainer.datamodule
        data.train_dataloader().set_rows(data.train_dataset[: ROWS[epoch]])

    def setup(self, trainer, pl_module, stage):
        trainer.reload_dataloaders_every_n_epochs = 1

    def on_fit_start(self, trainer, pl_module):
        self.show(trainer, self.epoch)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.limit = extend_max_steps(trainer, checkpoint)

    def on_train_start(self, trainer, pl_module):
        finish_epoch(trainer)
        finish_epoch(trainer)
        if self.limit is not None:
            trainer.fit_loop.epoch_loop.max_steps = self.limit

    def on_train_epoch_start(self, trainer, pl_module):
        self.began.append(trainer.current_epoch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append((trainer.current_epoch, batch_idx))

    def on_validation_end(self, trainer, pl_module):
        self.validated.append((trainer.current_epoch, trainer.global_step, float(trainer.callback_metrics["val_loss"])))

    def on_train_epoch_end(self, trainer, pl_module):
        self.ended.append((trainer.current_epoch, trainer.global_step))
        if trainer.current_epoch + 1 < len(ROWS):
            self.show(trainer, trainer.current_epoch + 1)


def fit(folder, epochs, ckpt_path=None, every=None, **limits):
    torch.manual_seed(0)
    lengths, module = Lengths(), BoringModule()
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=every) if every else ModelCheckpoint(folder / "unused")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[lengths, saving], default_root_dir=folder, **quiet, **limits)
    trainer.fit(module, BoringDataModule(num_rows=20, batch_size=4), ckpt_path=ckpt_path)
    return lengths, module.layer.weight, trainer.global_step


@pytest.mark.parametrize("step", [2, 3, 6, 8, 10])
def test_resuming_at_any_step_equals_an_uninterrupted_run(tmp_path, step):
    # Steps 3, 8 and 10 are the last of their epochs; the epoch after 3 is longer, the one after 8 shorter.
    whole, expected, total = fit(tmp_path, 3, every=1)
    resumed, found, steps = fit(tmp_path, 3, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert (total, steps) == (10, 10)
    assert resumed.batches == whole.batches[step:]
    assert resumed.began == [epoch for epoch in whole.began if epoch > whole.batches[step - 1][0]]
    assert resumed.ended == [(epoch, end) for epoch, end in whole.ended if end >= step]
    assert resumed.validated == [found for found in whole.validated if found[1] >= step]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("step", "limit"), [(3, 10), (6, 10), (8, 10), (10, 10), (3, 5), (8, 8)])
def test_resuming_with_max_steps(tmp_path, step, limit):
    whole, expected, total = fit(tmp_path, 3, every=1, max_steps=limit)
    resumed, found, steps = fit(tmp_path, 3, ckpt_path=tmp_path / f"step={step}.ckpt", max_steps=limit)
    assert (total, steps) == (limit, limit)
    assert resumed.batches == whole.batches[step:]
    assert resumed.ended == [(epoch, end) for epoch, end in whole.ended if end >= step]
    assert resumed.validated == [found for found in whole.validated if found[1] >= step]
    assert torch.equal(found, expected)
