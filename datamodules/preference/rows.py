"""Datasets of preference rows, and of prompts to answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from malleable.datamodules.batch import AnswerBatch, Example, PreferenceBatch
from malleable.datamodules.collate import collate
from malleable.datamodules.files.cache import Numbers
from malleable.datamodules.sample_ids import Ints, keyed_uniforms

View = Literal["preference", "chosen"]
_NOISE = 3  # purpose of pseudo-random numbers
_TEXT_ENCODING = "utf-8"


class RowTexts(NamedTuple):
    """Texts of a row, as they are before truncation.

    Attributes:
        prompt: Prompt as the model reads it, under the chat template if there is one.
        answers: Chosen answer, then the rejected ones; of an unpaired row its answer, then the answer of another row.
    """

    prompt: str
    answers: tuple[str, ...]


class Ragged:
    """Rows of different lengths in one memory-mapped array.

    Args:
        values: ``(V,)`` values of all rows, concatenated.
        offsets: ``(N + 1,)`` position of the first value of each row, and the number of values.
    """

    def __init__(self, values: NDArray[Any], offsets: NDArray[Any]) -> None:
        self.values = values
        self.offsets = offsets

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[Any]:
        """Return the values of a row."""
        values: NDArray[Any] = self.values[self.offsets[index] : self.offsets[index + 1]]
        return values

    @property
    def lengths(self) -> Ints:
        """Number of values of each row, ``(N,)``."""
        lengths: Ints = np.diff(self.offsets)
        return lengths

    @classmethod
    def pack(cls, rows: Sequence[NDArray[Any]], dtype: Any) -> Ragged:
        """Concatenate rows."""
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate([*rows, np.zeros(0, dtype=dtype)]).astype(dtype, copy=False), offsets)

    @classmethod
    def pack_texts(cls, texts: Sequence[str]) -> Ragged:
        """Concatenate the bytes of texts."""
        return cls.pack([np.frombuffer(text.encode(_TEXT_ENCODING), dtype=np.uint8) for text in texts], np.uint8)

    def text(self, index: int) -> str:
        """Return a row that :meth:`pack_texts` has stored."""
        return self[index].tobytes().decode(_TEXT_ENCODING)


@dataclass(frozen=True)
class PreferenceTable:
    """Tokenised rows of a split: N rows with K_n answers each, chosen first.

    Attributes:
        sample_id: ``(N,)`` stable ids.
        prompts: Tokens of each prompt.
        answers: Tokens of all answers, row by row.
        first_answer: ``(N + 1,)`` position in ``answers`` of the first answer of each row, and the number of answers.
        prompt_texts: Text of each prompt.
        answer_texts: Texts of all answers, row by row.
        smoothing: ``(N,)``; ``None`` if the data have none.
        desirable: ``(N,)``; ``None`` if the rows have rejected answers.
    """

    sample_id: Ints
    prompts: Ragged
    answers: Ragged
    first_answer: Ints
    prompt_texts: Ragged
    answer_texts: Ragged
    smoothing: Numbers | None = None
    desirable: Numbers | None = None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.sample_id)

    def arrays(self) -> dict[str, Numbers]:
        """Return the arrays to store, by name."""
        arrays: dict[str, Numbers] = {"sample_id": self.sample_id, "first_answer": self.first_answer}
        for name in ("prompts", "answers", "prompt_texts", "answer_texts"):
            arrays |= {name: getattr(self, name).values, f"{name}_offsets": getattr(self, name).offsets}
        return arrays | {name: values for name in ("smoothing", "desirable") if (values := getattr(self, name)) is not None}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Numbers]) -> PreferenceTable:
        """Rebuild a table from its arrays."""
        ragged: dict[str, Any] = {
            name: Ragged(arrays[name], arrays[f"{name}_offsets"]) for name in ("prompts", "answers", "prompt_texts", "answer_texts")
        }
        rest: dict[str, Any] = {name: arrays.get(name) for name in ("sample_id", "first_answer", "smoothing", "desirable")}
        return cls(**ragged, **rest)


class PreferenceRows:
    """Dataset of rows with a prompt and its answers, the chosen one first.

    Args:
        table: The rows.
        select: Positions in ``table`` of the rows to use; default: all.
        view: ``preference`` for rows with all answers, ``chosen`` for rows with the chosen answer only. Of unpaired data, the view ``chosen`` has the
            rows with a desirable answer.
        label_noise: Share of rows whose preference is reversed; see
            :class:`~malleable.datamodules.preference.datamodule.PreferenceDataModule`.
        seed: Seed of the choice of rows with a reversed preference.
        pad_token_id: Padding token of batches.
    """

    def __init__(
        self,
        table: PreferenceTable,
        *,
        select: Ints | None = None,
        view: View = "preference",
        label_noise: float = 0.0,
        seed: int = 0,
        pad_token_id: int = 0,
    ) -> None:
        self.table = table
        self.view = view
        self.pad_token_id = pad_token_id
        reversed_rows = keyed_uniforms(np.asarray(table.sample_id), seed, _NOISE) < label_noise
        self.desirable = None if table.desirable is None else (np.asarray(table.desirable) != 0) ^ reversed_rows
        self.reversed = reversed_rows if table.desirable is None else np.zeros(len(table), dtype=bool)
        chosen = np.arange(len(table)) if select is None else select
        self.select = chosen[self.desirable[chosen]] if view == "chosen" and self.desirable is not None else chosen

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.select)

    @property
    def sample_ids(self) -> Ints:
        """The ids of the rows, ``(N,)``."""
        return np.asarray(self.table.sample_id[self.select])

    def __getitem__(self, index: int) -> Example:
        """Return a row."""
        row = int(self.select[index])
        table = self.table
        answers = [table.answers[answer].tolist() for answer in self._answers(row)]
        example: Example = {"sample_id": int(table.sample_id[row]), "prompt": table.prompts[row].tolist(), "answers": answers}
        if self.view == "chosen":
            example["answers"] = answers[:1]
            return example
        if table.smoothing is not None:
            example["smoothing"] = float(table.smoothing[row])
        if self.desirable is not None:
            example["desirable"] = bool(self.desirable[row])
        return example

    def texts(self, index: int) -> RowTexts:
        """Return the texts of a row."""
        row = int(self.select[index])
        return RowTexts(self.table.prompt_texts.text(row), tuple(self.table.answer_texts.text(answer) for answer in self._answers(row)))

    def collate(self, rows: Sequence[Example]) -> AnswerBatch:
        """Collate rows to a :class:`PreferenceBatch`, or to an :class:`AnswerBatch` in the view ``chosen``."""
        return collate(rows, PreferenceBatch if self.view == "preference" else AnswerBatch, pad_token_id=self.pad_token_id)

    def row_tokens(self) -> Ints:
        """Return the number of tokens of each row's chosen answer."""
        first = self.table.first_answer[self.select] + self.reversed[self.select]
        return np.asarray(self.table.answers.lengths[first])

    def _answers(self, row: int) -> list[int]:
        """Return the positions of the answers of a row in the table; with a reversed preference, the first two are exchanged."""
        first, *others = range(int(self.table.first_answer[row]), int(self.table.first_answer[row + 1]))
        return [others[0], first, *others[1:]] if self.reversed[row] else [first, *others]


class PromptRows:
    """Dataset of prompts without answers, for prediction. The id of a row is its number, from 0.

    Args:
        prompts: Tokens of each prompt.
        prompt_texts: Text of each prompt.
        pad_token_id: Padding token of batches.
    """

    def __init__(self, prompts: Sequence[NDArray[Any]], prompt_texts: Sequence[str], pad_token_id: int = 0) -> None:
        self.prompts = prompts
        self.prompt_texts = prompt_texts
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        """Return the number of prompts."""
        return len(self.prompts)

    @property
    def sample_ids(self) -> Ints:
        """The ids of the rows, ``(N,)``."""
        return np.arange(len(self))

    def __getitem__(self, index: int) -> Example:
        """Return a prompt with an empty answer."""
        return {"sample_id": index, "prompt": self.prompts[index].tolist(), "answers": [()]}

    def texts(self, index: int) -> RowTexts:
        """Return the text of a prompt."""
        return RowTexts(self.prompt_texts[index], ())

    def collate(self, rows: Sequence[Example]) -> AnswerBatch:
        """Collate prompts to a batch."""
        return collate(rows, AnswerBatch, pad_token_id=self.pad_token_id)
