"""Rejected answers that a language model generates itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from malleable.datamodules.batch import AnswerBatch, Catalog
from malleable.lightning_modules.functional.keyed_random import keyed_uniform
from malleable.lightning_modules.functional.language.decoding import beam_search
from malleable.lightning_modules.functional.language.sampling import sample
from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.language.free_answers import named_items, nearest_items, write_answers


@dataclass
class SelfPlay:
    """The model's own recommendations as rejected answers.

    Attributes:
        decode: ``greedy`` takes the most probable answer (the released code), ``sample`` draws from the model (what the theory asks for),
            ``beam_k_random`` draws among the ``num_beams`` best. From a model that DPO on random titles had biased towards few items, two rounds
            of sampled negatives undid most of the bias (share of the tail .001 before, .139 after); greedy ones overshot (.034): 4 to 7 % of
            them were distinct, and their mean popularity went from 189 to 43.
        grounding: ``trie`` decodes among the catalogue's titles only, ``embedding`` writes freely and takes the nearest title,
            ``none`` takes the free text as it is (the released code).
        num_negatives: Rejected answers for each row; more than one needs a multi-negative loss.
        num_beams: Width for ``beam_k_random``, and for several greedy negatives.
        temperature: Of ``sample``.
        top_p: Of ``sample``: keep the most probable tokens up to this mass.
        max_new_tokens: Of free text.
        exclude_seen: Never answer what the user already has, which is liked and no wrong answer; such an item is not recommended either. The
            released code has no such rule: false.

    Source:
        Gao et al. (2025), SPRec, arXiv:2412.09243, Section 4.
    """

    decode: Literal["greedy", "sample", "beam_k_random"] = "greedy"
    grounding: Literal["trie", "embedding", "none"] = "trie"
    num_negatives: int = 1
    num_beams: int = 10
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 32
    exclude_seen: bool = True

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("num_negatives", "num_beams", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}; use decode='greedy' for the most probable answer")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.decode == "beam_k_random" and self.num_beams < self.num_negatives:
            raise ValueError(f"num_beams {self.num_beams} must be at least num_negatives {self.num_negatives}")
        if self.grounding != "trie" and (self.num_negatives > 1 or self.decode == "beam_k_random"):
            raise ValueError(f"grounding '{self.grounding}' writes one free answer a row; several negatives or beams need grounding 'trie'")


def generate_negatives(
    model: nn.Module,
    trie: Trie,
    catalog: Catalog,
    batch: AnswerBatch,
    settings: SelfPlay,
    seed: int = 0,
    *,
    allowed: Tensor | None = None,
    titles: Tensor | None = None,
    sync_any: Callable[[bool], bool] | None = None,
) -> Tensor:
    """Generate rejected answers of a batch with the model itself.

    Args:
        model: The language model.
        trie: The titles.
        catalog: The items.
        batch: Rows with prompts.
        settings: How to answer.
        seed: With the id of a row the only source of randomness, so that ranks and batches have no influence.
        allowed: ``(B, N)`` bool, items that may be named; ``None`` for all.
        titles: ``(N, d)`` embeddings of all titles, for ``grounding='embedding'``.
        sync_any: Returns whether a flag is true on any rank, where ranks must make equally many forward passes.

    Returns:
        ``(B, num_negatives)`` items, -1 where there is none. With ``grounding='none'`` ``(B, 2 + max_new_tokens)``: the item or -1, then the tokens
        of the free text with its end-of-sequence token, padded with -1.
    """
    seeds = row_seeds(batch.sample_id, seed)
    if settings.grounding == "trie":
        return _search_titles(model, trie, batch, settings, seeds, {"allowed": allowed, "sync_any": sync_any})
    temperature = settings.temperature if settings.decode == "sample" else 0.0
    options: Any = {"max_new_tokens": settings.max_new_tokens, "temperature": temperature, "top_p": settings.top_p, "seeds": seeds}
    tokens = write_answers(model, batch, catalog, **options, sync_any=sync_any)
    if titles is not None:
        return nearest_items(model, tokens, titles, 1, allowed).item_ids
    return torch.cat([named_items(tokens, catalog), tokens], 1)


def _search_titles(model: nn.Module, trie: Trie, batch: AnswerBatch, settings: SelfPlay, seeds: Tensor, options: dict[str, Any]) -> Tensor:
    """Return ``(B, num_negatives)`` items found in the trie."""
    count = settings.num_negatives
    prompts = (model, trie, batch.prompt_ids, batch.prompt_mask)
    if settings.decode == "sample":
        options |= {"temperature": settings.temperature, "top_p": settings.top_p, "distinct": count > 1}
        return sample(*prompts, seeds=seeds, num_samples=count, **options).item_ids
    if settings.decode == "greedy":
        beams = 1 if count == 1 else max(count, settings.num_beams)
        return beam_search(*prompts, num_beams=beams, k=count, **options).item_ids
    items = beam_search(*prompts, num_beams=settings.num_beams, k=settings.num_beams, **options).item_ids
    # Missing items come last whatever was drawn.
    uniform = keyed_uniform(seeds[:, None], torch.arange(items.shape[1], device=items.device))
    return items.gather(1, (uniform + (items < 0)).argsort(1)[:, :count])


def row_seeds(sample_id: Tensor, seed: int) -> Tensor:
    """Return one seed for each row, from its id and the round's seed alone, ``(B,)`` int64."""
    return sample_id * 2_654_435_761 + seed
