"""Sampled answers of a language model during preference tuning, and their divergence from the reference."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import pad

from malleable.callbacks.reference import row_keys
from malleable.callbacks.report.page import Section
from malleable.callbacks.row_pass import apply_to_rows
from malleable.callbacks.run_files import copy_to_run, find_copies, run_folder
from malleable.datamodules.batch import AnswerBatch, Example
from malleable.datamodules.collate import collate
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.language.tokenizer import load_tokenizer
from malleable.datamodules.loading import sample_ids
from malleable.datamodules.sample_ids import keyed_order
from malleable.lightning_modules.functional.keyed_random import mix
from malleable.lightning_modules.functional.language.free_text import generate_text
from malleable.lightning_modules.functional.language.logps import answer_logps
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.synchronized_logging import log_synchronized
from malleable.lightning_modules.verified_file import load_verified, save_verified

log = logging.getLogger(__name__)

FOLDER = "samples"
NO_TOKEN = -1
SHOWN_CHARACTERS = 200


class Answers(NamedTuple):
    """Answers of the reference.

    Attributes:
        prompts: ``(N,)`` int64, hashes of the rows.
        tokens: ``(N, T)`` int64, padded with -1.
        logps: ``(N,)`` log-probabilities in nats.
    """

    prompts: Tensor
    tokens: Tensor
    logps: Tensor


class AnswerSamples(Callback):
    """Sample answers to held-out prompts after each validation and test, and measure their lengths and the divergence from the reference.

    Before the first training step, the model also answers the prompts. These answers, and their log-probabilities, are stored in the run folder.
    Later, the trained model scores them. Logged values, with the prefix ``val_`` or ``test_``:

    - ``kl``: mean of ``log pi_ref(y) - log pi(y)`` over the stored answers y, in nats per answer: an estimate of ``KL(pi_ref || pi)``;
    - ``answer_tokens``: mean number of tokens of an answer, ``answers_ended``: share of answers that end within ``max_new_tokens``;
    - ``distinct_2``: share of different pairs of adjacent tokens among all pairs.

    The answers are written to ``samples/val_step_<step>.jsonl``, and the first ones are shown in the report.

    Args:
        num_prompts: Number of different prompts of each split.
        max_new_tokens: Maximum number of tokens of an answer.
        temperature: Sampling temperature of the answers, >= 0; 0 selects the most probable tokens. The stored answers of the reference always have
            temperature 1.
        top_p: Sample from the most probable tokens that together have this probability, in (0, 1].
        num_shown: Number of answers in the report.
        batch_size: Number of prompts of a batch on one device.
        seed: Seed of prompts and samples.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        num_prompts: int = 64,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_shown: int = 4,
        batch_size: int = 16,
        seed: int = 0,
    ) -> None:
        for name, value in (("num_prompts", num_prompts), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if temperature < 0 or not 0 < top_p <= 1 or num_shown < 0:
            raise ValueError(f"need temperature >= 0, 0 < top_p <= 1 and num_shown >= 0, got {temperature}, {top_p} and {num_shown}")
        self.num_prompts = num_prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_p = top_p
        self.num_shown = num_shown
        self.batch_size = batch_size
        self.seed = seed
        self._started = False
        self._reference: dict[str, Answers] = {}
        self._shown: list[list[str]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return whether answers of the reference are stored."""
        return {"started": self._started}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore whether answers of the reference are stored."""
        self._started = state_dict["started"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module, and forget the answers of an earlier fit.

        Raises:
            MisconfigurationException: If the module is not a language model.
        """
        if not isinstance(pl_module, LanguageModel):
            raise MisconfigurationException(f"AnswerSamples needs a language model, got {type(pl_module).__name__}; remove the callback")
        if stage == "fit":
            self._started, self._reference = False, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample and store answers of the reference; a resumed run reads those of the interrupted run."""
        module = cast("LanguageModel", pl_module)
        for split in ("val", "test"):
            if rows := self._prompts(trainer, split):
                name = f"{FOLDER}/reference_{split}.safetensors"
                path = run_folder(trainer) / name
                if self._started:
                    copy_to_run(trainer, run_folder(trainer), name)
                else:
                    answers = self._sample(trainer, module, rows, 1.0, 1.0, f"reference answers to {split} prompts")
                    logps = self._score(trainer, module, rows, answers)
                    if trainer.is_global_zero:
                        with atomic_write(path) as temporary:
                            save_verified({"prompts": row_keys(rows), "answers": answers, "logps": logps}, temporary)
                    trainer.strategy.barrier("answers of the reference")
                self._reference[split] = self._read(path, rows)
        self._started = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample answers to validation prompts."""
        if not trainer.sanity_checking:
            self._evaluate(trainer, cast("LanguageModel", pl_module), "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample answers to test prompts."""
        self._evaluate(trainer, cast("LanguageModel", pl_module), "test")

    def report_sections(self) -> list[Section]:
        """Return the first answers of the last validation or test."""
        if not self._shown:
            return []
        header = ["prompt", "chosen answer", "answer of the reference", "answer of the model"]
        return [Section("Sampled answers", "Answers to the same held-out prompts.", (header, self._shown))]

    def _evaluate(self, trainer: Trainer, module: LanguageModel, split: str) -> None:
        rows = self._prompts(trainer, split)
        if not rows:
            return
        reference = self._stored(trainer, split, rows)
        answers = self._sample(trainer, module, rows, self.temperature, self.top_p, f"answers to {split} prompts")
        figures = answer_statistics(answers, _eos(module))
        if reference is not None:
            figures["kl"] = (reference.logps - self._score(trainer, module, rows, reference.tokens)).mean().item()
        for name, value in figures.items():
            log_synchronized(module, f"{split}_{name}", value)
        path = run_folder(trainer) / FOLDER / f"{split}_step_{trainer.global_step}.jsonl"  # all ranks must call run_folder
        if trainer.is_global_zero:
            self._write(path, module, rows, answers, None if reference is None else reference.tokens)

    def _prompts(self, trainer: Trainer, split: str) -> list[Example]:
        """Return rows of a split with different prompts, selected by seed and id."""
        source: Any = getattr(trainer, "datamodule", None)
        loader: Any = getattr(trainer, f"{split}_dataloaders", None)
        rows = getattr(loader, "dataset", None) if source is None else getattr(source, f"{split}_dataset", None)
        if not rows or "prompt" not in rows[0]:
            return []
        chosen: dict[tuple[int, ...], Example] = {}
        for position in keyed_order(sample_ids(rows), self.seed, 0).tolist():
            row = rows[position]
            chosen.setdefault(tuple(row["prompt"]), row)
            if len(chosen) == self.num_prompts:
                break
        return list(chosen.values())

    def _sample(self, trainer: Trainer, module: LanguageModel, rows: Sequence[Example], temperature: float, top_p: float, label: str) -> Tensor:
        """Sample an answer to each prompt, ``(N, max_new_tokens)`` int64, padded with -1."""

        def generate(batch: AnswerBatch) -> Tensor:
            found = generate_text(
                module.model,
                batch.prompt_ids,
                batch.prompt_mask,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=_eos(module),
                temperature=temperature,
                top_p=top_p,
                seeds=mix(batch.sample_id) + self.seed,
                sync_any=module.sync_any,
            )
            is_end = found == _eos(module)
            after_end = is_end.cumsum(1) - is_end.long() > 0
            return pad(found.masked_fill(after_end, NO_TOKEN), (0, self.max_new_tokens - found.shape[1]), value=NO_TOKEN)

        prompts: list[Example] = [{"sample_id": row["sample_id"], "prompt": row["prompt"], "answers": [()]} for row in rows]
        return apply_to_rows(trainer, module, prompts, self._collate(module, AnswerBatch), self.batch_size, generate, label)

    def _score(self, trainer: Trainer, module: LanguageModel, rows: Sequence[Example], answers: Tensor) -> Tensor:
        """Compute the log-probability of each answer, ``(N,)`` in nats."""
        scored: list[Example] = [
            {"sample_id": row["sample_id"], "prompt": row["prompt"], "answers": [[token for token in own if token != NO_TOKEN]]}
            for row, own in zip(rows, answers.tolist(), strict=True)
        ]

        def compute(batch: AnswerBatch) -> Tensor:
            return answer_logps(module.model, batch, shared_prompt=module.decoding.shared_prompt)[:, 0]

        return apply_to_rows(trainer, module, scored, self._collate(module, AnswerBatch), self.batch_size, compute, "scores of answers")

    @staticmethod
    def _collate(module: LanguageModel, kind: Any) -> Any:
        assert module.vocabulary is not None
        return partial(collate, kind=kind, pad_token_id=module.vocabulary.pad_token_id)

    def _stored(self, trainer: Trainer, split: str, rows: Sequence[Example]) -> Answers | None:
        """Return the answers of the reference to these prompts, if the run of the model has stored them."""
        if (known := self._reference.get(split)) is not None:
            return known if torch.equal(known.prompts, row_keys(rows)) else None
        path = find_copies(trainer, run_folder(trainer), f"{FOLDER}/reference_{split}.safetensors")[0]
        # The first rank decides, because all ranks must run the model equally often.
        return self._read(path, rows) if trainer.strategy.broadcast(path.is_file()) else None

    @staticmethod
    def _read(path: Path, rows: Sequence[Example]) -> Answers:
        if not path.is_file():
            raise MisconfigurationException(
                f"the answers of the reference are missing: {path} does not exist. They cannot be sampled again, because the model has been trained "
                "since; restore the file or start a new run"
            )
        tensors, _ = load_verified(path)
        if set(tensors) != {"prompts", "answers", "logps"} or not torch.equal(tensors["prompts"], row_keys(rows)):
            raise MisconfigurationException(
                f"{path} has answers to other prompts: use the data, the seed and num_prompts of that run, or remove the callback AnswerSamples"
            )
        return Answers(tensors["prompts"], tensors["answers"], tensors["logps"])

    def _write(self, path: Path, module: LanguageModel, rows: Sequence[Example], answers: Tensor, reference: Tensor | None) -> None:
        """Write prompts and answers as text, or as tokens without a tokenizer."""
        assert module.vocabulary is not None
        name = module.vocabulary.tokenizer
        tokenizer = None if name is None else load_tokenizer(name)

        def text(tokens: Sequence[int]) -> str:
            real = [int(token) for token in tokens if token != NO_TOKEN]
            return " ".join(map(str, real)) if tokenizer is None else str(tokenizer.decode(real, skip_special_tokens=True))

        stored: list[list[int]] = [[] for _ in rows] if reference is None else reference.tolist()
        entries = [
            {"prompt": text(row["prompt"]), "chosen": text(row["answers"][0]), "reference": text(first), "answer": text(own)}
            for row, first, own in zip(rows, stored, answers.tolist(), strict=True)
        ]
        self._shown = [[_shorten(value) for value in entry.values()] for entry in entries[: self.num_shown]]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), encoding="utf-8")


def answer_statistics(answers: Tensor, eos_token_id: int) -> dict[str, float]:
    """Return length, share that ended, and share of distinct pairs of adjacent tokens.

    Args:
        answers: ``(N, T)`` int64, padded with -1 on the right, N >= 1.
        eos_token_id: Token that ends an answer.
    """
    real = answers != NO_TOKEN
    pairs = torch.stack([answers[:, :-1], answers[:, 1:]], -1)[real[:, 1:]]
    return {
        "answer_tokens": real.sum(1).double().mean().item(),
        "answers_ended": (answers == eos_token_id).any(1).double().mean().item(),
        "distinct_2": len(torch.unique(pairs, dim=0)) / max(1, len(pairs)),
    }


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def _eos(module: LanguageModel) -> int:
    assert module.vocabulary is not None
    return module.vocabulary.eos_token_id
