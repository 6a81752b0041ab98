"""The one prompt that training, generation and evaluation share, put together from tokenised pieces.

Each title is tokenised once; a prompt is a concatenation of token tuples, so that the text of a title never depends on its neighbours
and the answer's first token is the same in training and in decoding.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from malleable.datamodules.files.text_files import ends_in_blank
from malleable.datamodules.language.chat import check_content, in_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Tokens = tuple[int, ...]

# Fields of the template `chat`.
_CHAT = {
    "prefix": "I enjoyed, in this order:\n",
    "item": '"{title}"\n',
    "separator": "",
    "suffix": "What will I enjoy next? Answer with the title only.",
    "candidates_prefix": "Choose one of:\n",
    "candidate": '"{title}"\n',
}
# What stands after each field: there a blank between the two belongs.
_FOLLOWED_BY = {
    "prefix": "template.item",
    "item": "template.separator and template.suffix",
    "separator": "template.item",
    "suffix": "template.answer",
    "answer": "nothing, as the answer ends here",
    "candidates_prefix": "template.candidate",
    "candidate": "template.candidate and template.suffix",
}


@dataclass(frozen=True)
class PromptTemplate:
    """Text around the titles; special tokens of the tokenizer, such as ``</s>``, may stand in any field.

    ``prefix`` + history items joined by ``separator`` + (candidates) + ``suffix`` is the prompt, ``answer`` the answer, after which comes
    the end-of-sequence token. A space between two fields belongs to the start of the second one.

    Attributes:
        prefix: Text before the first item.
        item: An item of the history; ``{title}`` is its title.
        separator: Text between items.
        suffix: Text after the last item.
        answer: The answer; ``{title}`` is its title.
        candidates_prefix: Text before the candidates, between history and suffix, where rows have candidates; ``None`` leaves them out.
        candidate: A candidate; ``{title}`` is its title.
        chat: The prompt is a message of the user under the tokenizer's chat template, the answer the reply, which ends as the chat template
            says. Fields that are left out take the text of the template ``chat``.
        system: System message of the chat; ``None``: none.

    Raises:
        ValueError: If a field misses its ``{title}``. If a field ends in a space, a tab or a no-break space: pieces are tokenised one by
            one, and tokenizers join a blank to the word that follows, which lies in the next piece.
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
            raise ValueError("template.system is a message of a chat: set template.chat to true, or leave template.system out")
        for name in ("item", "answer", "candidate"):
            if getattr(self, name).count("{title}") != 1:
                raise ValueError(f"template.{name} must contain {{title}} once, got {getattr(self, name)!r}")
        for name, following in _FOLLOWED_BY.items():
            value = getattr(self, name)
            if value is not None and ends_in_blank(value):
                raise ValueError(
                    f"template.{name} must not end in a blank, got {value!r}: tokenizers join it to the next word; put it at the start of {following}"
                )

    @classmethod
    def named(cls, name: str) -> PromptTemplate:
        """Return the template ``history`` (models trained on the catalogue), ``instruction`` (pretrained models) or ``chat`` (instruct models).

        Raises:
            ValueError: If there is no template of that name.
        """
        if name not in TEMPLATES:
            raise ValueError(f"unknown template {name!r}; choose one of {sorted(TEMPLATES)} or give its fields")
        return TEMPLATES[name]

    def text(self, history: Sequence[str], candidates: Sequence[str] = ()) -> str:
        """Return the prompt as text."""
        parts = [self.prefix, self.separator.join(self.item.replace("{title}", title) for title in history)]
        if candidates and self.candidates_prefix is not None:
            parts += [self.candidates_prefix, *(self.candidate.replace("{title}", title) for title in candidates)]
        return "".join([*parts, self.suffix])


