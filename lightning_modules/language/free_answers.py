"""Free-text answers, and the titles nearest to them.

Shapes: B rows, T tokens, N items, d width of hidden states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from malleable.datamodules.batch import AnswerBatch, Catalog
from malleable.lightning_modules.functional.language.free_text import generate_text
from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.functional.language.trie_search_base import Decoded
from malleable.lightning_modules.functional.search.nearest import nearest


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
    """Generate a free-text answer to each prompt, which need not be a title of the catalogue.

    Args:
        model: The language model.
        batch: Rows with prompts.
        catalog: Catalogue whose end-of-sequence token is used.
        max_new_tokens: Maximum number of new tokens.
        temperature: Sampling temperature; 0 selects the most probable tokens.
        top_p: Sample from the most probable tokens that together have this probability.
        seeds: ``(B,)`` int64, seed of each row.
        sync_any: As in :func:`~malleable.lightning_modules.functional.language.free_text.generate_text`.

    Returns:
        ``(B, max_new_tokens + 1)`` int64: answers with a final end-of-sequence token, padded with -1.
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
    """Return the item whose title equals the text of each row, -1 if there is none.

    Args:
        tokens: ``(B, T)``, as :func:`write_answers` returns.
        catalog: The items.

    Returns:
        ``(B, 1)`` int64.
    """
    known = {tuple(title): item for item, title in reversed(list(enumerate(catalog.token_ids)))}
    return torch.tensor([[known.get(tuple(row), -1)] for row in texts(tokens)], device=tokens.device)


def nearest_items(model: nn.Module, tokens: Tensor, titles: Tensor, k: int, allowed: Tensor | None = None) -> Decoded:
    """Find the titles nearest to each text; scores are negative distances.

    Args:
        model: The language model, whose last hidden state is the embedding of a text.
        tokens: ``(B, T)``, as :func:`write_answers` returns.
        titles: ``(N, d)`` embeddings of all titles by the same model.
        k: Number of items.
        allowed: ``(N,)`` or ``(B, N)`` bool, items that may be returned; ``None`` allows all.

    Returns:
        Items ``(B, k)``, nearest first, padded with -1, and scores ``(B, k)``.

    Source:
        Bao et al. (2023), BIGRec, arXiv:2308.08434, Section 3.2.
        Differs: texts are embedded by the model with its adapter; the released code uses the base model.
    """
    return Decoded(*nearest(embed_texts(model, texts(tokens)), titles, k, metric="l2", allowed=allowed))


def texts(tokens: Tensor) -> list[list[int]]:
    """Return the rows of ``(B, T)`` as lists without padding."""
    return [[token for token in row if token >= 0] for row in tokens.tolist()]
