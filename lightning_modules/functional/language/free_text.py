"""Generation of free text with a language model.

Shapes: B rows, P prompt tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.keyed_random import keyed_uniform
from malleable.lightning_modules.functional.language.pass_forms import pass_forms
from malleable.lightning_modules.functional.language.tree_attention import evaluating
from malleable.lightning_modules.functional.language.whole_rows import RowDecoder


def generate_text(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int],
    pad_token_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seeds: Tensor | None = None,
    sync_any: Callable[[bool], bool] | None = None,
) -> Tensor:
    """Generate a continuation of each prompt.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        max_new_tokens: Maximum number of new tokens.
        eos_token_id: Token, or tokens, that end a row; e.g. also a newline, for answers of one line.
        pad_token_id: Token that fills rows that have ended; default: the (first) end token.
        temperature: Divides the logits, >= 0; 0 selects the most probable token.
        top_p: Sample from the most probable tokens that together have this probability, in (0, 1].
        top_k: Sample from this number of most probable tokens.
        seeds: ``(B,)`` int64, required if ``temperature`` > 0. The samples of a row depend only on its prompt and seed.
        sync_any: Returns whether its argument is true on any rank. If given, all ranks run the model equally often, as sharded weights (ZeRO-3,
            FSDP) require.

    Returns:
        ``(B, T)`` int64 with T <= ``max_new_tokens``, including the end token of each row.

    Raises:
        ValueError: If an argument is out of range, or if there is not one seed for each row.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"generation needs temperature >= 0, 0 < top_p <= 1, top_k >= 1 and max_new_tokens >= 1, "
            f"got temperature={temperature}, top_p={top_p}, top_k={top_k}, max_new_tokens={max_new_tokens}"
        )
    if seeds is None and temperature == 0:
        seeds = torch.zeros_like(prompt_ids[:, 0])
    if seeds is None or seeds.shape != prompt_ids.shape[:1]:
        given = None if seeds is None else tuple(seeds.shape)
        raise ValueError(f"seeds must contain one number for each of the {len(prompt_ids)} rows, got shape {given}")
    stops = torch.as_tensor(eos_token_id, device=prompt_ids.device).reshape(-1)
    pad = int(stops[0]) if pad_token_id is None else pad_token_id
    written: list[Tensor] = []
    real = running = torch.ones(len(prompt_ids), 1, dtype=torch.bool, device=prompt_ids.device)
    lengths = torch.zeros_like(running, dtype=torch.long)
    decoder: CachedDecoder | RowDecoder | None = None
    tokens = prompt_ids[:, :0]
    with evaluating(model):
        while len(written) < max_new_tokens and (sync_any or bool)(bool(running.any())):
            if decoder is None:
                decoder = text_decoder(model, prompt_ids, prompt_mask, max_new_tokens)
                logits = decoder.logits
            elif isinstance(decoder, CachedDecoder):
                logits = decoder.extend(tokens, real)
            else:
                logits = decoder.extend(tokens, torch.zeros_like(tokens), len(written) - 1)
            logits = logits[:, -1].float()
            tokens = logits.argmax(-1, keepdim=True) if temperature == 0 else _draw(logits / temperature, top_p, top_k, seeds, len(written))
            tokens = tokens.where(running, pad)
            written.append(tokens)
            lengths += running
            real, running = running, running & ~torch.isin(tokens, stops)
    # ranks that waited for others have columns of padding only
    return torch.cat(written, 1)[:, : int(lengths.max())]


def text_decoder(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> CachedDecoder | RowDecoder:
    """Return the fastest exact decoder of a model for one continuation of each row.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        max_new_tokens: Maximum number of new tokens.

    Raises:
        ValueError: If no decoder is exact for the model.
    """
    forms, width = pass_forms(model), prompt_ids.shape[1] + max_new_tokens
    if forms.cached.fits(width):
        return CachedDecoder(model, prompt_ids, prompt_mask)
    return RowDecoder(model, prompt_ids, prompt_mask, form=forms.row_form(width))


class CachedDecoder:
    """Decoder of left-padded rows with the model's own cache, one token of each row at a time.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool.

    Attributes:
        logits: ``(B, 1, V)``, at the last tokens of the prompts.
    """

    def __init__(self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor) -> None:
        self.model, self.mask = model, prompt_mask.bool()
        self.cache: Any = None
        self.logits = self._run(prompt_ids)

    def extend(self, tokens: Tensor, real: Tensor) -> Tensor:
        """Feed the next token of each row.

        Args:
            tokens: ``(B, 1)`` int64.
            real: ``(B, 1)`` bool, False in rows that have ended.

        Returns:
            Logits ``(B, 1, V)``.
        """
        self.mask = torch.cat([self.mask, real], 1)
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> Tensor:
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self.model(
            input_ids=tokens,
            attention_mask=self.mask.long(),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        logits: Tensor = output.logits[:, -1:]
        return logits


def _draw(logits: Tensor, top_p: float, top_k: int | None, seeds: Tensor, step: int) -> Tensor:
    """Sample a token from each row of ``(B, V)`` logits by inverse transform sampling; return ``(B, 1)``."""
    probs, order = logits.softmax(-1).double().sort(dim=-1, descending=True, stable=True)
    probs = probs[:, :top_k]
    probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    ends = probs.cumsum(-1)
    uniform = keyed_uniform(seeds, torch.full_like(seeds, step))[:, None].double()
    chosen = torch.searchsorted(ends, uniform * ends[:, -1:], right=True)
    return order.gather(1, chosen)
