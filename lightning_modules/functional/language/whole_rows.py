"""Passes over whole sequences, one in each row, without a cache.

They are the fallback for models for which a faster form is not exact, and the fast form for one answer to each prompt. Rows are padded on the right,
where padding does not affect causal attention, ALiBi, sliding windows and recurrent states, or rows of equal length are run together without
padding. Both work without an attention mask, so that SDPA can use causal kernels (FlashAttention on CUDA).

Shapes: N rows, T tokens, P positions whose logits are needed, V vocabulary, d width of hidden states, B prompts, K answers, A answer tokens,
R searched rows, n tokens of a step, X tokens of the longest path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.attention import causal_attention
from malleable.lightning_modules.functional.language.pass_forms import RowForm, bare_model
from malleable.lightning_modules.functional.ranks import is_sharded


def logits_at(model: nn.Module, input_ids: Tensor, lengths: Tensor, rows: Tensor, tokens: Tensor, *, form: RowForm) -> Tensor:
    """Compute logits at selected tokens of whole sequences.

    Args:
        model: Hugging Face causal language model.
        input_ids: ``(N, T)`` int64, padded on the right.
        lengths: ``(N,)`` int64, number of real tokens of each row.
        rows: ``(P,)`` int64, the row of each position.
        tokens: ``(P,)`` int64, the column of each position.
        form: ``causal``: one pass with causal kernels; ``padded``: one pass with the default mask of the model; ``unpadded``: one pass for each
            length, without padding.

    Returns:
        ``(P, V)``.

    Raises:
        ValueError: If ``form`` is ``unpadded`` and the weights are sharded.
    """
    return _run_at(_logits_at, model, input_ids, lengths, rows, tokens, form=form)


def states_at(model: nn.Module, input_ids: Tensor, lengths: Tensor, rows: Tensor, tokens: Tensor, *, form: RowForm) -> Tensor:
    """Compute the inputs of the language-model head at selected tokens, ``(P, d)``; the arguments are those of :func:`logits_at`."""
    return _run_at(_states_at, model, input_ids, lengths, rows, tokens, form=form)


def _run_at(
    run: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor],
    model: nn.Module,
    input_ids: Tensor,
    lengths: Tensor,
    rows: Tensor,
    tokens: Tensor,
    *,
    form: RowForm,
) -> Tensor:
    """Call ``run(model, input_ids, rows, tokens)`` once, or for each length without padding."""
    if form != "unpadded":
        with _kernels(model, form):
            return run(model, input_ids, rows, tokens)
    _refuse_sharded(model)
    parts, places = [], []
    for length, members in _by_length(lengths):
        place = torch.isin(rows, members).nonzero()[:, 0]
        if len(place):
            reset_rope(model)
            parts.append(run(model, input_ids[members, :length], torch.searchsorted(members, rows[place]), tokens[place]))
            places.append(place)
    return torch.cat(parts)[torch.cat(places).argsort()]


def states_at_end(model: nn.Module, input_ids: Tensor, lengths: Tensor, *, form: RowForm) -> Tensor:
    """Compute the hidden state of the last layer at the last token of whole sequences, ``(N, d)``; the arguments are those of :func:`logits_at`."""
    if form != "unpadded":
        with _kernels(model, form):
            return _states_at_end(model, input_ids, lengths)
    _refuse_sharded(model)
    parts, places = [], []
    for length, members in _by_length(lengths):
        reset_rope(model)
        parts.append(_states_at_end(model, input_ids[members, :length], lengths[members]))
        places.append(members)
    return torch.cat(parts)[torch.cat(places).argsort()]


def _kernels(model: nn.Module, form: RowForm) -> AbstractContextManager[None]:
    return causal_attention(bare_model(model).config) if form == "causal" else nullcontext()


def _refuse_sharded(model: nn.Module) -> None:
    """Raise an error if weights are sharded: ranks whose rows have more different lengths would run more passes than the others."""
    if is_sharded(model):
        raise ValueError(
            f"{type(model).__name__} needs a separate pass for each length of rows in this batch, but its weights are sharded over ranks, "
            "which must run equally many passes; use DDP or ZeRO-2, or shorter rows"
        )


def _by_length(lengths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield each length with the ascending indices of its rows."""
    for length in sorted(set(lengths.tolist())):
        yield int(length), (lengths == length).nonzero()[:, 0]


