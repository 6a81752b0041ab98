"""Answers written freely, and the titles nearest to them.

Shapes: B rows, T tokens, N items, d width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from malleable.datamodules.batch import AnswerBatch, Catalog
from malleable.lightning_modules.functional.language.free_text import generate_text
from malleable.lightning_modules.functional.language.grounding import embed_texts, nearest_titles
from malleable.lightning_modules.functional.language.trie_search import Decoded


def write_answers(
    model: nn.Module,
    batch: AnswerBatch,
    catalog: Catalog,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Tensor | None = None,
    sync_any: Callable[[bool], bool] | None = None,
) -> Tensor:
    """Let the model write an answer to each prompt without regard to the catalogue.

    Args:
        model: The language model.
        batch: Prompts.
        catalog: Gives the end-of-sequence token.
        max_new_tokens: Most tokens to write.
        temperature: 0 takes the most probable tokens.
        top_p: Probability mass to draw among.
        seeds: ``(B,)`` int64, the source of randomness of each row.
        sync_any: As in :func:`~malleable.lightning_modules.functional.language.free_text.generate_text`.

    Returns:
        ``(B, max_new_tokens + 1)`` int64: each answer ends in the end-of-sequence token and is padded with -1.
    """
    assert catalog.vocabulary is not None
    eos = catalog.vocabulary.eos_token_id
    written = generate_text(
        model,
        batch.prompt_ids,
        batch.prompt_mask,
        eos_token_id=eos,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seeds=seeds,
        sync_any=sync_any,
    )
    ended = (written == eos).cumsum(1)
    tokens = torch.full((len(written), max_new_tokens + 1), -1, device=written.device)
    tokens[:, : written.shape[1]] = written.masked_fill(ended - (written == eos).long() > 0, -1)
    length = (tokens >= 0).sum(1)
    cut_off = ended[:, -1] == 0
    tokens[cut_off, length[cut_off]] = eos
    return tokens


def named_items(tokens: Tensor, catalog: Catalog) -> Tensor:
    """The item whose title is exactly the text, -1 where none is.

    Args:
        tokens: ``(B, T)``, as :func:`write_answers` returns.
        catalog: The items.

    Returns:
        ``(B, 1)`` int64.
    """
    known = {tuple(title): item for item, title in reversed(list(enumerate(catalog.token_ids)))}
    return torch.tensor([[known.get(tuple(row), -1)] for row in texts(tokens)], device=tokens.device)


def nearest_items(model: nn.Module, tokens: Tensor, titles: Tensor, k: int, allowed: Tensor | None = None) -> Decoded:
    """The titles nearest to each text; scores are negative distances.

    Args:
        model: Embeds the texts by its last hidden state.
        tokens: ``(B, T)``, as :func:`write_answers` returns.
        titles: ``(N, d)`` embeddings of all titles by the same model.
        k: Number of items.
        allowed: ``(N,)`` or ``(B, N)`` bool, items that may be named.

    Source:
        Bao et al. (2023), BIGRec, arXiv:2308.08434, Section 3.2.
        Differs: the model itself embeds, adapter included; the release takes the base model.
    """
    return nearest_titles(embed_texts(model, texts(tokens)), titles, k=k, allowed=allowed)


def texts(tokens: Tensor) -> list[list[int]]:
    """Rows without their padding."""
    return [[token for token in row if token >= 0] for row in tokens.tolist()]
