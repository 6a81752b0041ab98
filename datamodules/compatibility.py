"""Check that data have the tokenizer, prompt template, items and labels that the weights were trained with.

On the command line, the tokenizer, the template and the catalogue of a checkpoint override those of the recipe before this check: see
``parse_arguments`` of ``MalleableCLI`` in :mod:`malleable.cli` (``configs/cli/cli.py`` in the repository).

The data must have the tokenizer, the prompt template and the items that the weights of a checkpoint were trained with, and the items must have the
same order. ``BaseModule`` calls :func:`check_identity` when it gets data or loads a checkpoint. ``LanguageModel`` calls :func:`check_exported_folder`
when it loads an exported model. :mod:`~malleable.datamodules.stored_identity` reads and writes the compared properties.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.batch import Catalog, KnowledgeGraph, Vocabulary
from malleable.datamodules.language.tokenizer import tokenizer_digest
from malleable.datamodules.recommendation.prompt import PromptTemplate
from malleable.datamodules.stored_identity import FOLDER_FILE, DataDescription, from_plain, read_entries, vocabulary_of

log = logging.getLogger(__name__)

TOKENS = "tokens of items"
SHOWN = 3
"""Maximum number of examples in a message."""
ADVICE = {
    "catalog": "Use the catalogue of the checkpoint: --data.tokenizer <checkpoint> (in Python, tokenizer='<checkpoint>' of the data module); "
    "to append new items to it, give --extend_catalog (extend_catalog=True), too",
    "vocabulary": "Use the tokenizer of the checkpoint: --data.tokenizer <checkpoint> (in Python, tokenizer=... of the data module)",
    "graph": "Use the data that the checkpoint was trained on",
}


def identity(description: DataDescription, *, text: bool = True) -> dict[str, Any]:
    """Return the properties of the data that must match the weights, by name: tokenizer, template and items; or entities and relations.

    Args:
        description: Description of the data, or description that a checkpoint stores.
        text: Whether the model reads text. If false, only the items of a catalogue are returned. It has no effect on graphs.
    """
    if isinstance(description, KnowledgeGraph):
        return {"entities": description.entities, "relations": description.relations}
    parts: dict[str, Any] = {"items": description.titles} if isinstance(description, Catalog) else {}
    vocabulary = vocabulary_of(description)
    if not text or vocabulary is None:
        return parts
    parts |= {"vocab_size": vocabulary.vocab_size, "eos_token_id": vocabulary.eos_token_id}
    if vocabulary.tokenizer is not None and (digest := tokenizer_digest(vocabulary.tokenizer)) is not None:
        parts["tokenizer"] = digest
    if isinstance(description, Catalog):
        if description.template is not None:
            # Fields that are missing in a checkpoint of an earlier version had their default values.
            parts["template"] = {**asdict(PromptTemplate()), **description.template}
        parts[TOKENS] = dict(zip(description.titles, description.token_ids, strict=False))
    return parts


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return a message with both values for each entry that is in both mappings and has different values."""
    return [found for name in stored if name in given and stored[name] != given[name] for found in _describe(name, stored[name], given[name])]


def check_identity(
    kind: str, stored: DataDescription, given: DataDescription, *, text: bool = True, extend: bool = False, new_items: str = ""
) -> None:
    """Check that data match the data that weights were trained on, and log the new items.

    Args:
        kind: ``catalog``, ``vocabulary`` or ``graph``.
        stored: Description in the checkpoint or module.
        given: Description of the data.
        text: Whether the model reads text.
        extend: Whether the data may have new items after the stored ones.
        new_items: State of the weights of new items, for the message.

    Raises:
        MisconfigurationException: If the data differ from the stored description.
    """
    extended = (stored, given) if extend and isinstance(stored, Catalog) and isinstance(given, Catalog) else None
    if extended:
        _log_new_items(*extended, new_items)
    if stored is given or stored == given:
        return
    own, other = identity(stored, text=text), identity(given, text=text)
    if extended:
        size = len(extended[0])
        other |= {"items": extended[1].titles[:size]}
        if TOKENS in other:
            other[TOKENS] = dict(list(other[TOKENS].items())[:size])
    if found := differences(own, other):
        what = "another graph" if kind == "graph" else "other data"
        raise MisconfigurationException(f"the checkpoint was trained on {what}: {'; '.join(found)}. {ADVICE[kind]}")