TEMPLATES = {
    # A prompt is the text of a packed history up to the answer.
    "history": PromptTemplate(),
    # The line break is part of the item: some tokenizers join it to the quote before it.
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
    """A template and a catalogue in tokens.

    Attributes:
        prefix: With the beginning-of-sequence token where the tokenizer puts one.
        separator: Between items.
        suffix: After the last item.
        candidates_prefix: Before the candidates; ``None`` leaves them out.
        items: Each title in the history's form.
        answers: Each title in the answer's form, with the end-of-sequence token.
        candidates: Each title in the candidates' form.
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
        """Largest token of all prompts and answers."""
        parts = [self.prefix, self.separator, self.suffix, self.candidates_prefix or (), *self.items, *self.answers, *self.candidates]
        return max((max(ids) for ids in parts if len(ids)), default=-1)

    def prompt(self, history: Sequence[int], candidates: Sequence[int] = ()) -> list[int]:
        """Return the tokens of a prompt."""
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
        """Return the tokens of a whole history as one document, closed by the end-of-sequence token."""
        return [*self.prompt(items)[: -len(self.suffix) or None], self.eos_token_id]


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], before: str = "") -> list[Tokens]:
    """Tokenise texts as the continuation of ``before``, without special tokens around them.

    Tokenizers of the Llama-2 kind put a space before the first word of a text and after a special token, but not elsewhere: a piece is
    therefore tokenised behind what stands before it. Where the tokenizer joins both into one token, the piece is tokenised alone.
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
        ValueError: If the tokenizer has no end-of-sequence token, or makes nothing of a title.
    """
    template, eos, bos = _written_out(template, titles, tokenizer)

    def pieces(form: str, before: str) -> list[Tokens]:
        return encode(tokenizer, [form.replace("{title}", title) for title in titles], before)

    after_item = _tail(template.item) or "a"
    after_candidate = _tail(template.candidate) or "a"
    items = pieces(template.item, template.separator or after_item)
    answers = pieces(template.answer, template.suffix or after_item)
    _check_titles(titles, items, answers, tokenizer)
    offered = template.candidates_prefix
    return PromptPieces(
        prefix=(*bos, *encode(tokenizer, [template.prefix])[0]),
        separator=encode(tokenizer, [template.separator], after_item)[0],
        suffix=encode(tokenizer, [template.suffix], after_item)[0],
        candidates_prefix=None if offered is None else encode(tokenizer, [offered], after_item)[0],
        items=items,
        answers=[(*ids, eos) for ids in answers],
        candidates=[] if offered is None else pieces(template.candidate, offered or after_candidate),
        eos_token_id=eos,
    )


def _written_out(template: PromptTemplate, titles: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[PromptTemplate, int, Tokens]:
    """Return the template of the whole text, the token that ends an answer, and what the tokenizer puts before a text."""
    eos: Any = tokenizer.eos_token_id
    written = template
    if template.chat:
        written, own = in_chat(template, tokenizer)
        check_content(template, written, list(titles[:2]), tokenizer)
        eos = eos if own is None else own
    if not isinstance(eos, int):
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so that no answer could end; set its eos_token")
    if written is not template:
        return written, eos, ()
    opening: Any = tokenizer("a")["input_ids"]
    bos = (tokenizer.bos_token_id,) if tokenizer.bos_token_id is not None and opening[0] == tokenizer.bos_token_id else ()
    return template, eos, bos


def _tail(form: str) -> str:
    return form.split("{title}")[1]


def _check_titles(titles: Sequence[str], items: Sequence[Tokens], answers: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> None:
    empty = [title for title, *forms in zip(titles, items, answers, strict=True) if not all(forms)]
    if empty:
        raise ValueError(
            f"{len(empty)} titles give no token under {tokenizer.name_or_path!r}, for example {empty[0]!r}; "
            f"remove them from the items, or choose a tokenizer that covers their characters"
        )
    if equal := len(answers) - len(set(answers)):
        log.warning("%d titles have the same tokens as another under %r and cannot be told apart", equal, tokenizer.name_or_path)
