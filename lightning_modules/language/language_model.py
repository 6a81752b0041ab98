"""What every recommending language model shares: weights, decoding to real items, evaluation, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor
from torchmetrics import Metric

from malleable.datamodules.batch import AnswerBatch, Catalog, PackedBatch, Recommendations
from malleable.lightning_modules.base import BaseModule, LossOutput, needs_weights
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.language.decoding import beam_search
from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.functional.language.logps import answer_token_logps, packed_batch_logps
from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.language.config import LanguageModelConfig
from malleable.lightning_modules.language.free_answers import nearest_items, write_answers
from malleable.lightning_modules.language.play import Play, Player, row_seeds
from malleable.lightning_modules.language.tuned_weights import TunedWeights
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.plain import from_plain
from malleable.lightning_modules.recommendation.evaluation import allowed_items, recommendation_metrics, update_metrics


@dataclass
class Decoding:
    """How a language model is made to name items.

    Attributes:
        grounding: ``trie`` searches among the catalogue's titles; ``embedding`` writes one answer freely and takes the titles nearest to it.
            Never compare figures of one with figures of the other.
        num_beams: Width of the beam in the trie of titles.
        exclude_seen: Leave out what the user already has.
        renormalize: Score within the trie, so that forced tokens cost nothing, instead of by the model's full distribution.
        shared_prompt: Compute a prompt once for all its answers. ``None`` does so where it is exact for the model; False runs a row for each
            answer; True refuses models for which it is not exact.
        max_new_tokens: Most tokens of a free answer.
    """

    grounding: Literal["trie", "embedding"] = "trie"
    num_beams: int = 20
    exclude_seen: bool = True
    renormalize: bool = False
    shared_prompt: bool | None = None
    max_new_tokens: int = 32


class LanguageModel(TunedWeights, BaseModule):
    """A causal language model that recommends by writing an item's title.

    Args:
        language_model: Which model and how it is tuned.
        catalog: The items; taken from the data module when left out.
        decoding: How titles are decoded.
        tuning: Rates of the default optimizer and schedule.
        ks: Cut-offs of the metrics.
        optimizer: Makes the optimizer instead.
        lr_scheduler: Makes the schedule instead.
    """

    needs: ClassVar[tuple[str, ...]] = ("catalog",)

    def __init__(
        self,
        language_model: LanguageModelConfig | None = None,
        catalog: Catalog | None = None,
        decoding: Decoding | None = None,
        tuning: Tuning | None = None,
        ks: tuple[int, ...] = (1, 5, 10),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.language_model: LanguageModelConfig = from_plain(LanguageModelConfig, language_model) or LanguageModelConfig()
        self.catalog = catalog
        self.decoding: Decoding = from_plain(Decoding, decoding) or Decoding()
        self.tuning: Tuning = from_plain(Tuning, tuning) or Tuning()
        self.ks = tuple(ks)
        self.model: Any = None
        self._trie: Trie | None = None
        self._titles: tuple[tuple[int, torch.device] | None, Tensor] | None = None

    @property
    def words(self) -> Catalog | None:
        """The catalogue."""
        return self.catalog

    @property
    def trie(self) -> Trie:
        """The trie of titles, on the module's device."""
        assert self.catalog is not None
        if self._trie is None:
            self._trie = Trie.build(self.catalog.token_ids)
        self._trie = self._trie.to(self.device)
        return self._trie

    @property
    def title_embeddings(self) -> Tensor:
        """Embeddings of all titles by the model as it stands, ``(N, d)``; a Trainer's are kept until it trains further or loads a checkpoint."""
        assert self.catalog is not None
        trainer = self.attached
        state = None if trainer is None else (trainer.global_step, self.device)
        if state is None or self._titles is None or self._titles[0] != state:
            self._titles = state, embed_texts(self.model, self.catalog.token_ids, pad_token_id=self.catalog.pad_token_id)
        return self._titles[1]

    @property
    def any_rank(self) -> Callable[[bool], bool] | None:
        """Tells whether a flag is up on any rank, where ranks must make equally many forward passes because weights are sharded."""
        strategy: Any = getattr(self.attached, "strategy", None)
        sharded = getattr(strategy, "zero_stage_3", False) or isinstance(strategy, FSDPStrategy)
        return partial(strategy.reduce_boolean_decision, all=False) if sharded else None

    @needs_weights
    def answer_loss(self, batch: AnswerBatch | PackedBatch) -> LossOutput:
        """Negative log-likelihood of the true answers, over the answer tokens of the optimizer step.

        A :class:`PackedBatch` is learnt whole: every token but each document's first.
        """
        # Rows repeated only to fill a batch count for nothing.
        real = batch.sample_id >= 0
        if isinstance(batch, PackedBatch):
            logps, targets = packed_batch_logps(self.model, batch)
            targets = targets & real[:, None]
        else:
            targets = batch.answer_mask[:, :1] & real[:, None, None]
            parts = (batch.prompt_ids, batch.prompt_mask, batch.answer_ids[:, :1], targets)
            logps = answer_token_logps(self.model, *parts, shared_prompt=self.decoding.shared_prompt)
        weight = targets.sum()
        count = weight.clamp_min(1) if batch.num_step_tokens is None else batch.num_step_tokens
        return LossOutput(-(logps * targets).sum() / count, {}, weight)

    @needs_weights
    @torch.no_grad()
    def recommend(self, batch: AnswerBatch, k: int | None = None) -> Recommendations:
        """Find the k most probable titles of each row.

        Args:
            batch: Rows with prompts; what they have seen is left out if so decided, and candidates restrict the choice.
            k: Number of items; default: the largest cut-off of the metrics.
        """
        assert self.catalog is not None
        k = k or max(self.ks)
        allowed = allowed_items(batch, len(self.catalog), self.decoding.exclude_seen)
        if self.decoding.grounding == "embedding":
            length = self.decoding.max_new_tokens
            tokens = write_answers(self.model, batch, self.catalog, max_new_tokens=length, any_rank=self.any_rank)
            return Recommendations(*nearest_items(self.model, tokens, self.title_embeddings, k, allowed))
        found = beam_search(
            self.model,
            self.trie,
            batch.prompt_ids,
            batch.prompt_mask,
            num_beams=max(k, self.decoding.num_beams),
            k=k,
            allowed=allowed,
            renormalize=self.decoding.renormalize,
            any_rank=self.any_rank,
        )
        return Recommendations(*found)

    @needs_weights
    @torch.no_grad()
    def play(self, batch: AnswerBatch, play: Play, seed: int = 0) -> Tensor:
        """Answer each row as self-play asks.

        Args:
            batch: Rows with prompts.
            play: How to answer.
            seed: Together with a row's id the only source of randomness, so that ranks and batches do not matter.

        Returns:
            ``(B, num_negatives)`` items, -1 where there is none; with ``grounding='none'`` ``(B, 2 + max_new_tokens)``: the item or -1,
            then the free text's tokens with its end-of-sequence token, padded with -1.
        """
        assert self.catalog is not None
        allowed = allowed_items(batch, len(self.catalog), play.exclude_seen)
        titles = self.title_embeddings if play.grounding == "embedding" else None
        return Player(self.model, self.trie, self.catalog, play, row_seeds(batch.sample_id, seed), self.any_rank).answer(batch, allowed, titles)

    def configure_metrics(self) -> dict[str, Metric]:
        """Accuracy and exposure of the recommended lists."""
        assert self.catalog is not None
        return recommendation_metrics(self.catalog, self.ks)

    def evaluate(self, batch: AnswerBatch, metrics: dict[str, Metric]) -> Recommendations:
        """Recommend, and compare with the true item."""
        recommended = self.recommend(batch)
        update_metrics(metrics, recommended, batch)
        return recommended

    @float32_by_default()
    def predict_step(self, batch: AnswerBatch, batch_idx: int) -> Recommendations:
        """Recommend."""
        return self.recommend(batch)

    def setup(self, stage: str) -> None:
        """Take the catalogue; an extended one makes a new trie."""
        before = self.catalog
        super().setup(stage)
        if self.catalog is not before:
            self._trie = self._titles = None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Forget what was computed with other weights."""
        super().on_load_checkpoint(checkpoint)
        self._titles = None
