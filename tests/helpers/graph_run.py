"""A small run of NFE as a script of its own: what is killed and resumed.

    python graph_run.py FOLDER [--kill EPOCH:BATCH | --kill val:EPOCH] [--resume] [--every_n_train_steps N] [--accelerator gpu]

Reads the files in ``FOLDER/../graph``. Leaves ``FOLDER/final.safetensors`` (both tables), ``FOLDER/val.json`` (every figure of every validation)
and ``FOLDER/test.json``.
"""

import argparse
import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from tiny_data import quiet_trainer
from toy_graph import toy_graph

from malleable.callbacks.report.report import RunReport
from malleable.lightning_modules.graphs.nfe import NFE
from malleable.lightning_modules.graphs.settings import EmbeddingTuning


class Kill(Callback):
    """Send the process SIGKILL in the middle of an epoch, or of its validation."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.where == f"{trainer.current_epoch}:{batch_idx}":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if self.where == f"val:{trainer.current_epoch}":
            os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", default="")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--every_n_train_steps", type=int)
    parser.add_argument("--accelerator", default="cpu")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seed_everything(7)
    every = {"every_n_train_steps": options.every_n_train_steps} if options.every_n_train_steps else {"save_on_train_epoch_end": True}
    report = RunReport()
    callbacks = [Kill(options.kill), report, ModelCheckpoint(options.folder / "checkpoints", save_last=True, **every)]
    trainer = quiet_trainer(options.folder, accelerator=options.accelerator, max_epochs=6, check_val_every_n_epoch=2, callbacks=callbacks)
    # Dropout and a rate that falls each epoch: what is drawn and what was counted must go on where it stopped.
    module = NFE("nfe2", 8, 1.0, gamma_trainable=True, dropout=0.2, tuning=EmbeddingTuning(lr=0.02, lr_decay=0.8))
    data = toy_graph(options.folder.parent / "graph", cache_dir=str(options.folder / "cache"), batch_size=4, global_batch_size=8, eval_batch_size=4)
    trainer.fit(module, data, ckpt_path=str(options.folder / "checkpoints" / "last.ckpt") if options.resume else None)
    save_file(dict(module.state_dict()), options.folder / "final.safetensors")
    (options.folder / "val.json").write_text(json.dumps({name: points for name, points in report.history.items() if name.startswith("val_")}))
    (figures,) = trainer.test(module, data, verbose=False)
    (options.folder / "test.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