def _logits_at(model: nn.Module, input_ids: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    with _head_at(model, rows, tokens) as gathered:
        logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits[0] if gathered else logits[rows, tokens]


def _states_at(model: nn.Module, input_ids: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    return head_states(model, rows, tokens, input_ids=input_ids)


def head_states(model: nn.Module, rows: Tensor, tokens: Tensor, **inputs: Any) -> Tensor:
    """Run a model and return the inputs of its language-model head at selected tokens; the head itself runs at the first of them only.

    Args:
        model: Hugging Face causal language model whose head is called once, see ``PassForms.head``.
        rows: ``(P,)`` int64, the row of each position.
        tokens: ``(P,)`` int64, the column of each position.
        **inputs: Arguments of the model.

    Returns:
        ``(P, d)``.
    """
    with _head_at(model, rows, tokens, count=1) as gathered:
        model(**inputs, use_cache=False)
    (states,) = gathered
    return states


def _states_at_end(model: nn.Module, input_ids: Tensor, lengths: Tensor) -> Tensor:
    first = torch.zeros_like(lengths[:1])
    with _head_at(model, first, first):
        states: Tensor = model(input_ids=input_ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    return states[torch.arange(len(states), device=states.device), lengths - 1]


@contextmanager
def _head_at(model: Any, rows: Tensor, tokens: Tensor, count: int | None = None) -> Iterator[list[Tensor]]:
    """Run the language-model head at these positions, or at the first ``count`` of them.

    The yielded list holds the hidden states at all these positions, ``(P, d)``, after the model has run. It stays empty if the model has computed
    logits at all positions without a call of the head.
    """
    head, gathered = model.get_output_embeddings(), []

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        # The backward pass of `index_select` is one kernel; that of `inputs[0][rows, tokens]` sorts the positions.
        gathered.append(inputs[0].flatten(0, 1).index_select(0, rows * inputs[0].shape[1] + tokens))
        return (gathered[-1][None, :count],)

    handle = None if head is None else head.register_forward_pre_hook(gather)
    try:
        yield gathered
    finally:
        if handle is not None:
            handle.remove()


def reset_rope(model: nn.Module) -> None:
    """Reset rotary embeddings to their original scale.

    With dynamic scaling, their frequencies otherwise depend on the longest sequence so far.
    """
    for module in model.modules():
        original = getattr(module, "original_max_seq_len", None)
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            if original is not None and getattr(module, name) is not original:
                prefix = name.removesuffix("max_seq_len_cached")
                setattr(module, name, original)
                current = getattr(module, f"{prefix}inv_freq")
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").to(current, copy=True))


def separate_answers(
    prompt_ids: Tensor, prompt_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, *, whole: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Put each answer after its prompt, in a separate row.

    Args:
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool.
        answer_ids: ``(B, K, A)`` int64, padded on the right.
        answer_mask: ``(B, K, A)`` bool.
        whole: Keep the last token of each answer, which predicts nothing, because results of dynamic rotary embeddings depend on the length of a row.

    Returns:
        Tokens ``(B * K, P + A - 1)``, or with ``whole`` ``(B * K, P + A)``, padded on the right; lengths of the rows ``(B * K,)``; and lengths of the
        prompts ``(B * K,)``.
    """
    count, width = answer_ids.shape[1:]
    last = 0 if whole else 1
    if not width:
        answer_ids = answer_ids.new_zeros(*answer_ids.shape[:2], 1)
    starts = prompt_mask.sum(1)
    column = torch.arange(prompt_ids.shape[1] + max(0, width - last), device=prompt_ids.device)
    offset = column - starts[:, None]  # position relative to the start of the answer
    prompts = prompt_ids.gather(1, (offset + prompt_ids.shape[1]).clamp(0, prompt_ids.shape[1] - 1))
    answers = answer_ids.gather(2, offset.clamp(0, max(0, width - 1))[:, None].expand(-1, count, -1))
    input_ids = torch.where(offset[:, None] < 0, prompts[:, None], answers)
    lengths = starts[:, None] + (answer_mask.sum(-1) - last).clamp_min(0)
    return input_ids.flatten(0, 1), lengths.flatten(), starts.repeat_interleave(count)


def separate_documents(input_ids: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Put each document of packed rows in a separate row.

    Args:
        input_ids: ``(B, T)`` int64.
        document_ids: ``(B, T)`` int64, 0 on padding.

    Returns:
        Tokens ``(N, longest)``, padded on the right; their lengths ``(N,)``; and the index of each real token in the flattened batch, ``(tokens,)``
        int64, in the order of the documents.
    """
    real = (document_ids.flatten() > 0).nonzero()[:, 0]
    key = document_ids + torch.arange(len(document_ids), device=document_ids.device)[:, None] * (document_ids.shape[1] + 1)
    _, lengths = torch.unique_consecutive(key.flatten()[real], return_counts=True)
    mask = torch.arange(int(lengths.max()) if len(lengths) else 0, device=lengths.device) < lengths[:, None]
    rows = input_ids.new_zeros(mask.shape)
    rows[mask] = input_ids.flatten()[real]
    return rows, lengths, real


class RowDecoder:
    """Decoder with the interface of :class:`~malleable.lightning_modules.functional.language.tree_attention.TreeDecoder`, without a cache.

    Each step runs the whole sequence of every token again. It therefore costs as much as the prompt and all steps so far with a cache.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(R, P)`` int64, padded on the left.
        prompt_mask: ``(R, P)`` bool.
        form: As in :func:`logits_at`.

    Attributes:
        logits: ``(R, 1, V)``, at the last token of the prompt.
    """

    def __init__(self, model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, *, form: RowForm) -> None:
        self.model, self.form = model, form
        self.lengths = prompt_mask.sum(1)
        column = torch.arange(prompt_ids.shape[1], device=prompt_ids.device)
        place = (column + prompt_ids.shape[1] - self.lengths[:, None]).clamp_max(prompt_ids.shape[1] - 1)
        self.prompt_ids = prompt_ids.gather(1, place)
        # Path from the prompt to each token of the last call: its tokens, ``(R, n, X)``, padded on the right, and its length, ``(R, n)``.
        self.path = self.prompt_ids.new_zeros(len(prompt_ids), 1, 0)
        self.size = self.prompt_ids.new_zeros(len(prompt_ids), 1)
        self.logits = self._run()

    def extend(self, tokens: Tensor, parent: Tensor, depth: Tensor | int, within: Tensor | None = None) -> Tensor:
        """Feed the next tokens; see :meth:`TreeDecoder.extend`."""
        own, added = tokens[..., None], torch.ones_like(tokens)
        if within is not None:
            # Sort the tokens of this call that are on the path of each token to the front, in their order.
            order = within.long().sort(dim=2, descending=True, stable=True).indices
            added = within.sum(2)
            own = tokens[:, None].expand(-1, tokens.shape[1], -1).gather(2, order)[..., : int(added.max())]
        inherited = self.path.gather(1, parent[..., None].expand(-1, -1, self.path.shape[2]))
        size = self.size.gather(1, parent)
        place = size[..., None] + torch.arange(own.shape[2], device=own.device)
        self.path = torch.nn.functional.pad(inherited, (0, own.shape[2])).scatter(2, place, own)
        self.size = size + added
        return self._run()

    def select(self, rows: Tensor) -> None:
        """Keep only the rows at the positions ``rows`` of the batch."""
        self.lengths, self.prompt_ids, self.path, self.size = self.lengths[rows], self.prompt_ids[rows], self.path[rows], self.size[rows]

    def idle(self) -> None:
        """Run the model and discard the result, because sharded weights require all ranks to run it equally often."""
        self.model(input_ids=self.prompt_ids.new_zeros(1, 1), use_cache=False)

    def _run(self) -> Tensor:
        """Return the logits ``(R, n, V)`` at the ends of the paths."""
        rows, count, width = self.path.shape
        column = torch.arange(self.prompt_ids.shape[1] + width, device=self.path.device)
        offset = (column - self.lengths[:, None])[:, None].expand(-1, count, -1)
        prompts = torch.nn.functional.pad(self.prompt_ids, (0, width))[:, None]
        paths = torch.nn.functional.pad(self.path, (0, 1)).gather(2, offset.clamp(0, width))
        input_ids = torch.where(offset < 0, prompts, paths).flatten(0, 1)
        lengths = (self.lengths[:, None] + self.size).flatten()
        ends = logits_at(self.model, input_ids, lengths, torch.arange(len(input_ids), device=lengths.device), lengths - 1, form=self.form)
        return ends.reshape(rows, count, -1)