def _log_new_items(stored: Catalog, given: Catalog, note: str) -> None:
    titles = given.titles[len(stored) :]
    if titles:
        number = f"{len(titles)} new item{'s' if len(titles) > 1 else ''}"
        log.info("extend_catalog: %s after the %d items of the checkpoint: %s; %s", number, len(stored), _examples(titles), note)
    else:
        log.info("extend_catalog: no item is new; the checkpoint has all %d items", len(stored))


def _describe(name: str, stored: Any, given: Any) -> list[str]:
    if isinstance(stored, Mapping):
        return _describe_mapping(name, stored, given)
    if isinstance(stored, (tuple, list)):
        return [_describe_sequence(name, stored, given)]
    if isinstance(stored, str) and len(stored) == 64:
        return [f"{name} {stored[:12]} in the checkpoint, {given[:12]} here (digests of the content)"]
    return [f"{name} {stored!r} in the checkpoint, {given!r} here"]


def _describe_mapping(name: str, stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    # Items that only one side has are reported under `items`.
    names = [key for key in stored if key in given] if name == TOKENS else list(dict.fromkeys([*stored, *given]))
    other = [key for key in names if stored.get(key) != given.get(key) and not (_is_default(stored.get(key)) and _is_default(given.get(key)))]
    if not other:
        return []
    examples = [f"{key!r} {_short(stored.get(key))} in the checkpoint, {_short(given.get(key))} here" for key in other[:SHOWN]]
    more = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
    return [f"{name}: {', '.join(examples)}{more}"]


def _is_default(value: Any) -> bool:
    """Return whether a value is a default, which another version of a library may omit."""
    return value in (None, False, "default") or value in ([], {}, ())


def _describe_sequence(name: str, stored: Sequence[Any], given: Sequence[Any]) -> str:
    ours, theirs = set(stored), set(given)
    new, missing = [item for item in given if item not in ours], [item for item in stored if item not in theirs]
    parts = [f"{len(items)} {word} ({_examples(items)})" for word, items in (("new", new), ("missing", missing)) if items]
    if not parts:
        pairs = enumerate(zip(stored, given, strict=False))
        place = next((index for index, (one, other) in pairs if one != other), min(len(stored), len(given)) - 1)
        parts = [f"in another order, first at position {place}: {stored[place]!r} in the checkpoint, {given[place]!r} here"]
    return f"{name}: {len(stored)} in the checkpoint, {len(given)} here, {', '.join(parts)}"


def _examples(items: Sequence[Any]) -> str:
    return ", ".join(map(repr, items[:SHOWN])) + (", ..." if len(items) > SHOWN else "")


def _short(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_exported_folder(name: str | None, given: Catalog | Vocabulary) -> None:
    """Check that data use the tokenizer that the model in an exported folder was trained with; warn if the prompt template differs.

    Items may differ: the model is a base model for further training, and can read and generate any title.

    Args:
        name: Name of a model or adapter; names that are not exported folders are not checked.
        given: Description of the data.

    Raises:
        MisconfigurationException: If the tokenizers differ.
    """
    path = Path(name).expanduser() if name is not None else None
    if path is None or not (path / FOLDER_FILE).is_file():
        return
    entries = read_entries(path)
    kind = "catalog" if "catalog" in entries else "vocabulary"
    stored, here = (identity(description) for description in (from_plain(kind, entries[kind]), given))
    if entries["tokenizer_digest"] is not None:
        stored["tokenizer"] = entries["tokenizer_digest"]
    if found := differences(*({key: side[key] for key in ("vocab_size", "tokenizer") if side.get(key)} for side in (stored, here))):
        raise MisconfigurationException(
            f"the model in {path} was trained with another tokenizer than the data use: {'; '.join(found).replace('the checkpoint', path.name)}. "
            f"Use the model's tokenizer: --data.tokenizer {name} (in Python, tokenizer='{name}' of the data module)"
        )
    if found := differences({"template": stored.get("template")}, {"template": here.get("template", stored.get("template"))}):
        log.warning("the model in %s was trained with another prompt template: %s", path, "; ".join(found).replace("the checkpoint", path.name))
