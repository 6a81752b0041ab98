"""AlphaEdit after training: facts in, a patch out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from malleable.callbacks.post_fit import PostFitEdit
from malleable.datamodules.requests import EditRequest, checked, read_requests, request_of
from malleable.lightning_modules.editing.editor import AlphaEditor, Edited, EditSettings, undisturbed
from malleable.lightning_modules.editing.protocol import measure, perplexity, summary
from malleable.lightning_modules.editing.statistics import StatisticsSettings
from malleable.lightning_modules.editing.targets import Fact
from malleable.lightning_modules.functional.null_space import LowRank
from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.names import canonical_name
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.plain import from_plain

log = logging.getLogger(__name__)


class AlphaEdit(PostFitEdit):
    """Edits facts in a trained decoder, in the null space of what its MLPs read.

    Args:
        requests: Facts: a JSONL file, a list of objects with ``prompt``, ``subject`` and ``target``; default: the data module's ``edit_requests``.
        settings: How they are edited.
        texts: What the model should go on saying: a text file, a paragraph a line, or a list; default: the data module's ``edit_texts``.
        statistics: How second moments are taken over it.
        statistics_file: Where these are kept and taken up; default: nowhere.
        measured_texts: Texts of which perplexity is measured before and after.
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
        measured_texts: int = 100,
        model: str = "model",
        start: Literal["best", "last"] = "best",
    ) -> None:
        super().__init__(model, start)
        self.settings: EditSettings = from_plain(EditSettings, settings) or EditSettings()
        self.statistics: StatisticsSettings = from_plain(StatisticsSettings, statistics) or StatisticsSettings()
        self.statistics_file = None if statistics_file is None else Path(statistics_file)
        self.texts = texts
        self.measured_texts = measured_texts
        # Read at once: a wrong line should not wait for the end of training.
        self.requests: list[EditRequest] | None = None
        if isinstance(requests, str):
            self.requests = read_requests(Path(requests))
        elif requests is not None:
            self.requests = checked([request_of(fields, number) for number, fields in enumerate(requests)], "requests")
        self.records: list[Edited] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find requests, text and tokenizer before any long work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._requests(trainer)
            self._tokenizer(trainer, pl_module)
            if self.settings.needs_text:
                self._texts(trainer)

    def make_patch(self, trainer: Trainer, pl_module: LightningModule, model: nn.Module) -> Patch:
        """Edit, turn the updates into deltas, and take the edits back."""
        requests = self._requests(trainer)
        editor = AlphaEditor(model, self._tokenizer(trainer, pl_module), self.settings)
        if self.settings.needs_text:
            editor.fit_statistics(self._texts(trainer), self.statistics, self.statistics_file)
        before = self._figures(editor, requests)
        self.records = editor.edit([Fact(request.prompt, request.subject, request.target) for request in requests])
        after = self._figures(editor, requests)
        if drift := editor.drift():
            after["drift"] = sum(drift.values()) / len(drift)
        deltas = {self._name(editor, layer): self._delta(editor, layer) for layer in editor.layers}
        editor.revert()
        settings = {**asdict(self.settings), "layers": list(editor.layers), "contexts_drawn": editor.contexts}
        about = [{**request.as_plain(), **_outcome(record)} for request, record in zip(requests, self.records, strict=True)]
        title = f"{len(requests)} facts, {self.settings.method}, layers {editor.layers[0]} to {editor.layers[-1]}"
        return self.patch(model, deltas, title=title, requests=about, settings=settings, figures={"before": before, "after": after})

    def _figures(self, editor: AlphaEditor, requests: Sequence[EditRequest]) -> dict[str, float]:
        with undisturbed(editor.model):
            figures: dict[str, float] = summary(measure(editor.model, editor.reader, requests))
            if isinstance(self.texts, list) and self.measured_texts:
                figures["perplexity"] = perplexity(editor.model, editor.tokenizer, self.texts[: self.measured_texts])
        return figures

    def _name(self, editor: AlphaEditor, layer: int) -> str:
        weight = editor.projections[layer].weight
        return next(canonical_name(name) for name, parameter in editor.model.named_parameters() if parameter is weight)

    def _delta(self, editor: AlphaEditor, layer: int) -> Delta:
        update, projection = editor.update(layer), editor.projections[layer]
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
            self.texts = list(_of_data(trainer, "edit_texts", "texts=... (a text file or a list)"))
        if isinstance(self.texts, str):
            path = Path(self.texts)
            if not path.is_file():
                raise MisconfigurationException(f"AlphaEdit(texts={str(path)!r}): there is no such file; give a text file, a paragraph a line")
            self.texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not self.texts:
            raise MisconfigurationException("AlphaEdit has no text to learn from what the model should go on saying; give some with texts=...")
        return self.texts

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


def _outcome(record: Edited) -> dict[str, Any]:
    return {
        "batch": record.batch,
        "loss": record.loss,
        "nll": record.nll,
        "steps": record.steps,
        "change": record.change,
        "lacking": list(record.lacking),
    }
