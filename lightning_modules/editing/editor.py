"""AlphaEdit and its baselines on a bare decoder: batches of facts in, changed weights and their low-rank updates out.

Shapes: u facts of a batch, n keys of earlier batches, d width of a key, v width of the residual stream.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from malleable.datamodules.editing.requests import PLACEHOLDER
from malleable.lightning_modules.editing.fine_tune import fine_tune
from malleable.lightning_modules.editing.layout import Layout, Projection, find_layout
from malleable.lightning_modules.editing.passes import check_additive, stopping
from malleable.lightning_modules.editing.prompts import Reader, draw_contexts
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.statistics import StatisticsSettings, second_moments
from malleable.lightning_modules.editing.targets import ROWS, Fact, Targets, find_targets
from malleable.lightning_modules.editing.undisturbed import undisturbed
from malleable.lightning_modules.functional.editing.null_space import (
    Covariance,
    KeyMetric,
    LowRank,
    NullSpace,
    NullSpaceRidge,
    Ridge,
    SecondMoment,
    Spectrum,
    compress_keys,
    mean_drift,
    solve_update,
)
from malleable.lightning_modules.functional.ranks import on_first_rank, rank, world_size

log = logging.getLogger(__name__)

# Where published settings begin and end, as shares of a decoder's depth (Llama-3-8B: 4 to 8 of 32).
DEPTH = (0.125, 0.25)


class Edited(NamedTuple):
    """What became of a fact.

    Attributes:
        fact: The fact.
        batch: Number of its batch, from 0.
        loss: Of its target, at the end of the search.
        nll: Negative log-likelihood of a token of the answer with the target in place, nats.
        steps: Steps of the search.
        change: Length of the target's change, as a share of the residual stream's.
        residuals: Norm of the remaining residual (target minus residual stream) before each layer is changed, relative to the norm of the
            whole change; the last entry is after all layers.
    """

    fact: Fact
    batch: int
    loss: float
    nll: float
    steps: int
    change: float
    residuals: tuple[float, ...]


class AlphaEditor:
    """Edits facts in the weights of a decoder, batch after batch.

    The model is changed in place; :attr:`updates` holds by how much. Flags, mode and hooks are left as they were.

    In a run of several ranks all of them call :meth:`fit_statistics`, :meth:`remember` and :meth:`edit`. Statistics are shared among the ranks; a
    batch is edited on the first rank, and the others add its updates, so that ranks cannot disagree. Keys are held on the first rank only.

    Args:
        model: A Hugging Face decoder, wrapped by adapters or not; matrices that an adapter wraps are edited themselves.
        tokenizer: Its fast tokenizer.
        settings: See there.

    Raises:
        ValueError: If the model has nothing to edit, or the residual stream gets something else than its MLPs give.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: EditSettings | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or EditSettings()
        self.layout: Layout = find_layout(model, self.settings.block, self.settings.projection)
        self.layers = self._layers()
        self.reader = Reader(tokenizer, self.settings.fact_token)
        self.projections: dict[int, Projection] = {layer: self.layout.projection_of(model, layer) for layer in self.layers}
        text = torch.tensor([tokenizer("The model")["input_ids"]], device=self.device)
        with undisturbed(self.model):
            for layer in self.layers:
                check_additive(model, self.layout, layer, text)
        self.moments: dict[int, Tensor] = {}
        self.spectra: dict[int, Spectrum] = {}
        self.contexts: list[str] = []
        self.keys: dict[int, Tensor] = {}
        self.updates: dict[int, list[LowRank]] = {layer: [] for layer in self.layers}
        self.records: list[Edited] = []
        # The matrices before the first edit, and the sum of all updates: in half precision one update at a time would be rounded away.
        self._originals: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._metrics: dict[int, KeyMetric] = {}
        self._batch = 0
        # Updates of the batch that is being edited, for the other ranks.
        self._added: dict[int, LowRank | Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def _layers(self) -> tuple[int, ...]:
        number = self.layout.num_layers(self.model)
        if self.settings.layers is None:
            first, last = (round(share * number) for share in DEPTH)
            return tuple(range(min(first, number - 1), min(last, number - 1) + 1))
        wrong = [layer for layer in self.settings.layers if not 0 <= layer < number]
        if wrong:
            raise ValueError(f"layers {wrong} do not exist: {type(self.model).__name__} has {number}, from 0 to {number - 1}")
        return tuple(self.settings.layers)

    def fit_statistics(self, texts: Sequence[str], settings: StatisticsSettings | None = None, file: Path | None = None) -> None:
        """Learn from text which directions of its keys the model uses; to be called before the first edit.

        Args:
            texts: What the model should go on saying.
            settings: See there.
            file: Where the sums are kept and taken up.
        """
        with undisturbed(self.model):
            self.use_moments(second_moments(self.model, self.layout, self.layers, self.tokenizer, texts, settings, file))

    def use_moments(self, moments: dict[int, SecondMoment]) -> None:
        """Take second moments that are known already, by layer."""
        self._metrics = {}
        for layer in self.layers:
            # One at a time where the model is; what is not needed there waits on the CPU.
            moment = moments[layer].mean().to(self.device)
            spectrum = Spectrum.of(moment)
            self.moments[layer] = moment.cpu()
            self.spectra[layer] = Spectrum(*(part.cpu() for part in spectrum))

    def metric(self, layer: int) -> KeyMetric:
        """What a change of a layer costs.

        Raises:
            ValueError: If second moments are needed and missing.
        """
        if layer not in self._metrics:
            self._metrics[layer] = self._make_metric(layer)
        return self._metrics[layer]

    def _make_metric(self, layer: int) -> KeyMetric:
        settings = self.settings
        if not settings.needs_text:
            return Ridge(settings.ridge)
        if layer not in self.spectra:
            raise ValueError(f"{settings.method} needs second moments of text: call fit_statistics(texts) before edit(...)")
        spectrum = Spectrum(*(part.to(self.device) for part in self.spectra[layer]))
        if settings.method == "memit":
            return Covariance(spectrum, settings.moment_weight)
        space = NullSpace(spectrum, settings.threshold.retained(spectrum.values))
        log.info("layer %s: %s of %s directions may change", layer, space.retained, len(spectrum.values))
        return NullSpaceRidge(space, settings.ridge)

    def retained(self, layer: int) -> int | None:
        """Number of directions of a layer's keys that edits may use; ``None`` under methods without a null space."""
        metric = self.metric(layer)
        return metric.null_space.retained if isinstance(metric, NullSpaceRidge) else None

    def edit(self, facts: Sequence[Fact]) -> list[Edited]:
        """Change the weights so that facts hold, in batches, each on the model as the earlier ones left it.

        Args:
            facts: What is to hold.

        Returns:
            What became of each.

        Raises:
            ValueError: If a fact cannot be read, or its target was lost; the batches before it stay.
        """
        if self.settings.needs_text:
            for layer in self.layers:
                self.metric(layer)
        size = self.settings.batch_size
        with undisturbed(self.model):
            self._draw_contexts()
            for layer, projection in self.projections.items():
                self._originals.setdefault(layer, projection.weight.detach().clone())
            records: list[Edited] = []
            for start in range(0, len(facts), size):
                records += self._edit_batch(facts[start : start + size])
                log.info("batch %s: %s facts edited", self._batch, len(self.records))
            return records

    def _edit_batch(self, facts: Sequence[Fact]) -> list[Edited]:
        """Edit on the first rank, and take its updates over on the others."""
        edit = self._fine_tune if self.settings.method == "fine_tune" else self._edit
        self._added = {}

        def make() -> tuple[list[Edited], dict[int, LowRank | Tensor]]:
            records = edit(facts)
            return records, {layer: _moved(update, "cpu") for layer, update in self._added.items()} if world_size() > 1 else {}

        records, added = on_first_rank(make)
        if rank() > 0:
            for layer, update in added.items():
                self._add(layer, _moved(update, self.device))
        self.records += records
        self._batch += 1
        return records

    def remember(self, facts: Sequence[Fact]) -> None:
        """Keep facts that the model was given by earlier edits, made by another editor, through the edits to come.

        Their keys are read from the model as it stands; the editor's own batches are remembered without asking.

        Args:
            facts: What was edited.

        Raises:
            ValueError: If a fact cannot be read.
        """
        if not facts:
            return
        with undisturbed(self.model):
            self._draw_contexts()
            on_first_rank(lambda: self._keep(self._read(facts, self.layers)[0]))

    def _draw_contexts(self) -> None:
        if not self.contexts:
            drawn = on_first_rank(lambda: draw_contexts(self.model, self.tokenizer, self.settings.seed)) if self.settings.contexts else []
            self.contexts = [PLACEHOLDER, *drawn[: self.settings.contexts]]

    def _keep(self, keys: Mapping[int, Tensor]) -> None:
        for layer in self.layers:
            known = self.keys.get(layer)
            self.keys[layer] = compress_keys(keys[layer] if known is None else torch.cat([known, keys[layer]]))

    def _edit(self, facts: Sequence[Fact]) -> list[Edited]:
        targets = find_targets(self.model, self.layout, self.layers[-1], self.reader, facts, self.contexts, self.settings.targets)
        # Where the model gave the answer already, the change is zero: report a residual of zero instead of dividing by zero.
        scale = targets.change.norm(dim=1)
        scale = scale.masked_fill(scale == 0, torch.inf)
        residuals = []
        for number, layer in enumerate(self.layers):
            keys, values = self._read(facts, [layer])
            residual = targets.value - values
            residuals.append(residual.norm(dim=1) / scale)
            update = solve_update(keys[layer], residual / (len(self.layers) - number), self.metric(layer), self.keys.get(layer))
            self._add(layer, update)
        keys, values = self._read(facts, self.layers)
        residuals.append((targets.value - values).norm(dim=1) / scale)
        if self.settings.remember:
            self._keep(keys)
        return self._record(facts, targets, torch.stack(residuals, 1))

    def _record(self, facts: Sequence[Fact], targets: Targets, residuals: Tensor) -> list[Edited]:
        change = targets.change.norm(dim=1) / targets.start.norm(dim=1)
        columns = [values.tolist() for values in (targets.loss, targets.nll, targets.steps, change, residuals)]
        return [
            Edited(fact, self._batch, loss, nll, steps, part, tuple(residual))
            for fact, loss, nll, steps, part, residual in zip(facts, *columns, strict=True)
        ]

    def _fine_tune(self, facts: Sequence[Fact]) -> list[Edited]:
        before = {layer: projection.weight.detach().float().clone() for layer, projection in self.projections.items()}
        weights = [projection.weight for projection in self.projections.values()]
        losses, steps = fine_tune(self.model, weights, self.reader, facts, self.settings.tuning, self.settings.targets.max_rows or ROWS)
        for layer, projection in self.projections.items():
            self._add(layer, projection.weight.detach().float() - before[layer])
        return [Edited(fact, self._batch, loss, loss, steps, float("nan"), ()) for fact, loss in zip(facts, losses, strict=True)]

    @torch.no_grad()
    def _add(self, layer: int, update: LowRank | Tensor) -> None:
        """Write the original and the sum of all updates, rounded once."""
        projection = self.projections[layer]
        if isinstance(update, LowRank):
            update = LowRank(update.up.float(), update.down.float())
            self.updates[layer].append(update)
        self._added[layer] = update
        if isinstance(update, LowRank):
            update = projection.oriented(update.dense())
        if layer not in self._sums:
            self._sums[layer] = torch.zeros_like(self._originals[layer], dtype=torch.float)
        self._sums[layer] += update
        projection.weight.copy_(self._originals[layer].float() + self._sums[layer])

    @torch.no_grad()
    def _read(self, facts: Sequence[Fact], layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
        """Keys ``(u, d)`` of layers, and the residual stream ``(u, v)`` after the last layer, at the subjects.

        The bare prompt counts for half of a key, the contexts together for the other half.
        """
        number = len(self.contexts)
        weights = torch.full((number,), 0.5 / max(1, number - 1), dtype=torch.double, device=self.device)
        weights[0] = 0.5 if number > 1 else 1.0
        size = max(1, (self.settings.targets.max_rows or ROWS) // number)
        keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        values = []
        with stopping(self.model, self.layout, self.layers[-1], layers) as seen:
            for start in range(0, len(facts), size):
                part = facts[start : start + size]
                rows = self.reader.batch([self.reader.row(f.prompt, f.subject, context) for f in part for context in self.contexts], self.device)
                seen.run(**rows.inputs())
                assert seen.output is not None
                place = torch.arange(len(rows.position), device=self.device), rows.position
                for layer in layers:
                    inputs = seen.keys[layer].reshape(*rows.input_ids.shape, -1)[place].double()
                    keys[layer].append(torch.einsum("ucd,c->ud", inputs.view(len(part), number, -1), weights))
                values.append(seen.output[place].view(len(part), number, -1)[:, 0].float())
        return {layer: torch.cat(parts) for layer, parts in keys.items()}, torch.cat(values)

    def update(self, layer: int) -> LowRank:
        """Sum of all updates of a layer, one after another as a single product.

        Raises:
            ValueError: If there is none, or descent made them: that changes all directions.
        """
        parts = self.updates[layer]
        if not parts:
            raise ValueError(f"layer {layer} has no update of low rank: it was not edited, or by {self.settings.method}; see change(layer)")
        return LowRank(torch.cat([part.up for part in parts], 1), torch.cat([part.down for part in parts], 0))

    def change(self, layer: int) -> Tensor:
        """Sum of all updates of a layer in its parameter's shape, single precision.

        Raises:
            ValueError: If there is none.
        """
        if layer not in self._sums:
            raise ValueError(f"layer {layer} has not been edited")
        return self._sums[layer].clone()

    def check(self, facts: Sequence[Fact]) -> None:
        """Read facts, without editing anything.

        Raises:
            ValueError: If one cannot be read: no token overlaps its subject, or its answer has no tokens.
        """
        for fact in facts:
            self.reader.row(fact.prompt, fact.subject, answer=self.reader.answer(fact.target)[:-1])

    def drift(self) -> dict[int, float]:
        """Mean squared change of what each layer makes of the text of the second moments."""
        return {layer: mean_drift(self.update(layer), self.moments[layer]) for layer in self.layers if self.updates[layer] and layer in self.moments}

    @torch.no_grad()
    def revert(self) -> None:
        """Take all edits back, to the bit."""
        for layer, original in self._originals.items():
            self.projections[layer].weight.copy_(original)
        self._originals, self._sums, self.keys, self.records, self._batch = {}, {}, {}, [], 0
        self.updates = {layer: [] for layer in self.layers}


def _moved(update: LowRank | Tensor, device: torch.device | str) -> LowRank | Tensor:
    return LowRank(*(part.to(device) for part in update)) if isinstance(update, LowRank) else update.to(device)
