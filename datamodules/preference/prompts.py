"""Reading of prompts to answer."""

from __future__ import annotations

from pathlib import Path

from malleable.datamodules.files.text_files import file_kind, read_lines
from malleable.datamodules.files.user_files import check_file
from malleable.datamodules.sources.preference.base import Prompt
from malleable.datamodules.sources.preference.files import KINDS, read_records
from malleable.datamodules.sources.preference.records import ASSISTANT, to_prompt

FIELD = "prompt"


def read_prompts(path: Path, is_chat: bool) -> tuple[list[Prompt], list[str]]:
    """Read prompts.

    Args:
        path: A text file (``.txt``) with one prompt on each line, or a table with the column ``prompt``: ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or
            ``.parquet``. JSON may also contain strings. A prompt is a text or, for data under a chat template, a list of messages.
        is_chat: Whether prompts are formatted by a chat template; a text is a message of the user then.

    Returns:
        The prompts, and the place of each one for messages.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a prompt is missing, empty, or a conversation although ``is_chat`` is false; or if there are none.
    """
    check_file(path, f"give a file of prompts that ends in .txt, {KINDS}")
    if file_kind(path) == ".txt":
        found: list[tuple[str, object]] = [(f"{path}, line {number}", line) for number, line in read_lines(path)]
    else:
        found = [(place, _field(fields, place)) for place, fields in read_records(path, [FIELD])]
    if not found:
        raise ValueError(f"{path} contains no prompts; give a file with at least one prompt")
    prompts = []
    for place, value in found:
        try:
            prompt = to_prompt(value, FIELD)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError(f"{place}: the prompt is empty; give a text")
        if not isinstance(prompt, str) and not is_chat:
            raise ValueError(f"{place}: the prompt is a conversation, but the data have plain prompts; give a text, or set chat: true")
        if not isinstance(prompt, str) and prompt[-1].role == ASSISTANT:
            raise ValueError(f"{place}: the last turn of a prompt must not be of the assistant, who answers next; remove it")
        prompts.append(prompt)
    return prompts, [place for place, _ in found]


def _field(fields: object, place: str) -> object:
    if isinstance(fields, str):
        return fields
    if not isinstance(fields, dict) or fields.get(FIELD) is None:
        known = f"; the fields are {', '.join(map(str, fields))[:200]}" if isinstance(fields, dict) else ""
        raise ValueError(f"{place}: the field {FIELD!r} is missing{known}; give each row a prompt")
    return fields[FIELD]
