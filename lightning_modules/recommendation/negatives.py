"""Rejected answers that a language model generates itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from malleable.datamodules.batch import AnswerBatch, Catalog
from malleable.datamodules.negatives import Hardest, NegativeSampler, SelfPlay, Semantic
from malleable.lightning_modules.functional.keyed_random import keyed_uniform
from malleable.lightning_modules.functional.language.decoding import beam_search
from malleable.lightning_modules.functional.language.grounding import nearest_titles
from malleable.lightning_modules.functional.language.sampling import sample
from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.language.free_answers import named_items, nearest_items, write_answers


def generate_negatives(
    model: nn.Module,
    trie: Trie,
    catalog: Catalog,
    batch: AnswerBatch,
    sampler: NegativeSampler,
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
        sampler: :class:`SelfPlay`, :class:`Hardest` or :class:`Semantic`.
        seed: With the id of a row the only source of randomness, so that ranks and batches have no influence.
        allowed: ``(B, N)`` bool, items that may be named; ``None`` for all.
        titles: ``(N, d)`` embeddings of all titles, for :class:`Semantic` and ``grounding='embedding'``.
        sync_any: Returns whether a flag is true on any rank, where ranks must make equally many forward passes.

    Returns:
        ``(B, num_negatives)`` items, -1 where there is none. With ``grounding='none'`` ``(B, 2 + max_new_tokens)``: the item or -1, then the tokens
        of the free text with its end-of-sequence token, padded with -1.
    """
    seeds = row_seeds(batch.sample_id, seed)
    if isinstance(sampler, Hardest):
        beams = max(sampler.num_beams, sampler.num_negatives)
        options: Any = {"allowed": allowed, "sync_any": sync_any}
        return beam_search(model, trie, batch.prompt_ids, batch.prompt_mask, num_beams=beams, k=sampler.num_negatives, **options).item_ids
    if isinstance(sampler, Semantic):
        assert titles is not None
        items = nearest_titles(titles[batch.target], titles, sampler.pool, allowed=allowed).item_ids
        return _choose(items, seeds, sampler.num_negatives)
    assert isinstance(sampler, SelfPlay)
    return _self_play(model, trie, catalog, batch, sampler, seeds, allowed, titles, sync_any)


def _self_play(
    model: nn.Module,
    trie: Trie,
    catalog: Catalog,
    batch: AnswerBatch,
    settings: SelfPlay,
    seeds: Tensor,
    allowed: Tensor | None,
    titles: Tensor | None,
    sync_any: Callable[[bool], bool] | None,
) -> Tensor:
    """Let the model recommend."""
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
    return _choose(items, seeds, count)


def _choose(items: Tensor, seeds: Tensor, count: int) -> Tensor:
    """Choose ``count`` of the items ``(B, M)`` of each row; missing ones, -1, come last whatever was drawn."""
    uniform = keyed_uniform(seeds[:, None], torch.arange(items.shape[1], device=items.device))
    return items.gather(1, (uniform + (items < 0)).argsort(1)[:, :count])


def row_seeds(sample_id: Tensor, seed: int) -> Tensor:
    """Return one seed for each row, from its id and the round's seed alone, ``(B,)`` int64."""
    return sample_id * 2_654_435_761 + seed
