"""Data module of recommendation: prompts and answers, or packed histories, from interactions of users with items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from malleable.datamodules.base import BaseDataModule
from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.datamodules.files.fetch import cache_folder
from malleable.datamodules.files.run_folders import find_exported_model
from malleable.datamodules.loading import PhasedLoader
from malleable.datamodules.negative_samplers import NegativeSampler
from malleable.datamodules.recommendation.events import SPLITS
from malleable.datamodules.recommendation.histories import ItemLookup, TextFormat, read_histories, read_users
from malleable.datamodules.recommendation.packed_rows import PackedRows
from malleable.datamodules.recommendation.prompt import PromptTemplate
from malleable.datamodules.recommendation.rows import AnswerRows, Lengths, PromptWindow
from malleable.datamodules.recommendation.sequence_rows import SequenceColumns, SequenceQueries, SequenceRows
from malleable.datamodules.recommendation.splits import Ints, RowIndex, Split
from malleable.datamodules.recommendation.store import Store, StoreSettings
from malleable.datamodules.recommendation.summary import log_summary
from malleable.datamodules.sample_ids import keyed_order, read_sample_ids, text_hashes
from malleable.datamodules.sources.recommendation.base import Source
from malleable.datamodules.stored_identity import is_stored, read_stored, vocabulary_of

ALL_USERS = "all"
TrainView = Literal["answer", "packed", "sequence", "packed_sequence"]


class RecommendationDataModule(BaseDataModule):
    """Rows for models that recommend items, most of which read and generate titles.

    Each training interaction of a user, except the first one, gives a row: a prompt with the items before it, and its title as the answer.
    ``prepare_data`` cleans, splits and tokenises the data into a memory-mapped cache, which all ranks share.

    Args:
        source: Source of the interactions.
        tokenizer: Hub id, folder, GGUF file or alias (:data:`~malleable.datamodules.files.fetch.ALIASES`) of a tokenizer. ``None`` trains a BPE
            tokenizer on the titles. ``none`` creates rows of items without text. A checkpoint, or the folder ``model/`` or ``adapter/`` of a run,
            gives the tokenizer, the template and the catalogue that its weights were trained with; items keep their positions in this catalogue.
            ``last:<recipe>`` is the latest run of a recipe.
        vocab_size: Number of tokens of a tokenizer that is trained on the titles.
        template: Prompt template: ``history``, ``instruction``, ``chat``, or the fields of a template. Default: the template of the checkpoint if
            ``tokenizer`` is one, otherwise ``history``.
        split: Settings of filters, split and history lengths.
        train_view: Training rows: ``answer`` (a prompt and its answer), ``packed`` (tokens of histories), ``sequence`` (items of one history) or
            ``packed_sequence`` (items of several histories). With the latter two, batches are
            :class:`~malleable.datamodules.batch.SequenceBatch`, for sequence models; set ``split.sequence_length``, too.
        pack_length: Number of tokens or items of a packed row.
        negatives: Sampler of rejected answers for each row: ``Uniform``, ``Popularity`` or a ``Mixture``, see
            :mod:`malleable.datamodules.negative_samplers`.
        max_prompt_length: Maximum number of tokens of a prompt; the oldest items of longer histories are omitted. ``None``: no limit.
        extend_catalog: If ``tokenizer`` is a checkpoint, append items that are not in its catalogue; otherwise such items are an error.
        local_files_only: Use the local cache for hub ids, without downloads; the environment variable ``HF_HUB_OFFLINE`` has the same effect.
        predict_file: File of histories to recommend for, see :func:`~malleable.datamodules.recommendation.histories.read_histories`.
        predict_users: Users of the data to recommend for, after their last item: ``all``, or a file of ids, see
            :func:`~malleable.datamodules.recommendation.histories.read_users`. Cannot be combined with ``predict_file``.
        cache_dir: Folder of the cache; default: ``$MALLEABLE_CACHE`` or the user's cache folder.
        batch_size: Maximum number of rows of a training batch on one device.
        global_batch_size: Number of rows of an optimizer step over all devices; default: ``batch_size`` times the number of devices.
        eval_batch_size: Number of rows of a batch in validation, test and prediction; default: ``batch_size``.
        num_workers: Number of worker processes on each device.
        seed: Seed of the order of rows and of all random choices.

    Attributes:
        catalog: The items. This and the datasets are available after ``setup``.
        answer_dataset: Training rows with a prompt and an answer, which exist also if training uses packed histories.
        predicted_users: User of each prediction row, by ``sample_id``. The ``sample_id`` of a prediction row is the number, from 0, of its row in
            ``predict_file``, or of its user in ``predict_users``. ``None`` if the rows have no users.

    Raises:
        ValueError: If an argument is out of range, or if the data cannot be used.
    """

    reads_checkpoints: ClassVar[bool] = True
    """Whether ``tokenizer`` may be a checkpoint."""
    predict_options: ClassVar[str] = "predict_file, or predict_users: all"
    catalog: Catalog
    answer_dataset: AnswerRows
    predicted_users: dict[int, str] | None = None

    def __init__(
        self,
        source: Source,
        tokenizer: str | None = None,
        vocab_size: int = 2048,
        template: str | PromptTemplate | None = None,
        split: Split | None = None,
        train_view: TrainView = "answer",
        pack_length: int = 512,
        negatives: NegativeSampler | None = None,
        max_prompt_length: int | None = None,
        predict_file: str | None = None,
        predict_users: str | None = None,
        cache_dir: str | None = None,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        extend_catalog: bool = False,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(batch_size, global_batch_size, eval_batch_size, num_workers, seed)
        tokenizer = None if tokenizer is None else find_exported_model(tokenizer)
        if extend_catalog and not is_stored(tokenizer):
            raise ValueError(f"extend_catalog needs a catalogue to extend: set tokenizer=<checkpoint>, got tokenizer={tokenizer!r}")
        if train_view not in get_args(TrainView):
            raise ValueError(f"train_view must be one of {', '.join(get_args(TrainView))}, got {train_view!r}")
        if negatives is not None and "sequence" in train_view:
            raise ValueError(f"negatives has no effect with train_view={train_view!r}: set negatives of the model")
        if negatives is not None:
            negatives.bind(1, [1], seed)  # raises an error for samplers that need a model
        if train_view == "packed" and tokenizer == "none":
            raise ValueError("train_view='packed' packs the text of titles, but tokenizer='none' has no text; choose train_view='answer'")
        if predict_file is not None and predict_users is not None:
            raise ValueError("predict_file and predict_users exclude each other: give a file of histories, or users of the data")
        self.source = source
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.template = PromptTemplate.named(template) if isinstance(template, str) else template
        self.extend_catalog = extend_catalog
        self.local_files_only = local_files_only
        self.split = split or Split()
        self.train_view = train_view
        self.pack_length = pack_length
        self.negatives = negatives
        self.max_prompt_length = max_prompt_length
        self.predict_file = predict_file
        self.predict_users = predict_users
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self._store: Store | None = None
        self._packed: PackedRows | None = None
        self._sequences: SequenceRows | None = None

    def prepare_data(self) -> None:
        """Download, clean, split and tokenise the data into the cache, unless they are there."""
        self._open()

    def setup(self, stage: str) -> None:
        """Open the cache, and set the catalogue and the datasets."""
        super().setup(stage)
        if self.train_dataset is not None:
            return
        store = self._open()
        self.catalog = store.catalog
        sampler = self.negatives
        negatives = None if sampler is None else sampler.bind(len(self.catalog), self.catalog.popularity, self.seed)
        rows = {
            name: AnswerRows(
                store.rows[name],
                store.sequences,
                store.pieces,
                lengths=self._lengths,
                hide_seen=self.split.repeats == "drop",
                negatives=negatives,
                select=self._selected(name, store.rows[name].sample_id),
                pad_token_id=self._pad_token_id,
            )
            for name in SPLITS
        }
        self.answer_dataset = rows["train"]
        self.train_dataset = self._train_rows(self.train_view)
        self.val_dataset, self.test_dataset = (self._to_queries(rows[name], store.columns) for name in ("val", "test"))
        log_summary(f"data of {type(self.source).__name__}", self.data_summary())
        if self.predict_file is not None:
            self.predict_dataset = self._file_rows(Path(self.predict_file).expanduser())
        elif self.predict_users is not None:
            self.predict_dataset = self._user_rows(self.predict_users)

    def data_summary(self) -> list[tuple[str, str]]:
        """Return pairs of name and text of the data, then each warning as a pair ``("warning", text)``; available after ``setup``."""
        summary = self._open().summary
        parts: dict[str, AnswerRows] = {"train": self.answer_dataset, "val": self.val_dataset, "test": self.test_dataset}
        summary.describe_rows({name: (len(rows), len(rows.table)) for name, rows in parts.items()})
        return summary.pairs()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """Vocabulary of the texts, available after ``setup``; ``None`` with ``tokenizer='none'``."""
        return self.catalog.vocabulary

    @property
    def num_items(self) -> int:
        """Number of items of the catalogue, available after ``setup``."""
        return len(self.catalog)

    @property
    def behaviors(self) -> tuple[str, ...]:
        """Types of interactions, available after ``setup``; empty if the source has none."""
        events = self._open().events
        return tuple(events.behaviors) if events is not None else ()

    @property
    def sequence_dataset(self) -> SequenceRows:
        """Training rows of items: of one history each, or packed with ``train_view='packed_sequence'``; created on first use."""
        if self._sequences is None:
            self._sequences = self.sequence_rows(pack_length=self.pack_length if self.train_view == "packed_sequence" else None)
        return self._sequences

    def sequence_rows(self, max_length: int | None = None, pack_length: int | None = None) -> SequenceRows:
        """Return training rows of items; available after ``setup``.

        Args:
            max_length: Maximum number of items before a target. Default: ``split.sequence_length``, which is not exceeded.
            pack_length: Number of items of a row that several histories are packed into; ``None``: one history a row.
        """
        store, limit = self._open(), self._lengths.sequence
        titles = text_hashes(self.catalog.titles)
        return SequenceRows(store.columns, store.rows["train"], self.answer_dataset.select, titles, min(limit, max_length or limit), pack_length)

    @property
    def packed_dataset(self) -> PackedRows:
        """Packed rows of the training parts of all histories, created on first use; ``train_limit`` has no effect on them."""
        if self._packed is None:
            store = self._open()
            if self.split.train_without is not None:
                raise ValueError(
                    "split.train_without omits rows with a prompt and an answer, but packed histories have no such rows; choose view 'answer'"
                )
            if store.pieces is None:
                raise ValueError("packed histories need text, but tokenizer='none' has no text; give a tokenizer")
            sequences = [items[:end] for items, end in zip(store.sequences, store.train_end, strict=True) if end > 1]
            self._packed = PackedRows(sequences, store.pieces, self.pack_length, self._pad_token_id)
        return self._packed

    def row_tokens(self) -> Sequence[int]:
        """Return the number of tokens of each training row that contribute to the loss."""
        tokens: Sequence[int] = self.train_dataset.row_tokens()
        return tokens

    def _train_rows(self, view: TrainView) -> Any:
        if "sequence" in view:
            return self.sequence_dataset
        return self.packed_dataset if view == "packed" else self.answer_dataset

    def _to_queries(self, rows: AnswerRows, columns: SequenceColumns) -> AnswerRows:
        """Return rows of items for sequence models, other rows unchanged."""
        return SequenceQueries(columns, rows) if "sequence" in self.train_view else rows

    @property
    def _lengths(self) -> Lengths:
        split = self.split
        return Lengths(split.sequence_length or split.history_length, split.metric_length or split.history_length)

    @property
    def _pad_token_id(self) -> int:
        return self.vocabulary.pad_token_id if self.vocabulary else 0

    def train_dataloader(self) -> PhasedLoader[Any]:
        """Return the training loader, whose attribute ``views`` has the kinds of training rows: ``answer``, ``packed`` and ``sequence``."""
        loader = super().train_dataloader()
        loader.views = {"answer": self.answer_dataset, "packed": lambda: self.packed_dataset, "sequence": lambda: self.sequence_dataset}
        return loader

    def _open(self) -> Store:
        if self._store is None:
            settings = StoreSettings(
                source=self.source,
                split=replace(self.split, train_limit=None, train_without=None, val_limit=None, test_limit=None),
                vocab_size=self.vocab_size,
                max_prompt_length=self.max_prompt_length,
                seed=self.seed,
                local_files_only=self.local_files_only,
                **self._text_settings(),
            )
            self._store = Store.open_or_build(settings, (self.cache_dir or cache_folder()) / "recommendation")
        return self._store

    def _text_settings(self) -> dict[str, Any]:
        """Return tokenizer, template and catalogue; if ``tokenizer`` is a checkpoint, those of the checkpoint.

        Raises:
            ValueError: If the checkpoint has another template.
        """
        if not is_stored(self.tokenizer):
            return {"tokenizer": self.tokenizer, "template": self.template or PromptTemplate()}
        assert self.tokenizer is not None
        stored = read_stored(self.tokenizer)
        tokenizer = getattr(vocabulary_of(stored), "tokenizer", None)
        if not isinstance(stored, Catalog):
            return {"tokenizer": tokenizer, "template": self.template or PromptTemplate()}
        template = PromptTemplate(**stored.template) if stored.template is not None else self.template or PromptTemplate()
        if self.template not in (None, template):
            raise ValueError(f"template is {self.template} here, but {template} in {self.tokenizer}; omit template, or use other weights")
        self.template = template
        return {"tokenizer": tokenizer or "none", "template": template, "catalog": stored, "extend_catalog": self.extend_catalog}

    def _selected(self, name: str, ids: Ints) -> Ints:
        """Return the positions of the selected rows of a split. With a limit, rows are sampled by their ids, independently of their order."""
        limit = getattr(self.split, f"{name}_limit")
        kept = np.arange(len(ids)) if limit is None or limit >= len(ids) else np.sort(keyed_order(ids, self.seed)[:limit])
        if name == "train" and self.split.train_without is not None:
            # After the limit, so that no other row replaces an omitted one.
            kept = kept[~np.isin(ids[kept], read_sample_ids(Path(self.split.train_without).expanduser(), ids))]
        return kept

    def _file_rows(self, path: Path) -> AnswerRows:
        store = self._open()
        histories = read_histories(path, ItemLookup(store.catalog.titles, store.keys), TextFormat.of_source(self.source))
        users = {history.number: history.user_id for history in histories if history.user_id is not None}
        self.predicted_users = users or None
        columns = SequenceColumns([np.array(history.items) for history in histories])
        return self._prediction_rows(columns, [history.number for history in histories])

    def _user_rows(self, users: str) -> AnswerRows:
        """Return one prediction row for each user of the data, after the user's whole history."""
        store = self._open()
        if not store.users:
            raise ValueError(f"predict_users: the rows of {type(self.source).__name__} have no users; give a file of histories: predict_file")
        if users == ALL_USERS:
            chosen = list(enumerate(store.users))
            indices = list(range(len(chosen)))
        else:
            index_of = {user: number for number, user in enumerate(store.users)}
            everyone = set(store.events.users) if store.events is not None else ()
            chosen = read_users(Path(users).expanduser(), index_of, TextFormat.of_source(self.source), everyone)
            indices = [index_of[user] for _, user in chosen]
        self.predicted_users = dict(chosen)
        columns = store.columns.take(indices)
        # Items that filters remove from the history, e.g. because of a low rating, are not recommended either.
        owned = [store.items_of(index) for index in indices] if self.split.repeats == "drop" else None
        return self._prediction_rows(columns, [number for number, _ in chosen], owned)

    def _prediction_rows(self, columns: SequenceColumns, numbers: Sequence[int], owned: Sequence[Ints] | None = None) -> AnswerRows:
        """Return rows without a target.

        Args:
            columns: The histories, items oldest first.
            numbers: Id of each row.
            owned: For each row, items that are not recommended, in addition to those of its history.
        """
        store, sequences = self._open(), columns.items
        index = RowIndex(np.arange(len(sequences)), np.array([len(items) for items in sequences]))
        table = PromptWindow(self.split.history_length, store.pieces, self.max_prompt_length).make_rows("predict", sequences, index)
        table = replace(table, sample_id=np.array(numbers))
        unlisted = np.flatnonzero(~store.listed)
        hidden = [np.concatenate([items, unlisted]) for items in owned] if owned is not None else [unlisted] * len(sequences)
        rows = AnswerRows(
            table,
            sequences,
            store.pieces,
            lengths=self._lengths,
            hide_seen=self.split.repeats == "drop",
            hidden=hidden if owned is not None or len(unlisted) else None,
            pad_token_id=self._pad_token_id,
        )
        return self._to_queries(rows, columns)
