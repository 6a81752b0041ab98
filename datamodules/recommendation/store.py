"""Cache of prepared recommendation data: catalogue, tokens, histories and rows, built once and memory-mapped by all ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute

from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.datamodules.files.cache import hash_settings, open_or_build, open_tables, write_tables
from malleable.datamodules.files.fetch import sha256_of
from malleable.datamodules.files.sealed import is_intact
from malleable.datamodules.language import tokenizer as tokenizers
from malleable.datamodules.negative_samplers import ItemSampler
from malleable.datamodules.recommendation.alignment import align
from malleable.datamodules.recommendation.events import SPLITS, Events
from malleable.datamodules.recommendation.prompt import PromptPieces, PromptTemplate, tokenize
from malleable.datamodules.recommendation.rows import PromptWindow, RaggedColumn, RowTable, SelectedColumn
from malleable.datamodules.recommendation.sequence_rows import SequenceColumns
from malleable.datamodules.recommendation.splits import Interactions, Ints, RowIndex, Split, prepare
from malleable.datamodules.recommendation.summary import DataSummary
from malleable.datamodules.sources.recommendation.base import Source

log = logging.getLogger(__name__)

# Increase it when the format or the meaning of the cache changes.
FORMAT = 8
_NONE = np.zeros(0, dtype=np.int64)
_EVENT_TYPES = {
    "user": pa.int32(),
    "item": pa.int32(),
    "time": pa.float64(),
    "rating": pa.float64(),
    "row": pa.int64(),
    "split": pa.int8(),
    "behavior": pa.int16(),
}
_NO_ROWS = RowTable(_NONE, _NONE, _NONE, _NONE, _NONE)


@dataclass(frozen=True)
class StoreSettings:
    """Settings that determine the prepared data, and therefore the name of its cache.

    Other attributes are arguments of :class:`~malleable.datamodules.recommendation.datamodule.RecommendationDataModule`.

    Attributes:
        catalog: Catalogue of the checkpoint that the data are used with; its items keep their positions. ``None`` without a checkpoint.
        extend_catalog: Append items that are not in ``catalog``; otherwise they are an error.
    """

    source: Source
    split: Split
    template: PromptTemplate
    tokenizer: str | None
    vocab_size: int
    max_prompt_length: int | None
    seed: int
    catalog: Catalog | None = None
    extend_catalog: bool = False
    local_files_only: bool = False

    def cache_key(self) -> str:
        """Return the name of the cache folder: a digest of the settings and of the contents of the source's files."""
        kind = self.tokenizer
        return hash_settings(
            {
                "format": FORMAT,
                "source": [type(self.source).__qualname__, self.source.settings(), [sha256_of(path) for path in self.source.files()]],
                "split": asdict(self.split),
                "template": asdict(self.template),
                "tokenizer": [self.vocab_size, tokenizers.METHOD] if kind is None else kind if kind == "none" else tokenizers.fingerprint(kind),
                "max_prompt_length": self.max_prompt_length,
                # Only candidates are sampled when the cache is built. Without candidates, all seeds share one cache.
                "seed": self.seed if self.split.candidates else None,
                "catalog": self.catalog and [self.catalog.titles, self.catalog.keys, self.catalog.token_ids, self.extend_catalog],
            }
        )


