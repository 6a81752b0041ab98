"""Log-probabilities of answers, computed with one pass over each prompt.

A prompt and its K answers share one row: ``[padding | prompt | answer 1 | ... | answer K | padding]``. Each answer attends to the prompt and to
itself, and its positions start at the end of the prompt. The result equals that of K separate rows, but the prompt is computed once. The
language-model head runs only at positions that predict an answer token. If these positions have many logits, it runs on some of them at a time, see
:mod:`~malleable.lightning_modules.functional.language.chunked_head`.

A prompt with one answer is a whole sequence in its own row, padded on the right, which causal kernels run without a mask.

Shapes: B rows, P prompt tokens, K answers, A answer tokens, T columns of a shared or packed row, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.attention import AttentionSpan, causal_attention, document_mask, model_mask
from malleable.lightning_modules.functional.language.chunked_head import HeadForm, exceeds_limit, head_logps
from malleable.lightning_modules.functional.language.pass_forms import RowForm, bare_model, pass_forms, sharing_pays
from malleable.lightning_modules.functional.language.selected_logps import selected_token_logps
from malleable.lightning_modules.functional.language.whole_rows import head_states, logits_at, separate_answers, separate_documents, states_at

NO_PROMPT = "every row needs at least one prompt token; give the template a prefix or a beginning-of-sequence token"

TOO_FEW_COLUMNS = "the answers of a row need more than num_columns columns; create the batch with `collate`, or omit num_columns"


class SharedRow(NamedTuple):
    """Batch of shared rows: each row contains a prompt and its answers.

    Attributes:
        input_ids: ``(B, T)``.
        position_ids: ``(B, T)``.
        allowed: ``(B, T, T)`` bool, which keys each query attends to.
        num_kept: Number of last positions whose logits are needed.
        predictors: ``(B, K, A)``, for each answer token, the index among these last positions whose logits predict it; 0 on padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    allowed: Tensor
    num_kept: int
    predictors: Tensor


def shared_row(prompt_ids: Tensor, prompt_mask: Tensor, answer_ids: Tensor, answer_mask: Tensor, num_columns: int | None = None) -> SharedRow:
    """Put a prompt and its answers into one row.

    The last token of an answer predicts nothing and is not part of the row. The shape of the row depends only on the shapes of the arguments and on
    ``num_columns``, so that no synchronisation with the device is needed.

    Args:
        prompt_ids: ``(B, P)``, padded on the left, at least one real token in each row.
        prompt_mask: ``(B, P)`` bool.
        answer_ids: ``(B, K, A)``, padded on the right.
        answer_mask: ``(B, K, A)`` bool.
        num_columns: Number of columns after the prompt, at least as many as the answers of any row need. Default: ``K * (A - 1)``, the maximum.

    Raises:
        ValueError: If a row has no prompt token, or its answers need more than ``num_columns``.
    """
    rows, width = prompt_ids.shape
    count, longest = answer_ids.shape[1:]
    extra = count * max(0, longest - 1) if num_columns is None else num_columns
    lengths = answer_mask.sum(-1)
    ends = (lengths - 1).clamp_min(0).cumsum(1)
    offsets = ends - (lengths - 1).clamp_min(0)
    check_rows(prompt_mask.any(1), NO_PROMPT)
    check_rows(ends[:, -1] <= extra, TOO_FEW_COLUMNS)

    column = torch.arange(extra, device=prompt_ids.device).expand(rows, -1).contiguous()
    answer = torch.searchsorted(ends, column, right=True)
    real, owner = answer < count, answer.clamp_max(count - 1)
    offset = column - offsets.gather(1, owner)
    tokens = answer_ids.flatten(1).gather(1, torch.where(real, owner * longest + offset, 0))
    starts = prompt_mask.sum(1, keepdim=True)
    input_ids = torch.cat([prompt_ids, torch.where(real, tokens, 0)], 1)
    position_ids = torch.cat([(prompt_mask.cumsum(1) - 1).clamp_min(0), torch.where(real, starts + offset, 0)], 1)

    # branch: -1 padding, 0 prompt, j answer j.
    branch = torch.cat([prompt_mask.long() - 1, torch.where(real, owner + 1, -1)], 1)
    same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    causal = torch.ones(width + extra, width + extra, dtype=torch.bool, device=prompt_ids.device).tril()
    diagonal = torch.eye(width + extra, dtype=torch.bool, device=prompt_ids.device)
    allowed = (same & causal & (branch >= 0)[:, None, :]) | diagonal
    token = torch.arange(longest, device=answer_ids.device)
    predictors = torch.where(answer_mask & (token > 0), offsets[..., None] + token, 0)
    return SharedRow(input_ids, position_ids, allowed, extra + 1, predictors)


