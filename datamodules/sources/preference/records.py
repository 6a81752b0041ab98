"""Conversion of records with prompts, answers or conversations to rows of preference data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.sources.preference.base import Message, PreferenceRow, Prompt

FIELDS = ("prompt", "chosen", "rejected", "completion", "label", "smoothing")
ASSISTANT, USER = "assistant", "user"
SHAPES = "prompt, chosen and rejected (pairs), or prompt, completion and label (unpaired rows)"
EMPTY, EQUAL, NONE_REJECTED = "empty answer", "rejected answers equal to the chosen one", "no rejected answer"
_LABELS = {"true": True, "1": True, "false": False, "0": False}


class Record(NamedTuple):
    """Row of a file.

    Attributes:
        place: File and line, for messages.
        fields: Values by name of the column.
    """

    place: str
    fields: Mapping[str, Any]


class _Shape(NamedTuple):
    """Properties that all rows of a source share."""

    fields: str
    prompt: str
    smoothing: str


def check_columns(columns: Mapping[str, str] | None) -> dict[str, str]:
    """Check the option ``columns`` of a source, and return a copy.

    Raises:
        ValueError: If a field is unknown.
    """
    if unknown := sorted(set(columns or {}) - set(FIELDS)):
        raise ValueError(f"columns has the unknown field {unknown[0]!r}; the fields are {', '.join(FIELDS)}")
    return dict(columns or {})


class RecordReader:
    """Converter of records to rows. All records, also those of several files, must have the same shape.

    Shapes of records with rejected answers (``chosen`` and ``rejected``):

    - ``prompt``, ``chosen`` and ``rejected`` are strings.
    - ``prompt`` is a list of messages, ``{role, content}``. ``chosen`` and ``rejected`` are lists with one message of the assistant, or whole
      conversations that begin with the prompt, or strings.
    - There is no ``prompt``, or it is a string: ``chosen`` and ``rejected`` are conversations that share all turns except the last one, the answer.
    - In each shape, ``rejected`` may be a list of several answers: of strings, or of conversations.

    Unpaired records have ``prompt``, ``completion`` and ``label`` (true if the completion is desirable), where ``completion`` has the shape of
    ``chosen``. Each record may have ``smoothing``, the probability in [0, 1] that its preference is reversed.

    Empty answers, and rejected answers that equal the chosen one or another rejected one, are removed. Records without a chosen and a rejected answer
    are dropped and counted.

    Args:
        columns: Names of the columns by field, for columns that are not named like their field.

    Attributes:
        dropped: Number of dropped records by reason.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns
        self.dropped: Counter[str] = Counter()
        self._shape: tuple[_Shape, str] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the columns that are read, if they exist."""
        return [self.columns.get(field, field) for field in FIELDS]

    def read(self, records: Iterable[Record], origin: str) -> list[PreferenceRow]:
        """Convert records.

        Args:
            records: Records of a file or table.
            origin: File or table, for messages.

        Raises:
            ValueError: If a record has a wrong shape, or if there are none.
        """
        converted = [self._convert(record) for record in records]
        if not converted:
            raise ValueError(f"{origin} has no rows; give a file with at least one row with {SHAPES}")
        return [row for row in converted if row is not None]

    def _convert(self, record: Record) -> PreferenceRow | None:
        try:
            if not isinstance(record.fields, Mapping):
                raise ValueError(f"expected an object with {SHAPES}, got {brief_repr(record.fields)}")
            values = self._values(record.fields)
            paired = "chosen" in values or "rejected" in values
            # Files of pairs often have further columns.
            if not paired and not ("completion" in values or "label" in values):
                raise ValueError(f"expected {SHAPES}; the fields are {', '.join(map(str, record.fields))[:200]}; rename them with columns: {{...}}")
            smoothing = self._smoothing(values)
            prompt, answers, desirable = self._pair(values) if paired else self._unpaired(values)
        except ValueError as error:
            raise ValueError(f"{record.place}: {error}") from error
        kind = "text" if isinstance(prompt, str) else "a conversation"
        fields = "chosen and rejected" if paired else "completion and label"
        self._check_shape(_Shape(fields, f"the prompt is {kind}", f"smoothing is {'missing' if smoothing is None else 'given'}"), record.place)
        kept = self._kept(answers) if paired else tuple(answers) if answers[0].strip() else self._drop(EMPTY)
        return PreferenceRow(prompt, kept, record.place, desirable, smoothing) if kept else None

    def _values(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that are not null, by field."""
        values = {}
        for field in FIELDS:
            name = self.columns.get(field, field)
            if name not in fields and field in self.columns:
                raise ValueError(f"no column {name!r} for {field}, only {', '.join(map(str, fields))[:200]}; correct columns")
            if fields.get(name) is not None:
                values[field] = fields[name]
        return values

    def _check_shape(self, shape: _Shape, place: str) -> None:
        if self._shape is None:
            self._shape = shape, place
        first, where = self._shape
        if other := next(((own, then) for own, then in zip(shape, first, strict=True) if own != then), None):
            raise ValueError(f"{place}: {other[0]}, but {other[1]} in {where}; all rows of a source must have the same shape, use separate sources")

    def _kept(self, answers: Sequence[str]) -> tuple[str, ...]:
        """Return the chosen answer and the distinct rejected ones; count the row as dropped if one of them is missing."""
        chosen, *rejected = answers
        filled = [answer for answer in dict.fromkeys(rejected) if answer.strip()]
        others = [answer for answer in filled if answer != chosen]
        if others and chosen.strip():
            return chosen, *others
        return self._drop(EMPTY if not chosen.strip() or (rejected and not filled) else EQUAL if filled else NONE_REJECTED)

    def _drop(self, reason: str) -> tuple[str, ...]:
        self.dropped[reason] += 1
        return ()

    def _pair(self, values: Mapping[str, Any]) -> tuple[Prompt, list[str], None]:
        chosen, rejected = (self._required(values, name) for name in ("chosen", "rejected"))
        several = _several(rejected, self._name("rejected"))
        prompt = self._prompt(values, chosen, "chosen")
        answers = [_answer(chosen, prompt, self._name("chosen")), *(_answer(each, prompt, self._name("rejected")) for each in several)]
        return prompt, answers, None

    def _unpaired(self, values: Mapping[str, Any]) -> tuple[Prompt, tuple[str, ...], bool]:
        completion = self._required(values, "completion")
        prompt = self._prompt(values, completion, "completion")
        label = self._required(values, "label")
        known = label if isinstance(label, bool) else _LABELS.get(str(label).casefold()) if isinstance(label, (str, int)) else None
        if known is None:
            raise ValueError(f"field {self._name('label')}: expected true or false (or 1 or 0), got {brief_repr(label)}")
        return prompt, (_answer(completion, prompt, self._name("completion")),), known

    def _prompt(self, values: Mapping[str, Any], answer: Any, field: str) -> Prompt:
        """Return the prompt of a record, or the shared turns of its conversations."""
        prompt, name = values.get("prompt"), self._name("prompt")
        if prompt is None or (isinstance(prompt, str) and isinstance(answer, list) and len(answer) > 1):
            if not isinstance(answer, list):
                raise ValueError(
                    f"the field {name!r} is missing; give a prompt, or whole conversations (lists of messages) in {self._name(field)}; "
                    "rename another column with columns: {prompt: ...}"
                )
            turns = _messages(answer, self._name(field))[:-1]
            if not turns:
                raise ValueError(f"the field {name!r} is missing, and field {self._name(field)} has no turn before the answer; give a prompt")
            return turns
        if isinstance(prompt, str):
            return (Message(USER, prompt),) if isinstance(answer, list) else prompt
        turns = _messages(prompt, name)
        if turns[-1].role == ASSISTANT:
            raise ValueError(f"field {name}: the last turn of a prompt must not be of the assistant, who answers next; remove it")
        return turns

    def _required(self, values: Mapping[str, Any], field: str) -> Any:
        if field not in values:
            raise ValueError(f"the field {self._name(field)!r} is missing or null; rows need {SHAPES}")
        return values[field]

    def _smoothing(self, values: Mapping[str, Any]) -> float | None:
        value = values.get("smoothing")
        if value is None:
            return None
        try:
            number = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        if not 0 <= number <= 1:
            raise ValueError(f"field {self._name('smoothing')}: expected a probability in [0, 1], got {brief_repr(value)}")
        return number

    def _name(self, field: str) -> str:
        return self.columns.get(field, field)


