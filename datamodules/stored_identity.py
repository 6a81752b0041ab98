"""Storage of the properties of the data that must match the weights (tokenizer, template, items, graph) in checkpoints and exported folders.

A checkpoint has the entries ``catalog``, ``vocabulary`` or ``graph`` and, for models that read text, ``tokenizer``. An exported folder has the same
entries in ``malleable.json``, beside the files of the tokenizer. :mod:`~malleable.datamodules.compatibility` compares them with the data of a run.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, cast, get_args, get_origin, get_type_hints

from malleable.datamodules.batch import Catalog, KnowledgeGraph, Vocabulary
from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.datamodules.files.text_files import read_json
from malleable.datamodules.files.user_files import first_line
from malleable.datamodules.language.tokenizer import pack_tokenizer, rules_digest, tokenizer_digest, unpack_tokenizer, write_from_memory

DataDescription = Catalog | Vocabulary | KnowledgeGraph
"""Description of the data that weights were trained on."""

__all__ = [
    "FOLDER_FILE",
    "KINDS",
    "SETTINGS",
    "DataDescription",
    "as_plain",
    "from_plain",
    "is_stored",
    "load_identity",
    "read_entries",
    "read_stored",
    "restore_tokenizer",
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


def as_plain(description: DataDescription) -> dict[str, Any]:
    """Return a description as plain data."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(description).items()}


def from_plain(kind: str, stored: Mapping[str, Any]) -> DataDescription:
    """Rebuild a description from plain data; unknown entries, which later versions may write, are ignored.

    Raises:
        TypeError: If a field has a wrong type.
    """
    known = {field.name for field in fields(KINDS[kind])}
    values = {name: _tuples(value) for name, value in stored.items() if name in known}
    if values.get("vocabulary") is not None:
        values["vocabulary"] = from_plain("vocabulary", values["vocabulary"])
    description: DataDescription = KINDS[kind](**values)
    hints = get_type_hints(KINDS[kind])
    for name, value in vars(description).items():
        if not _fits(value, hints[name]):
            raise TypeError(f"field {name!r} has the invalid value {brief_repr(value)}")
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
    """Write a tokenizer from memory into a folder, if its files were removed. Return whether this process had read the tokenizer before."""
    return write_from_memory(name, folder)


def load_identity(entries: Mapping[str, Any], kind: str) -> DataDescription | None:
    """Return a description from a checkpoint; ``None`` if the checkpoint has no entry ``kind``.

    The stored tokenizer is written to the cache folder, and the description refers to its folder there.

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
        raise ValueError(
            f"the checkpoint's entry {kind!r} or its tokenizer is damaged ({type(error).__name__}: {first_line(error)}); "
            "use another copy of the checkpoint"
        ) from error
    return description


def write_folder(folder: Path, kind: str, description: DataDescription, settings: Mapping[str, Any]) -> None:
    """Write ``malleable.json`` into an exported folder: the description, the digest of its tokenizer, and the settings of the model."""
    vocabulary = vocabulary_of(description)
    digest = None if vocabulary is None or vocabulary.tokenizer is None else tokenizer_digest(vocabulary.tokenizer)
    content = {kind: as_plain(description), "tokenizer_digest": digest, SETTINGS: dict(settings)}
    with atomic_write(folder / FOLDER_FILE) as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def is_stored(name: str | None) -> bool:
    """Return whether a name is a checkpoint or an exported folder with ``malleable.json``."""
    if name is None:
        return False
    path = Path(name).expanduser()
    return (path.is_file() and path.suffix != ".gguf") or (path / FOLDER_FILE).is_file() or _sharded(path) is not None


def stores_data(name: str) -> bool:
    """Return whether a checkpoint or exported folder contains a catalogue or a vocabulary."""
    return is_stored(name) and any(kind in read_entries(Path(name).expanduser()) for kind in ("catalog", "vocabulary"))


def read_stored(name: str) -> Catalog | Vocabulary:
    """Read the catalogue, or else the vocabulary, of a checkpoint or an exported folder; its tokenizer is a local folder.

    Raises:
        ValueError: If the file is not a checkpoint, contains neither, or has another tokenizer than the model was trained with.
    """
    path = Path(name).expanduser()
    entries = read_entries(path)
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


def read_entries(path: Path) -> dict[str, Any]:
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
