"""Tokenisation of prompts with their answers: chat templates, the boundary between prompt and answer, and truncation.

Shapes: P prompt tokens, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from malleable.datamodules.files.user_files import first_line
from malleable.datamodules.language.chat import end_of_turn, render
from malleable.datamodules.sources.preference.base import Message, Prompt
from malleable.datamodules.sources.preference.records import ASSISTANT, USER

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokens = NDArray[np.int32]
Policy = Literal["prompt_start", "prompt_end", "drop"]
MIN_PROMPT_PART = 4
"""Long answers shorten a prompt to not less than ``max_length`` divided by this number."""
_CONTENT, _ANSWER = "malleablecontent", "malleableanswer"


class TokenizedRow(NamedTuple):
    """Tokens of a prompt and its answers.

    Attributes:
        text: Prompt as the model reads it, under the chat template, before truncation.
        prompt: ``(P,)``.
        answers: ``(A,)`` of each answer, with the token that ends it.
        merged: Whether the last token of the prompt alone is part of an answer, because it merged with the answer's first characters.
        cut: Whether the prompt or an answer was shortened.
    """

    text: str
    prompt: Tokens
    answers: list[Tokens]
    merged: bool = False
    cut: bool = False


@dataclass(frozen=True)
class Truncation:
    """Maximum lengths of rows.

    Attributes:
        max_length: Maximum number of tokens of a prompt with its longest answer; ``None``: no limit.
        max_prompt_length: Maximum number of tokens of a prompt; ``None``: no limit.
        policy: ``prompt_start`` removes tokens from the start of a prompt, except the beginning-of-sequence token. ``prompt_end`` removes them from
            its end, except the text of a chat template after the last message. ``drop`` drops rows that are too long.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    policy: Policy = "prompt_start"

    def apply(self, row: TokenizedRow, opening: int, closing: int) -> TokenizedRow | None:
        """Shorten a row.

        A prompt is shortened only as far as ``max_prompt_length`` and the longest answer require, and to not less than a quarter of ``max_length``.
        Then answers are shortened at their end; such an answer does not end with the end-of-sequence token.

        Args:
            row: The row.
            opening: Number of tokens at the start of the prompt that are kept.
            closing: Number of tokens at the end of the prompt that ``prompt_end`` keeps.

        Returns:
            The row; ``None`` if it is too long and the policy is ``drop``.
        """
        size = len(row.prompt)
        limit = size if self.max_prompt_length is None else min(size, self.max_prompt_length)
        longest = max(map(len, row.answers), default=0)
        if self.max_length is not None:
            limit = min(limit, max(self.max_length - longest, self.max_length // MIN_PROMPT_PART, 1))
        space = longest if self.max_length is None else min(longest, self.max_length - limit)
        if limit == size and space == longest:
            return row
        if self.policy == "drop":
            return None
        return row._replace(prompt=self._prompt(row.prompt, limit, opening, closing), answers=[ids[:space] for ids in row.answers], cut=True)

    def _prompt(self, prompt: Tokens, limit: int, opening: int, closing: int) -> Tokens:
        opening = min(opening, limit)
        if self.policy == "prompt_end":
            opening, end = max(opening, limit - closing), min(closing, limit - opening)
        else:
            end = limit - opening
        return np.concatenate([prompt[:opening], prompt[len(prompt) - end :]])


class PairTokenizer:
    """Tokenizer of prompts with their answers.

    Prompt and answer are tokenised as one text and then separated, so that a model reads the tokens that it reads in any other text. A tokenizer can
    merge the last characters of a prompt with the first ones of an answer. The prompt of a row therefore consists of the leading tokens that the
    prompt alone and the texts with each of its answers have in common: usually all tokens of the prompt, or all but the last one. All answers of a
    row continue the same tokens.

    Plain texts are tokenised as they are. The beginning-of-sequence token is prepended if the tokenizer prepends it, unless the text starts with it.
    Conversations are formatted by the chat template. Their prompt is what ``apply_chat_template(..., add_generation_prompt=True)`` returns, i.e. what
    generation starts from, including its beginning-of-sequence token, if any. An answer ends with the token that ends a turn in the template; if
    there is none, and in plain text, with the end-of-sequence token. It is appended only if it is absent, and it is a scored token.

    Args:
        tokenizer: The tokenizer.
        chat: Format prompts by the chat template; plain prompts are messages of the user then.
        mask_assistant_header: Whether the text that begins a reply in the chat template belongs to the prompt, and is not scored.

    Attributes:
        eos_token_id: Token that ends an answer.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, or no usable chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: bool, mask_assistant_header: bool = True) -> None:
        self.tokenizer = tokenizer
        self.chat = chat
        self.mask_assistant_header = mask_assistant_header
        self._ending, self._after = "", ""
        self._closing = 0
        eos: Any = tokenizer.eos_token_id
        self._bos: int | None = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else None
        self._adds_bos = False
        if chat:
            eos = self._read_template(eos)
        elif self._bos is not None:
            first: Any = tokenizer("a")["input_ids"]
            self._adds_bos = first[0] == self._bos
        if not isinstance(eos, int):
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so that no answer could end; set its eos_token")
        self.eos_token_id = eos

    def _read_template(self, eos: Any) -> Any:
        """Read the text after messages and replies from the chat template, and return the token that ends a reply."""
        name = self.tokenizer.name_or_path
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {name!r} has no chat template, which conversations need; choose the tokenizer of an instruct model, or plain texts"
            )
        messages = [Message(USER, _CONTENT)]
        prompt, opened = self._render(messages, False), self._render(messages, True)
        reply = self._render([*messages, Message(ASSISTANT, _ANSWER)], False)
        if opened.count(_CONTENT) != 1 or reply.count(_ANSWER) != 1:
            raise ValueError(f"the chat template of {name!r} does not contain each message once; choose another tokenizer, or give plain texts")
        closing = (opened if self.mask_assistant_header else prompt).split(_CONTENT)[1]
        self._closing = len(self._encode([closing])[0])
        self._after = reply.split(_ANSWER)[1]
        before, end = end_of_turn(self.tokenizer, self._after)
        if end is None:
            return eos
        self._ending = self._after[: len(before) + len(str(self.tokenizer.convert_ids_to_tokens(end)))]
        return end

    def _render(self, messages: Sequence[Message], opened: bool) -> str:
        try:
            return render(self.tokenizer, [[message._asdict() for message in messages]], opened)[0]
        except Exception as error:  # templates raise various exceptions
            roles = ", ".join(message.role for message in messages)
            raise ValueError(
                f"the chat template of {self.tokenizer.name_or_path!r} rejects messages of {roles} ({first_line(error)}); change roles or their order"
            ) from error

    def tokenize(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], places: Sequence[str]) -> list[TokenizedRow]:
        """Tokenise rows.

        Args:
            prompts: Prompt of each row.
            answers: Answers of each row.
            places: File and line of each row, for messages.

        Raises:
            ValueError: If the chat template rejects or changes a conversation; the message contains its place.
        """
        if self.chat:
            texts, joined, starts = self._format(prompts, answers, places)
        else:
            texts = [str(prompt) for prompt in prompts]
            joined = [[text + answer for answer in own] for text, own in zip(texts, answers, strict=True)]
            starts = texts
        flat = self._encode([*texts, *(text for own in joined for text in own)])
        alone, rest = flat[: len(texts)], iter(flat[len(texts) :])
        unopened = alone if starts is texts else self._encode(starts)
        rows = []
        for text, prompt, start, own in zip(texts, alone, unopened, joined, strict=True):
            whole = [self._ended(next(rest)) for _ in own]
            shared = min((_common(prompt, ids) for ids in whole), default=len(prompt))
            end = min(shared, _common(start, prompt)) if starts is not texts else shared
            rows.append(TokenizedRow(text, prompt[:end], [ids[end:] for ids in whole], shared < len(prompt)))
        return rows

    def shorten(self, row: TokenizedRow, truncation: Truncation) -> TokenizedRow | None:
        """Shorten a row; see :meth:`Truncation.apply`."""
        return truncation.apply(row, int(self._bos is not None and row.prompt[:1].tolist() == [self._bos]), self._closing)

    def is_empty(self, answer: Tokens) -> bool:
        """Return whether an answer has no tokens besides the one that ends it."""
        return len(answer) == 0 or (len(answer) == 1 and int(answer[0]) == self.eos_token_id)

    def _format(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], places: Sequence[str]
    ) -> tuple[list[str], list[list[str]], list[str]]:
        """Return prompts under the chat template, prompts with each answer, and the text before the first scored token of each row."""
        turns = [[message._asdict() for message in _turns(prompt)] for prompt in prompts]
        texts = self._render_all(turns, places, True)
        starts = texts if self.mask_assistant_header else self._render_all(turns, places, False)
        owners = [number for number, own in enumerate(answers) for _ in own]
        flat = (answer for own in answers for answer in own)
        replies = [[*turns[number], {"role": ASSISTANT, "content": answer}] for number, answer in zip(owners, flat, strict=True)]
        joined: list[list[str]] = [[] for _ in prompts]
        for number, whole in zip(owners, self._render_all(replies, [places[number] for number in owners], False), strict=True):
            if not whole.startswith(texts[number]) or not whole.endswith(self._after):
                raise ValueError(
                    f"{places[number]}: under the chat template of {self.tokenizer.name_or_path!r}, the conversation with the answer does not "
                    "continue the prompt from which generation starts; choose another tokenizer, or change its chat_template"
                )
            joined[number].append(whole[: len(whole) - len(self._after)] + self._ending)
        return texts, joined, starts

    def _render_all(self, conversations: Sequence[list[dict[str, Any]]], places: Sequence[str], opened: bool) -> list[str]:
        try:
            return render(self.tokenizer, conversations, opened) if conversations else []
        except Exception:  # templates raise various exceptions
            for place, conversation in zip(places, conversations, strict=True):
                try:
                    self._render([Message(**message) for message in conversation], opened)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
            raise

    def _encode(self, texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        options: Any = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        rows = [np.array(ids, dtype=np.int32) for ids in self.tokenizer(list(texts), **options)["input_ids"]]
        if self._bos is None or not self._adds_bos:
            return rows
        return [ids if ids[:1].tolist() == [self._bos] else np.insert(ids, 0, self._bos) for ids in rows]

    def _ended(self, tokens: Tokens) -> Tokens:
        return tokens if tokens[-1:].tolist() == [self.eos_token_id] else np.append(tokens, np.int32(self.eos_token_id))


def _turns(prompt: Prompt) -> Sequence[Message]:
    return (Message(USER, prompt),) if isinstance(prompt, str) else prompt


def _common(first: Tokens, second: Tokens) -> int:
    """Return the number of leading tokens that two texts have in common."""
    size = min(len(first), len(second))
    other = np.flatnonzero(first[:size] != second[:size])
    return int(other[0]) if len(other) else size
