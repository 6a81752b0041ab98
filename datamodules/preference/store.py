"""Cache of tokenised preference data, built once and memory-mapped by all ranks."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from malleable.datamodules.batch import Vocabulary
from malleable.datamodules.files.cache import Numbers, hash_settings, open_arrays, open_or_build, write_arrays
from malleable.datamodules.files.fetch import sha256_of
from malleable.datamodules.files.sealed import is_intact
from malleable.datamodules.language import tokenizer as tokenizers
from malleable.datamodules.preference.lengths import describe_drops, describe_lengths, list_drops
from malleable.datamodules.preference.rows import PreferenceTable, Ragged
from malleable.datamodules.preference.split import PreferenceSplit, other_rows, split_by_prompt
from malleable.datamodules.preference.tokenize import PairTokenizer, TokenizedRow, Truncation
from malleable.datamodules.recommendation.summary import DataSummary
from malleable.datamodules.sample_ids import Hashes, content_ids, text_hashes
from malleable.datamodules.sources.preference.base import PreferenceRow, PreferenceSource

log = logging.getLogger(__name__)

# Increase it when the format or the meaning of the cache changes.
FORMAT = 1
CHUNK = 2000
"""Number of rows that are tokenised at once."""
EMPTY_PROMPT, EMPTY_ANSWER, TOO_LONG, EQUAL = "prompt without tokens", "answer without tokens", "too long", "answers equal after truncation"


@dataclass(frozen=True)
class StoreSettings:
    """Settings that determine the tokenised data, and therefore the name of their cache.

    Other attributes are arguments of :class:`~malleable.datamodules.preference.datamodule.PreferenceDataModule`.

    Attributes:
        tokenizer: Name of the tokenizer; ``None`` to train one.
    """

    source: PreferenceSource
    tokenizer: str | None
    vocab_size: int
    chat: bool
    mask_assistant_header: bool
    truncation: Truncation
    split: PreferenceSplit
    seed: int
    local_files_only: bool = False

    def cache_key(self) -> str:
        """Return the name of the cache folder: a digest of the settings and of the contents of the source's files."""
        name = self.tokenizer
        return hash_settings(
            {
                "format": FORMAT,
                "source": [type(self.source).__qualname__, self.source.settings(), [sha256_of(path) for path in self.source.files()]],
                "tokenizer": [self.vocab_size, tokenizers.WORD_METHOD] if name is None else tokenizers.fingerprint(name),
                "chat": [self.chat, self.mask_assistant_header],
                "truncation": asdict(self.truncation),
                "split": [self.split.val_size, self.split.test_size],
                "seed": self.seed,
            }
        )


