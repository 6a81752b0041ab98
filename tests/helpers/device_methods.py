"""Small runs of whole methods on a device: an edit, a round of self-play, and counting baselines. Their results are on the CPU, to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, seed_everything
from self_play_run import make_loop, make_module
from small_editing import tokenizer
from small_facts import NEW, SETTINGS, TEXTS, learnt_decoder
from tiny import tiny_rows
from tiny_data import TinyData, quiet_trainer
from toy_sequences import ToySequences, packed_row, training_rows
from toy_shop import ToyShop

from malleable.callbacks.self_play.phases import PhaseSettings
from malleable.callbacks.self_play.round_file import RoundFile
from malleable.datamodules.collate import collate_answers
from malleable.lightning_modules.editing.editor import AlphaEditor
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.targets import TargetSettings
from malleable.lightning_modules.recommendation.baselines import Baseline, ItemKNN, Markov, Popularity, count_rows
from malleable.lightning_modules.recommendation.ease import EASE
from malleable.lightning_modules.recommendation.sequence_settings import EncoderSettings
from malleable.lightning_modules.recommendation.sequential import SequentialRecommender


def accelerator(device: torch.device) -> str:
    """Return the name of a device for a Trainer."""
    return "gpu" if device.type == "cuda" else device.type


def edit_changes(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
    """Edit four facts in a decoder that knows others; return the changes of the weights by layer, in float32."""
    model = learnt_decoder().to(device, dtype)
    settings = EditSettings(**{**SETTINGS, "targets": TargetSettings(lr=0.5, steps=15, clamp=4.0, decay=0.01), "batch_size": 2})
    editor = AlphaEditor(model, tokenizer("bos"), settings)
    editor.fit_statistics(TEXTS)
    editor.edit(NEW[:4])
    assert {weight.device.type for weight in model.parameters()} == {device.type}
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    return {layer: editor.change(layer).float().cpu() for layer in editor.layers}


class _Losses(Callback):
    """Records the loss of every training batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def self_play_round(device: torch.device, folder: Path, precision: str = "32-true") -> tuple[list[list[int]], list[float]]:
    """Run a warm-up and one round of self-play without dropout; return the generated negatives and the losses of all batches."""
    seed_everything(7)
    phase = PhaseSettings(lr=1e-3, warmup_steps=0)
    loop = make_loop(rounds=1, rows_per_round=16, warmup=PhaseSettings(epochs=1, lr=1e-3, warmup_steps=0), sft=phase, dpo=phase)
    losses = _Losses()
    options = {"accelerator": accelerator(device), "precision": precision, "max_epochs": -1, "enable_checkpointing": False}
    module = make_module(dropout=0.0)
    quiet_trainer(folder, callbacks=[loop, losses], **options).fit(module, TinyData(train=tiny_rows(24)))
    items = RoundFile.read(folder / "run/self_play/round_1.parquet").items
    assert items is not None
    return items, losses.values


BASELINES: dict[str, type[Baseline]] = {kind.__name__: kind for kind in (Popularity, ItemKNN, Markov, EASE)}


def baseline_results(name: str, device: torch.device, folder: Path) -> tuple[list[list[int]], torch.Tensor, dict[str, float]]:
    """Count the rows of a small shop; return the recommended items, their scores, and the figures of a test."""
    data = ToyShop()
    data.setup("fit")
    module = BASELINES[name](catalog=data.catalog, ks=(1, 3))
    module.configure_model()
    module.to(device)
    count_rows([module], data.train_dataset)
    items, scores = module.recommend(collate_answers(data.test_dataset).to(device), 8)
    trainer = quiet_trainer(folder, accelerator=accelerator(device), logger=False, enable_checkpointing=False)
    (figures,) = trainer.test(BASELINES[name](ks=(1, 3)), ToyShop(), verbose=False)
    return items.tolist(), scores.cpu(), dict(figures)


def sequence_results(kind: str, device: torch.device, folder: Path, precision: str = "32-true") -> tuple[list[float], dict[str, float]]:
    """Train a small sequential recommender without dropout on packed rows; return the losses of all batches, and the figures of a test."""
    seed_everything(0)
    module = SequentialRecommender(EncoderSettings(kind, dim=16, num_layers=1, max_length=12, dropout=0.0, mask_rate=0.4), ks=(1, 3))
    data = ToySequences(train=[packed_row(training_rows(64)[start : start + 2]) for start in range(0, 64, 2)])
    data.row_tokens = lambda: [len(row["items"]) - 2 for row in data.train_dataset]  # type: ignore[method-assign]
    losses = _Losses()
    options = {"accelerator": accelerator(device), "precision": precision, "logger": False, "enable_checkpointing": False}
    trainer = quiet_trainer(folder, max_epochs=3, callbacks=[losses], **options)
    trainer.fit(module, data)
    (figures,) = trainer.test(module, data, verbose=False)
    return losses.values, dict(figures)
