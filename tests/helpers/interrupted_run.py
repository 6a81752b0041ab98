"""A fit, a validation, a test or a prediction of the boring module that receives a signal, as a script of its own.

    python interrupted_run.py COMMAND SIGNAL STEP [CKPT_PATH]

Two micro-batches make a step. The signal arrives in the first micro-batch of the step, or in the evaluation's first batch; SIGNAL 0 sends none.
STEP -1 is before the first step, -2 the validation of the first epoch. If the environment has SIGNALLED, e.g. ``01``, the fit runs on two ranks that
Lightning starts, and only these ranks get the signal. With ``SIGNALLED=agent``, torchrun starts the ranks and gets the signal.
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
        signalled, rank = os.environ.get("SIGNALLED", "0"), os.environ.get("LOCAL_RANK", "0")
        self.agent = signalled == "agent"
        self.number = number if rank in signalled or (self.agent and rank == "0") else 0
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.number and trainer.global_step == self.step and batch_idx % trainer.accumulate_grad_batches == 0:
            os.kill(os.getppid() if self.agent else os.getpid(), self.number)
            time.sleep(5 if self.agent else 0)  # until torchrun has sent the signal to the ranks

    def on_train_epoch_start(self, trainer, pl_module):
        if self.number and self.step == -1:
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
        elif self.number and self.step == -2 and batch_idx == 0:
            os.kill(os.getpid(), self.number)


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    torch.manual_seed(0)
    command, number, step, *path = sys.argv[1:]
    callbacks = [Send(int(number), int(step)), LastCheckpoint("checkpoints")]
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    ranks = {"devices": 2, "strategy": "ddp"} if "SIGNALLED" in os.environ else {"devices": 1}
    trainer = Trainer(max_epochs=3, callbacks=callbacks, **quiet, **ranks)
    data = BoringDataModule(batch_size=2, global_batch_size=4)
    if command == "fit":
        trainer.fit(BoringModule(), data, ckpt_path=path[0] if path else None)
    else:
        getattr(trainer, command)(BoringModule(), data)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
