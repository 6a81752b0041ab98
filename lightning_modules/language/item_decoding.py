"""Decoding of items of a catalogue with a language model: settings, and the choice of the search.

The searches over the trie of titles are in ``functional/language``: ``trie_beam_search.py`` and ``trie_sampling.py``.

Shapes: B rows, N items, d width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from malleable.datamodules.batch import AnswerBatch, Catalog, Recommendations
from malleable.datamodules.negative_samplers import NegativeSampler, SelfPlay, Semantic
from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.functional.language.trie_beam_search import beam_search
from malleable.lightning_modules.language.free_answers import nearest_items, write_answers
from malleable.lightning_modules.recommendation.evaluation import allowed_items
from malleable.lightning_modules.recommendation.generated_negatives import generate_negatives

SyncAny = Callable[[bool], bool]


@dataclass
class Decoding:
    """Settings of the decoding of items.

    Attributes:
        grounding: ``trie``: beam search over the titles of the catalogue; ``embedding``: generate one free-text answer and return the titles nearest
            to it. Figures of the two are not comparable.
        num_beams: Number of beams of the search in the trie.
        exclude_seen: Do not recommend items that the user has interacted with.
        renormalize: Normalise probabilities over the tokens that lead to an allowed item instead of the vocabulary.
        shared_prompt: Compute a prompt once for all its answers. ``None``: if that is exact for the model; False: never, each answer gets its own
            row; True: always, and it is an error if that is not exact for the model.
        max_new_tokens: Maximum number of tokens of a free-text answer.
    """

    grounding: Literal["trie", "embedding"] = "trie"
    num_beams: int = 20
    exclude_seen: bool = True
    renormalize: bool = False
    shared_prompt: bool | None = None
    max_new_tokens: int = 32


class ItemDecoder:
    """Decoder of items of a catalogue with a language model.

    The model is an argument of the methods. The trie of titles is cached. Embeddings of titles, which depend on the weights, are cached until
    ``weights_version`` changes.

    Args:
        catalog: The items.
        decoding: Settings of decoding.
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
            model: The language model.
            weights_version: Value that changes whenever the weights change; ``None`` disables the cache.
        """
        if weights_version is None or self._titles is None or self._titles[0] != weights_version:
            pad = self.catalog.vocabulary.pad_token_id if self.catalog.vocabulary else 0
            self._titles = weights_version, embed_texts(model, self.catalog.token_ids, pad_token_id=pad)
        return self._titles[1]

    def clear_embeddings(self) -> None:
        """Clear the cache of embeddings."""
        self._titles = None

    @torch.no_grad()
    def recommend(
        self, model: nn.Module, batch: AnswerBatch, k: int, *, weights_version: Hashable = None, sync_any: SyncAny | None = None
    ) -> Recommendations:
        """Find the k most probable titles of each row.

        Args:
            model: The language model.
            batch: Rows with prompts; seen items are excluded with ``decoding.exclude_seen``, and candidates restrict the choice.
            k: Number of items.
            weights_version: As in :meth:`title_embeddings`.
            sync_any: Returns whether a flag is true on any rank; given if all ranks must make equally many forward passes.
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
        """Generate rejected answers; see :func:`~malleable.lightning_modules.recommendation.generated_negatives.generate_negatives`."""
        own = isinstance(sampler, SelfPlay)
        allowed = allowed_items(batch, len(self.catalog), exclude_seen=getattr(sampler, "exclude_seen", True), exclude_target=not own)
        embeds = sampler.grounding == "embedding" if isinstance(sampler, SelfPlay) else isinstance(sampler, Semantic)
        titles = self.title_embeddings(model, weights_version) if embeds else None
        trie = self.trie(batch.prompt_ids.device)
        return generate_negatives(model, trie, self.catalog, batch, sampler, seed, allowed=allowed, titles=titles, sync_any=sync_any)
