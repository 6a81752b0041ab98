"""A fit, a validation, a test or a prediction of the boring module that receives a signal, as a script of its own.

    python interrupted_run.py COMMAND SIGNAL STEP [CKPT_PATH]

Two micro-batches make a step. The signal arrives in the first micro-batch of the step, or in the evaluation's first batch; SIGNAL 0 sends none.
"""

import logging
import os
import signal
import sys
import time

import torch
from boring import BoringDataModule, BoringModule
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from malleable import LastCheckpoint


class Send(Callback):
    def __init__(self, number: int, step: int) -> None:
        self.number = number
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.number and trainer.global_step == self.step and batch_idx % 2 == 0:
            os.kill(os.getpid(), self.number)

    def on_train_epoch_start(self, trainer, pl_module):
        if self.number and self.step < 0:
            os.kill(os.getpid(), self.number)
            time.sleep(60)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.number:
            os.kill(os.getpid(), self.number)
            time.sleep(60)

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.on_test_batch_start(trainer, pl_module, batch, batch_idx)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.on_test_batch_start(trainer, pl_module, batch, batch_idx)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    torch.manual_seed(0)
    command, number, step, *path = sys.argv[1:]
    callbacks = [Send(int(number), int(step)), LastCheckpoint("checkpoints")]
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(max_epochs=3, callbacks=callbacks, **quiet)
    data = BoringDataModule(batch_size=2, global_batch_size=4)
    if command == "fit":
        trainer.fit(BoringModule(), data, ckpt_path=path[0] if path else None)
    else:
        getattr(trainer, command)(BoringModule(), data)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