class AnswerSlots(NamedTuple):
    """Answer tokens of a row in C slots: the first token of each answer, then the other tokens without padding between answers.

    Attributes:
        owner: ``(B, C)``, the answer of each slot.
        token: ``(B, C)``, the index of its token in the answer.
        slots: ``(B, K, A)``, the slot of each answer token; any slot on padding.
    """

    owner: Tensor
    token: Tensor
    slots: Tensor


def answer_slots(answer_mask: Tensor, num_columns: int) -> AnswerSlots:
    """Arrange the answer tokens of each row in ``C = K + num_columns`` slots.

    Args:
        answer_mask: ``(B, K, A)`` bool, A >= 1.
        num_columns: As in :func:`shared_row`.
    """
    rows, count, longest = answer_mask.shape
    ends = (answer_mask.sum(-1) - 1).clamp_min(0).cumsum(1)
    starts = ends.roll(1, 1).index_fill(1, ends.new_zeros(1), 0)
    column = torch.arange(num_columns, device=ends.device).expand(rows, -1).contiguous()
    owner = torch.searchsorted(ends, column, right=True).clamp_max(count - 1)
    token = (column - starts.gather(1, owner) + 1).clamp_max(longest - 1)
    each = torch.arange(count, device=ends.device).expand(rows, -1)
    index = torch.arange(longest, device=ends.device)
    slots = torch.where(index > 0, count + starts[..., None] + index - 1, each[..., None]).clamp_max(count + num_columns - 1)
    return AnswerSlots(torch.cat([each, owner], 1), torch.cat([torch.zeros_like(each), token], 1), slots)


def check_rows(valid: Tensor, message: str) -> None:
    """Raise an error unless all entries of ``valid`` (bool) are true; on an accelerator, an asynchronous assertion without synchronisation.

    Raises:
        ValueError: On a CPU. On an accelerator, the device reports a failed assertion with the message.
    """
    if valid.device.type != "cpu":
        torch._assert_async(valid.all(), message)
    elif not bool(valid.all()):
        raise ValueError(message)


def answer_token_logps(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    *,
    shared_prompt: bool | None = None,
    num_columns: int | None = None,
) -> Tensor:
    """Compute the log-probability of every answer token, in nats.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(B, P)``, padded on the left.
        prompt_mask: ``(B, P)`` bool.
        answer_ids: ``(B, K, A)``, padded on the right.
        answer_mask: ``(B, K, A)`` bool.
        shared_prompt: Whether to run a prompt once for all its answers, if it has several. ``None``: if that is exact for this model and takes no
            more computation than separate rows, see :func:`~malleable.lightning_modules.functional.language.pass_forms.sharing_pays`; True: always;
            False: never, each answer gets its own row.
        num_columns: As in :func:`shared_row`.

    Returns:
        ``(B, K, A)`` float32, 0 on padding.

    Raises:
        ValueError: If a row has no prompt token, so that nothing predicts the first answer token, or if no form of the pass is exact for the model.
    """
    parts = (prompt_ids, prompt_mask, answer_ids, answer_mask)
    forms = pass_forms(model)
    columns = answer_ids.shape[1] * max(0, answer_ids.shape[2] - 1) if num_columns is None else num_columns
    shareable = forms.shared.fits(prompt_ids.shape[1] + columns)
    if shared_prompt and not shareable:
        raise ValueError(forms.refusal("a prompt shared by its answers", "shared_prompt=None or False runs a row for each answer"))
    head = forms.head if exceeds_limit(model, len(answer_ids) * (answer_ids.shape[1] + columns), answer_ids.device) else None
    width = prompt_ids.shape[1] + answer_ids.shape[2]
    if shareable and shared_prompt is None and forms.causal.fits(width):
        shareable = sharing_pays(model, prompt_ids.shape[1], answer_ids.shape[1], answer_ids.shape[2], columns)
    if shareable and shared_prompt is not False and answer_ids.shape[1] > 1:
        return shared_logps(model, *parts, num_columns=num_columns, plan=forms.shared.plan, head=head)
    if forms.shared.fits(width) and not forms.causal.fits(width):
        # A custom mask avoids the synchronisation of the library's mask, which reads the positions.
        alone = [part.repeat_interleave(answer_ids.shape[1], 0) for part in parts[:2]] + [part.flatten(0, 1)[:, None] for part in parts[2:]]
        return shared_logps(model, *alone, plan=forms.shared.plan, head=head).reshape(answer_ids.shape)
    return separate_logps(model, *parts, form=forms.row_form(width), num_columns=num_columns, head=head)


