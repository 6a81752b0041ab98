"""Evaluation of edits: before and after the edit, between its batches, and in every test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from malleable.callbacks.editing.edit_report import edit_sections, survival_section
from malleable.callbacks.editing.patched_model import PatchedModel, patch_callbacks
from malleable.callbacks.report.page import Column, Section
from malleable.datamodules.editing.requests import EditRequest, load_requests, parse_request, without_replaced
from malleable.datamodules.language.texts import read_texts
from malleable.lightning_modules.editing.evaluation import EvaluationResult, Protocol, SurvivalEvaluation, evaluate_edits
from malleable.lightning_modules.metrics.editing import RequestFigures
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.serialization import from_plain
from malleable.lightning_modules.synchronized_logging import log_synchronized


class EditEvaluation(PatchedModel):
    """Evaluate edit requests before and after an edit, after each of its batches, and in every test.

    It evaluates every :class:`~malleable.callbacks.editing.post_fit.PostFitEdit` of the Trainer. The order in the list of callbacks does not matter.
    It also evaluates checkpoints that contain patches, and models that were not edited. ``test`` logs the metrics of the model with all patches. The
    report also contains the metrics without patches, and the answers to each request. The patch stores the metrics before and after the edit.

    Args:
        protocol: Settings of the evaluation.
        requests: Edit requests: a JSONL file, or a list of objects with ``prompt``, ``subject`` and ``target``. Default: the requests of the
            edit. Without an edit, those of the patches. Without patches, those given to an edit callback, or ``edit_requests`` of the data module.
        texts: Texts for perplexity: a list, or a file that :func:`~malleable.datamodules.language.texts.read_texts` can read. Default:
            ``measured_texts`` of the data module. If there are no texts, perplexity is not measured.
        model: Name of the LightningModule's attribute that contains the Hugging Face model.

    Attributes:
        before: Results before the edit; in a test, results without patches.
        after: Results with all patches.
        measured: Requests that were evaluated for ``before`` and ``after``.
    """

    def __init__(
        self,
        protocol: Protocol | None = None,
        requests: str | list[dict[str, Any]] | None = None,
        texts: str | list[str] | None = None,
        model: str = "model",
    ) -> None:
        super().__init__(model)
        self.protocol: Protocol = from_plain(Protocol, protocol) or Protocol()
        self.requests = load_requests(requests)
        self.texts = texts
        self.before, self.after = EvaluationResult(), EvaluationResult()
        self.measured: list[EditRequest] = []
        self._edited: tuple[str, ...] = ()  # ids of the patches that were applied between `before` and `after`
        self._batches: SurvivalEvaluation | None = None
        self._survival: dict[str, Any] = {}

    @property
    def headline_metrics(self) -> tuple[str, ...]:
        """Names of the main metrics; empty before an evaluation."""
        names = ("efficacy", "generalization", "specificity", "efficacy_exact", "specificity_exact", "fluency", "consistency", "perplexity")
        return names if self.after.requests else ()

    def state_dict(self) -> dict[str, Any]:
        """Return the survival of edits (their efficacy after later batches), which a resumed run does not measure again."""
        return {"survival": self._survival}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the survival of edits (their efficacy after later batches)."""
        self._survival = dict(state_dict["survival"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check tokenizer and texts before training."""
        self.find_model(pl_module)
        self.find_tokenizer(trainer, pl_module)
        self._texts(trainer)

    def before_edit(self, trainer: Trainer, pl_module: LightningModule, selected: Sequence[EditRequest]) -> None:
        """Evaluate the model before an edit; every rank must call this method.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule, without the edit.
            selected: Requests of the edit; may be empty.
        """
        self.measured = self._choose_requests(trainer, selected)
        self.after, self._edited, self._batches = EvaluationResult(), (), None
        self.before = self._evaluate(trainer, pl_module)

    def after_batch(self, trainer: Trainer, pl_module: LightningModule, edited: Sequence[EditRequest], batch_size: int) -> None:
        """Measure the efficacy of the facts edited so far; every rank must call this method after each batch of an edit.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule, with the edits so far.
            edited: Requests edited so far, in order.
            batch_size: Number of requests of a batch.
        """
        if self.protocol.survival:
            self._batches = self._batches or SurvivalEvaluation(batch_size, self.protocol.max_rows)
            self._batches.update(self.find_model(pl_module), self.find_tokenizer(trainer, pl_module), edited)

    def after_edit(self, trainer: Trainer, pl_module: LightningModule, patch: Patch) -> Patch:
        """Evaluate the model after an edit; every rank must call this method.

        Args:
            trainer: The Trainer.
            pl_module: The LightningModule, with the patch.
            patch: The patch.

        Returns:
            The patch with the metrics before and after it.
        """
        self.after = self._evaluate(trainer, pl_module)
        self._edited = (*patch.requires, patch.id)
        if self._batches is not None:
            self._survival = {"patch": patch.id, **self._batches.compute()}
        if not self.after.requests:
            return patch
        figures = {when: {**result.figures, **patch.figures.get(when, {})} for when, result in self._results().items()}
        self.after.figures.update(figures["after"])
        return replace(patch, figures=figures, requests=self._with_outcomes(patch.requests))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the model with all patches, and again without patches if it has any."""
        before = self.before if self._edited == self.stack.ids and len(self._edited) == 1 else None
        earlier, self.measured = self.measured, self._choose_requests(trainer, ())
        self.after = self._evaluate(trainer, pl_module)
        if not self.stack.patches:
            self.before = EvaluationResult()
        elif before is None or not before.requests or earlier != self.measured:
            with self.originals(self.find_model(pl_module)):
                self.before = self._evaluate(trainer, pl_module)
        drift = self.stack.patches[0].figures.get("after", {}).get("drift") if len(self.stack.patches) == 1 else None
        if self.after.requests and drift is not None:
            # The drift is measured on the update of each layer, so it is not known for several patches together.
            self.after.figures["drift"] = drift

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics of the model with all patches, and its perplexity divided by the perplexity without patches."""
        figures = {f"test_{name}": value for name, value in self.after.figures.items() if name != "perplexity"}
        if "perplexity" in self.before.figures:
            figures["test_perplexity_ratio"] = self.after.figures["perplexity"] / self.before.figures["perplexity"]
        for name, value in figures.items():
            log_synchronized(pl_module, name, value)

    def report_columns(self) -> list[Column]:
        """Return the metrics before the edit."""
        return [Column("before the edit", "before", self.before.figures)] if self.before.figures else []

    def report_rows(self) -> dict[str, list[float]]:
        """Return the metrics of each request, in percent."""
        rows = self.after.requests
        return {name: [100 * getattr(row, name) for row in rows] for name in RequestFigures._fields} if rows else {}

    def report_sections(self) -> list[Section]:
        """Return the table of requests before and after the edit, and the survival of edits if it was measured after each batch."""
        survival = self._survival if self._survival.get("patch") in self.stack.ids else {}
        return [*edit_sections(self.measured, self.before, self.after), *survival_section(survival)]

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> EvaluationResult:
        if not self.measured:
            return EvaluationResult()
        tokenizer = self.find_tokenizer(trainer, pl_module)
        return evaluate_edits(self.find_model(pl_module), tokenizer, self.measured, self._texts(trainer), self.protocol)

    def _choose_requests(self, trainer: Trainer, selected: Sequence[EditRequest]) -> list[EditRequest]:
        """Return the requests to evaluate: the argument ``requests``, or those of the edit, of the patches or of the run, in this order."""
        if self.requests is not None:
            return self.requests
        if selected:
            return list(selected)
        of_run = _requests_of_run(trainer)
        # Patches do not store references.
        references = {request.question: request.references for request in of_run}
        patched = patched_requests(self.stack.patches)
        return [replace(request, references=references.get(request.question, ())) for request in patched] or of_run

    def _texts(self, trainer: Trainer) -> list[str]:
        if isinstance(self.texts, str):
            self.texts = read_texts(Path(self.texts))
        if self.texts is not None:
            return self.texts
        return list(getattr(getattr(trainer, "datamodule", None), "measured_texts", None) or ())

    def _results(self) -> dict[str, EvaluationResult]:
        return {"before": self.before, "after": self.after}

    def _with_outcomes(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the requests of a patch. If they are equal to the measured requests, add the results of each request."""
        if [(request.get("prompt"), request.get("subject")) for request in requests] != [request.question for request in self.measured]:
            return [dict(request) for request in requests]
        found = []
        for number, request in enumerate(requests):
            outcome = dict(request.get("outcome", {}))
            for when, result in self._results().items():
                shares = {name: value for name, value in result.requests[number]._asdict().items() if not math.isnan(value)}
                outcome[when] = {**shares, **({"answer": result.answers[number]} if number < len(result.answers) else {})}
            found.append({**request, "outcome": outcome})
        return found


def patched_requests(patches: Sequence[Patch]) -> list[EditRequest]:
    """Return the edit requests of patches, in order, without those that a later patch replaced. Requests of other kinds are skipped."""
    names = {field.name for field in dataclass_fields(EditRequest)}
    current: list[EditRequest] = []
    for patch in patches:
        own = [request for request in patch.requests if {"prompt", "subject", "target"} <= request.keys()]
        requests = [parse_request({name: value for name, value in request.items() if name in names}, number) for number, request in enumerate(own)]
        current = [*without_replaced(current, requests), *requests]
    return current


def _requests_of_run(trainer: Trainer) -> list[EditRequest]:
    """Return the requests given to edits, or those of the data module."""
    given = [request for callback in patch_callbacks(trainer) for request in callback.requests or ()]
    return given or list(getattr(getattr(trainer, "datamodule", None), "edit_requests", None) or ())
