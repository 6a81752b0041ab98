"""Prompt templates, and prompts as concatenations of tokenised pieces; training, generation and evaluation use the same prompt.

Each title is tokenised once. The tokens of a title therefore do not depend on the text around it, and the first token of an answer is the same in
training and in decoding.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from malleable.datamodules.files.text_files import ends_in_blank
from malleable.datamodules.language.chat import apply_chat_format, check_chat_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Tokens = tuple[int, ...]

# Default fields of chat templates.
_CHAT = {
    "prefix": "I enjoyed, in this order:\n",
    "item": '"{title}"\n',
    "separator": "",
    "suffix": "What will I enjoy next? Answer with the title only.",
    "candidates_prefix": "Choose one of:\n",
    "candidate": '"{title}"\n',
}
# Field that follows each field. A blank between both must be at the start of the following field. Nothing follows an answer.
_FOLLOWED_BY = {
    "prefix": "template.item",
    "item": "template.separator and template.suffix",
    "separator": "template.item",
    "suffix": "template.answer",
    "answer": None,
    "candidates_prefix": "template.candidate",
    "candidate": "template.candidate and template.suffix",
}


@dataclass(frozen=True)
class PromptTemplate:
    """Template of prompts and answers. Any field may contain special tokens of the tokenizer, such as ``</s>``.

    The prompt is ``prefix``, the items of the history joined by ``separator``, the candidates (if any), and ``suffix``. The answer is ``answer``,
    followed by the end-of-sequence token. A space between two fields must be at the start of the second field.

    Attributes:
        prefix: Text before the first item.
        item: Text of an item of the history; ``{title}`` is replaced by its title.
        separator: Text between items.
        suffix: Text after the last item.
        answer: Text of the answer; ``{title}`` is replaced by the title.
        candidates_prefix: Text between history and candidates, in rows with candidates; ``None``: prompts do not contain the candidates.
        candidate: Text of a candidate; ``{title}`` is replaced by its title.
        chat: Use the tokenizer's chat template: the prompt is a message of the user, the answer is the reply. Omitted fields have the defaults of the
            template ``chat``.
        system: System message of the chat; ``None``: no system message.

    Raises:
        ValueError: If ``{title}`` is missing in a field, or if a field ends in a space, a tab or a no-break space. Pieces are tokenised separately,
            but tokenizers join a blank to the following word, which is in the next piece.
    """

    prefix: str = ""
    item: str = "{title}"
    separator: str = "</s>"
    suffix: str = "</s>"
    answer: str = "{title}"
    candidates_prefix: str | None = None
    candidate: str = "{title}"
    chat: bool = False
    system: str | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.chat:
            for field in fields(self):
                if field.name in _CHAT and getattr(self, field.name) == field.default:
                    object.__setattr__(self, field.name, _CHAT[field.name])
        elif self.system is not None:
            raise ValueError("template.system is a message of a chat: set template.chat to true, or omit template.system")
        for name in ("item", "answer", "candidate"):
            if getattr(self, name).count("{title}") != 1:
                raise ValueError(f"template.{name} must contain {{title}} once, got {getattr(self, name)!r}")
        for name, following in _FOLLOWED_BY.items():
            value = getattr(self, name)
            if value is not None and ends_in_blank(value):
                raise ValueError(
                    f"template.{name} must not end in a blank, got {value!r}: tokenizers join it to the next word; "
                    f"{f'move it to the start of {following}' if following else 'remove it'}"
                )

    @classmethod
    def named(cls, name: str) -> PromptTemplate:
        """Return the template ``history`` (models trained from scratch), ``instruction`` (pretrained models) or ``chat`` (instruct models).

        Raises:
            ValueError: If there is no template with this name.
        """
        if name not in TEMPLATES:
            raise ValueError(f"unknown template {name!r}; choose one of {sorted(TEMPLATES)} or give the fields of a template")
        return TEMPLATES[name]

    def text(self, history: Sequence[str], candidates: Sequence[str] = ()) -> str:
        """Return the text of a prompt."""
        parts = [self.prefix, self.separator.join(self.item.replace("{title}", title) for title in history)]
        if candidates and self.candidates_prefix is not None:
            parts += [self.candidates_prefix, *(self.candidate.replace("{title}", title) for title in candidates)]
        return "".join([*parts, self.suffix])


TEMPLATES = {
    # Prompt and answer together have the text of a packed history.
    "history": PromptTemplate(),
    # The line break is part of the item, because some tokenizers join it to the preceding quote.
    "instruction": PromptTemplate(
        prefix="The user enjoyed, in this order:\n",
        item='"{title}"\n',
        separator="",
        suffix="Next the user will enjoy:",
        answer=' "{title}"',
        candidates_prefix="Choose one of:\n",
        candidate='"{title}"\n',
    ),
    "chat": PromptTemplate(chat=True),
}


@dataclass(frozen=True)
class PromptPieces:
    """Tokens of a template and a catalogue.

    Attributes:
        prefix: Tokens before the first item, including the beginning-of-sequence token if the tokenizer adds one.
        separator: Tokens between items.
        suffix: Tokens after the last item.
        candidates_prefix: Tokens before the candidates; ``None``: prompts do not contain the candidates.
        items: Tokens of each title as an item of the history.
        answers: Tokens of each title as an answer, with the end-of-sequence token.
        candidates: Tokens of each title as a candidate.
        eos_token_id: End-of-sequence token.
    """

    prefix: Tokens
    separator: Tokens
    suffix: Tokens
    candidates_prefix: Tokens | None
    items: Sequence[Tokens]
    answers: Sequence[Tokens]
    candidates: Sequence[Tokens]
    eos_token_id: int

    @property
    def largest_token_id(self) -> int:
        """Largest token id in prompts and answers."""
        parts = [self.prefix, self.separator, self.suffix, self.candidates_prefix or (), *self.items, *self.answers, *self.candidates]
        return max((max(ids) for ids in parts if len(ids)), default=-1)

    def prompt(self, history: Sequence[int], candidates: Sequence[int] = ()) -> list[int]:
        """Return the tokens of a prompt.

        Args:
            history: Items of the history, by id, oldest first.
            candidates: Items to choose from, by id.
        """
        tokens = list(self.prefix)
        for position, item in enumerate(history):
            if position:
                tokens += self.separator
            tokens += self.items[item]
        if len(candidates) and self.candidates_prefix is not None:
            tokens += self.candidates_prefix
            tokens += itertools.chain.from_iterable(self.candidates[item] for item in candidates)
        tokens += self.suffix
        return tokens

    def document(self, items: Sequence[int]) -> list[int]:
        """Return the tokens of a whole history as one document, which ends with the end-of-sequence token."""
        return [*self.prompt(items)[: -len(self.suffix) or None], self.eos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], before: str = "") -> list[Tokens]:
    """Tokenise texts as continuations of ``before``, without special tokens around them.

    Tokenizers such as that of Llama 2 add a space before the first word of a text and after a special token, but not elsewhere. A piece is therefore
    tokenised after the text that precedes it in a prompt. If a token contains characters of both, the piece is tokenised alone.
    """
    if not texts:
        return []
    alone = [tuple(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    if not before:
        return alone
    start, *joined = (tuple(ids) for ids in tokenizer([before, *(before + text for text in texts)], add_special_tokens=False)["input_ids"])
    return [ids[len(start) :] if ids[: len(start)] == start else own for ids, own in zip(joined, alone, strict=True)]


def tokenize(template: PromptTemplate, titles: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> PromptPieces:
    """Tokenise a template and a catalogue.

    Raises:
        ValueError: If the tokenizer has no end-of-sequence token, or if a title has no tokens.
    """
    template, eos, bos = _resolve_chat(template, titles, tokenizer)

    def pieces(field: str, before: str) -> list[Tokens]:
        return encode(tokenizer, [field.replace("{title}", title) for title in titles], before)

    after_item = _after_title(template.item) or "a"
    after_candidate = _after_title(template.candidate) or "a"
    items = pieces(template.item, template.separator or after_item)
    answers = pieces(template.answer, template.suffix or after_item)
    _check_titles(titles, items, answers, tokenizer)
    candidates_prefix = template.candidates_prefix
    return PromptPieces(
        prefix=(*bos, *encode(tokenizer, [template.prefix])[0]),
        separator=encode(tokenizer, [template.separator], after_item)[0],
        suffix=encode(tokenizer, [template.suffix], after_item)[0],
        candidates_prefix=None if candidates_prefix is None else encode(tokenizer, [candidates_prefix], after_item)[0],
        items=items,
        answers=[(*ids, eos) for ids in answers],
        candidates=[] if candidates_prefix is None else pieces(template.candidate, candidates_prefix or after_candidate),
        eos_token_id=eos,
    )


def _resolve_chat(template: PromptTemplate, titles: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[PromptTemplate, int, Tokens]:
    """Return the template with the text of the chat template, the token that ends an answer, and the tokens that the tokenizer adds before a text."""
    eos: Any = tokenizer.eos_token_id
    resolved = template
    if template.chat:
        resolved, end_of_turn = apply_chat_format(template, tokenizer)
        check_chat_messages(template, resolved, list(titles[:2]), tokenizer)
        eos = eos if end_of_turn is None else end_of_turn
    if not isinstance(eos, int):
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so that no answer could end; set its eos_token")
    if resolved is not template:
        return resolved, eos, ()
    opening: Any = tokenizer("a")["input_ids"]
    bos = (tokenizer.bos_token_id,) if tokenizer.bos_token_id is not None and opening[0] == tokenizer.bos_token_id else ()
    return template, eos, bos


def _after_title(field: str) -> str:
    return field.split("{title}")[1]


def _check_titles(titles: Sequence[str], items: Sequence[Tokens], answers: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
    empty = [title for title, *forms in zip(titles, items, answers, strict=True) if not all(forms)]
    if empty:
        raise ValueError(
            f"{len(empty)} titles have no tokens with the tokenizer {tokenizer.name_or_path!r}, e.g. {empty[0]!r}; "
            "remove them from the items, or choose a tokenizer that supports their characters"
        )
    if equal := len(answers) - len(set(answers)):
        log.warning(
            "%d titles have the same tokens as another title with the tokenizer %r; the model cannot distinguish them", equal, tokenizer.name_or_path
        )