@dataclass
class Store:
    """Tokenised data.

    Attributes:
        vocabulary: Vocabulary of the tokenizer, with the token that ends an answer.
        tables: Rows by split.
        is_chat: Whether prompts are formatted by a chat template.
        summary: Counts, lengths and warnings.
    """

    vocabulary: Vocabulary
    tables: dict[str, PreferenceTable]
    is_chat: bool
    summary: DataSummary

    @classmethod
    def open_or_build(cls, settings: StoreSettings, folder: Path) -> Store:
        """Open the cache of these settings below ``folder``, and build it if it is missing or damaged."""
        target = folder / settings.cache_key()
        arrays, meta = open_or_build(target, open_arrays, lambda folder: write_arrays(folder, *build(settings)), "the data")
        tables = {
            split: PreferenceTable.from_arrays({name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{split}.")})
            for split in meta["splits"]
        }
        vocabulary = Vocabulary(**meta["vocabulary"])
        if settings.tokenizer is None and not is_intact(Path(vocabulary.tokenizer or "")):
            # The folder of the trained tokenizer was removed or damaged. Equal texts give the same tokenizer again.
            vocabulary = replace(vocabulary, tokenizer=_train(read_splits(settings)[0]["train"], settings.vocab_size))
        return cls(vocabulary, tables, meta["is_chat"], DataSummary(**meta["summary"]))


def build(settings: StoreSettings) -> tuple[dict[str, Numbers], dict[str, Any]]:
    """Return the arrays and the plain data of the cache."""
    splits, dropped, summary = read_splits(settings)
    first = next(row for rows in splits.values() for row in rows)
    is_chat = settings.chat or not isinstance(first.prompt, str)
    name = settings.tokenizer or _train(splits["train"], settings.vocab_size)
    loaded: Any = tokenizers.load_tokenizer(name, settings.local_files_only)
    tokenizer = PairTokenizer(loaded, is_chat, settings.mask_assistant_header)
    number, tables, tokenized = sum(dropped.values()), {}, {}
    for split, rows in splits.items():
        number += len(rows)
        tables[split], tokenized[split] = _tokenize(rows, tokenizer, settings, dropped)
    if not len(tables["train"]):
        raise ValueError(f"no training row remains ({list_drops(dropped)}); check the data, and max_length and max_prompt_length")
    describe_drops(summary, number, dropped)
    describe_lengths(summary, tables["train"], tokenized["train"])
    largest = max(int(part.values.max(initial=-1)) for table in tables.values() for part in (table.prompts, table.answers))
    pad = loaded.pad_token_id if isinstance(loaded.pad_token_id, int) else tokenizer.eos_token_id
    vocabulary = Vocabulary(len(loaded), tokenizer.eos_token_id, pad, name, max(largest, pad, tokenizer.eos_token_id))
    arrays = {f"{split}.{column}": array for split, table in tables.items() for column, array in table.arrays().items()}
    meta = {"vocabulary": asdict(vocabulary), "splits": list(tables), "is_chat": is_chat, "summary": asdict(summary)}
    return arrays, meta


def read_splits(settings: StoreSettings) -> tuple[dict[str, list[PreferenceRow]], Counter[str], DataSummary]:
    """Read the source, and split its training rows by prompt.

    Returns:
        Rows by split, the number of dropped rows by reason, and a summary of the split.

    Raises:
        ValueError: If no row remains.
    """
    tables = settings.source.load()
    dropped = Counter(tables.dropped)
    summary = DataSummary()
    if empty := next((split for split, rows in tables.rows.items() if not rows), None):
        raise ValueError(
            f"all {empty} rows of {type(settings.source).__name__} were dropped ({list_drops(dropped)}); give rows with two different answers"
        )
    splits = dict(tables.rows)
    sizes = settings.split.sizes(set(splits))
    train = splits["train"]
    if sizes != (None, None):
        parts = split_by_prompt(prompt_hashes(train), sizes, settings.seed)
        splits |= {split: [train[row] for row in rows] for split, rows in parts.items()}
    prompts = {split: prompt_hashes(rows) for split, rows in splits.items()}
    summary.facts["prompts"] = ", ".join(f"{split} {len(np.unique(own)):,}" for split, own in prompts.items())
    for split, own in prompts.items():
        if split != "train" and (shared := int(np.isin(np.unique(own), prompts["train"]).sum())):
            summary.warnings.append(f"{shared:,} of the {split} prompts are also training prompts, so that {split} metrics are too high; remove them")
    return splits, dropped, summary


def prompt_hashes(rows: Sequence[PreferenceRow]) -> Hashes:
    """Return the hash of the prompt of each row, ``(N,)``."""
    return text_hashes(json.dumps(row.prompt, ensure_ascii=False) for row in rows)


def _tokenize(
    rows: Sequence[PreferenceRow], tokenizer: PairTokenizer, settings: StoreSettings, dropped: Counter[str]
) -> tuple[PreferenceTable, list[TokenizedRow]]:
    """Tokenise the rows of a split, and count the dropped ones."""
    prompts = prompt_hashes(rows)
    ids = content_ids(prompts, text_hashes(json.dumps([row.answers, row.desirable], ensure_ascii=False) for row in rows))
    answers = [row.answers for row in rows]
    if len(rows) and rows[0].desirable is not None:
        answers = [(*own, *rows[other].answers) for own, other in zip(answers, other_rows(prompts, ids, settings.seed), strict=True)]
    kept: list[int] = []
    tokenized: list[TokenizedRow] = []
    texts: list[tuple[str, ...]] = []
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        found = tokenizer.tokenize([row.prompt for row in rows[part]], answers[part], [row.place for row in rows[part]])
        for number, whole in enumerate(found, start):
            is_pair = rows[number].desirable is None
            row, own, reason = _select(whole, answers[number], tokenizer, settings.truncation, is_pair)
            if row is None:
                dropped[reason] += 1
                continue
            kept.append(number)
            tokenized.append(row)
            texts.append(own)
    smoothing = [rows[number].smoothing for number in kept]
    desirable = [rows[number].desirable for number in kept]
    table = PreferenceTable(
        sample_id=ids[kept],
        prompts=Ragged.pack([row.prompt for row in tokenized], np.int32),
        answers=Ragged.pack([answer for row in tokenized for answer in row.answers], np.int32),
        first_answer=np.cumsum([0, *(len(row.answers) for row in tokenized)], dtype=np.int64),
        prompt_texts=Ragged.pack_texts([row.text for row in tokenized]),
        answer_texts=Ragged.pack_texts([text for own in texts for text in own]),
        smoothing=np.array(smoothing, dtype=np.float32) if smoothing and smoothing[0] is not None else None,
        desirable=np.array(desirable, dtype=np.uint8) if desirable and desirable[0] is not None else None,
    )
    return table, tokenized


def _select(
    row: TokenizedRow, texts: tuple[str, ...], tokenizer: PairTokenizer, truncation: Truncation, is_pair: bool
) -> tuple[TokenizedRow | None, tuple[str, ...], str]:
    """Shorten a row, and remove rejected answers that cannot be distinguished from the chosen one.

    Returns:
        The row and the texts of its answers; ``None`` and the reason if it is dropped.
    """
    if not len(row.prompt):
        return None, (), EMPTY_PROMPT
    if any(tokenizer.is_empty(answer) for answer in row.answers):
        return None, (), EMPTY_ANSWER
    if not is_pair:
        # The answer of another row must not shorten the prompt.
        short = tokenizer.shorten(row._replace(answers=row.answers[:1]), truncation)
        if short is None:
            return None, (), TOO_LONG
        room = None if truncation.max_length is None else max(1, truncation.max_length - len(short.prompt))
        return short._replace(answers=[*short.answers, *(answer[:room] for answer in row.answers[1:])]), texts, ""
    short = tokenizer.shorten(row, truncation)
    if short is None:
        return None, (), TOO_LONG
    chosen = short.answers[0]
    different = [0, *(number for number, answer in enumerate(short.answers) if not np.array_equal(answer, chosen))]
    if len(different) == 1:
        return None, (), EQUAL
    return short._replace(answers=[short.answers[number] for number in different]), tuple(texts[number] for number in different), ""


def _train(rows: Sequence[PreferenceRow], vocab_size: int) -> str:
    """Train a tokenizer on the texts of the training rows."""
    prompts = [row.prompt if isinstance(row.prompt, str) else "\n".join(message.content for message in row.prompt) for row in rows]
    return str(tokenizers.train_tokenizer([*prompts, *(answer for row in rows for answer in row.answers)], vocab_size, across_words=False))
