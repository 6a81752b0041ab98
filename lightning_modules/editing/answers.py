"""How likely a model finds given answers to given questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from malleable.lightning_modules.editing.passes import at_positions
from malleable.lightning_modules.editing.prompts import Reader, Row
from malleable.lightning_modules.functional.ranks import shard, sum_over_ranks


class Answers(NamedTuple):
    """How a model takes given answers to given questions.

    Attributes:
        nll: ``(N,)`` negative log-likelihood of a token of the answer, nats, mean over its tokens.
        accuracy: ``(N,)`` share of its tokens that are the likeliest, given the ones before.
    """

    nll: Tensor
    accuracy: Tensor

    @property
    def exact(self) -> Tensor:
        """Whether all tokens are, ``(N,)``."""
        return self.accuracy == 1


@torch.no_grad()
def take_answers(model: Any, reader: Reader, questions: Sequence[tuple[str, str]], max_rows: int = 64) -> Answers:
    """Score answers under teacher forcing.

    In a run of several ranks all of them must call it: each scores a share of the questions, and all return all scores.

    Args:
        model: In evaluation mode.
        reader: Makes rows of texts.
        questions: Texts and answers; a blank is put between them.
        max_rows: Rows of a pass.
    """
    answers = [reader.answer(answer) for _, answer in questions]
    rows = [reader.question(text, answer[:-1]) for (text, _), answer in zip(questions, answers, strict=True)]
    # Rows of like lengths share a pass.
    order = shard(sorted(range(len(rows)), key=lambda number: len(rows[number].ids)))
    scores = torch.zeros(2, len(rows))
    for start in range(0, len(order), max_rows):
        chosen = order[start : start + max_rows]
        part = score_answers(model, reader, [rows[number] for number in chosen], [answers[number] for number in chosen])
        scores[:, chosen] = torch.stack(part).cpu()
    return Answers(*sum_over_ranks(scores, next(model.parameters()).device))


def score_answers(model: Any, reader: Reader, rows: Sequence[Row], answers: Sequence[Sequence[int]]) -> Answers:
    """Score answers in one pass; gradients reach what they would in the model's own loss.

    Args:
        model: In evaluation mode.
        reader: Makes a batch of rows.
        rows: Prompts, each followed by all but the last token of its answer.
        answers: Tokens of the answers.
    """
    device = next(model.parameters()).device
    batch = reader.batch(rows, device)
    lengths = torch.tensor([len(answer) for answer in answers], device=device)
    row = torch.arange(len(rows), device=device).repeat_interleave(lengths)
    first = torch.tensor([len(one.ids) - len(answer) for one, answer in zip(rows, answers, strict=True)], device=device)
    within = torch.arange(len(row), device=device) - (lengths.cumsum(0) - lengths)[row]
    token = torch.tensor([token for answer in answers for token in answer], device=device)
    with at_positions(model, row, first[row] + within):
        logps = model(**batch.inputs(), use_cache=False).logits[0].float().log_softmax(-1)
    own = logps[torch.arange(len(token), device=device), token]
    right = (logps.detach().argmax(-1) == token).float()
    return Answers(*(values.new_zeros(len(rows)).index_add(0, row, values) / lengths for values in (-own, right)))
