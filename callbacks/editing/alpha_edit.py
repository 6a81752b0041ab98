"""AlphaEdit and its baselines as a callback: edits facts after training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from malleable.callbacks.editing.edit_evaluation import patched_requests
from malleable.callbacks.editing.edit_report import UsedDirections, spectrum_section
from malleable.callbacks.editing.post_fit import PostFitEdit
from malleable.callbacks.report.page import Section
from malleable.datamodules.editing.requests import EditRequest, check_requests, load_requests, without_replaced
from malleable.datamodules.language.texts import read_texts
from malleable.lightning_modules.editing.editor import AlphaEditor
from malleable.lightning_modules.editing.known import KnownFacts, known_requests
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.statistics import StatisticsSettings
from malleable.lightning_modules.editing.targets import Fact
from malleable.lightning_modules.functional.editing.weight_update import LowRank
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.tensors import canonical_name
from malleable.lightning_modules.serialization import from_plain

log = logging.getLogger(__name__)


class AlphaEdit(PostFitEdit):
    """Edit facts in a trained decoder. Weights change only in the null space of the inputs that the edited MLP projections receive on other text.

    The callback makes the edit only. Add :class:`~malleable.callbacks.editing.edit_evaluation.EditEvaluation` to measure it.

    Args:
        requests: Facts to edit: a JSONL file, or a list of objects with ``prompt``, ``subject`` and ``target``. Default: ``edit_requests`` of the
            data module.
        settings: Method and hyper-parameters.
        texts: Texts that the edit preserves: a list, or a file that :func:`~malleable.datamodules.language.texts.read_texts` can read. Default:
            ``edit_texts`` of the data module.
        statistics: How second moments of the text are computed.
        statistics_file: File to store the second moments in and load them from; ``{hash}`` in its name is replaced by a hash of model, text and
            settings. Default: they are not stored.
        known: Edit only facts that the model answers correctly before the edit. Default: all requests.
        model: Name of the LightningModule's attribute that contains the Hugging Face model.
        start: Weights to edit: ``best`` for those of the best checkpoint of the run, ``last`` for those after the last step.

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
        model: str = "model",
        start: Literal["best", "last"] = "best",
    ) -> None:
        super().__init__(model, start)
        self.settings: EditSettings = from_plain(EditSettings, settings) or EditSettings()
        self.statistics: StatisticsSettings = from_plain(StatisticsSettings, statistics) or StatisticsSettings()
        self.statistics_file = None if statistics_file is None else Path(statistics_file)
        self.known: KnownFacts | None = from_plain(KnownFacts, known)
        self.texts = texts
        # Read here, so that an invalid line is reported before training.
        self.requests = load_requests(requests)
        self._spectrum: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the base class, and the spectrum (eigenvalues of the second moments) of the last edit for the report."""
        return {**super().state_dict(), "spectrum": self._spectrum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the base class and the spectrum of the last edit."""
        super().load_state_dict(state_dict)
        self._spectrum = dict(state_dict["spectrum"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check requests, text, tokenizer and model before training."""
        requests = self._requests(trainer)
        if self.settings.needs_text:
            self._texts(trainer)
        AlphaEditor(self.find_model(pl_module), self.find_tokenizer(trainer, pl_module), self.settings).check(list(map(Fact.from_request, requests)))

    def identity(self, trainer: Trainer) -> Any:
        """Return the requests."""
        return [_without_references(request) for request in self._requests(trainer)]

    def select_requests(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Sequence[EditRequest]:
        """Return the requests. If ``known`` is set, return only requests whose facts the model answers correctly before the edit."""
        requests = self._requests(trainer)
        if self.known is None:
            return requests
        found = known_requests(model, self.find_tokenizer(trainer, pl_module), requests, self.known)
        log.info("editing %s of %s requests: the model answers these facts correctly before the edit", len(found), len(requests))
        return found

    def make_patch(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Patch:
        """Edit the selected requests in batches, and return the changes of the weights as a patch."""
        editor = AlphaEditor(model, self.find_tokenizer(trainer, pl_module), self.settings)
        self._prepare(trainer, editor)
        evaluation = self.find_evaluation(trainer)
        requests, size = self.selected, self.settings.batch_size
        try:
            for start in range(0, len(requests), size):
                editor.edit(list(map(Fact.from_request, requests[start : start + size])))
                if evaluation is not None:
                    evaluation.after_batch(trainer, pl_module, requests[: start + size], size)
            deltas = {_tensor_name(editor, layer): _delta(editor, layer) for layer in editor.layers}
            records, drift = editor.records, editor.drift()
        finally:
            editor.revert()
        self._spectrum = {"rule": _describe_threshold(self.settings), "directions": _used_directions(editor)}
        outcomes = [{name: value for name, value in record._asdict().items() if name != "fact"} for record in records]
        return self.patch(
            model,
            deltas,
            title=f"{len(requests)} facts, {self.settings.method}, layers {editor.layers[0]} to {editor.layers[-1]}",
            requests=[{**_without_references(request), "outcome": outcome} for request, outcome in zip(requests, outcomes, strict=True)],
            settings={**asdict(self.settings), "layers": list(editor.layers), "contexts_drawn": editor.contexts},
            figures={"after": {"drift": sum(drift.values()) / len(drift)}} if drift else {},
        )

    def _prepare(self, trainer: Trainer, editor: AlphaEditor) -> None:
        """Compute the second moments of the text, and the keys of facts that earlier patches edited."""
        if self.settings.needs_text:
            # Computed on the model without patches, so that all edits of a model can use the same file.
            with self.originals(editor.model):
                editor.fit_statistics(self._texts(trainer), self.statistics, self.statistics_file)
        if self.settings.preserve_past:
            editor.preserve(list(map(Fact.from_request, without_replaced(patched_requests(self.stack.patches), self.selected))))

    def report_sections(self) -> list[Section]:
        """Return a section with the spectrum of the second moments; an empty list if the last patch of this callback is not applied."""
        if not self._spectrum or next(reversed(self.applied), None) not in self.stack.ids:
            return []
        directions = {layer: UsedDirections(*found) for layer, found in self._spectrum["directions"].items()}
        return spectrum_section(directions, self._spectrum["rule"])

    def _requests(self, trainer: Trainer) -> list[EditRequest]:
        if self.requests is None:
            self.requests = check_requests(_from_datamodule(trainer, "edit_requests", "requests=... (a JSONL file or a list)"), "the data module")
        return self.requests

    def _texts(self, trainer: Trainer) -> list[str]:
        if self.texts is None:
            self.texts = list(_from_datamodule(trainer, "edit_texts", "texts=... (a file or a list)"))
        if isinstance(self.texts, str):
            self.texts = read_texts(Path(self.texts))
        if not self.texts:
            raise MisconfigurationException(
                "AlphaEdit needs texts that the edit preserves, but the list or file is empty; give texts=... (a file or a list)"
            )
        return self.texts


def _from_datamodule(trainer: Trainer, name: str, instead: str) -> Any:
    found = getattr(getattr(trainer, "datamodule", None), name, None)
    if found is None:
        raise MisconfigurationException(f"AlphaEdit needs {instead}, or a data module that has `{name}`")
    return found


def _without_references(request: EditRequest) -> dict[str, Any]:
    """Return a request as plain data, without the reference texts, which may be many times as long as the rest."""
    return {name: value for name, value in request.as_plain().items() if name != "references"}


def _tensor_name(editor: AlphaEditor, layer: int) -> str:
    weight = editor.projections[layer].weight
    return next(canonical_name(name) for name, parameter in editor.model.named_parameters() if parameter is weight)


def _delta(editor: AlphaEditor, layer: int) -> Delta:
    """Return the weight change of a layer, in factored form if that takes less memory."""
    projection = editor.projections[layer]
    if editor.settings.method == "fine_tune":
        return Delta(editor.change(layer))
    update = editor.update(layer)
    rank, (rows, columns) = update.up.shape[1], projection.weight.shape
    if rank * (rows + columns) >= rows * columns:
        return Delta(projection.oriented(update.dense()))
    if projection.transposed:
        update = LowRank(update.down.T, update.up.T)
    return Delta(update.up, update.down)


def _used_directions(editor: AlphaEditor) -> dict[int, list[Any]]:
    """Return the fields of :class:`UsedDirections` of each layer, as plain data."""
    return {layer: [spectrum.values.cpu(), editor.retained(layer)] for layer, spectrum in editor.spectra.items()}


def _describe_threshold(settings: EditSettings) -> str:
    if settings.method != "alpha_edit":
        return f"{settings.method} may change all directions"
    return f"threshold {settings.threshold.mode} {settings.threshold.value:g}"
