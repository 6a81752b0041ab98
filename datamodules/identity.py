"""Identity of the data that weights were trained on: tokenizer, prompt template, items and labels.

It is stored with the weights and compared when they are loaded. A checkpoint has the entries ``catalog``, ``vocabulary`` or ``graph`` and, for
models that read text, ``tokenizer``. An exported folder has the same entries in ``malleable.json``, beside the files of the tokenizer.
"""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.batch import Catalog, KnowledgeGraph, Vocabulary
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.datamodules.files.text_files import read_json
from malleable.datamodules.files.user_files import first_line
from malleable.datamodules.language.tokenizer import pack_tokenizer, rules_digest, tokenizer_digest, unpack_tokenizer, write_known
from malleable.datamodules.recommendation.prompt import PromptTemplate

log = logging.getLogger(__name__)

DataDescription = Catalog | Vocabulary | KnowledgeGraph

__all__ = [
    "KINDS",
    "SETTINGS",
    "as_plain",
    "check_folder",
    "check_identity",
    "differences",
    "from_plain",
    "identity",
    "is_stored",
    "load_identity",
    "read_stored",
    "rules_digest",
    "store_identity",
    "stores_data",
    "vocabulary_of",
    "with_tokenizer",
    "write_folder",
]

KINDS: dict[str, type[Any]] = {"catalog": Catalog, "vocabulary": Vocabulary, "graph": KnowledgeGraph}
SETTINGS = "settings"
"""Entry of a checkpoint with the settings that change what its weights compute."""
FOLDER_FILE = "malleable.json"
TOKENS = "tokens of items"
SHOWN = 3
"""Maximum number of examples in a message."""
ADVICE = {
    "catalog": "Use the catalogue of the checkpoint: --data.tokenizer <checkpoint> (in Python, tokenizer='<checkpoint>' of the data module); "
    "to append new items to it, give --extend_catalog (extend_catalog=True), too",
    "vocabulary": "Use the tokenizer of the checkpoint: --data.tokenizer <checkpoint> (in Python, tokenizer=... of the data module)",
    "graph": "Use the data that the checkpoint was trained on",
}


def vocabulary_of(description: DataDescription) -> Vocabulary | None:
    """Return the vocabulary of a catalogue, or the vocabulary itself; ``None`` for a graph."""
    if isinstance(description, Catalog):
        return description.vocabulary
    return description if isinstance(description, Vocabulary) else None


def with_tokenizer(description: DataDescription, tokenizer: str) -> DataDescription:
    """Return a copy whose vocabulary loads its tokenizer from ``tokenizer``."""
    vocabulary = vocabulary_of(description)
    if vocabulary is None:
        return description
    vocabulary = replace(vocabulary, tokenizer=tokenizer)
    return replace(description, vocabulary=vocabulary) if isinstance(description, Catalog) else vocabulary


# --- comparison ---


def identity(description: DataDescription, *, text: bool = True) -> dict[str, Any]:
    """Return everything that the weights depend on, by name, as values that can be compared.

    Args:
        description: Description of the data or of a checkpoint.
        text: Whether the model reads text; otherwise only the items are compared.
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
    """Return a message for each entry that both mappings have and that differs, with both values."""
    return [found for name in stored if name in given and stored[name] != given[name] for found in _describe(name, stored[name], given[name])]


def check_identity(kind: str, stored: DataDescription, given: DataDescription, *, text: bool = True, extend: bool = False) -> None:
    """Check that data match the data that weights were trained on.

    Args:
        kind: ``catalog``, ``vocabulary`` or ``graph``.
        stored: Description in the checkpoint or module.
        given: Description of the data.
        text: Whether the model reads text.
        extend: Whether the data may have new items after the stored ones.

    Raises:
        MisconfigurationException: If they differ.
    """
    if stored is given or stored == given:
        return
    own, other = identity(stored, text=text), identity(given, text=text)
    if extend and isinstance(stored, Catalog) and isinstance(given, Catalog):
        other |= {"items": given.titles[: len(stored)]}
        if TOKENS in other:
            other[TOKENS] = dict(list(other[TOKENS].items())[: len(stored)])
    if found := differences(own, other):
        what = "another graph" if kind == "graph" else "other data"
        raise MisconfigurationException(f"the checkpoint was trained on {what}: {'; '.join(found)}. {ADVICE[kind]}")


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
        parts = [f"in another order, first at position {place}: {stored[place]!r} and {given[place]!r}"]
    return f"{name}: {len(stored)} in the checkpoint, {len(given)} here, {', '.join(parts)}"


def _examples(items: Sequence[Any]) -> str:
    return ", ".join(map(repr, items[:SHOWN])) + (", ..." if len(items) > SHOWN else "")


def _short(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- storage ---


def as_plain(description: DataDescription) -> dict[str, Any]:
    """Return a description as plain data."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(description).items()}


def from_plain(kind: str, stored: Mapping[str, Any]) -> DataDescription:
    """Rebuild a description from plain data; unknown entries, which later versions may write, are ignored."""
    known = {field.name for field in fields(KINDS[kind])}
    values = {name: _tuples(value) for name, value in stored.items() if name in known}
    if values.get("vocabulary") is not None:
        values["vocabulary"] = from_plain("vocabulary", values["vocabulary"])
    description: DataDescription = KINDS[kind](**values)
    hints = get_type_hints(KINDS[kind])
    for name, value in vars(description).items():
        if not _fits(value, hints[name]):
            raise TypeError(f"{name} is {value!r:.80}")
    return description


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type of a field."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(part, inner[0]) for part in value)
    if origin is UnionType:
        return any(_fits(value, one) for one in inner)
    return isinstance(value, origin or hint) and not (hint is int and isinstance(value, bool))


