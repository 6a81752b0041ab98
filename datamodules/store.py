"""The tokenised data of one recipe: built once into the Arrow cache, opened by every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from malleable.datamodules import tokenizer as tokenizers
from malleable.datamodules.batch import Catalog
from malleable.datamodules.cache import digest, open_tables, write_tables
from malleable.datamodules.fetch import sha256_of
from malleable.datamodules.prompt import PromptPieces, PromptTemplate, tokenize
from malleable.datamodules.rows import Ints, Ragged, RowTable
from malleable.datamodules.sampling import ItemSampler
from malleable.datamodules.sources.base import Source
from malleable.datamodules.splits import SPLITS, Interactions, Split, prepare

log = logging.getLogger(__name__)

# Raise it when what is stored changes its meaning.
FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """All that decides the stored data; arguments as in :class:`~malleable.datamodules.recommendation.RecommendationDataModule`."""

    source: Source
    split: Split
    template: PromptTemplate
    tokenizer: str | None
    vocab_size: int
    max_prompt_length: int | None
    seed: int

    def fingerprint(self) -> str:
        """Return what names the cache."""
        kind = self.tokenizer
        return digest(
            {
                "format": FORMAT,
                "source": [type(self.source).__qualname__, self.source.settings(), [sha256_of(path) for path in self.source.files()]],
                "split": asdict(self.split),
                "template": asdict(self.template),
                "tokenizer": f"bpe {self.vocab_size}" if kind is None else kind if kind == "none" else tokenizers.fingerprint(kind),
                "max_prompt_length": self.max_prompt_length,
                # Only candidates are drawn while building; other seeds share the cache.
                "seed": self.seed if self.split.candidates else None,
            }
        )


@dataclass
class Store:
    """Opened data.

    Attributes:
        catalog: The items.
        keys: The source's ids of each item.
        pieces: Tokenised template and titles; ``None`` without a tokenizer.
        sequences: Items of each user or ready row, oldest first.
        train_end: Leading items of each sequence that belong to training.
        rows: Rows by split.
    """

    catalog: Catalog
    keys: list[list[str]]
    pieces: PromptPieces | None
    sequences: Sequence[Ints]
    train_end: Ints
    rows: dict[str, RowTable]

    @classmethod
    def open_or_build(cls, recipe: Recipe, folder: Path) -> Store:
        """Open the cache of a recipe below ``folder``, building it where it is missing or not whole."""
        target = folder / recipe.fingerprint()
        opened = open_tables(target)
        if opened is None:
            started = time.monotonic()
            tables, meta = build(recipe)
            write_tables(target, tables, meta)
            log.info("data prepared in %.1f s: %s", time.monotonic() - started, target)
            opened = open_tables(target)
            if opened is None:
                raise OSError(f"the cache {target} cannot be read right after it was written; check the disk, or choose another cache_dir")
        return cls._from_tables(*opened)

    @classmethod
    def _from_tables(cls, tables: dict[str, pa.Table], meta: dict[str, Any]) -> Store:
        items = tables["items"].to_pydict()
        answers = tuple(tuple(ids) for ids in items["answer"])
        catalog = Catalog(
            titles=tuple(items["title"]),
            token_ids=answers if meta["template"] else (),
            genres=tuple(tuple(genres) for genres in items["genres"]),
            popularity=tuple(items["popularity"]),
            **meta["tokenizer"],
        )
        pieces = None
        if meta["template"]:
            fields = {name: None if ids is None else tuple(ids) for name, ids in meta["template"].items()}
            pieces = PromptPieces(items=items["item"], answers=answers, candidates=items["candidate"], eos_token_id=catalog.eos_token_id, **fields)
        rows = {name: _read_rows(tables[name]) for name in SPLITS}
        sequences = tables["sequences"]
        return cls(catalog, items["keys"], pieces, Ragged(sequences["items"]), sequences["train_end"].to_numpy(), rows)


def build(recipe: Recipe) -> tuple[dict[str, dict[str, pa.Array]], dict[str, Any]]:
    """Make the tables and the plain data of a recipe."""
    data = prepare(recipe.source.load(), recipe.split)
    pieces, info = None, {}
    if recipe.tokenizer != "none":
        name = recipe.tokenizer or str(tokenizers.train_tokenizer(data.titles, recipe.vocab_size))
        loaded = tokenizers.load_tokenizer(name)
        pieces = tokenize(recipe.template, data.titles, loaded)
        info = {"eos_token_id": loaded.eos_token_id, "pad_token_id": loaded.pad_token_id, "vocab_size": len(loaded), "tokenizer": name}
    tables = {
        "items": _items(data, pieces),
        "sequences": {"items": _ragged(data.sequences), "train_end": pa.array(data.train_end, pa.int32())},
        **_rows(data, recipe, pieces),
    }
    fields = ("prefix", "separator", "suffix", "candidates_prefix")
    return tables, {"tokenizer": info, "template": {name: getattr(pieces, name) for name in fields} if pieces is not None else None}


def row_table(
    name: str,
    sequences: Sequence[Ints],
    sequence: Ints,
    end: Ints,
    candidates: Sequence[Ints] | None,
    first_id: int,
    history_length: int,
    pieces: PromptPieces | None,
    max_prompt_length: int | None,
) -> RowTable:
    """Place rows: how far back each prompt reaches within the history length and the prompt's own."""
    flat = np.concatenate([*sequences, np.zeros(0, dtype=np.int64)]).astype(np.int64)
    bases = np.cumsum([0, *(len(items) for items in sequences)])
    base, stop = bases[sequence], bases[sequence] + end
    target = np.where(stop < bases[np.asarray(sequence) + 1], flat[np.minimum(stop, len(flat) - 1)], -1)
    start = np.maximum(base, stop - history_length)
    if pieces is not None and max_prompt_length is not None:
        fixed = len(pieces.prefix) + len(pieces.suffix) - len(pieces.separator)
        budget = np.full(len(stop), max_prompt_length - fixed)
        if candidates is not None and pieces.candidates_prefix is not None:
            sizes = np.array([len(ids) for ids in pieces.candidates])
            budget -= len(pieces.candidates_prefix) + np.array([sizes[items].sum() for items in candidates])
        total = np.cumsum([0, *(np.array([len(ids) + len(pieces.separator) for ids in pieces.items])[flat])])
        fitting = np.searchsorted(total, total[stop] - budget)
        if (none := fitting >= stop).any():
            needed = int((total[stop] - total[stop - 1] - budget)[none].max()) + max_prompt_length
            raise ValueError(f"max_prompt_length {max_prompt_length} leaves {int(none.sum())} {name} prompts without any item; {needed} would hold one")
        if shortened := int((fitting > start).sum()):
            log.warning("%d of %d %s histories are longer than max_prompt_length %d: their oldest items are left out", shortened, len(stop), name, max_prompt_length)
        start = np.maximum(start, fitting)
    return RowTable(first_id + np.arange(len(stop)), np.asarray(sequence), start - base, np.asarray(end), target, candidates)


