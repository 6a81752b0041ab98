"""Embeddings of texts by a causal language model.

Shapes: B rows, d width, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.pass_forms import RowForm, pass_forms
from malleable.lightning_modules.functional.language.tree_attention import evaluating
from malleable.lightning_modules.functional.language.whole_rows import states_at_end


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
