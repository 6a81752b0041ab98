"""Edit requests: the type that all sources return, and a JSON file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import id_text, read_json_rows
from malleable.datamodules.files.user_files import check_file

PLACEHOLDER = "{}"


class Probe(NamedTuple):
    """Prompt about another subject (a neighbour), whose answer the edit must not change.

    Attributes:
        prompt: Complete text of the prompt.
        answer: True answer.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class EditRequest:
    """Request to change the answer of a prompt.

    Attributes:
        request_id: Id of the request.
        prompt: Text with one ``{}`` for the subject.
        subject: Subject of the fact.
        target: New answer.
        true: Answer before the edit, if it is known.
        paraphrases: Paraphrases of the prompt, with the subject inserted.
        neighbors: Prompts about other subjects, whose answers the edit must not change.
        generation_prompts: Beginnings of texts about the subject, for fluency and consistency.
        references: Texts about other subjects for which the new answer is true; generated texts about the subject are compared with them.

    Raises:
        ValueError: If a text is empty, the prompt does not contain ``{}`` exactly once, or a text other than a reference begins or ends in white
            space. The space before an answer is added by the tokenization; a second one would change the tokens.
    """

    request_id: str
    prompt: str
    subject: str
    target: str
    true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Probe, ...] = ()
    generation_prompts: tuple[str, ...] = ()
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the texts."""
        for name in ("prompt", "subject", "target"):
            _check_text(name, getattr(self, name))
        if self.true is not None:
            _check_text("true", self.true)
        for name in _LIST_FIELDS:
            # Without this check, a string instead of a list would be split into letters.
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if not isinstance(self.neighbors, (tuple, list)) or not all(map(_is_probe, self.neighbors)):
            raise ValueError(f"neighbors must be pairs of prompt and answer, both non-empty strings, got {brief_repr(self.neighbors, 200)}")
        for name in ("paraphrases", "generation_prompts"):
            for text in getattr(self, name):
                _check_white_space(name, text)
        for text in (text for probe in self.neighbors for text in probe):
            _check_white_space("neighbors", text)
        if self.prompt.count(PLACEHOLDER) != 1:
            raise ValueError(f"prompt must contain {PLACEHOLDER} exactly once, for the subject, got {self.prompt!r}")
        if self.true is not None and self.true.strip() == self.target.strip():
            raise ValueError(f"target and true are both {self.target!r}, so there is nothing to edit; change target, or remove the request")

    @property
    def question(self) -> tuple[str, str]:
        """Prompt and subject; two requests with the same question must have the same target."""
        return self.prompt, self.subject

    def as_plain(self) -> dict[str, Any]:
        """Return plain data for :func:`parse_request`."""
        lists = {name: list(getattr(self, name)) for name in _LIST_FIELDS}
        return {**asdict(self), **lists, "neighbors": [probe._asdict() for probe in self.neighbors]}


_LIST_FIELDS = ("paraphrases", "generation_prompts", "references")
_FIELDS = {"request_id", "prompt", "subject", "target", "true", "neighbors", *_LIST_FIELDS}
# Names of fields in published files.
_ALIASES = {"case_id": "request_id", "target_new": "target", "target_true": "true"}


def parse_request(fields: Mapping[str, Any], number: int) -> EditRequest:
    """Build a request from plain data.

    Args:
        fields: ``prompt``, ``subject`` and ``target``, and optionally other fields of :class:`EditRequest`. The names ``case_id``, ``target_new``
            and ``target_true`` are also accepted, the latter two also as ``{"str": ...}``.
        number: Id of the request if ``fields`` contains none.

    Raises:
        ValueError: If a field is missing, unknown or invalid.
    """
    named = {_ALIASES.get(name, name): value for name, value in fields.items()}
    unknown = sorted(named.keys() - _FIELDS)
    missing = sorted({"prompt", "subject", "target"} - named.keys())
    if unknown or missing:
        problems = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(f"invalid fields of an edit request: {'; '.join(problems)}; allowed fields are {', '.join(sorted(_FIELDS))}")
    for name in ("target", "true"):
        if isinstance(named.get(name), Mapping):
            named[name] = named[name].get("str")
    named["request_id"] = id_text(named.get("request_id", number), "request_id")
    for name in _LIST_FIELDS:
        named[name] = _texts(name, named.get(name))
    neighbors = named.get("neighbors")
    neighbors = () if neighbors is None else neighbors
    if isinstance(neighbors, str) or not isinstance(neighbors, Sequence):
        raise ValueError(f"neighbors must be a list of objects with prompt and answer, got {brief_repr(neighbors)}")
    named["neighbors"] = tuple(_probe(item) for item in neighbors)
    return EditRequest(**named)


def _is_probe(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(text, str) and bool(text.strip()) for text in value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a non-empty string, got {brief_repr(value)}")
    _check_white_space(name, value)


def _check_white_space(name: str, text: str) -> None:
    if text != text.strip():
        raise ValueError(f"{name} must not begin or end in white space, got {text!r}; remove it (the space before an answer is added automatically)")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise ValueError(f"{name} must be a list of strings, got {brief_repr(value)}")
    texts = tuple(value or ())
    if wrong := [text for text in texts if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"{name} must contain non-empty strings, got {wrong[0]!r}")
    return texts


def _probe(item: Any) -> Probe:
    if isinstance(item, Mapping) and {"prompt", "answer"} == item.keys():
        probe = Probe(item["prompt"], item["answer"])
        if all(isinstance(text, str) and text.strip() for text in probe):
            return probe
    raise ValueError(f"neighbors must contain objects with prompt and answer, both non-empty strings, got {brief_repr(item)}")


def read_requests(path: Path) -> list[EditRequest]:
    """Read requests from a file with one JSON object per line, or with a JSON array of objects.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a line is invalid; the message names file, line and field.
    """
    check_file(path, "a file of edit requests has one JSON object per line, with prompt, subject and target")
    requests = []
    for number, place, fields in read_json_rows(path):
        try:
            if not isinstance(fields, dict):
                raise ValueError(f"expected a JSON object with prompt, subject and target, got {brief_repr(fields)}")
            requests.append(parse_request(fields, number))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return check_requests(requests, str(path))


def load_requests(given: str | Sequence[Mapping[str, Any]] | None) -> list[EditRequest] | None:
    """Read requests from a file or from plain data; return ``None`` for ``None``.

    Args:
        given: Name of a file for :func:`read_requests`, or objects for :func:`parse_request`.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If a request is invalid.
    """
    if given is None:
        return None
    if isinstance(given, str):
        return read_requests(Path(given))
    return check_requests([parse_request(fields, number) for number, fields in enumerate(given)], "requests")


def without_replaced(earlier: Sequence[EditRequest], later: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the earlier requests, without those that have the same prompt and subject as a later request."""
    replaced = {request.question for request in later}
    return [request for request in earlier if request.question not in replaced]


def check_requests(requests: Sequence[EditRequest], source: str) -> list[EditRequest]:
    """Check that requests do not contradict each other, and return them as a list.

    Raises:
        ValueError: If there are no requests, an id occurs twice, or two requests have the same prompt and subject but different targets.
    """
    if not requests:
        raise ValueError(f"{source} contains no edit requests; give at least one")
    by_id: dict[str, EditRequest] = {}
    by_question: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        if request.request_id in by_id:
            raise ValueError(f"{source} has two requests with id {request.request_id!r}; ids must be unique")
        other = by_question.get(request.question)
        if other is not None and other.target != request.target:
            prompt = request.prompt.replace(PLACEHOLDER, request.subject)
            ids = f"{other.request_id} and {request.request_id}"
            raise ValueError(
                f"{source}: requests {ids} have the same prompt {prompt!r} but targets {other.target!r} and {request.target!r}; keep one"
            )
        by_id[request.request_id] = by_question[request.question] = request
    return list(requests)
