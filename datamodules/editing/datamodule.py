"""Data module of edit requests, statements of facts, and plain text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from malleable.datamodules.base import BaseDataModule
from malleable.datamodules.batch import Vocabulary
from malleable.datamodules.editing.requests import EditRequest, check_requests
from malleable.datamodules.files.run_folders import find_exported_model
from malleable.datamodules.language.text_rows import TextRows
from malleable.datamodules.language.tokenizer import largest_token_id, load_tokenizer, train_tokenizer
from malleable.datamodules.sources.editing.base import EditSource, EditTables
from malleable.datamodules.sources.editing.texts import TextSource
from malleable.datamodules.stored_identity import is_stored, read_stored, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EditingDataModule(BaseDataModule):
    """Edit requests, and text to train the language model that is edited.

    The training rows are documents, each with several statements of facts in random order, and plain texts. Validation uses other documents of the
    same statements. The test uses the text whose perplexity is measured; if there are plain texts, it is held out from training.

    Args:
        source: Source of the requests and statements.
        texts: Source of plain texts. Default: none.
        tokenizer: Hub id, folder, GGUF file or alias (:data:`~malleable.datamodules.files.fetch.ALIASES`) of a tokenizer; or a checkpoint, the folder
            ``model/`` or ``adapter/`` of a run, or ``last:<recipe>``. ``None`` trains a BPE tokenizer on statements and texts.
        vocab_size: Number of tokens of a tokenizer that is trained on statements and texts.
        sentences: Number of statements in a document.
        shuffles: Number of times that an epoch contains each statement, each time in another random order of all statements.
        pack_length: Length of a row in tokens.
        eval_documents: Maximum number of validation documents, and of test texts.
        retain_statements: Add the statements that no request changes to the text that edits preserve. Without these statements,
            the text contains no neighbour of an edited fact.
        batch_size: Maximum number of rows of a training batch on one device.
        global_batch_size: Rows of an optimizer step over all devices. Default: ``batch_size`` times the number of devices.
        eval_batch_size: Rows of a validation or test batch. Default: ``batch_size``.
        num_workers: Worker processes on each device.
        seed: Seed of the order of rows and of all random choices.
        local_files_only: Look for a tokenizer's hub id in the local cache only; the environment variable ``HF_HUB_OFFLINE`` has the same effect.

    Attributes:
        vocabulary: Vocabulary of the tokenizer. All attributes are set by ``setup``.
        tokenizer: The tokenizer.
        edit_requests: Edit requests.
        edit_texts: Text that edits preserve: the training texts, and with ``retain_statements`` the statements that no request changes.
        measured_texts: Text whose perplexity is measured: the plain texts that are held out from training. If there are no plain texts, the
            statements that no request changes.

    Raises:
        ValueError: If a value is out of range or the data cannot be used; the message says which.
    """

    reads_checkpoints: ClassVar[bool] = True
    """Whether ``tokenizer`` may be a checkpoint of a run."""
    vocabulary: Vocabulary
    tokenizer: PreTrainedTokenizerBase
    edit_requests: list[EditRequest]
    edit_texts: list[str]
    measured_texts: list[str]

    def __init__(
        self,
        source: EditSource,
        texts: TextSource | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 1024,
        sentences: int = 8,
        shuffles: int = 10,
        pack_length: int = 256,
        eval_documents: int = 100,
        retain_statements: bool = True,
        batch_size: int = 16,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        local_files_only: bool = False,
    ) -> None:
        super().__init__(batch_size, global_batch_size, eval_batch_size, num_workers, seed)
        for name, value in (("sentences", sentences), ("shuffles", shuffles), ("eval_documents", eval_documents)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if pack_length < 2:
            raise ValueError(f"pack_length must be >= 2, got {pack_length}")
        self.source = source
        self.texts = texts
        self.tokenizer_name = None if tokenizer is None else find_exported_model(tokenizer)
        self.vocab_size = vocab_size
        self.sentences = sentences
        self.shuffles = shuffles
        self.pack_length = pack_length
        self.eval_documents = eval_documents
        self.retain_statements = retain_statements
        self.local_files_only = local_files_only
        self._read: tuple[EditTables, list[str]] | None = None
        self._folder: str | None = None
        self._statements: list[str] | None = None
        self._train_rows: TextRows | None = None

    def prepare_data(self) -> None:
        """Download the data and train the tokenizer, if they are not in the cache."""
        self._tokenizer_folder()

    def setup(self, stage: str) -> None:
        """Read requests and texts, and build the rows."""
        super().setup(stage)
        if self._statements is not None:
            return
        tables, texts = self._load()
        name = self._tokenizer_folder()
        tokenizer: Any = load_tokenizer(name, self.local_files_only)
        self.tokenizer = tokenizer
        largest = largest_token_id(
            tokenizer, [*tables.statements, *tables.retained, *texts, *(text for request in tables.requests for text in _strings(request))]
        )
        self.vocabulary = Vocabulary(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, name, largest)
        self.edit_requests = check_requests(tables.requests, type(self.source).__name__)
        number = len(texts) - min(self.eval_documents, len(texts) // 2)
        texts, held_out = texts[:number], texts[number:]
        retained = self._documents(tables.retained, 1, self.seed) if self.retain_statements else []
        self.edit_texts = retained + texts
        self.measured_texts = held_out or retained[: self.eval_documents]
        statements = self._documents(tables.statements, self.shuffles, self.seed + 1)
        if not statements and not texts:
            raise ValueError(f"{type(self.source).__name__} has no statements, and there are no texts; give texts with texts=...")
        if not self.measured_texts:
            raise ValueError(
                "there is no text whose perplexity could be measured: give texts with texts=..., or set retain_statements=True "
                "and leave at least one statement that no request changes"
            )
        validation = self._documents(tables.statements, 1, self.seed + 2)[: self.eval_documents]
        self._statements = statements + texts
        self.val_dataset = self._rows(validation or held_out)
        self.test_dataset = self._rows(self.measured_texts)

    @property
    def train_dataset(self) -> TextRows | None:
        """Training rows, built on first access, because edits of a published model need none."""
        if self._train_rows is None and self._statements is not None:
            self._train_rows = self._rows(self._statements)
        return self._train_rows

    def row_tokens(self) -> Sequence[int]:
        """Return the number of targets of each training row."""
        assert self.train_dataset is not None
        return cast("Sequence[int]", self.train_dataset.row_tokens())

    def _load(self) -> tuple[EditTables, list[str]]:
        if self._read is None:
            self._read = self.source.load(), self.texts.load() if self.texts is not None else []
        return self._read

    def _tokenizer_folder(self) -> str:
        if self._folder is None:
            self._folder = self._find_tokenizer()
        return self._folder

    def _find_tokenizer(self) -> str:
        if is_stored(self.tokenizer_name):
            vocabulary = vocabulary_of(read_stored(str(self.tokenizer_name)))
            if vocabulary is None or vocabulary.tokenizer is None:
                raise ValueError(f"{self.tokenizer_name} was trained without a tokenizer; give one with tokenizer=...")
            return vocabulary.tokenizer
        if self.tokenizer_name is not None:
            return self.tokenizer_name
        tables, texts = self._load()
        return str(train_tokenizer([*tables.statements, *texts], self.vocab_size, across_words=False))

    def _documents(self, sentences: Sequence[str], shuffles: int, seed: int) -> list[str]:
        documents = []
        for shuffle in range(shuffles):
            order = list(sentences)
            random.Random(f"{seed} {shuffle}").shuffle(order)
            documents += [" ".join(order[start : start + self.sentences]) for start in range(0, len(order), self.sentences)]
        return documents

    def _rows(self, documents: Sequence[str]) -> TextRows:
        encoded: Any = self.tokenizer(list(documents))["input_ids"]
        return TextRows(encoded, self.pack_length, pad_token_id=self.vocabulary.pad_token_id)


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings of a request."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, EditRequest):
        yield from _strings(tuple(vars(value).values()))
    elif isinstance(value, tuple):
        for part in value:
            yield from _strings(part)
