"""AlphaEdit after training: facts in, a patch out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from malleable.callbacks.editing.edit_report import UsedDirections, edit_sections, spectrum_section, survival_section
from malleable.callbacks.editing.post_fit import PostFitEdit
from malleable.callbacks.report.page import Column, Section
from malleable.datamodules.editing.requests import EditRequest, checked, read_requests, request_of
from malleable.datamodules.language.texts import read_texts
from malleable.lightning_modules.editing.editor import AlphaEditor, Edited
from malleable.lightning_modules.editing.evaluation import EvaluationResult, KnownFacts, Protocol, edit_in_batches, evaluate_edits, known_requests
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.statistics import StatisticsSettings
from malleable.lightning_modules.editing.targets import Fact
from malleable.lightning_modules.editing.undisturbed import undisturbed
from malleable.lightning_modules.functional.editing.null_space import LowRank
from malleable.lightning_modules.metrics.editing import RequestFigures
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.tensors import canonical_name
from malleable.lightning_modules.serialization import from_plain

log = logging.getLogger(__name__)


class AlphaEdit(PostFitEdit):
    """Edits facts in a trained decoder, in the null space of what its MLPs read.

    ``test`` asks for the facts, their paraphrases and neighbours, of the model as it is and as it was before; a report shows them side by side.

    Args:
        requests: Facts: a JSONL file, a list of objects with ``prompt``, ``subject`` and ``target``; default: the data module's ``edit_requests``.
        settings: How they are edited.
        texts: What the model should go on saying: a list, or a file as of :func:`~malleable.datamodules.language.texts.read_texts`; default: the data
            module's ``edit_texts``.
        statistics: How second moments are taken over it.
        statistics_file: Where these are kept and taken up, ``{mark}`` in it stands for the model and text they are of; default: nowhere.
        known: Edit only what the model knows; default: all requests.
        protocol: What is measured before and after, and between batches.
        model: Name of the module's attribute that is the Hugging Face model.
        start: ``best`` weights by the run's checkpoint callback, or the ``last`` ones.

    Source:
        Fang et al. (2025), AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models, ICLR, arXiv:2410.02355.
    """

    kind: ClassVar[str] = "alpha_edit"

    def __init__(
        self,
        requests: str | list[dict[str, Any]] | None = None,
        settings: EditSettings | None = None,
        texts: str | list[str] | None = None,
        statistics: StatisticsSettings | None = None,
        statistics_file: str | None = None,
        known: KnownFacts | None = None,
        protocol: Protocol | None = None,
        model: str = "model",
        start: Literal["best", "last"] = "best",
    ) -> None:
        super().__init__(model, start)
        self.settings: EditSettings = from_plain(EditSettings, settings) or EditSettings()
        self.statistics: StatisticsSettings = from_plain(StatisticsSettings, statistics) or StatisticsSettings()
        self.statistics_file = None if statistics_file is None else Path(statistics_file)
        self.known: KnownFacts | None = from_plain(KnownFacts, known)
        self.protocol: Protocol = from_plain(Protocol, protocol) or Protocol()
        self.texts = texts
        # Read at once: a wrong line should not wait for the end of training.
        self.requests: list[EditRequest] | None = None
        if isinstance(requests, str):
            self.requests = read_requests(Path(requests))
        elif requests is not None:
            self.requests = checked([request_of(fields, number) for number, fields in enumerate(requests)], "requests")
        self.records: list[Edited] = []
        self.before, self.after = EvaluationResult(), EvaluationResult()
        self._edited: list[EditRequest] = []
        self._course: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return also what the report says of the edit itself, which a run that is resumed after it does not repeat."""
        return {**super().state_dict(), "course": self._course}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load also what the report says of the edit itself."""
        super().load_state_dict(state_dict)
        self._course = dict(state_dict.get("course", {}))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find requests, text and tokenizer, and whether the model can be edited at all, before any long work."""
        requests = self._requests(trainer)
        if self.settings.needs_text:
            self._texts(trainer)
        AlphaEditor(self._model(pl_module), self._tokenizer(trainer, pl_module), self.settings).check([Fact.of(request) for request in requests])

    def asked(self, trainer: Trainer) -> Any:
        """The requests."""
        return [_plain(request) for request in self._requests(trainer)]

    def make_patch(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Patch:
        """Edit, turn the updates into deltas, and take the edits back."""
        tokenizer, measured = self._tokenizer(trainer, pl_module), self._measured(trainer)
        editor = AlphaEditor(model, tokenizer, self.settings)
        requests = self._requests(trainer)
        if self.known is not None:
            with undisturbed(model):
                requests, asked = known_requests(model, editor.reader, requests, self.known), requests
            log.info("%s of %s requests are edited: facts that the model knows", len(requests), len(asked))
        self._edited = requests
        if self.settings.needs_text:
            # Of the model before all patches: what was taken for the first one is taken up for the next.
            with self.originals(model):
                editor.fit_statistics(self._texts(trainer), self.statistics, self.statistics_file)
        if self.settings.remember:
            editor.remember([Fact.of(request) for request in _unasked(self._patched(), requests)])
        self.before = evaluate_edits(model, tokenizer, requests, measured, self.protocol)
        try:
            self.records, survival = edit_in_batches(editor, requests, self.protocol)
            self.after = evaluate_edits(model, tokenizer, requests, measured, self.protocol)
            deltas = {self._name(editor, layer): self._delta(editor, layer) for layer in editor.layers}
            drift = editor.drift()
        finally:
            editor.revert()
        if drift:
            self.after.figures["drift"] = sum(drift.values()) / len(drift)
        self._course = {
            "survival": survival,
            "directions": _directions(editor),
            "rule": _rule(self.settings),
            "drift": self.after.figures.get("drift"),
        }
        settings = {**asdict(self.settings), "layers": list(editor.layers), "contexts_drawn": editor.contexts}
        about = [{**_plain(request), "outcome": self._outcome(number)} for number, request in enumerate(requests)]
        title = f"{len(requests)} facts, {self.settings.method}, layers {editor.layers[0]} to {editor.layers[-1]}"
        figures = {"before": self.before.figures, "after": self.after.figures}
        return self.patch(model, deltas, title=title, requests=about, settings=settings, figures=figures)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run the protocol on the requests of the patches, or on those given, as the model is and as it was before the patches."""
        patched = self._patched()
        given = self.requests is not None or hasattr(getattr(trainer, "datamodule", None), "edit_requests")
        if not patched and not given:
            return
        references = {request.question: request.references for request in self._requests(trainer)} if given else {}
        requests = [replace(request, references=references.get(request.question, ())) for request in patched] or self._requests(trainer)
        model, tokenizer, measured = self._model(pl_module), self._tokenizer(trainer, pl_module), self._measured(trainer)
        own = tuple(self.applied) == self.stack.ids
        known = self._edited == requests and own
        drift = self._course.get("drift") if known or (own and len(self.stack.ids) == 1) else None
        self.after = evaluate_edits(model, tokenizer, requests, measured, self.protocol)
        if not patched:
            self.before = EvaluationResult()
        elif not known or not self.before.requests:
            with self.originals(model):
                self.before = evaluate_edits(model, tokenizer, requests, measured, self.protocol)
        if drift is not None:
            self.after.figures["drift"] = drift
        self._edited = requests

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the figures of the model as it is, and the growth of perplexity."""
        figures = {f"test_{name}": value for name, value in self.after.figures.items() if name != "perplexity"}
        if "perplexity" in self.before.figures:
            figures["test_perplexity_ratio"] = self.after.figures["perplexity"] / self.before.figures["perplexity"]
        pl_module.log_dict(figures, rank_zero_only=False)

    def report_columns(self) -> list[Column]:
        """What the model was like before."""
        return [Column("before the edit", "before", self.before.figures)] if self.before.figures else []

    def report_rows(self) -> dict[str, list[float]]:
        """Return the figures of each request, in percent."""
        figures = self.after.requests
        return {name: [100 * getattr(own, name) for own in figures] for name in RequestFigures._fields} if figures else {}

    def report_sections(self) -> list[Section]:
        """Facts before and after, and of an edit made by this callback the survival of edits and the spectrum."""
        sections = edit_sections(self._edited, self.before, self.after)
        if self._course and next(reversed(self.applied), None) in self.stack.ids:
            directions = {layer: UsedDirections(*found) for layer, found in self._course["directions"].items()}
            sections += [*survival_section(self._course["survival"]), *spectrum_section(directions, self._course["rule"])]
        return sections

    def _patched(self) -> list[EditRequest]:
        """The requests of all patches, but those that a later patch answered anew."""
        standing: list[EditRequest] = []
        for patch in self.stack.patches:
            if patch.kind == self.kind:
                requests = [_request(plain, number) for number, plain in enumerate(patch.requests)]
                standing = [*_unasked(standing, requests), *requests]
        return standing

    def _name(self, editor: AlphaEditor, layer: int) -> str:
        weight = editor.projections[layer].weight
        return next(canonical_name(name) for name, parameter in editor.model.named_parameters() if parameter is weight)

    def _outcome(self, number: int) -> dict[str, Any]:
        """What became of a request, for the patch."""
        outcome: dict[str, Any] = {name: value for name, value in self.records[number]._asdict().items() if name != "fact"}
        for when, findings in (("before", self.before), ("after", self.after)):
            shares = {name: value for name, value in findings.requests[number]._asdict().items() if not math.isnan(value)}
            outcome[when] = {**shares, **({"says": findings.answers[number]} if number < len(findings.answers) else {})}
        return outcome

    def _delta(self, editor: AlphaEditor, layer: int) -> Delta:
        projection = editor.projections[layer]
        if self.settings.method == "fine_tune":
            return Delta(editor.change(layer))
        update = editor.update(layer)
        rank, (rows, columns) = update.up.shape[1], projection.weight.shape
        if rank * (rows + columns) >= rows * columns:
            return Delta(projection.oriented(update.dense()))
        if projection.transposed:
            update = LowRank(update.down.T, update.up.T)
        return Delta(update.up, update.down)

    def _requests(self, trainer: Trainer) -> list[EditRequest]:
        if self.requests is None:
            found: Sequence[EditRequest] = _of_data(trainer, "edit_requests", "requests=... (a JSONL file or a list)")
            self.requests = checked(found, "the data module")
        return self.requests

    def _texts(self, trainer: Trainer) -> list[str]:
        if self.texts is None:
            self.texts = list(_of_data(trainer, "edit_texts", "texts=... (a file or a list)"))
        if isinstance(self.texts, str):
            self.texts = read_texts(Path(self.texts))
        if not self.texts:
            raise MisconfigurationException("AlphaEdit has no text to learn from what the model should go on saying; give some with texts=...")
        return self.texts

    def _measured(self, trainer: Trainer) -> list[str]:
        """Texts whose perplexity is measured: the data module's, or the first of those given."""
        held = getattr(getattr(trainer, "datamodule", None), "measured_texts", None)
        return list(held) if held else self._texts(trainer) if self.texts is not None else []

    def _tokenizer(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        for owner in (pl_module, getattr(trainer, "datamodule", None)):
            tokenizer = getattr(owner, "tokenizer", None)
            if tokenizer is not None and not isinstance(tokenizer, str):
                return tokenizer
        raise MisconfigurationException("AlphaEdit needs the model's tokenizer: give the module or the data module an attribute `tokenizer`")


def _of_data(trainer: Trainer, name: str, instead: str) -> Any:
    found = getattr(getattr(trainer, "datamodule", None), name, None)
    if found is None:
        raise MisconfigurationException(f"AlphaEdit needs {instead}, or a data module that has `{name}`")
    return found


def _plain(request: EditRequest) -> dict[str, Any]:
    """A request for the patch, without the texts of its references, which may be many times all else."""
    return {name: value for name, value in request.as_plain().items() if name != "references"}


def _request(plain: Mapping[str, Any], number: int) -> EditRequest:
    """A request as a patch holds it."""
    return request_of({field.name: plain[field.name] for field in dataclass_fields(EditRequest) if field.name in plain}, number)


def _unasked(earlier: Sequence[EditRequest], later: Sequence[EditRequest]) -> list[EditRequest]:
    """Earlier requests whose questions are not answered anew."""
    anew = {request.question for request in later}
    return [request for request in earlier if request.question not in anew]


def _directions(editor: AlphaEditor) -> dict[int, list[Any]]:
    """Return the fields of :class:`UsedDirections` of each layer, as plain data."""
    return {layer: [spectrum.values.cpu(), editor.retained(layer)] for layer, spectrum in editor.spectra.items()}


def _rule(settings: EditSettings) -> str:
    if settings.method != "alpha_edit":
        return f"{settings.method} may use all of them"
    return f"threshold {settings.threshold.mode} {settings.threshold.value:g}"
