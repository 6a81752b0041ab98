"""Grounding of free text to items: nearest titles by embedding.

Shapes: B rows, N items, d width, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.pass_forms import RowForm, pass_forms
from malleable.lightning_modules.functional.language.tree_attention import evaluating
from malleable.lightning_modules.functional.language.trie_search_base import Decoded
from malleable.lightning_modules.functional.language.whole_rows import states_at_end
from malleable.lightning_modules.functional.precision import full_precision


@full_precision
def nearest_titles(
    embeddings: Tensor,
    title_embeddings: Tensor,
    k: int,
    *,
    popularity: Tensor | None = None,
    gamma: float = 0.0,
    allowed: Tensor | None = None,
) -> Decoded:
    """Find the k titles with the smallest Euclidean distance to each embedding.

    With ``gamma`` > 0, the distances D, scaled to [0, 1] in each row, are multiplied by (1 + P)^-gamma.

    Args:
        embeddings: ``(B, d)``.
        title_embeddings: ``(N, d)``.
        k: Number of items to return for each row.
        popularity: ``(N,)`` or ``(B, N)``, popularity or collaborative score of each item; P is this, scaled to [0, 1].
        gamma: Weight of ``popularity``, >= 0.
        allowed: ``(N,)`` or ``(B, N)`` bool, the items that may be returned; ``None`` allows all.

    Returns:
        Items ``(B, k)``, padded with -1, and their negative distances ``(B, k)``, adjusted if ``gamma`` > 0.

    Raises:
        ValueError: If ``gamma`` is negative, or positive without ``popularity``.

    Source:
        Bao et al. (2023), BIGRec, arXiv:2308.08434: grounding generated text to real items.
    """
    if gamma < 0 or (gamma > 0 and popularity is None):
        raise ValueError(f"gamma must be 0, or > 0 with a popularity for each item; got gamma={gamma} and popularity={popularity}")
    distance = _distances(embeddings.float(), title_embeddings.float())
    if popularity is not None and gamma > 0:
        distance = _scaled(distance) * (1 + _scaled(popularity.float())) ** -gamma
    if allowed is not None:
        distance = distance.masked_fill(~allowed, torch.inf)
    top = distance.topk(min(k, distance.shape[1]), largest=False)
    missing = k - top.values.shape[1]
    items = torch.nn.functional.pad(top.indices.masked_fill(top.values == torch.inf, -1), (0, missing), value=-1)
    return Decoded(items, torch.nn.functional.pad(-top.values, (0, missing), value=-torch.inf))


def embed_texts(model: nn.Module, token_ids: Sequence[Sequence[int]], *, batch_size: int = 64, pad_token_id: int = 0) -> Tensor:
    """Embed each text as the last layer's hidden state at its last token.

    Args:
        model: Hugging Face causal language model.
        token_ids: Tokens of each text.
        batch_size: Number of texts in a forward pass.
        pad_token_id: Padding token.

    Returns:
        ``(len(token_ids), d)`` float32 on the model's device.

    Raises:
        ValueError: If a text has no tokens.

    Source:
        The released code of BIGRec, which embeds generated and real titles in the same way.
    """
    lengths = torch.tensor([len(text) for text in token_ids])
    if not lengths.all():
        raise ValueError(f"text {int(lengths.argmin())} has no tokens and cannot be embedded; leave it out")
    device = next(model.parameters()).device
    order = lengths.argsort(stable=True)  # texts of similar length need little padding
    parts = []
    for index in torch.split(order, batch_size):
        width = int(lengths[index].max())
        rows = [list(token_ids[i]) + [pad_token_id] * (width - len(token_ids[i])) for i in index.tolist()]
        parts.append(last_hidden_states(model, torch.tensor(rows, device=device), lengths[index].to(device)))
    return torch.cat(parts)[order.argsort().to(device)]


def last_hidden_states(model: nn.Module, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Return the hidden state of the last layer at the last real token of each row, ``(B, d)`` float32.

    Args:
        model: Hugging Face causal language model.
        input_ids: ``(B, T)`` int64, padded on the right.
        lengths: ``(B,)`` int64, real tokens of each row.

    Raises:
        ValueError: If the model returns no hidden states, or if they are not exact in a batch.
    """
    forms = pass_forms(model)
    width = input_ids.shape[1]
    if not forms.states or not (forms.embedding.fits(width) or forms.unpadded):
        raise ValueError(forms.refusal("embeddings of texts", "use grounding 'trie' instead"))
    with evaluating(model):
        form: RowForm = "causal" if forms.causal.fits(width) else "padded" if forms.embedding.fits(width) else "unpadded"
        return states_at_end(model, input_ids, lengths, form=form).float()


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Compute Euclidean distances ``(B, N)`` by one matrix product."""
    # a common offset, which is large for hidden states, does not change distances, but reduces the precision of the product
    centre = right.mean(0)
    left, right = left - centre, right - centre
    squared = left.square().sum(1, keepdim=True) + right.square().sum(1) - 2 * left @ right.T
    return squared.clamp(min=0).sqrt()


def _scaled(values: Tensor) -> Tensor:
    """Scale each row to [0, 1]; rows with equal values become 0."""
    low, high = values.aminmax(dim=-1, keepdim=True)
    return (values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny)