@dataclass
class Store:
    """Prepared data.

    Attributes:
        catalog: The items.
        keys: Ids of each item in the source.
        pieces: Tokenised template and titles; ``None`` without a tokenizer.
        sequences: Items of each user or ready row, oldest first.
        train_end: ``(S,)`` number of leading items of each of the S sequences that belong to training.
        rows: Rows by split.
        summary: Counts and warnings of filtering and cleaning.
        listed: ``(N,)`` whether the source has the item; the catalogue of a checkpoint may have more items.
        events: All interactions with known items, including those that filters remove from ``sequences``; ``None`` for ready rows.
        user: Position of the user of each sequence in ``events.users``; empty for ready rows.
        positions: Positions in ``events`` of the items of each sequence.
    """

    catalog: Catalog
    keys: list[list[str]]
    pieces: PromptPieces | None
    sequences: Sequence[Ints]
    train_end: Ints
    rows: dict[str, RowTable]
    summary: DataSummary
    listed: NDArray[np.bool_]
    events: Events | None = None
    user: Ints = field(default_factory=lambda: _NONE)
    positions: Sequence[Ints] = ()

    @property
    def users(self) -> list[str]:
        """Id of the user of each sequence in the source; empty for ready rows."""
        return [self.events.users[user] for user in self.user] if self.events is not None else []

    @property
    def columns(self) -> SequenceColumns:
        """Items, times and types of interactions of each sequence."""
        if self.events is None:
            return SequenceColumns(self.sequences)
        behaviors = SelectedColumn(self.events.behavior, self.positions) if self.events.behaviors else None
        return SequenceColumns(self.sequences, SelectedColumn(self.events.time, self.positions), behaviors)

    def items_of(self, sequence: int) -> Ints:
        """Return all items that the user of a sequence has interacted with, including items that filters remove from the sequence."""
        return self.sequences[sequence] if self.events is None else np.unique(self.events.item[self.events.of_user(self.user[sequence])])

    @classmethod
    def open_or_build(cls, settings: StoreSettings, folder: Path) -> Store:
        """Open the cache of these settings below ``folder``, and build it if it is missing or incomplete."""
        target = folder / settings.cache_key()
        store = cls._from_tables(*open_or_build(target, open_tables, lambda folder: write_tables(folder, *build(settings)), "the data"))
        vocabulary = store.catalog.vocabulary
        if settings.tokenizer is None and vocabulary is not None and not is_intact(Path(vocabulary.tokenizer or "")):
            # The folder of the trained tokenizer was removed or damaged. Equal titles give the same tokenizer again.
            trained = tokenizers.train_tokenizer(store.catalog.titles, settings.vocab_size, store.catalog.popularity)
            store.catalog = replace(store.catalog, vocabulary=replace(vocabulary, tokenizer=str(trained)))
        return store

    @classmethod
    def _from_tables(cls, tables: dict[str, pa.Table], meta: dict[str, Any]) -> Store:
        items = tables["items"].to_pydict()
        answers = tuple(tuple(ids) for ids in items["answer"])
        catalog = Catalog(
            titles=tuple(items["title"]),
            token_ids=answers if meta["template"] else (),
            genres=tuple(tuple(genres) for genres in items["genres"]),
            popularity=tuple(items["popularity"]),
            vocabulary=Vocabulary(**meta["vocabulary"]) if meta["vocabulary"] else None,
            keys=tuple(own[0] for own in items["keys"]),
            template=meta["prompt"],
        )
        pieces = None
        if meta["template"]:
            fields: dict[str, Any] = {name: None if ids is None else tuple(ids) for name, ids in meta["template"].items()}
            eos = meta["vocabulary"]["eos_token_id"]
            pieces = PromptPieces(items=items["item"], answers=answers, candidates=items["candidate"], eos_token_id=eos, **fields)
        rows = {name: _read_rows(tables[name]) if name in tables else _NO_ROWS for name in SPLITS}
        sequences = tables["sequences"]
        store = cls(
            catalog,
            items["keys"],
            pieces,
            RaggedColumn(sequences["items"]),
            sequences["train_end"].to_numpy(),
            rows,
            DataSummary(**meta["summary"]),
            np.array(items["listed"], dtype=bool),
        )
        if "events" in tables:
            events = {name: tables["events"][name].to_numpy() for name in tables["events"].column_names}
            store.events = Events(tables["users"]["user_id"].to_pylist(), behaviors=meta["behaviors"], **events)
            store.user, store.positions = sequences["user"].to_numpy(), RaggedColumn(sequences["positions"])
        return store


