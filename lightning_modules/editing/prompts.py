"""Prompts of facts as rows of tokens: where the subject ends, in which contexts a fact is read, and what is to be answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from malleable.datamodules.editing.requests import PLACEHOLDER

STARTS = ("The", "Therefore", "Because", "I", "You")

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]


class Span(NamedTuple):
    """Characters ``start:end`` of a text."""

    start: int
    end: int


class Row(NamedTuple):
    """A text with the token that an edit looks at.

    Attributes:
        ids: Tokens.
        position: The token looked at.
    """

    ids: list[int]
    position: int


class Rows(NamedTuple):
    """Rows filled up on the right to one length.

    Attributes:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``.
        position: ``(B,)`` the token looked at.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """What the model is given."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def take(self, chosen: Tensor) -> Rows:
        """Some of the rows, without columns that none of them needs."""
        mask = self.attention_mask[chosen]
        length = int(mask.sum(1).max())
        return Rows(self.input_ids[chosen, :length], mask[:, :length], self.position[chosen])


def fill(prompt: str, subject: str, context: str = PLACEHOLDER) -> tuple[str, Span]:
    """Put the subject into a prompt and the prompt into a context; return the text and where the subject lies in it.

    Args:
        prompt: Holds ``{}`` once, for the subject; a subject may hold braces of its own and occur elsewhere too.
        subject: What the fact is about.
        context: Holds ``{}`` once, for the prompt.

    Raises:
        ValueError: If a placeholder is missing or doubled.
    """
    for name, text in (("prompt", prompt), ("context", context)):
        if text.count(PLACEHOLDER) != 1:
            raise ValueError(f"a {name} must hold {PLACEHOLDER} exactly once, got {text!r}")
    (before, after), (left, right) = prompt.split(PLACEHOLDER), context.split(PLACEHOLDER)
    start = len(left) + len(before)
    return f"{left}{before}{subject}{after}{right}", Span(start, start + len(subject))


def look_up(offsets: Sequence[tuple[int, int]], span: Span, strategy: FactToken = "subject_last") -> int:
    """Find the token at which a fact is read.

    Args:
        offsets: Characters of each token; empty for tokens that the tokenizer adds.
        span: The subject's characters.
        strategy: Last or first token of the subject, the one after it, or the last of all.

    Raises:
        ValueError: If no token overlaps the subject.
    """
    if strategy == "last":
        return len(offsets) - 1
    inside = [number for number, (start, end) in enumerate(offsets) if start < span.end and end > span.start and end > start]
    if not inside:
        raise ValueError(f"no token overlaps the subject at characters {span.start} to {span.end}")
    if strategy == "subject_first":
        return inside[0]
    return min(inside[-1] + (strategy == "subject_first_after_last"), len(offsets) - 1)


@dataclass(frozen=True)
class Reader:
    """Turns texts into rows.

    Args:
        tokenizer: A fast one of transformers, which tells the characters of each token.
        strategy: Where a fact is read.

    Raises:
        ValueError: If the tokenizer tells no offsets.
    """

    tokenizer: Any
    strategy: FactToken = "subject_last"

    def __post_init__(self) -> None:
        """Refuse a slow tokenizer: a subject's last token would have to be guessed."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"editing needs a fast tokenizer, which tells where tokens lie in the text; {type(self.tokenizer).__name__} does not")

    @property
    def pad(self) -> int:
        """What rows are filled up with: it is masked, so any token will do."""
        return next((number for number in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if number is not None), 0)

    def answer(self, text: str) -> list[int]:
        """Tokens of an answer after a prompt, with the blank between them.

        Raises:
            ValueError: If there are none.
        """
        # Behind a letter: some tokenizers put a blank of their own before a text.
        before, whole = (self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in ("a", f"a {text.lstrip()}"))
        ids: list[int] = (
            whole[len(before) :] if whole[: len(before)] == before else self.tokenizer(f" {text.lstrip()}", add_special_tokens=False)["input_ids"]
        )
        if not ids:
            raise ValueError(f"the answer {text!r} has no tokens")
        return ids

    def row(self, prompt: str, subject: str, context: str = PLACEHOLDER, answer: Sequence[int] = ()) -> Row:
        """Read a prompt, followed by the tokens of an answer."""
        text, span = fill(prompt, subject, context)
        # A blank at the end would be a token of its own, which no answer begins after.
        text = text.rstrip() if span.end < len(text) else text
        ids, offsets = self._encoded(text)
        return Row([*ids, *answer], look_up(offsets, span, self.strategy))

    def question(self, text: str, answer: Sequence[int] = ()) -> Row:
        """Read a whole text, followed by the tokens of an answer; its last token is looked at."""
        ids, _ = self._encoded(text.rstrip())
        return Row([*ids, *answer], len(ids) - 1)

    def _encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        # What the tokenizer puts behind a text (an end, a separator) would stand between prompt and answer.
        while len(ids) > 1 and added[len(ids) - 1]:
            ids.pop()
        return ids, encoded["offset_mapping"][: len(ids)]

    def batch(self, rows: Sequence[Row], device: torch.device | str = "cpu") -> Rows:
        """Fill rows up on the right, whatever side the tokenizer is set to."""
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.pad)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
        return Rows(ids.to(device), mask.to(device), torch.tensor([row.position for row in rows], device=device))


@torch.no_grad()
def draw_contexts(model: nn.Module, tokenizer: Any, seed: int = 0, starts: Sequence[str] = STARTS, length: int = 10) -> list[str]:
    """Let the model write the beginnings that facts are read after.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        seed: Of the sampling, among the five likeliest tokens.
        starts: First words.
        length: Tokens of a beginning, the first words among them.

    Returns:
        Contexts, one for each start, such as ``The first thing that. {}``.
    """
    device = next(model.parameters()).device
    reader, generator = Reader(tokenizer), torch.Generator().manual_seed(seed)
    contexts = []
    for start in starts:
        ids = torch.tensor([reader.question(start).ids], device=device)
        first = ids.shape[1]
        while ids.shape[1] < max(length, first + 1):
            best = model(input_ids=ids, use_cache=False).logits[0, -1].float().topk(5)
            drawn = torch.multinomial(best.values.softmax(-1).cpu(), 1, generator=generator)
            ids = torch.cat([ids, best.indices[drawn.to(device)][None]], 1)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        contexts.append(f"{' '.join(text.replace('{', ' ').replace('}', ' ').split())}. {PLACEHOLDER}")
    return contexts
