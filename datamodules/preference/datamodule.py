"""Data module of preference tuning: prompts with chosen and rejected answers, for any language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException

from malleable.datamodules.base import BaseDataModule
from malleable.datamodules.batch import Vocabulary
from malleable.datamodules.files.fetch import cache_folder
from malleable.datamodules.files.run_folders import find_exported_model
from malleable.datamodules.language.tokenizer import load_tokenizer
from malleable.datamodules.preference.prompts import read_prompts
from malleable.datamodules.preference.rows import PreferenceRows, PromptRows, RowTexts, View
from malleable.datamodules.preference.split import SPLITS, PreferenceSplit
from malleable.datamodules.preference.store import Store, StoreSettings
from malleable.datamodules.preference.tokenize import PairTokenizer, Policy, Truncation
from malleable.datamodules.recommendation.summary import log_summary
from malleable.datamodules.sample_ids import keyed_order
from malleable.datamodules.sources.preference.base import PreferenceSource
from malleable.datamodules.stored_identity import is_stored, read_stored, vocabulary_of


class PreferenceDataModule(BaseDataModule):
    """Prompts with chosen and rejected answers, or with single answers that are desirable or not.

    ``prepare_data`` tokenises the data into a memory-mapped cache, which all ranks share.
    :class:`~malleable.datamodules.preference.tokenize.PairTokenizer` describes the tokenisation: training reads the same prompt tokens as generation,
    and each answer ends with the token that ends a reply.

    Rows without rejected answers (unpaired rows) have the field ``desirable``. Their second answer is the answer of another row of the split, with
    which losses such as ``KTO`` estimate the divergence from the reference.

    Args:
        source: Source of the rows: ``PreferenceFile``, ``HubPreferences`` or ``SyntheticPreferences``.
        tokenizer: Hub id, folder, GGUF file or alias (:data:`~malleable.datamodules.files.fetch.ALIASES`) of a tokenizer; or a checkpoint, the folder
            ``model/`` or ``adapter/`` of a run, or ``last:<recipe>``. ``None`` trains a BPE tokenizer without a chat template on the training texts.
        vocab_size: Number of tokens of a tokenizer that is trained on the texts.
        chat: Format plain prompts and answers by the tokenizer's chat template, as messages of user and assistant. Conversations always are.
        mask_assistant_header: Whether the text that begins a reply in the chat template belongs to the prompt. The published pipeline of alpha-DPO
            scores it as a part of the answer: ``False``. No effect on plain texts.
        max_length: Maximum number of tokens of a prompt with its longest answer. Default: no limit.
        max_prompt_length: Maximum number of tokens of a prompt. Default: no limit.
        truncate: What happens to rows that are too long; see :class:`~malleable.datamodules.preference.tokenize.Truncation`. ``prompt_start`` removes
            the start of the prompt and ``prompt_end`` its end, as much as needed, and then shortens answers; ``drop`` drops the row.
        split: Validation and test prompts, and limits of the numbers of rows.
        train_view: Training rows: ``preference`` (:class:`~malleable.datamodules.batch.PreferenceBatch`), or ``chosen`` for supervised fine-tuning on
            the chosen or desirable answers (:class:`~malleable.datamodules.batch.AnswerBatch`). Validation and test rows always have all answers.
        label_noise: Share of training rows whose preference is reversed, which shows how robust a method is. With 0.5, the labels of pairs contain no
            information: in this control experiment, the held-out accuracy must not exceed chance. Rows are selected by seed and ``sample_id``. In a
            reversed row, the chosen answer and the first rejected one are exchanged; in an unpaired row, ``desirable`` is negated.
        predict_file: File of prompts to answer, see :func:`~malleable.datamodules.preference.prompts.read_prompts`.
        cache_dir: Folder of the cache; default: ``$MALLEABLE_CACHE`` or the user's cache folder.
        local_files_only: Use the local cache for hub ids, without downloads; the environment variable ``HF_HUB_OFFLINE`` has the same effect.
        batch_size: Maximum number of rows of a training batch on one device.
        global_batch_size: Number of rows of an optimizer step over all devices; default: ``batch_size`` times the number of devices.
        eval_batch_size: Number of rows of a batch in validation, test and prediction; default: ``batch_size``.
        num_workers: Number of worker processes on each device.
        seed: Seed of the split, of the order of rows and of all random choices.

    Attributes:
        vocabulary: Vocabulary of the tokenizer; its ``eos_token_id`` is the token that ends an answer. Available after ``setup``, like the datasets.

    Raises:
        ValueError: If an argument is out of range, or if the data cannot be used.
    """

    reads_checkpoints: ClassVar[bool] = True
    """Whether ``tokenizer`` may be a checkpoint."""
    predict_options: ClassVar[str] = "predict_file"
    vocabulary: Vocabulary

    def __init__(
        self,
        source: PreferenceSource,
        tokenizer: str | None = None,
        vocab_size: int = 1024,
        chat: bool = False,
        mask_assistant_header: bool = True,
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        truncate: Policy = "prompt_start",
        split: PreferenceSplit | None = None,
        train_view: View = "preference",
        label_noise: float = 0.0,
        predict_file: str | None = None,
        cache_dir: str | None = None,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(batch_size, global_batch_size, eval_batch_size, num_workers, seed)
        for name, value, allowed in (("train_view", train_view, get_args(View)), ("truncate", truncate, get_args(Policy))):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length must be >= 2, one token for the prompt and one for the answer, got {max_length}")
        if max_prompt_length is not None and max_prompt_length < 1:
            raise ValueError(f"max_prompt_length must be >= 1, got {max_prompt_length}")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise must be a share in [0, 1], got {label_noise}")
        self.source = source
        self.tokenizer = None if tokenizer is None else find_exported_model(tokenizer)
        self.vocab_size = vocab_size
        self.chat = chat
        self.mask_assistant_header = mask_assistant_header
        self.truncation = Truncation(max_length, max_prompt_length, truncate)
        self.split = split or PreferenceSplit()
        self.train_view = train_view
        self.label_noise = label_noise
        self.predict_file = predict_file
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self.local_files_only = local_files_only
        self._store: Store | None = None

    def prepare_data(self) -> None:
        """Download, split and tokenise the data into the cache, unless they are there."""
        self._open()

    def setup(self, stage: str) -> None:
        """Open the cache, and set the vocabulary and the datasets."""
        super().setup(stage)
        if self.train_dataset is not None:
            return
        store = self._open()
        self.vocabulary = store.vocabulary
        self.train_dataset = self._rows("train", self.train_view, self.label_noise)
        if not len(self.train_dataset):
            raise ValueError("train_view='chosen' needs desirable answers, but no training row has one; use train_view='preference', or other data")
        self.val_dataset, self.test_dataset = (self._rows(split) if split in store.tables else None for split in SPLITS[1:])
        log_summary(f"data of {type(self.source).__name__}", self.data_summary())
        if self.predict_file is not None:
            self.predict_dataset = self._prompt_rows(Path(self.predict_file).expanduser())

    def data_summary(self) -> list[tuple[str, str]]:
        """Return pairs of name and text of the data, then each warning as a pair ``("warning", text)``; available after ``setup``."""
        store = self._open()
        parts = {"train": self.train_dataset, "val": self.val_dataset, "test": self.test_dataset}
        store.summary.describe_rows({name: (len(rows), len(rows.table)) for name, rows in parts.items() if rows is not None})
        if self.label_noise:
            store.summary.facts["label noise"] = f"the preference of {self.label_noise:.1%} of training rows is reversed"
        return store.summary.pairs()

    def texts(self, split: str, sample_id: int) -> RowTexts:
        """Return the texts of the row of a split (``train``, ``val``, ``test`` or ``predict``) with this id, before truncation.

        Raises:
            KeyError: If the split has no such row.
        """
        rows = self._dataset(split)
        found = np.flatnonzero(rows.sample_ids == sample_id)
        if not len(found):
            raise KeyError(f"the {split} split has no row with sample_id {sample_id}")
        texts: RowTexts = rows.texts(int(found[0]))
        return texts

    def row_tokens(self) -> Sequence[int]:
        """Return the number of tokens of each training row's chosen answer."""
        tokens: Sequence[int] = self.train_dataset.row_tokens()
        return tokens

    def _dataset(self, split: str) -> Any:
        if split in SPLITS and self.train_dataset is not None and getattr(self, f"{split}_dataset") is None:
            kind = {"val": "validation"}.get(split, split)
            raise MisconfigurationException(f"{type(self).__name__} has no {split} data: give the source {kind} rows, or set split.{split}_size")
        return super()._dataset(split)

    def _rows(self, split: str, view: View = "preference", label_noise: float = 0.0) -> PreferenceRows:
        table = self._open().tables[split]
        limit = getattr(self.split, f"{split}_limit")
        # Rows are sampled by their ids, independently of their order.
        select = None if limit is None or limit >= len(table) else np.sort(keyed_order(np.asarray(table.sample_id), self.seed)[:limit])
        pad = self._open().vocabulary.pad_token_id
        return PreferenceRows(table, select=select, view=view, label_noise=label_noise, seed=self.seed, pad_token_id=pad)

    def _prompt_rows(self, path: Path) -> PromptRows:
        """Return the prompts of a file, tokenised and shortened like those of the data."""
        store = self._open()
        loaded = load_tokenizer(str(store.vocabulary.tokenizer), self.local_files_only)
        tokenizer = PairTokenizer(loaded, store.is_chat)
        prompts, places = read_prompts(path, store.is_chat)
        rows = []
        for place, row in zip(places, tokenizer.tokenize(prompts, [()] * len(prompts), places), strict=True):
            short = tokenizer.shorten(row, self.truncation)
            if short is None or not len(short.prompt):
                problem = "has no tokens" if short is not None else f"has {len(row.prompt)} tokens, more than max_prompt_length or max_length allow"
                raise ValueError(f"{place}: the prompt {problem}; change or remove it{'' if short else ', or set truncate to prompt_start'}")
            rows.append(short)
        return PromptRows([row.prompt for row in rows], [row.text for row in rows], store.vocabulary.pad_token_id)

    def _open(self) -> Store:
        if self._store is None:
            settings = StoreSettings(
                source=self.source,
                tokenizer=self._tokenizer_name(),
                vocab_size=self.vocab_size,
                chat=self.chat,
                mask_assistant_header=self.mask_assistant_header,
                truncation=self.truncation,
                split=self.split,
                seed=self.seed,
                local_files_only=self.local_files_only,
            )
            self._store = Store.open_or_build(settings, (self.cache_dir or cache_folder()) / "preference")
        return self._store

    def _tokenizer_name(self) -> str | None:
        if not is_stored(self.tokenizer):
            return self.tokenizer
        tokenizer: Any = getattr(vocabulary_of(read_stored(str(self.tokenizer))), "tokenizer", None)
        if tokenizer is None:
            raise ValueError(f"{self.tokenizer} was trained without a tokenizer; give one with tokenizer=...")
        return str(tokenizer)