def build(settings: StoreSettings) -> tuple[dict[str, dict[str, pa.Array]], dict[str, Any]]:
    """Return the tables and the plain data of the cache."""
    data = prepare(settings.source.load(), settings.split)
    if settings.catalog is not None:
        data = align(data, settings.catalog, settings.extend_catalog)
    pieces, vocabulary, prompt = None, None, None
    if settings.tokenizer != "none":
        name = settings.tokenizer or str(tokenizers.train_tokenizer(data.titles, settings.vocab_size, data.popularity().tolist()))
        loaded = tokenizers.load_tokenizer(name, settings.local_files_only)
        pieces = tokenize(settings.template, data.titles, loaded)
        largest = max(pieces.largest_token_id, tokenizers.largest_token_id(loaded, ()))
        vocabulary = Vocabulary(len(loaded), pieces.eos_token_id, loaded.pad_token_id, name, largest)
        prompt = asdict(settings.template)
    tables = {
        "items": _item_table(data, pieces),
        "sequences": {"items": _list_array(data.sequences), "train_end": pa.array(data.train_end, pa.int32())},
        **_row_tables(data, settings, pieces),
    }
    if (events := data.events) is not None:
        tables["users"] = {"user_id": pa.array(events.users, pa.string())}
        tables["events"] = {name: pa.array(getattr(events, name), kind) for name, kind in _EVENT_TYPES.items()}
        tables["sequences"] |= {"user": pa.array(data.user, pa.int32()), "positions": _list_array(data.positions)}
    names = ("prefix", "separator", "suffix", "candidates_prefix")
    template = {name: getattr(pieces, name) for name in names} if pieces is not None else None
    return tables, {
        "vocabulary": asdict(vocabulary) if vocabulary else None,
        "prompt": prompt,
        "template": template,
        "summary": asdict(data.summary),
        "behaviors": data.events.behaviors if data.events is not None else [],
    }


def _row_tables(data: Interactions, settings: StoreSettings, pieces: PromptPieces | None) -> dict[str, dict[str, pa.Array]]:
    window = PromptWindow(settings.split.history_length, pieces, settings.max_prompt_length)
    tables = {}
    ids = data.sample_ids()
    for name in SPLITS:
        index = data.rows[name]
        if index.candidates is None and settings.split.candidates is not None:
            index = replace(index, candidates=_sample_candidates(data, index, ids[name], settings.split.candidates, settings.seed))
        table = window.make_rows(name, data.sequences, index, ids[name])
        tables[name] = {
            "sample_id": pa.array(table.sample_id, pa.int64()),
            **{column: pa.array(getattr(table, column), pa.int32()) for column in ("sequence", "start", "end", "target")},
            "candidates": _list_array(table.candidates if table.candidates is not None else [_NONE] * len(table)),
        }
    return tables


def _sample_candidates(data: Interactions, index: RowIndex, ids: Ints, number: int, seed: int) -> list[Ints]:
    """Return the candidates of each row: its target, at a random position, and items that the user has not interacted with up to the target."""
    # Not the seed of the negatives, so that candidates and negatives are independent.
    sampler = ItemSampler(range(len(data.titles)), seed=seed + 1)
    rows = []
    for sample_id, sequence, end in zip(ids.tolist(), index.sequence, index.end, strict=True):
        items = data.sequences[sequence][: end + 1]
        drawn = sampler.draw(sample_id, number - 1, items.tolist())
        rows.append(np.insert(np.array(drawn), sampler.draw_position(sample_id, number), items[-1]))
    return rows


def _item_table(data: Interactions, pieces: PromptPieces | None) -> dict[str, pa.Array]:
    strings, ints = pa.list_(pa.string()), pa.list_(pa.int32())
    empty: list[tuple[int, ...]] = [()] * len(data.titles)
    tokens = {"item": empty, "answer": empty, "candidate": empty}
    if pieces is not None:
        tokens = {"item": list(pieces.items), "answer": list(pieces.answers), "candidate": list(pieces.candidates) or empty}
    return {
        "title": pa.array(data.titles, pa.string()),
        "genres": pa.array([list(genres) for genres in data.genres], strings),
        "keys": pa.array(data.keys, strings),
        "popularity": pa.array(data.popularity(), pa.int64()),
        "listed": pa.array(np.ones(len(data.titles), dtype=bool) if data.listed is None else data.listed, pa.bool_()),
        **{name: pa.array([list(ids) for ids in column], ints) for name, column in tokens.items()},
    }


def _list_array(rows: Sequence[Ints]) -> pa.Array:
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    values = np.concatenate([*rows, _NONE])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


def _read_rows(table: pa.Table) -> RowTable:
    columns = {name: table[name].to_numpy() for name in ("sample_id", "sequence", "start", "end", "target")}
    has_candidates = compute.max(compute.list_value_length(table["candidates"])).as_py() > 0
    return RowTable(**columns, candidates=RaggedColumn(table["candidates"]) if has_candidates else None)
