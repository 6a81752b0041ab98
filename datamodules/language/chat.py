"""Prompts of instruct models: a prompt template as the user message of the tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from malleable.datamodules.files.text_files import BLANKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from malleable.datamodules.recommendation.prompt import PromptTemplate

DATE = datetime(2024, 7, 26, tzinfo=UTC)
"""Date for chat templates that contain one (the default of Llama 3), so that prompts do not depend on the day of data preparation."""
_CALL_OF_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_BLANKS = f"{BLANKS}\u00a0"
_CONTENT, _ANSWER = "malleablecontent", "malleableanswer"


def apply_chat_format(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptTemplate, int | None]:
    """Combine a prompt template with the chat template of a tokenizer.

    Args:
        template: Prompt template; its prompt is the user message, its answer the reply.
        tokenizer: Tokenizer with a chat template.

    Returns:
        A pair: the prompt template with the text of the chat template in its fields (including the beginning-of-sequence token), and the id of the
        token that ends a reply. The id is ``None`` if the chat template has no special token after the reply; use the end-of-sequence token then.

    Raises:
        ValueError: If the tokenizer has no chat template, or if the chat template does not contain each message exactly once.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, so template 'chat' cannot be used; "
            "choose template 'instruction', or an instruct model with its tokenizer"
        )
    messages = [{"role": "system", "content": template.system}] if template.system is not None else []
    messages.append({"role": "user", "content": _CONTENT})
    prompt = _rendered(tokenizer, messages, add_generation_prompt=True)
    reply = _rendered(tokenizer, [*messages, {"role": "assistant", "content": _ANSWER}])
    if prompt.count(_CONTENT) != 1 or reply.count(_ANSWER) != 1:
        raise ValueError(f"the chat template of {tokenizer.name_or_path!r} does not contain each message once; choose template 'instruction'")
    opening, closing = prompt.split(_CONTENT)
    end, end_token = end_of_turn(tokenizer, reply.split(_ANSWER)[1])
    # Text between the generation prompt and a reply, such as the empty thoughts of Qwen 3, is part of the prompt.
    between = reply.split(_ANSWER)[0].removeprefix(prompt) if reply.startswith(prompt) else ""
    closing += between
    stem = closing.rstrip(_BLANKS)
    resolved = replace(
        template,
        chat=False,
        system=None,
        prefix=opening + template.prefix,
        suffix=template.suffix + stem,
        # A space before the end of the turn, as in Llama 2, would be a separate token at the end of each title.
        answer=closing[len(stem) :] + template.answer + end.rstrip(),
    )
    return resolved, end_token


def check_chat_messages(template: PromptTemplate, resolved: PromptTemplate, titles: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the chat template does not change messages, so that :func:`apply_chat_format` gives the same text as the chat template.

    Args:
        template: Prompt template.
        resolved: Result of :func:`apply_chat_format` for ``template``.
        titles: Titles of the prompt that is compared.
        tokenizer: Tokenizer with a chat template.

    Raises:
        ValueError: If the chat template changes a message.
    """
    messages = [{"role": "system", "content": template.system}] if template.system is not None else []
    expected = _rendered(tokenizer, [*messages, {"role": "user", "content": template.text(titles)}], add_generation_prompt=True)
    if not resolved.text(titles).startswith(expected.rstrip(_BLANKS)):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} changes the text of a message; start template.prefix and end template.suffix with a "
            "word, or choose template 'instruction'"
        )


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    try:
        (text,) = render(tokenizer, [messages], add_generation_prompt)
    except Exception as error:  # templates raise various exceptions
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path!r} rejects messages of {roles}: {error}; "
            "set or omit template.system, or choose template 'instruction'"
        ) from error
    return text


def render(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, Any]]], add_generation_prompt: bool = False) -> list[str]:
    """Return the text of each conversation under the chat template of a tokenizer.

    A template that contains the current date gets :data:`DATE` instead, so that texts do not depend on the day.

    Args:
        tokenizer: Tokenizer with a chat template.
        conversations: Messages of each conversation, with ``role`` and ``content``.
        add_generation_prompt: Append the text that begins a reply.

    Raises:
        Exception: Templates raise exceptions of various types for conversations that they do not support.
    """
    chat_template: Any = tokenizer.get_chat_template()
    dated = _CALL_OF_DATE.sub(lambda call: repr(DATE.strftime(call[2])), chat_template)
    texts: Any = tokenizer.apply_chat_template(list(conversations), chat_template=dated, tokenize=False, add_generation_prompt=add_generation_prompt)
    return [str(text) for text in texts]


def end_of_turn(tokenizer: PreTrainedTokenizerBase, rest: str) -> tuple[str, int | None]:
    """Return the text between a reply and the token that ends it, and the token.

    Args:
        tokenizer: Tokenizer with a chat template.
        rest: Text of the chat template after a reply.

    Returns:
        Text and id of the first special token; an empty text and ``None`` if there is no special token.
    """
    special = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for token_id in tokenizer(rest, add_special_tokens=False)["input_ids"]:
        if token_id in special:
            return rest[: rest.index(special[token_id])], token_id
    return "", None