def shared_logps(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    *,
    num_columns: int | None = None,
    plan: tuple[AttentionSpan, ...] = (),
    head: HeadForm | None = None,
) -> Tensor:
    """Compute :func:`answer_token_logps` with one shared row for each prompt.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(B, P)``, padded on the left.
        prompt_mask: ``(B, P)`` bool.
        answer_ids: ``(B, K, A)``, padded on the right.
        answer_mask: ``(B, K, A)`` bool.
        num_columns: As in :func:`shared_row`.
        plan: Attention spans of the model's layers.
        head: Function from the output of the head to logits, which are computed in chunks; ``None``: compute all logits at once.

    Returns:
        ``(B, K, A)`` float32, 0 on padding.
    """
    row = shared_row(prompt_ids, prompt_mask, answer_ids, answer_mask, num_columns)
    mask = model_mask(model, row.allowed, plan, row.position_ids)
    inputs = {"input_ids": row.input_ids, "attention_mask": mask, "position_ids": row.position_ids}
    if head is not None:
        extra = row.num_kept - 1
        slots = answer_slots(answer_mask, extra)
        last = torch.full((answer_ids.shape[1],), prompt_ids.shape[1] - 1, device=row.input_ids.device)
        column = torch.cat([last, last[:1] + 1 + torch.arange(extra, device=last.device)]).expand(slots.owner.shape)
        number = torch.arange(len(column), device=last.device)[:, None].expand_as(column)
        states = head_states(model, number.flatten(), column.flatten(), **inputs)
        return _slot_logps(model, states, answer_ids, answer_mask, slots, head)
    logits = model(**inputs, logits_to_keep=row.num_kept, use_cache=False).logits
    logps = selected_token_logps(logits, answer_ids.flatten(1), row.predictors.flatten(1)).reshape(answer_ids.shape)
    return logps.masked_fill(~answer_mask, 0.0)


def _slot_logps(model: nn.Module, states: Tensor, answer_ids: Tensor, answer_mask: Tensor, slots: AnswerSlots, head: HeadForm) -> Tensor:
    """Compute :func:`answer_token_logps` from the hidden states ``(B * C, d)`` that predict the tokens of the slots."""
    targets = answer_ids.flatten(1).gather(1, slots.owner * answer_ids.shape[2] + slots.token)
    logps = head_logps(model, states, targets.flatten(), head).reshape(targets.shape)
    return logps.gather(1, slots.slots.flatten(1)).reshape(answer_ids.shape).masked_fill(~answer_mask, 0.0)


def separate_logps(
    model: nn.Module,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    answer_ids: Tensor,
    answer_mask: Tensor,
    *,
    form: RowForm = "padded",
    num_columns: int | None = None,
    head: HeadForm | None = None,
) -> Tensor:
    """Compute :func:`answer_token_logps` with one row for each answer.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(B, P)``, padded on the left.
        prompt_mask: ``(B, P)`` bool.
        answer_ids: ``(B, K, A)``, padded on the right.
        answer_mask: ``(B, K, A)`` bool.
        form: As in :func:`~malleable.lightning_modules.functional.language.whole_rows.logits_at`.
        num_columns: As in :func:`shared_row`; it bounds the number of positions of a chunked head.
        head: As in :func:`shared_logps`.

    Returns:
        ``(B, K, A)`` float32, 0 on padding.
    """
    check_rows(prompt_mask.any(1), NO_PROMPT)
    input_ids, lengths, starts = separate_answers(prompt_ids, prompt_mask, answer_ids, answer_mask, whole=form == "unpadded")
    if head is not None and answer_ids.shape[2]:
        count = answer_ids.shape[1]
        extra = count * (answer_ids.shape[2] - 1) if num_columns is None else num_columns
        check_rows((answer_mask.sum(-1) - 1).clamp_min(0).sum(1) <= extra, TOO_FEW_COLUMNS)
        slots = answer_slots(answer_mask, extra)
        row = torch.arange(len(answer_ids), device=starts.device)[:, None] * count + slots.owner
        place = torch.minimum(starts.reshape(-1, count)[:, :1] - 1 + slots.token, lengths[row] - 1)
        states = states_at(model, input_ids, lengths, row.flatten(), place.flatten(), form=form)
        return _slot_logps(model, states, answer_ids, answer_mask, slots, head)
    tokens = starts[:, None] - 1 + torch.arange(answer_ids.shape[2], device=starts.device)
    # Positions after the end of a row are masked below.
    tokens = torch.minimum(tokens, lengths[:, None] - 1)
    rows = torch.arange(len(tokens), device=starts.device)[:, None].expand_as(tokens)
    logits = logits_at(model, input_ids, lengths, rows.flatten(), tokens.flatten(), form=form)
    logps = selected_token_logps(logits[None], answer_ids.reshape(1, -1)).reshape(answer_ids.shape)
    return logps.masked_fill(~answer_mask, 0.0)


