"""Prompts of facts as token ids, with the position of the token at which a fact is edited.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from malleable.datamodules.editing.requests import PLACEHOLDER

CONTEXT_STARTS = ("The", "Therefore", "Because", "I", "You")

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last", "last"]


class Span(NamedTuple):
    """Characters ``start:end`` of a text."""

    start: int
    end: int


class Row(NamedTuple):
    """Token ids of a text.

    Attributes:
        ids: Token ids.
        position: Position of the fact token, at which keys and values are read.
    """

    ids: list[int]
    position: int


class RowBatch(NamedTuple):
    """Rows, padded on the right to the same length.

    Attributes:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``.
        position: ``(B,)`` position of the fact token of each row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of the model."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    def select(self, chosen: Tensor) -> RowBatch:
        """Return some of the rows, without columns that contain only padding."""
        mask = self.attention_mask[chosen]
        length = int(mask.sum(1).max())
        return RowBatch(self.input_ids[chosen, :length], mask[:, :length], self.position[chosen])


def fill_prompt(prompt: str, subject: str, context: str = PLACEHOLDER) -> tuple[str, Span]:
    """Insert the subject into a prompt and the prompt into a context; return the text and the characters of the subject.

    Args:
        prompt: Text with one ``{}`` for the subject. The subject may contain braces, and may occur in the prompt a second time.
        subject: Subject of the fact.
        context: Text with one ``{}`` for the prompt.

    Raises:
        ValueError: If prompt or context does not contain ``{}`` exactly once.
    """
    for name, text in (("prompt", prompt), ("context", context)):
        if text.count(PLACEHOLDER) != 1:
            raise ValueError(f"a {name} must contain {PLACEHOLDER} exactly once, got {text!r}")
    (before, after), (left, right) = prompt.split(PLACEHOLDER), context.split(PLACEHOLDER)
    start = len(left) + len(before)
    return f"{left}{before}{subject}{after}{right}", Span(start, start + len(subject))


def find_fact_token(offsets: Sequence[tuple[int, int]], span: Span, fact_token: FactToken = "subject_last") -> int:
    """Return the position of the fact token.

    Args:
        offsets: Characters ``(start, end)`` of each token; empty for special tokens that the tokenizer adds.
        span: Characters of the subject.
        fact_token: Last or first token of the subject, the token after the subject, or the last token of the text.

    Raises:
        ValueError: If no token overlaps the subject.
    """
    if fact_token == "last":
        return len(offsets) - 1
    inside = [number for number, (start, end) in enumerate(offsets) if start < span.end and end > span.start and end > start]
    if not inside:
        raise ValueError(f"no token overlaps the subject at characters {span.start} to {span.end}; give a subject with visible characters")
    if fact_token == "subject_first":
        return inside[0]
    return min(inside[-1] + (fact_token == "subject_first_after_last"), len(offsets) - 1)


@dataclass(frozen=True)
class PromptEncoder:
    """Converts prompts and answers to token ids.

    Args:
        tokenizer: Fast tokenizer of transformers, which returns the offsets of tokens.
        fact_token: Token of a prompt at which the fact is edited.

    Raises:
        ValueError: If the tokenizer does not return offsets.
    """

    tokenizer: Any
    fact_token: FactToken = "subject_last"

    def __post_init__(self) -> None:
        """Refuse a slow tokenizer: the last token of a subject cannot be found without offsets."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"editing needs a fast tokenizer, which returns the offsets of tokens in the text; {type(self.tokenizer).__name__} is not "
                "fast; load it with use_fast=True, or use a model that has a fast tokenizer"
            )

    @property
    def pad_token_id(self) -> int:
        """Id of the padding token. Padding is masked, so any id is correct."""
        return next((number for number in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if number is not None), 0)

    def encode_answer(self, text: str) -> list[int]:
        """Return the token ids of an answer after a prompt, with the space between them.

        Raises:
            ValueError: If the answer has no tokens.
        """
        # The answer is encoded after a letter, because some tokenizers add a space before a text.
        before, whole = (self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in ("a", f"a {text.lstrip()}"))
        ids: list[int] = (
            whole[len(before) :] if whole[: len(before)] == before else self.tokenizer(f" {text.lstrip()}", add_special_tokens=False)["input_ids"]
        )
        if not ids:
            raise ValueError(f"the answer {text!r} has no tokens; give an answer with visible characters")
        return ids

    def encode_prompt(self, prompt: str, subject: str, context: str = PLACEHOLDER, answer: Sequence[int] = ()) -> Row:
        """Encode a prompt with its subject, followed by the token ids of an answer; see :func:`fill_prompt`."""
        text, span = fill_prompt(prompt, subject, context)
        # A space at the end would be a separate token, after which no answer begins.
        text = text.rstrip() if span.end < len(text) else text
        ids, offsets = self._encode(text)
        return Row([*ids, *answer], find_fact_token(offsets, span, self.fact_token))

    def encode_text(self, text: str, answer: Sequence[int] = ()) -> Row:
        """Encode a complete text, followed by the token ids of an answer; the fact token is the last token of the text."""
        ids, _ = self._encode(text.rstrip())
        return Row([*ids, *answer], len(ids) - 1)

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        # Special tokens at the end (end of sequence, separator) would be between prompt and answer.
        while len(ids) > 1 and added[len(ids) - 1]:
            ids.pop()
        return ids, encoded["offset_mapping"][: len(ids)]

    def collate(self, rows: Sequence[Row], device: torch.device | str = "cpu") -> RowBatch:
        """Pad rows on the right, independently of the padding side of the tokenizer."""
        length = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), length), self.pad_token_id)
        mask = torch.zeros(len(rows), length, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            mask[number, : len(row.ids)] = 1
        return RowBatch(ids.to(device), mask.to(device), torch.tensor([row.position for row in rows], device=device))


@torch.no_grad()
def generate_contexts(model: nn.Module, tokenizer: Any, seed: int = 0, starts: Sequence[str] = CONTEXT_STARTS, length: int = 10) -> list[str]:
    """Generate texts that precede a prompt, so that an edit is effective in different contexts.

    Args:
        model: Model in evaluation mode.
        tokenizer: Its tokenizer.
        seed: Seed of the sampling among the five most probable tokens.
        starts: First words of the contexts.
        length: Number of tokens of a context, including the first words.

    Returns:
        One context for each start, such as ``The first thing that. {}``.
    """
    device = next(model.parameters()).device
    encoder, generator = PromptEncoder(tokenizer), torch.Generator().manual_seed(seed)
    contexts = []
    for start in starts:
        ids = torch.tensor([encoder.encode_text(start).ids], device=device)
        first = ids.shape[1]
        while ids.shape[1] < max(length, first + 1):
            best = model(input_ids=ids, use_cache=False).logits[0, -1].float().topk(5)
            drawn = torch.multinomial(best.values.softmax(-1).cpu(), 1, generator=generator)
            ids = torch.cat([ids, best.indices[drawn.to(device)][None]], 1)
        text = tokenizer.decode(ids[0], skip_special_tokens=True)
        contexts.append(f"{' '.join(text.replace('{', ' ').replace('}', ' ').split())}. {PLACEHOLDER}")
    return contexts
