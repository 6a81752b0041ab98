"""Recommendation by writing titles: a language model searches among the items of a catalogue."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from malleable.datamodules.batch import AnswerBatch, Catalog, Recommendations
from malleable.datamodules.negatives import NegativeSampler, SelfPlay, Semantic
from malleable.lightning_modules.functional.language.decoding import beam_search
from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.language.free_answers import nearest_items, write_answers
from malleable.lightning_modules.recommendation.evaluation import allowed_items
from malleable.lightning_modules.recommendation.negatives import generate_negatives

SyncAny = Callable[[bool], bool]


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


class ItemDecoder:
    """Finds items of a catalogue with a language model.

    The model is an argument of the methods, not a part of the decoder. What is computed from the catalogue alone (the trie of titles) is kept;
    what depends on weights (embeddings of titles) is kept as long as ``weights_version`` stays the same.

    Args:
        catalog: The items.
        decoding: How titles are decoded.
    """

    def __init__(self, catalog: Catalog, decoding: Decoding) -> None:
        self.catalog = catalog
        self.decoding = decoding
        self._trie: Trie | None = None
        self._titles: tuple[Hashable, Tensor] | None = None

    def trie(self, device: torch.device) -> Trie:
        """Return the trie of titles on a device."""
        if self._trie is None:
            self._trie = Trie.build(self.catalog.token_ids)
        self._trie = self._trie.to(device)
        return self._trie

    def title_embeddings(self, model: nn.Module, weights_version: Hashable = None) -> Tensor:
        """Return the embeddings of all titles, ``(N, d)``.

        Args:
            model: Embeds the titles.
            weights_version: Changes whenever the weights do; ``None`` computes anew.
        """
        if weights_version is None or self._titles is None or self._titles[0] != weights_version:
            pad = self.catalog.vocabulary.pad_token_id if self.catalog.vocabulary else 0
            self._titles = weights_version, embed_texts(model, self.catalog.token_ids, pad_token_id=pad)
        return self._titles[1]

    def forget_weights(self) -> None:
        """Drop what was computed with weights."""
        self._titles = None

    @torch.no_grad()
    def recommend(
        self, model: nn.Module, batch: AnswerBatch, k: int, *, weights_version: Hashable = None, sync_any: SyncAny | None = None
    ) -> Recommendations:
        """Find the k most probable titles of each row.

        Args:
            model: The language model.
            batch: Rows with prompts; what they have seen is left out if so decided, and candidates restrict the choice.
            k: Number of items.
            weights_version: As in :meth:`title_embeddings`.
            sync_any: Returns whether a flag is true on any rank, where ranks must make equally many forward passes.
        """
        allowed = allowed_items(batch, len(self.catalog), self.decoding.exclude_seen)
        if self.decoding.grounding == "embedding":
            tokens = write_answers(model, batch, self.catalog, max_new_tokens=self.decoding.max_new_tokens, sync_any=sync_any)
            return Recommendations(*nearest_items(model, tokens, self.title_embeddings(model, weights_version), k, allowed))
        found = beam_search(
            model,
            self.trie(batch.prompt_ids.device),
            batch.prompt_ids,
            batch.prompt_mask,
            num_beams=max(k, self.decoding.num_beams),
            k=k,
            allowed=allowed,
            renormalize=self.decoding.renormalize,
            sync_any=sync_any,
        )
        return Recommendations(*found)

    @torch.no_grad()
    def generate_negatives(
        self,
        model: nn.Module,
        batch: AnswerBatch,
        sampler: NegativeSampler,
        seed: int,
        *,
        weights_version: Hashable = None,
        sync_any: SyncAny | None = None,
    ) -> Tensor:
        """Generate rejected answers; see :func:`~malleable.lightning_modules.recommendation.negatives.generate_negatives`."""
        own = isinstance(sampler, SelfPlay)
        allowed = allowed_items(batch, len(self.catalog), exclude_seen=getattr(sampler, "exclude_seen", True), exclude_target=not own)
        embeds = sampler.grounding == "embedding" if isinstance(sampler, SelfPlay) else isinstance(sampler, Semantic)
        titles = self.title_embeddings(model, weights_version) if embeds else None
        trie = self.trie(batch.prompt_ids.device)
        return generate_negatives(model, trie, self.catalog, batch, sampler, seed, allowed=allowed, titles=titles, sync_any=sync_any)