def _rows(data: Interactions, recipe: Recipe, pieces: PromptPieces | None) -> dict[str, dict[str, pa.Array]]:
    tables = {}
    first_id = 0
    for name in SPLITS:
        index = data.rows[name]
        candidates = index.candidates
        if candidates is None and recipe.split.candidates is not None:
            candidates = _draw_candidates(data, index, first_id, recipe)
        arrays = None if candidates is None else [np.asarray(items, dtype=np.int64) for items in candidates]
        table = row_table(
            name, data.sequences, index.sequence, index.end, arrays, first_id, recipe.split.history_length, pieces, recipe.max_prompt_length
        )
        first_id += len(table)
        tables[name] = {
            "sample_id": pa.array(table.sample_id, pa.int64()),
            **{field: pa.array(getattr(table, field), pa.int32()) for field in ("sequence", "start", "end", "target")},
            "candidates": _ragged(arrays if arrays is not None else [np.zeros(0, dtype=np.int64)] * len(table)),
        }
    return tables


def _draw_candidates(data: Interactions, index: Any, first_id: int, recipe: Recipe) -> list[list[int]]:
    number = recipe.split.candidates
    assert number is not None
    # Another stream than the negatives', which are drawn with the plain seed.
    sampler = ItemSampler(range(len(data.titles)), seed=recipe.seed + 1)
    rows = []
    for offset, (sequence, end) in enumerate(zip(index.sequence, index.end, strict=True)):
        items = data.sequences[sequence][: end + 1].tolist()
        drawn = sampler.draw(first_id + offset, number - 1, items)
        place = sampler.place(first_id + offset, number)
        rows.append([*drawn[:place], items[-1], *drawn[place:]])
    return rows


def _items(data: Interactions, pieces: PromptPieces | None) -> dict[str, pa.Array]:
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
        **{name: pa.array([list(ids) for ids in column], ints) for name, column in tokens.items()},
    }


def _ragged(rows: Sequence[Ints]) -> pa.Array:
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    values = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, pa.int32()))


def _read_rows(table: pa.Table) -> RowTable:
    columns = {name: table[name].to_numpy() for name in ("sample_id", "sequence", "start", "end", "target")}
    candidates = Ragged(table["candidates"])
    return RowTable(**columns, candidates=candidates if len(candidates) and len(candidates[0]) else None)