def answer_logps(model: nn.Module, batch: Any, *, shared_prompt: bool | None = None) -> Tensor:
    """Compute the summed log-probability of every answer of an ``AnswerBatch``, ``(B, K)`` float32, in nats."""
    parts = (batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask)
    return answer_token_logps(model, *parts, shared_prompt=shared_prompt, num_columns=batch.answer_columns).sum(-1)


def packed_token_logps(
    model: nn.Module, input_ids: Tensor, document_ids: Tensor, position_ids: Tensor, *, one_document: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the log-probability of every token of packed documents except the first token of each document.

    Args:
        model: Hugging Face causal language model.
        input_ids: ``(B, T)``.
        document_ids: ``(B, T)``, 0 on padding.
        position_ids: ``(B, T)``, restarting in each document.
        one_document: Whether each row is one document, padded on the right, which needs no mask. False is always correct.

    Returns:
        Log-probabilities ``(B, T - 1)`` float32 in nats, 0 for tokens that are not predicted, and the mask of predicted tokens ``(B, T - 1)`` bool.

    Raises:
        ValueError: If no form of the pass is exact for the model.
    """
    forms = pass_forms(model)
    head = forms.head if exceeds_limit(model, input_ids.numel(), input_ids.device) else None
    if one_document and forms.causal.fits(input_ids.shape[1]):
        with causal_attention(bare_model(model).config):
            return _target_logps(model, input_ids, document_ids, {}, head)
    if forms.packed.fits(input_ids.shape[1]):
        return packed_row_logps(model, input_ids, document_ids, position_ids, plan=forms.packed.plan, head=head)
    return separate_document_logps(model, input_ids, document_ids, form=forms.row_form(input_ids.shape[1]), head=head)


def packed_batch_logps(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Compute :func:`packed_token_logps` of a ``PackedBatch``."""
    return packed_token_logps(model, batch.input_ids, batch.document_ids, batch.position_ids, one_document=batch.one_document)


def packed_row_logps(
    model: nn.Module,
    input_ids: Tensor,
    document_ids: Tensor,
    position_ids: Tensor,
    *,
    plan: tuple[AttentionSpan, ...] = (),
    head: HeadForm | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`packed_token_logps` with packed rows, with a mask for the attention spans ``plan``; ``head`` as in :func:`shared_logps`."""
    mask = model_mask(model, document_mask(document_ids), plan, position_ids)
    return _target_logps(model, input_ids, document_ids, {"attention_mask": mask, "position_ids": position_ids}, head)


def _target_logps(model: nn.Module, input_ids: Tensor, document_ids: Tensor, inputs: dict[str, Any], head: HeadForm | None) -> tuple[Tensor, Tensor]:
    """Run a model, and select the log-probability of each next token of a document; see :func:`packed_token_logps`."""
    # Shift the targets instead of the logits: a slice of the logits would be copied in the forward and the backward pass.
    shifted = input_ids.roll(-1, 1)
    if head is None:
        logps = selected_token_logps(model(input_ids=input_ids, use_cache=False, **inputs).logits, shifted)
    else:
        row, column = (place.flatten() for place in torch.meshgrid(*(torch.arange(n, device=shifted.device) for n in shifted.shape), indexing="ij"))
        states = head_states(model, row, column, input_ids=input_ids, **inputs)
        logps = head_logps(model, states, shifted.flatten(), head).reshape(shifted.shape)
    targets = document_targets(document_ids)
    return logps[:, :-1].masked_fill(~targets, 0.0), targets


def separate_document_logps(
    model: nn.Module, input_ids: Tensor, document_ids: Tensor, *, form: RowForm = "padded", head: HeadForm | None = None
) -> tuple[Tensor, Tensor]:
    """Compute :func:`packed_token_logps` with one row for each document; ``form`` as in ``logits_at``, ``head`` as in :func:`shared_logps`."""
    rows, lengths, place = separate_documents(input_ids, document_ids)
    row, column = (torch.arange(rows.shape[1], device=lengths.device) < lengths[:, None] - 1).nonzero(as_tuple=True)
    predictor = place[(lengths.cumsum(0) - lengths)[row] + column]
    targets = rows[row, column + 1]
    if head is None:
        logps = selected_token_logps(logits_at(model, rows, lengths, row, column, form=form)[None], targets[None])[0]
    else:
        logps = head_logps(model, states_at(model, rows, lengths, row, column, form=form), targets, head)
    flat = logps.new_zeros(input_ids.numel()).index_put((predictor,), logps)
    return flat.reshape(input_ids.shape)[:, :-1], document_targets(document_ids)


def document_targets(document_ids: Tensor) -> Tensor:
    """Return which of the tokens 1..T-1 are predicted, i.e. follow a token of the same document, ``(B, T - 1)`` bool."""
    return (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] > 0)
