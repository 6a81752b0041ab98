"""Facts to be edited, and what is asked around them: one vocabulary for every source, and our own file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from malleable.datamodules.files.text_files import id_text, read_json_rows
from malleable.datamodules.files.user_files import check_file

PLACEHOLDER = "{}"


class Probe(NamedTuple):
    """A question about another subject, whose answer is to stay.

    Attributes:
        prompt: Whole text.
        answer: What is true.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class EditRequest:
    """A fact that is to become another.

    Attributes:
        request_id: Name of the request.
        prompt: Holds ``{}`` once, for the subject.
        subject: What the fact is about.
        target: The new answer.
        true: The answer so far, where it is known.
        paraphrases: The same question in other words, subject put in.
        neighbors: Questions about others, whose answers are to stay.
        generation_prompts: Beginnings of texts about the subject, for fluency and consistency.
        references: Texts about things of which the new answer is true: what texts about the subject should now resemble.

    Raises:
        ValueError: If a text is empty, or the prompt has no place for the subject. If a text but a reference begins or ends in white space: the
            blank before an answer is added when tokens are made, and tokenizers join another one to the next word.
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
        for name in _TEXTS:
            # A text in place of a list would become its letters.
            object.__setattr__(self, name, _texts(name, getattr(self, name)))
        if not isinstance(self.neighbors, (tuple, list)) or not all(map(_is_probe, self.neighbors)):
            raise ValueError(f"neighbors must be prompts and answers, both texts, got {self.neighbors!r:.200}")
        for name in ("paraphrases", "generation_prompts"):
            for text in getattr(self, name):
                _refuse_blanks(name, text)
        for text in (text for probe in self.neighbors for text in probe):
            _refuse_blanks("neighbors", text)
        if self.prompt.count(PLACEHOLDER) != 1:
            raise ValueError(f"prompt must hold {PLACEHOLDER} exactly once, for the subject, got {self.prompt!r}")
        if self.true is not None and self.true.strip() == self.target.strip():
            raise ValueError(f"target and true are both {self.target!r}: there is nothing to edit")

    @property
    def question(self) -> tuple[str, str]:
        """Prompt and subject: what can have one answer only."""
        return self.prompt, self.subject

    def as_plain(self) -> dict[str, Any]:
        """Return what :func:`request_of` reads."""
        lists = {name: list(getattr(self, name)) for name in _TEXTS}
        return {**asdict(self), **lists, "neighbors": [probe._asdict() for probe in self.neighbors]}


_TEXTS = ("paraphrases", "generation_prompts", "references")
_NAMES = {"request_id", "prompt", "subject", "target", "true", "neighbors", *_TEXTS}
# What the field's files call them.
_OTHER_NAMES = {"case_id": "request_id", "target_new": "target", "target_true": "true"}


def request_of(fields: Mapping[str, Any], number: int) -> EditRequest:
    """Make a request of plain data.

    Args:
        fields: ``prompt``, ``subject`` and ``target``, and optionally the others of :class:`EditRequest`; ``case_id``, ``target_new`` and
            ``target_true`` will do too, the latter two also as ``{"str": ...}``.
        number: Its id, if it has none.

    Raises:
        ValueError: If a field is missing, unknown or wrong.
    """
    named = {_OTHER_NAMES.get(name, name): value for name, value in fields.items()}
    unknown = sorted(named.keys() - _NAMES)
    missing = sorted({"prompt", "subject", "target"} - named.keys())
    if unknown or missing:
        raise ValueError(
            f"an edit request has no {', '.join(missing) or 'field'} {', '.join(unknown)}".strip() + f"; fields are {', '.join(sorted(_NAMES))}"
        )
    for name in ("target", "true"):
        if isinstance(named.get(name), Mapping):
            named[name] = named[name].get("str")
    named["request_id"] = id_text(named.get("request_id", number), "request_id")
    for name in _TEXTS:
        named[name] = _texts(name, named.get(name))
    neighbors = named.get("neighbors")
    neighbors = () if neighbors is None else neighbors
    if isinstance(neighbors, str) or not isinstance(neighbors, Sequence):
        raise ValueError(f"neighbors must be a list of objects with prompt and answer, got {neighbors!r:.80}")
    named["neighbors"] = tuple(_probe(item) for item in neighbors)
    return EditRequest(**named)


def _is_probe(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(text, str) and bool(text.strip()) for text in value)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text, got {value!r:.80}")
    _refuse_blanks(name, value)


def _refuse_blanks(name: str, text: str) -> None:
    if text != text.strip():
        raise ValueError(f"{name} must not begin or end in white space, got {text!r}: remove it; a blank before the answer is added automatically")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise ValueError(f"{name} must be a list of texts, got {value!r:.80}")
    texts = tuple(value or ())
    if wrong := [text for text in texts if not isinstance(text, str) or not text.strip()]:
        raise ValueError(f"{name} must be texts, got {wrong[0]!r}")
    return texts


def _probe(item: Any) -> Probe:
    if isinstance(item, Mapping) and {"prompt", "answer"} == item.keys():
        probe = Probe(item["prompt"], item["answer"])
        if all(isinstance(text, str) and text.strip() for text in probe):
            return probe
    raise ValueError(f"a neighbor is an object of prompt and answer, both texts, got {item!r:.80}")


def read_requests(path: Path) -> list[EditRequest]:
    """Read requests: a JSON object a line, or a JSON array of objects.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is wrong; the message names file, line and field.
    """
    check_file(path, "a file of edit requests holds a JSON object a line, with prompt, subject and target")
    requests = []
    for number, place, fields in read_json_rows(path):
        try:
            if not isinstance(fields, dict):
                raise ValueError(f"expected an object, got {type(fields).__name__}")
            requests.append(request_of(fields, number))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return checked(requests, str(path))


def load_requests(given: str | Sequence[Mapping[str, Any]] | None) -> list[EditRequest] | None:
    """Read requests from a file name or from plain data; ``None`` passes through.

    Args:
        given: Name of a file for :func:`read_requests`, or objects for :func:`request_of`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a request is wrong.
    """
    if given is None:
        return None
    if isinstance(given, str):
        return read_requests(Path(given))
    return checked([request_of(fields, number) for number, fields in enumerate(given)], "requests")


def without_replaced(earlier: Sequence[EditRequest], later: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the earlier requests whose prompt and subject no later request has."""
    replaced = {request.question for request in later}
    return [request for request in earlier if request.question not in replaced]


def checked(requests: Sequence[EditRequest], source: str) -> list[EditRequest]:
    """Check that requests can hold together.

    Raises:
        ValueError: If there are none, an id occurs twice, or one question is to have two answers.
    """
    if not requests:
        raise ValueError(f"{source} holds no edit requests")
    seen: dict[str, EditRequest] = {}
    asked: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        if request.request_id in seen:
            raise ValueError(f"{source} has two requests with id {request.request_id!r}; ids must differ")
        other = asked.get(request.question)
        if other is not None and other.target != request.target:
            asks = request.prompt.replace(PLACEHOLDER, request.subject)
            both = f"{other.request_id} and {request.request_id}"
            raise ValueError(f"{source}: requests {both} ask {asks!r} and want {other.target!r} and {request.target!r}; keep one")
        seen[request.request_id] = asked[request.question] = request
    return list(requests)
