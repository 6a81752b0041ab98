"""Sources of edit requests: your own file, and published datasets as their authors distribute them; nothing is downloaded.

CounterFact (Meng et al. 2022, MIT, with its code), zsRE as processed by MEND (Levy et al. 2017; Mitchell et al. 2022), and QAEdit (Yang et al. 2025,
Apache-2.0).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from malleable.datamodules.editing.requests import PLACEHOLDER, EditRequest, Probe, check_requests, read_requests
from malleable.datamodules.files.escape import brief_repr
from malleable.datamodules.files.text_files import JsonRow, field_of, id_text, list_of, object_of, read_json_rows, text_of, texts_of
from malleable.datamodules.files.user_files import check_file
from malleable.datamodules.sources.editing.base import EditSource, EditTables

log = logging.getLogger(__name__)


class RequestFile(EditSource):
    """Your own requests, one JSON object per line; for the fields see :func:`~malleable.datamodules.editing.requests.parse_request`.

    Args:
        path: Path of the file.
        limit: Maximum number of requests; the first ones are used. Default: all.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        self.path, self.limit = Path(path).expanduser(), limit

    def load(self) -> EditTables:
        """Read the requests."""
        return EditTables(read_requests(self.path)[: self.limit])


class EditRecords(EditSource):
    """Base class of sources that read records from a JSON array, or from a file with one JSON object per line.

    If several records have the same prompt and subject, only the last one is used, because its edit would replace the others.

    Args:
        path: Path of the file.
        limit: Maximum number of requests; the first ones are used. Default: all.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file has another format; the message names file, record and field.
    """

    def __init__(self, path: str, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be >= 1, got {limit}")
        self.path, self.limit = Path(path).expanduser(), limit

    @abstractmethod
    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Build the request of a record.

        Raises:
            ValueError: If a field is missing or has a wrong type.
        """

    def load(self) -> EditTables:
        """Read the requests."""
        latest: dict[tuple[str, str], EditRequest] = {}
        ids: set[str] = set()
        records = _records(self.path)[: self.limit]
        for number, (_, place, record) in enumerate(records):
            try:
                if not isinstance(record, Mapping):
                    raise ValueError(f"expected a JSON object, got {brief_repr(record)}")
                request = self.request(_strip(record), number)
            except ValueError as error:
                raise ValueError(f"{place}: {error}; give a file of {type(self).__name__}, or another source") from error
            if request.request_id in ids:
                request = replace(request, request_id=f"{request.request_id}/{number}")
            ids.add(request.request_id)
            latest.pop((request.prompt, request.subject), None)
            latest[request.prompt, request.subject] = request
        if dropped := len(records) - len(latest):
            log.warning("%s: %s of %s records are dropped, because a later record has the same prompt and subject", self.path, dropped, len(records))
        return EditTables(check_requests(list(latest.values()), str(self.path)))


class CounterFact(EditRecords):
    """CounterFact in the nested format of its authors.

    A record has two paraphrases, ten neighbours with the same true answer, and ten beginnings of texts.

    Args:
        path: Path of ``counterfact.json`` or ``multi_counterfact.json``.
        limit: Maximum number of records; the first ones are used. Default: all.
        snippets: Path of ``attribute_snippets.json``, whose texts are the references for consistency. Default: no references.
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
                    raise ValueError(f"{place}: {error}; give the path of CounterFact's attribute_snippets.json as snippets") from error
        return super().load()

    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Build the request of a record."""
        rewrite = object_of(record, "requested_rewrite")
        new, true = object_of(rewrite, "target_new"), text_of(object_of(rewrite, "target_true"), "str")
        return EditRequest(
            request_id=id_text(field_of(record, "case_id"), "case_id"),
            prompt=text_of(rewrite, "prompt"),
            subject=text_of(rewrite, "subject"),
            target=text_of(new, "str"),
            true=true,
            paraphrases=texts_of(record, "paraphrase_prompts"),
            neighbors=tuple(Probe(text, true) for text in texts_of(record, "neighborhood_prompts")),
            generation_prompts=texts_of(record, "generation_prompts") if "generation_prompts" in record else (),
            references=tuple(self._texts.get((str(rewrite.get("relation_id", "")), str(new.get("id", ""))), ())),
        )


class FlatCounterFact(EditRecords):
    """CounterFact in the flat format of EasyEdit. A record has one paraphrase, one neighbour, and a prompt that contains the subject."""

    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Build the request of a record."""
        paraphrase, probe = record.get("rephrase_prompt"), record.get("locality_prompt")
        return EditRequest(
            request_id=id_text(record.get("case_id", number), "case_id"),
            prompt=_with_placeholder(text_of(record, "prompt"), text_of(record, "subject")),
            subject=text_of(record, "subject"),
            target=text_of(record, "target_new"),
            true=text_of(record, "ground_truth"),
            paraphrases=(text_of(record, "rephrase_prompt"),) if paraphrase else (),
            neighbors=(Probe(text_of(record, "locality_prompt"), text_of(record, "locality_ground_truth")),) if probe else (),
        )


class ZsRE(EditRecords):
    """zsRE: questions, each with one paraphrase, and a question of Natural Questions as the neighbour.

    The answer of the model before the edit is not part of the data. Published figures are shares of correct tokens, which are called ``*_accuracy``
    here.

    Args:
        path: Path of ``zsre_mend_eval.json``.
        limit: Maximum number of records; the first ones are used. Default: all.
        target: ``answer`` uses the true answer as the target, as in the AlphaEdit paper; ``alt`` uses a false one, as EasyEdit does.
    """

    def __init__(self, path: str, limit: int | None = None, target: Literal["answer", "alt"] = "answer") -> None:
        super().__init__(path, limit)
        self.target = target

    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Build the request of a record."""
        question, answer = f"{text_of(record, 'loc').rstrip('?')}?", text_of(record, "loc_ans")
        return EditRequest(
            request_id=id_text(record.get("case_id", number), "case_id"),
            prompt=_with_placeholder(text_of(record, "src"), text_of(record, "subject")),
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
            raise ValueError("field answers: the list is empty; expected at least one string")
        return answers[0]


class QAEdit(EditRecords):
    """QAEdit: questions of Natural Questions, TriviaQA and SimpleQA, each with one paraphrase and five other questions as neighbours."""

    def request(self, record: Mapping[str, Any], number: int) -> EditRequest:
        """Build the request of a record."""
        return EditRequest(
            request_id=id_text(record.get("id", number), "id"),
            prompt=_with_placeholder(text_of(record, "prompt"), text_of(record, "subject")),
            subject=text_of(record, "subject"),
            target=text_of(record, "target"),
            paraphrases=(text_of(record, "rephrase"),),
            neighbors=tuple(Probe(text_of(item, "loc"), text_of(item, "loc_ans")) for item in list_of(record, "locality")),
        )


def _with_placeholder(prompt: str, subject: str) -> str:
    """Replace the first occurrence of the subject by the placeholder."""
    before, found, after = prompt.partition(subject) if subject else ("", "", "")
    if not found:
        raise ValueError(f"the subject {subject!r} does not occur in {prompt!r}")
    return f"{before}{PLACEHOLDER}{after}"


def _strip(value: Any) -> Any:
    """Remove white space at the ends of all strings of a record. Published files contain some, and requests do not allow it."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return {key: _strip(part) for key, part in value.items()}
    return [_strip(part) for part in value] if isinstance(value, list) else value


def _records(path: Path) -> list[JsonRow]:
    check_file(path, "give the file of edit records as its authors distribute it")
    return list(read_json_rows(path))