def _several(rejected: Any, name: str) -> list[Any]:
    """Return the rejected answers of a record, each a string or a list of messages."""
    if isinstance(rejected, str) or (isinstance(rejected, list) and rejected and all(isinstance(part, Mapping) for part in rejected)):
        return [rejected]
    if isinstance(rejected, list) and (all(isinstance(part, str) for part in rejected) or all(isinstance(part, list) for part in rejected)):
        return rejected
    raise ValueError(f"field {name}: expected a string, a list of messages, or a list of several such answers, got {brief_repr(rejected)}")


def _answer(value: Any, prompt: Prompt, name: str) -> str:
    """Return the text of an answer.

    Args:
        value: A string, a message of the assistant, or a whole conversation.
        prompt: The prompt of the record.
        name: Name of the column, for messages.
    """
    if isinstance(value, str):
        return value
    if isinstance(prompt, str):
        raise ValueError(f"field {name}: expected a string like the prompt, got {brief_repr(value)}")
    *before, last = _messages(value, name)
    if last.role != ASSISTANT:
        raise ValueError(f"field {name}: the last turn must be of the role {ASSISTANT}, got {brief_repr(last.role)}; remove later turns")
    if before and tuple(before) != prompt:
        raise ValueError(f"field {name}: the turns before the answer differ from the prompt or from the other answers; they must be the same")
    return last.content


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {name}: expected a string or a list of messages with role and content, got {brief_repr(value)}")
    return tuple(_message(part, name) for part in value)


def _message(value: Any, name: str) -> Message:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"field {name}: a message must have a role and a content, both strings, got {brief_repr(value)}")
    if value.get("tool_calls") or value.get("function_call"):
        raise ValueError(f"field {name}: messages with tool calls are not supported, got {brief_repr(value)}; remove such rows")
    return Message(role, content)


def to_prompt(value: Any, name: str) -> Prompt:
    """Convert a value to a prompt: a text, or messages.

    Raises:
        ValueError: If it is neither.
    """
    return value if isinstance(value, str) else _messages(value, name)
