"""A small self-play run as a script of its own: what is killed, resumed, and run on several ranks.

    python self_play_run.py FOLDER [--kill PHASE:STEP | --kill play:ROUND] [--resume] [--devices N] [--strategy ddp|zero2|zero3] [--lora BASE]

Leaves ``FOLDER/final.safetensors`` (whole trainable weights), ``FOLDER/test.json`` and ``FOLDER/run/self_play/round_*.parquet``.
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
from tiny import tiny_config
from tiny_data import TinyData, quiet_trainer

from malleable.callbacks.self_play.loop import SelfPlayLoop
from malleable.callbacks.self_play.phases import PhaseSettings
from malleable.datamodules.negative_samplers import SelfPlay
from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA
from malleable.lightning_modules.language.export import gathered_state
from malleable.lightning_modules.language.item_decoding import Decoding
from malleable.lightning_modules.recommendation.sprec import SPRec


class Kill(Callback):
    """Send the process SIGKILL in the middle of a phase."""

    def __init__(self, where: str, loop: SelfPlayLoop) -> None:
        self.phase, number = where.split(":")
        self.number = int(number)
        self.loop = loop

    def setup(self, trainer, pl_module, stage):
        if self.phase != "play":
            return
        ask, calls = pl_module.generate_negatives, []

        def interrupted(*args, **kwargs):
            calls.extend([1] * (kwargs["sampler"] == self.loop.negatives))
            # Two batches a round on one device, and those that compare decoding: die in the second.
            if len(calls) == 2 * self.number:
                os.kill(os.getpid(), signal.SIGKILL)
            return ask(*args, **kwargs)

        pl_module.generate_negatives = interrupted

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        phase = self.loop.phases[trainer.current_epoch]
        if phase.kind == self.phase and phase.round == 2 and batch_idx == self.number:
            os.kill(os.getpid(), signal.SIGKILL)


def make_loop(**changes) -> SelfPlayLoop:
    """Two rounds of 32 rows after three epochs of warm-up."""
    settings = {
        "rounds": 2,
        "rows_per_round": 32,
        "warmup": PhaseSettings(epochs=2, lr=1e-2, warmup_steps=0),
        "sft": PhaseSettings(lr=1e-3, warmup_steps=2),
        "dpo": PhaseSettings(lr=1e-3, warmup_steps=2),
        "negatives": SelfPlay(decode="beam_k_random", num_beams=3),
    }
    return SelfPlayLoop(**(settings | changes))


def make_module(base: str | None = None, dropout: float = 0.1) -> SPRec:
    """A module with dropout, so that resumption must repeat what is drawn."""
    config = tiny_config()
    if base:
        config = LanguageModelConfig(name=base, lora=LoRA(r=2, alpha=4, dropout=dropout))
    else:
        config.scratch.dropout = dropout
    return SPRec(language_model=config, decoding=Decoding(num_beams=8, exclude_seen=False), ks=(1, 3))


def strategy_of(name: str):
    """Make a strategy by its short name."""
    if name in ("zero2", "zero3"):
        from cpu_deepspeed import CPUDeepSpeedStrategy

        return CPUDeepSpeedStrategy(stage=int(name[-1]))
    return name


def main(arguments: list[str]) -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--lora")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--every_n_train_steps", type=int)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    seed_everything(7)
    loop = make_loop()
    every = {"every_n_train_steps": options.every_n_train_steps} if options.every_n_train_steps else {"save_on_train_epoch_end": True}
    callbacks = [loop, ModelCheckpoint(options.folder / "checkpoints", save_last=True, **every)]
    if options.kill:
        callbacks.append(Kill(options.kill, loop))
    trainer = quiet_trainer(options.folder, devices=options.devices, strategy=strategy_of(options.strategy), max_epochs=-1, callbacks=callbacks)
    module, data = make_module(options.lora, options.dropout), TinyData(batch_size=4 // options.devices, global_batch_size=4)
    trainer.fit(module, data, ckpt_path=str(options.folder / "checkpoints" / "last.ckpt") if options.resume else None)
    state = gathered_state(module.model, trainable_only=True)
    if trainer.is_global_zero:
        save_file({name: value.clone().contiguous() for name, value in state.items()}, options.folder / "final.safetensors")
    (figures,) = trainer.test(module, data, verbose=False)
    if trainer.is_global_zero:
        (options.folder / "test.json").write_text(json.dumps(figures))
        (options.folder / "history.json").write_text(json.dumps([loop.state.history, loop.state.before["figures"], loop.state.marks]))


if __name__ == "__main__":
    main(sys.argv[1:])
