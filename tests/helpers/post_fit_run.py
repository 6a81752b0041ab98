"""Somebody's own LightningModule around a small decoder, edited after training; run as a script, on one rank or several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from small_editing import decoder, tokenizer
from small_facts import KNOWN, NEW, OTHERS, SETTINGS, TEXTS, learnt_decoder, lesson_loss, lessons, paraphrased, share
from torch.utils.data import DataLoader

from malleable import AlphaEdit, EditEvaluation, PostFitEdit
from malleable.lightning_modules.editing.evaluation import Protocol
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.targets import Fact, TargetSettings


class FactModule(LightningModule):
    """Module that does not depend on malleable, except for the attribute names ``model`` and ``tokenizer``.

    Args:
        spoil: Epoch from which on training ruins the weights.
        only: Keep only the weights with this in their names in checkpoints.
    """

    strict_loading = False

    def __init__(self, spoil: int | None = None, only: str = "") -> None:
        super().__init__()
        self.model = decoder(width=64, inner=256, spread=0.02)
        self.tokenizer = tokenizer("bos")
        self.spoil, self.only = spoil, only

    def learn(self) -> None:
        """Learn the facts by heart."""
        self.model = learnt_decoder()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, labels = lessons()
        return lesson_loss(self.model, inputs, labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_known", share(self.model, KNOWN + paraphrased(KNOWN)))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log_dict({"test_new": share(self.model, NEW), "test_others": share(self.model, OTHERS)})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def on_train_epoch_start(self) -> None:
        if self.spoil is not None and self.current_epoch >= self.spoil:
            with torch.no_grad():
                self.model.lm_head.weight.normal_()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if self.only in name}

    def train_dataloader(self) -> Any:
        return DataLoader([0, 1], 1)

    val_dataloader = test_dataloader = train_dataloader


def make_request(fact: Fact) -> dict[str, Any]:
    """Make a request."""
    return {"prompt": fact.prompt, "subject": fact.subject, "target": fact.target}


def edit(**changed: Any) -> AlphaEdit:
    """Make the callback that edits."""
    return AlphaEdit(**{"requests": [make_request(fact) for fact in NEW], "settings": EditSettings(**SETTINGS), "texts": TEXTS, **changed})


def evaluation(**protocol: Any) -> EditEvaluation:
    """Make the callback that measures edits."""
    return EditEvaluation(Protocol(**protocol), texts=TEXTS)


def trainer_of(folder: Path, *edits: PostFitEdit | EditEvaluation, **options: Any) -> Trainer:
    """Make a Trainer that keeps the best epoch."""
    keep = ModelCheckpoint(monitor="val_known", mode="max")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, callbacks=[*edits, keep], **{"max_epochs": 1, **quiet, **options})


def main(folder: Path, ranks: int, how: str) -> None:
    """Fit, or leave a frozen model as it is, edit and test; write the patch's id and what was measured."""
    more = {"paraphrases": ["because I know"], "generation_prompts": ["I know", "the dog"], "references": ["the dog saw the house"]}
    facts = [{**make_request(fact), "true": "dog", "neighbors": [{"prompt": "the capital of Lima", "answer": "sad"}], **more} for fact in NEW[:3]]
    settings = EditSettings(**{**SETTINGS, "targets": TargetSettings(lr=0.5, steps=10, clamp=4.0, decay=0.01), "batch_size": 2})
    module, callback, measured = FactModule(), edit(requests=facts, settings=settings), evaluation(texts=7, writing=8, generated_tokens=4)
    module.load_state_dict(torch.load(folder / "learnt.pt", weights_only=True))
    options: dict[str, Any] = {"limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
    if how == "frozen":
        module.model.requires_grad_(False)
        module.configure_optimizers = lambda: None  # type: ignore[method-assign]
        options["max_steps"] = 0
    trainer = trainer_of(folder, callback, measured, devices=ranks, strategy="ddp" if ranks > 1 else "auto", **options)
    trainer.fit(module)
    (figures,) = trainer.test(module, verbose=False)
    weights = {name: parameter.detach().double().sum().item() for name, parameter in module.model.named_parameters()}
    answers = measured.after.answers, measured.before.answers, measured.after.requests, measured.before.requests
    found = {"id": callback.stack.ids[0], "figures": figures, "before": measured.before.figures, "weights": weights, "answers": answers}
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
