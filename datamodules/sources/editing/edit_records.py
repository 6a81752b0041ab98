"""Published edit requests, read from the files their authors give out; nothing is fetched.

CounterFact (Meng et al. 2022, MIT with its code), zsRE as MEND cut it (Levy et al. 2017; Mitchell et al. 2022), and QAEdit (Yang et al. 2025,
Apache-2.0): give the file.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest, Probe, checked, read_requests
from malleable.datamodules.files.text_files import JsonRow, field_of, id_text, list_of, object_of, read_json_rows, text_of, texts_of
from malleable.datamodules.files.user_files import check_file
from malleable.datamodules.sources.editing.base import EditSource, EditTables

log = logging.getLogger(__name__)


class RequestFile(EditSource):
    """Requests of one's own, a JSON object a line; see :func:`~malleable.datamodules.editing.requests.request_of` for the fields.

    Args:
        path: The file.
        limit: Take the first so many.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        self.path, self.limit = Path(path).expanduser(), limit

    def load(self) -> EditTables:
        """Read the requests."""
        return EditTables(read_requests(self.path)[: self.limit])


class EditRecords(EditSource):
    """Records of a JSON array, or one a line.

    Of two records that ask the same and want different answers the later one counts, as its edit would undo the other's.

    Args:
        path: The file.
        limit: Take the first so many.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such file; the message names file, record and field.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        self.path, self.limit = Path(path).expanduser(), limit

    @abstractmethod
    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Make the request of a record.

        Raises:
            ValueError: If a field is missing or of another type.
        """

    def load(self) -> EditTables:
        """Read the requests."""
        latest: dict[tuple[str, str], EditRequest] = {}
        ids: set[str] = set()
        records = _records(self.path)[: self.limit]
        for number, (_, place, record) in enumerate(records):
            try:
                if not isinstance(record, Mapping):
                    raise ValueError(f"expected an object, got {type(record).__name__}")
                request = self.request(_without_blanks(record), number)
            except ValueError as error:
                raise ValueError(f"{place}: {error}; is this a file of {type(self).__name__}?") from error
            if request.request_id in ids:
                request = replace(request, request_id=f"{request.request_id}/{number}")
            ids.add(request.request_id)
            latest.pop((request.prompt, request.subject), None)
            latest[request.prompt, request.subject] = request
        if dropped := len(records) - len(latest):
            log.warning("%s: %s of %s records ask what a later one asks; the later ones count", self.path, dropped, len(records))
        return EditTables(checked(list(latest.values()), str(self.path)))


class CounterFact(EditRecords):
    """CounterFact as its authors publish it, nested: two paraphrases, ten neighbours of the same true answer, ten beginnings.

    Args:
        path: ``counterfact.json`` or ``multi_counterfact.json``.
        limit: Take the first so many.
        snippets: ``attribute_snippets.json``, whose texts are the references of consistency.
    """

    def __init__(self, path: str, limit: int | None = None, snippets: str | None = None) -> None:
        super().__init__(path, limit)
        self.snippets = None if snippets is None else Path(snippets).expanduser()
        self._texts: dict[tuple[str, str], list[str]] = defaultdict(list)

    def load(self) -> EditTables:
        """Read snippets and requests."""
        if self.snippets is not None and not self._texts:
            for _, place, entry in _records(self.snippets):
                try:
                    texts = [text_of(sample, "text") for sample in list_of(entry, "samples")]
                    self._texts[text_of(entry, "relation_id"), text_of(entry, "target_id")] += texts
                except ValueError as error:
                    raise ValueError(f"{place}: {error}; is this attribute_snippets.json?") from error
        return super().load()

    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Make the request of a record."""
        asked = object_of(record, "requested_rewrite")
        new, true = object_of(asked, "target_new"), text_of(object_of(asked, "target_true"), "str")
        return EditRequest(
            request_id=id_text(field_of(record, "case_id"), "case_id"),
            prompt=text_of(asked, "prompt"),
            subject=text_of(asked, "subject"),
            target=text_of(new, "str"),
            true=true,
            paraphrases=texts_of(record, "paraphrase_prompts"),
            neighbors=tuple(Probe(text, true) for text in texts_of(record, "neighborhood_prompts")),
            generation_prompts=texts_of(record, "generation_prompts") if "generation_prompts" in record else (),
            references=tuple(self._texts.get((str(asked.get("relation_id", "")), str(new.get("id", ""))), ())),
        )


class FlatCounterFact(EditRecords):
    """CounterFact as EasyEdit gives it out, flat: one paraphrase and one neighbour, the subject put into the prompt."""

    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Make the request of a record."""
        paraphrase, probe = record.get("rephrase_prompt"), record.get("locality_prompt")
        return EditRequest(
            request_id=id_text(record.get("case_id", number), "case_id"),
            prompt=_with_place(text_of(record, "prompt"), text_of(record, "subject")),
            subject=text_of(record, "subject"),
            target=text_of(record, "target_new"),
            true=text_of(record, "ground_truth"),
            paraphrases=(text_of(record, "rephrase_prompt"),) if paraphrase else (),
            neighbors=(Probe(text_of(record, "locality_prompt"), text_of(record, "locality_ground_truth")),) if probe else (),
        )