def store_identity(entries: dict[str, Any], kind: str, description: DataDescription) -> None:
    """Store a description and its tokenizer in a checkpoint."""
    entries[kind] = as_plain(description)
    vocabulary = vocabulary_of(description)
    if vocabulary is not None and vocabulary.tokenizer is not None and (packed := pack_tokenizer(vocabulary.tokenizer)) is not None:
        entries["tokenizer"] = packed


def restore_tokenizer(name: str, folder: Path) -> bool:
    """Write a tokenizer that this process has read, and whose files were removed since, into a folder; return whether it was read."""
    return write_known(name, folder)


def load_identity(entries: Mapping[str, Any], kind: str) -> DataDescription | None:
    """Return a description from a checkpoint, or ``None``; its tokenizer is written to the cache folder and loads from there.

    Raises:
        ValueError: If the entry or the tokenizer is damaged.
    """
    if kind not in entries:
        return None
    try:
        description = from_plain(kind, entries[kind])
        if "tokenizer" in entries and vocabulary_of(description) is not None:
            description = with_tokenizer(description, str(unpack_tokenizer(entries["tokenizer"])))
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError, zlib.error) as error:
        raise ValueError(f"the checkpoint's entry {kind!r} or its tokenizer is damaged ({type(error).__name__}: {first_line(error)})") from error
    return description


def write_folder(folder: Path, kind: str, description: DataDescription, settings: Mapping[str, Any]) -> None:
    """Write ``malleable.json`` into an exported folder."""
    vocabulary = vocabulary_of(description)
    digest = None if vocabulary is None or vocabulary.tokenizer is None else tokenizer_digest(vocabulary.tokenizer)
    content = {kind: as_plain(description), "tokenizer_digest": digest, SETTINGS: dict(settings)}
    with atomic_write(folder / FOLDER_FILE) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def check_folder(name: str | None, given: Catalog | Vocabulary) -> None:
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
    entries = _entries(path)
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


def is_stored(name: str | None) -> bool:
    """Return whether a name is a checkpoint or an exported folder with ``malleable.json``."""
    if name is None:
        return False
    path = Path(name).expanduser()
    return (path.is_file() and path.suffix != ".gguf") or (path / FOLDER_FILE).is_file() or _sharded(path) is not None


def stores_data(name: str) -> bool:
    """Return whether a checkpoint or exported folder contains a catalogue or a vocabulary."""
    return is_stored(name) and any(kind in _entries(Path(name).expanduser()) for kind in ("catalog", "vocabulary"))


def read_stored(name: str) -> Catalog | Vocabulary:
    """Read the catalogue, or else the vocabulary, of a checkpoint or an exported folder; its tokenizer is a local folder.

    Raises:
        ValueError: If the file is not a checkpoint, contains neither, or has another tokenizer than the model was trained with.
    """
    path = Path(name).expanduser()
    entries = _entries(path)
    try:
        description = load_identity(entries, "catalog") or load_identity(entries, "vocabulary")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if description is None or isinstance(description, KnowledgeGraph):
        raise ValueError(
            f"{name} contains neither a catalogue nor a vocabulary; give a checkpoint of a language model or recommender, or a tokenizer"
        )
    if (path / FOLDER_FILE).is_file():
        return _with_own_tokenizer(path, description, entries["tokenizer_digest"])
    tokenizer = getattr(vocabulary_of(description), "tokenizer", None)
    if "tokenizer" not in entries and tokenizer is not None and tokenizer_digest(tokenizer) is None:
        raise ValueError(
            f"{name} was written by an earlier version, without its tokenizer, and {tokenizer} is not on this machine; "
            "copy that folder here, name the tokenizer with --data.tokenizer, or train again"
        )
    return description


def _entries(path: Path) -> dict[str, Any]:
    """Read the entries of a checkpoint or exported folder."""
    if (path / FOLDER_FILE).is_file():
        folder: dict[str, Any] = read_json(path / FOLDER_FILE)
        known = isinstance(folder, dict) and any(isinstance(folder.get(kind), dict) for kind in KINDS)
        if not known or not isinstance(folder.get("tokenizer_digest", 0), (str, NoneType)):
            raise ValueError(f"{path / FOLDER_FILE} is damaged; export the model again")
        return folder
    file = path if path.is_file() else _sharded(path)
    assert file is not None
    return read_plain(file)


def _with_own_tokenizer(path: Path, description: Catalog | Vocabulary, digest: str | None) -> Catalog | Vocabulary:
    if digest is None:
        return description
    if (found := tokenizer_digest(str(path))) != digest:
        raise ValueError(
            f"the tokenizer in {path} differs from the one that its model was trained with (digest {str(found)[:12]}, expected {digest[:12]}); "
            "export the model again"
        )
    return cast("Catalog | Vocabulary", with_tokenizer(description, str(path)))


def _sharded(path: Path) -> Path | None:
    """Return the file with the plain data of a sharded checkpoint, or ``None``."""
    if not path.is_dir():
        return None
    if (path / "meta.pt").is_file():  # FSDP
        return path / "meta.pt"
    return next(iter(sorted(path.glob("*/*mp_rank_00_model_states.pt"))), None)  # DeepSpeed


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
