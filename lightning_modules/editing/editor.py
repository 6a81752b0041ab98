"""AlphaEdit and its baselines on a decoder without Lightning. Facts are edited in batches; the results are changed weights and low-rank updates.

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
from malleable.lightning_modules.editing.evaluation_mode import evaluation_mode
from malleable.lightning_modules.editing.fine_tune import fine_tune
from malleable.lightning_modules.editing.layout import Layout, Projection, find_layout
from malleable.lightning_modules.editing.partial_forward import capture_until, check_additive
from malleable.lightning_modules.editing.prompts import PromptEncoder, generate_contexts
from malleable.lightning_modules.editing.settings import EditSettings
from malleable.lightning_modules.editing.statistics import StatisticsSettings, second_moments
from malleable.lightning_modules.editing.targets import MAX_ROWS, Fact, Targets, find_targets
from malleable.lightning_modules.functional.editing.null_space import NullSpace
from malleable.lightning_modules.functional.editing.second_moments import SecondMoment, Spectrum
from malleable.lightning_modules.functional.editing.weight_update import (
    Covariance,
    KeyMetric,
    LowRank,
    NullSpaceRidge,
    Ridge,
    compress_keys,
    mean_drift,
    solve_update,
)
from malleable.lightning_modules.functional.ranks import on_first_rank, rank, world_size

log = logging.getLogger(__name__)

# Default layers, as shares of the depth, from published settings (Llama-3-8B: layers 4 to 8 of 32).
DEPTH = (0.125, 0.25)


class EditRecord(NamedTuple):
    """Result of the edit of one fact.

    Attributes:
        fact: The fact.
        batch: Index of its batch.
        loss: Loss of its target vector at the end of the optimisation.
        nll: Negative log-likelihood of the answer with the target vector inserted, in nats, mean over tokens.
        steps: Number of optimizer steps.
        change: Norm of the difference of the target vector and the residual stream, relative to the norm of the residual stream.
        residuals: Norm of the remaining difference (target vector minus residual stream) before each layer is changed, and after the last one,
            relative to the norm of the difference before the edit.
    """

    fact: Fact
    batch: int
    loss: float
    nll: float
    steps: int
    change: float
    residuals: tuple[float, ...]


class AlphaEditor:
    """Editor of facts in the weights of a decoder.

    The model is changed in place; :attr:`updates` contains the changes. Gradient flags, training mode and hooks are not changed.

    In a distributed run, every rank must call :meth:`fit_statistics`, :meth:`preserve` and :meth:`edit`. The second moments are computed by all ranks
    together. A batch is edited on the first rank, and the other ranks add its updates, so that all ranks have the same weights. Past keys are stored
    on the first rank only.

    Args:
        model: Hugging Face decoder, with or without adapters. If a matrix is wrapped by an adapter, the wrapped matrix is edited.
        tokenizer: Its fast tokenizer.
        settings: Method and hyper-parameters.

    Attributes:
        layers: Layers that are edited.
        moments: Second moment of the keys of each layer, ``(d, d)``.
        spectra: Eigenvalues and eigenvectors of the second moment of each layer.
        contexts: Contexts of the prompts; the first one is the empty context.
        past_keys: Keys ``(n, d)`` of earlier edits in each layer, whose values are preserved.
        updates: Low-rank updates of each layer, in order.
        records: Results of all edits.

    Raises:
        ValueError: If the model has no matrix to edit, or does not add the output of its MLPs to the residual stream unchanged.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: EditSettings | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings or EditSettings()
        self.layout: Layout = find_layout(model, self.settings.block, self.settings.projection)
        self.layers = self._select_layers()
        self.encoder = PromptEncoder(tokenizer, self.settings.fact_token)
        self.projections: dict[int, Projection] = {layer: self.layout.projection_of(model, layer) for layer in self.layers}
        text = torch.tensor([tokenizer("The model")["input_ids"]], device=self.device)
        with evaluation_mode(self.model):
            for layer in self.layers:
                check_additive(model, self.layout, layer, text)
        self.moments: dict[int, Tensor] = {}
        self.spectra: dict[int, Spectrum] = {}
        self.contexts: list[str] = []
        self.past_keys: dict[int, Tensor] = {}
        self.updates: dict[int, list[LowRank]] = {layer: [] for layer in self.layers}
        self.records: list[EditRecord] = []
        # Weights are computed as the original plus the sum of all updates: in half precision, single updates would be lost by rounding.
        self._originals: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._metrics: dict[int, KeyMetric] = {}
        self._batch = 0
        # Updates of the current batch, which are sent to the other ranks.
        self._batch_updates: dict[int, LowRank | Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def _select_layers(self) -> tuple[int, ...]:
        number = self.layout.num_layers(self.model)
        if self.settings.layers is None:
            first, last = (round(share * number) for share in DEPTH)
            return tuple(range(min(first, number - 1), min(last, number - 1) + 1))
        wrong = [layer for layer in self.settings.layers if not 0 <= layer < number]
        if wrong:
            raise ValueError(f"layers {wrong} do not exist in {type(self.model).__name__}; select layers from 0 to {number - 1}")
        return tuple(self.settings.layers)

    def fit_statistics(self, texts: Sequence[str], settings: StatisticsSettings | None = None, file: Path | None = None) -> None:
        """Compute the second moments of the keys over text; must be called before the first edit.

        Args:
            texts: Text that the edits preserve.
            settings: Settings of the computation.
            file: File to store the second moments in and load them from.
        """
        with evaluation_mode(self.model):
            self.use_moments(second_moments(self.model, self.layout, self.layers, self.tokenizer, texts, settings, file))

    def use_moments(self, moments: dict[int, SecondMoment]) -> None:
        """Use second moments that were computed before, by layer."""
        self._metrics = {}
        for layer in self.layers:
            # Decomposed one at a time on the device of the model, and stored on the CPU to save device memory.
            moment = moments[layer].mean().to(self.device)
            spectrum = Spectrum.of(moment)
            self.moments[layer] = moment.cpu()
            self.spectra[layer] = Spectrum(*(part.cpu() for part in spectrum))

    def metric(self, layer: int) -> KeyMetric:
        """Return the penalty of updates of a layer.

        Raises:
            ValueError: If the method needs second moments, and :meth:`fit_statistics` was not called.
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
        log.info("layer %s: edits may change %s of %s directions", layer, space.retained, len(spectrum.values))
        return NullSpaceRidge(space, settings.ridge)

    def retained(self, layer: int) -> int | None:
        """Return the number of directions of a layer's keys that edits may change; ``None`` for methods without a null space."""
        metric = self.metric(layer)
        return metric.null_space.retained if isinstance(metric, NullSpaceRidge) else None

    def edit(self, facts: Sequence[Fact]) -> list[EditRecord]:
        """Edit facts in batches; each batch is applied to the result of the previous one.

        Args:
            facts: Facts to edit.

        Returns:
            Result of each edit.

        Raises:
            ValueError: If a fact cannot be encoded, or the optimisation of its target diverged. Earlier batches remain applied.
        """
        if self.settings.needs_text:
            for layer in self.layers:
                self.metric(layer)
        size = self.settings.batch_size
        with evaluation_mode(self.model):
            self._set_contexts()
            for layer, projection in self.projections.items():
                self._originals.setdefault(layer, projection.weight.detach().clone())
            records: list[EditRecord] = []
            for start in range(0, len(facts), size):
                records += self._edit_batch(facts[start : start + size])
                log.info("batch %s: %s facts edited so far", self._batch, len(self.records))
            return records

    def _edit_batch(self, facts: Sequence[Fact]) -> list[EditRecord]:
        """Edit a batch on the first rank, and add its updates on the other ranks."""
        edit = self._fine_tune if self.settings.method == "fine_tune" else self._edit
        self._batch_updates = {}

        def make() -> tuple[list[EditRecord], dict[int, LowRank | Tensor]]:
            records = edit(facts)
            return records, {layer: _to_device(update, "cpu") for layer, update in self._batch_updates.items()} if world_size() > 1 else {}

        records, updates = on_first_rank(make)
        if rank() > 0:
            for layer, update in updates.items():
                self._add_update(layer, _to_device(update, self.device))
        self.records += records
        self._batch += 1
        return records

    def preserve(self, facts: Sequence[Fact]) -> None:
        """Preserve facts that another editor has edited before, by adding their keys to :attr:`past_keys`.

        The keys are computed with the current weights. The facts of earlier batches of this editor are preserved automatically.

        Args:
            facts: Facts that were edited before.

        Raises:
            ValueError: If a fact cannot be encoded.
        """
        if not facts:
            return
        with evaluation_mode(self.model):
            self._set_contexts()
            on_first_rank(lambda: self._add_past_keys(self._keys_and_values(facts, self.layers)[0]))

    def _set_contexts(self) -> None:
        if not self.contexts:
            drawn = on_first_rank(lambda: generate_contexts(self.model, self.tokenizer, self.settings.seed)) if self.settings.contexts else []
            self.contexts = [PLACEHOLDER, *drawn[: self.settings.contexts]]

    def _add_past_keys(self, keys: Mapping[int, Tensor]) -> None:
        for layer in self.layers:
            past = self.past_keys.get(layer)
            self.past_keys[layer] = compress_keys(keys[layer] if past is None else torch.cat([past, keys[layer]]))

    def _edit(self, facts: Sequence[Fact]) -> list[EditRecord]:
        targets = find_targets(self.model, self.layout, self.layers[-1], self.encoder, facts, self.contexts, self.settings.targets)
        # If the model gave the answer already, the change is zero: report a residual of zero instead of dividing by zero.
        scale = targets.change.norm(dim=1)
        scale = scale.masked_fill(scale == 0, torch.inf)
        residuals = []
        for number, layer in enumerate(self.layers):
            keys, values = self._keys_and_values(facts, [layer])
            residual = targets.value - values
            residuals.append(residual.norm(dim=1) / scale)
            update = solve_update(keys[layer], residual / (len(self.layers) - number), self.metric(layer), self.past_keys.get(layer))
            self._add_update(layer, update)
        keys, values = self._keys_and_values(facts, self.layers)
        residuals.append((targets.value - values).norm(dim=1) / scale)
        if self.settings.preserve_past:
            self._add_past_keys(keys)
        return self._make_records(facts, targets, torch.stack(residuals, 1))

    def _make_records(self, facts: Sequence[Fact], targets: Targets, residuals: Tensor) -> list[EditRecord]:
        change = targets.change.norm(dim=1) / targets.start.norm(dim=1)
        columns = [values.tolist() for values in (targets.loss, targets.nll, targets.steps, change, residuals)]
        return [
            EditRecord(fact, self._batch, loss, nll, steps, part, tuple(residual))
            for fact, loss, nll, steps, part, residual in zip(facts, *columns, strict=True)
        ]

    def _fine_tune(self, facts: Sequence[Fact]) -> list[EditRecord]:
        before = {layer: projection.weight.detach().float().clone() for layer, projection in self.projections.items()}
        weights = [projection.weight for projection in self.projections.values()]
        losses, steps = fine_tune(self.model, weights, self.encoder, facts, self.settings.tuning, self.settings.targets.max_rows or MAX_ROWS)
        for layer, projection in self.projections.items():
            self._add_update(layer, projection.weight.detach().float() - before[layer])
        return [EditRecord(fact, self._batch, loss, loss, steps, float("nan"), ()) for fact, loss in zip(facts, losses, strict=True)]

    @torch.no_grad()
    def _add_update(self, layer: int, update: LowRank | Tensor) -> None:
        """Add an update, and set the weight to the original plus the sum of all updates, rounded once."""
        projection = self.projections[layer]
        if isinstance(update, LowRank):
            update = LowRank(update.up.float(), update.down.float())
            self.updates[layer].append(update)
        self._batch_updates[layer] = update
        if isinstance(update, LowRank):
            update = projection.oriented(update.dense())
        if layer not in self._sums:
            self._sums[layer] = torch.zeros_like(self._originals[layer], dtype=torch.float)
        self._sums[layer] += update
        projection.weight.copy_(self._originals[layer].float() + self._sums[layer])

    @torch.no_grad()
    def _keys_and_values(self, facts: Sequence[Fact], layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
        """Return the keys ``(u, d)`` of layers, and the residual stream ``(u, v)`` after the last edited layer, at the fact tokens.

        A key is a weighted mean: the empty context has weight 1/2, and all other contexts together have weight 1/2.
        """
        number = len(self.contexts)
        weights = torch.full((number,), 0.5 / max(1, number - 1), dtype=torch.double, device=self.device)
        weights[0] = 0.5 if number > 1 else 1.0
        size = max(1, (self.settings.targets.max_rows or MAX_ROWS) // number)
        keys: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        values = []
        with capture_until(self.model, self.layout, self.layers[-1], layers) as captured:
            for start in range(0, len(facts), size):
                part = facts[start : start + size]
                encoded = [self.encoder.encode_prompt(fact.prompt, fact.subject, context) for fact in part for context in self.contexts]
                rows = self.encoder.collate(encoded, self.device)
                captured.run(**rows.inputs())
                assert captured.output is not None
                place = torch.arange(len(rows.position), device=self.device), rows.position
                for layer in layers:
                    inputs = captured.keys[layer].reshape(*rows.input_ids.shape, -1)[place].double()
                    keys[layer].append(torch.einsum("ucd,c->ud", inputs.view(len(part), number, -1), weights))
                values.append(captured.output[place].view(len(part), number, -1)[:, 0].float())
        return {layer: torch.cat(parts) for layer, parts in keys.items()}, torch.cat(values)

    def update(self, layer: int) -> LowRank:
        """Return the sum of all updates of a layer as one product of two factors.

        Raises:
            ValueError: If the layer has no low-rank update: it was not edited, or it was edited by fine-tuning.
        """
        parts = self.updates[layer]
        if not parts:
            raise ValueError(
                f"layer {layer} has no low-rank update: it was not edited, or it was edited by {self.settings.method}; use change(layer)"
            )
        return LowRank(torch.cat([part.up for part in parts], 1), torch.cat([part.down for part in parts], 0))

    def change(self, layer: int) -> Tensor:
        """Return the sum of all updates of a layer in the shape of its parameter, in float32.

        Raises:
            ValueError: If the layer was not edited.
        """
        if layer not in self._sums:
            raise ValueError(f"layer {layer} has not been edited; edited layers: {sorted(self._sums)}")
        return self._sums[layer].clone()

    def check(self, facts: Sequence[Fact]) -> None:
        """Encode facts without editing them.

        Raises:
            ValueError: If a fact cannot be encoded: no token overlaps its subject, or its answer has no tokens.
        """
        for fact in facts:
            self.encoder.encode_prompt(fact.prompt, fact.subject, answer=self.encoder.encode_answer(fact.target)[:-1])

    def drift(self) -> dict[int, float]:
        """Return the mean squared change of the values of each layer over the text of the second moments."""
        return {layer: mean_drift(self.update(layer), self.moments[layer]) for layer in self.layers if self.updates[layer] and layer in self.moments}

    @torch.no_grad()
    def revert(self) -> None:
        """Revert all edits; the weights are restored bit by bit."""
        for layer, original in self._originals.items():
            self.projections[layer].weight.copy_(original)
        self._originals, self._sums, self.past_keys, self.records, self._batch = {}, {}, {}, [], 0
        self.updates = {layer: [] for layer in self.layers}


def _to_device(update: LowRank | Tensor, device: torch.device | str) -> LowRank | Tensor:
    return LowRank(*(part.to(device) for part in update)) if isinstance(update, LowRank) else update.to(device)