class ZsRE(EditRecords):
    """zsRE, questions: one rephrased, one of Natural Questions as the neighbour.

    The old answer is not known; published figures are shares of right tokens, ``*_accuracy`` here.

    Args:
        path: ``zsre_mend_eval.json``.
        limit: Take the first so many.
        target: ``answer`` teaches the true answer, as published for AlphaEdit; ``alt`` a false one, as EasyEdit does.
    """

    def __init__(self, path: str, limit: int | None = None, target: Literal["answer", "alt"] = "answer") -> None:
        super().__init__(path, limit)
        self.target = target

    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Make the request of a record."""
        question, answer = f"{text_of(record, 'loc').rstrip('?')}?", text_of(record, "loc_ans")
        return EditRequest(
            request_id=id_text(record.get("case_id", number), "case_id"),
            prompt=_with_place(text_of(record, "src"), text_of(record, "subject")),
            subject=text_of(record, "subject"),
            target=self._target(record),
            paraphrases=(text_of(record, "rephrase"),),
            neighbors=(Probe(question, answer),) if answer else (),
        )

    def _target(self, record: Mapping[str, Any]) -> str:
        if self.target == "alt":
            return text_of(record, "alt")
        answers = texts_of(record, "answers")
        if not answers:
            raise ValueError("field answers: the list is empty; expected at least one text")
        return answers[0]


class QAEdit(EditRecords):
    """QAEdit: questions of Natural Questions, TriviaQA and SimpleQA, one rephrased, five others as neighbours."""

    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Make the request of a record."""
        return EditRequest(
            request_id=id_text(record.get("id", number), "id"),
            prompt=_with_place(text_of(record, "prompt"), text_of(record, "subject")),
            subject=text_of(record, "subject"),
            target=text_of(record, "target"),
            paraphrases=(text_of(record, "rephrase"),),
            neighbors=tuple(Probe(text_of(item, "loc"), text_of(item, "loc_ans")) for item in list_of(record, "locality")),
        )


def _with_place(prompt: str, subject: str) -> str:
    """Put the placeholder where the subject stands first."""
    before, found, after = prompt.partition(subject) if subject else ("", "", "")
    if not found:
        raise ValueError(f"the subject {subject!r} does not occur in {prompt!r}")
    return f"{before}{PLACEHOLDER}{after}"


def _without_blanks(value: Any) -> Any:
    """Remove white space at the ends of all texts of a record: published files have some by accident, and requests refuse it."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return {key: _without_blanks(part) for key, part in value.items()}
    return [_without_blanks(part) for part in value] if isinstance(value, list) else value


def _records(path: Path) -> list[JsonRow]:
    check_file(path, "give the file of edit records as its authors publish it")
    return list(read_json_rows(path))
