"""SequentialRecommender: next-item recommendation with SASRec, GRU4Rec, BERT4Rec or HSTU."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from malleable.datamodules.batch import AnswerBatch, Catalog, RankedRows, Recommendations, SequenceBatch
from malleable.datamodules.negative_samplers import NegativeSampler, Uniform
from malleable.lightning_modules.base import BaseModule, LossOutput, Split, needs_weights
from malleable.lightning_modules.functional.defaults import drawn_on_cpu, float32_by_default
from malleable.lightning_modules.functional.precision import full_precision
from malleable.lightning_modules.functional.recommendation.item_draws import ItemProposal
from malleable.lightning_modules.functional.recommendation.sequence_encoders import SequenceEncoder
from malleable.lightning_modules.functional.recommendation.sequence_layout import SequenceLayout
from malleable.lightning_modules.functional.search.nearest import nearest
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.losses.ranking import ItemLoss, default_item_loss
from malleable.lightning_modules.metrics.ranking import check_ks
from malleable.lightning_modules.recommendation.evaluation import ItemRanking, allowed_items
from malleable.lightning_modules.recommendation.sequence_inputs import (
    PositionNegatives,
    append_hidden,
    as_query,
    check_items,
    hidden_items,
    last_only,
    layout_of,
    position_keys,
    shorten,
    split_by_length,
)
from malleable.lightning_modules.recommendation.sequence_settings import EncoderSettings
from malleable.lightning_modules.serialization import from_plain, object_from_plain

MIN_TARGETS = 1e-6  # bound of a divisor, for steps without targets


class SequentialRecommender(ItemRanking, BaseModule):
    """Recommend the next item from the sequence of a user's items.

    An encoder computes a state at each position of a history. The score of an item is the inner product of the state and the embedding of the item.
    The loss is computed at all positions of a row at once. Rows are :class:`~malleable.datamodules.batch.SequenceBatch`, of one history or of several
    packed ones. An :class:`~malleable.datamodules.batch.AnswerBatch` is read as histories with one target each.

    Args:
        encoder: Kind and sizes of the encoder.
        catalog: The items. Default: taken from the data module.
        loss: ``CE``, ``SampledCE``, ``GBCE``, ``BCE`` or ``BPR``. Default: ``CE`` up to 50,000 items, ``GBCE`` above.
        negatives: Distribution and number of negatives: ``Uniform``, ``Popularity`` or a ``Mixture`` of them. Default: ``Uniform`` with 256 negatives
            for ``SampledCE`` and ``GBCE``, and 1 for ``BCE`` and ``BPR``.
        exclude_seen: Do not recommend items that the user has interacted with.
        tuning: Settings of the default optimizer and scheduler.
        ks: Cut-offs of the ranking metrics.
        behaviors: Names of the types of interactions. Default: taken from the data module, which may have none.
        optimizer: Factory of the optimizer, instead of the default one.
        lr_scheduler: Factory of the scheduler, instead of the default one.

    Raises:
        ValueError: If negatives are given to a loss without negatives, or if their sampler needs a model.

    Source:
        Kang and McAuley (2018), SASRec, arXiv:1808.09781; Hidasi et al. (2016), GRU4Rec, arXiv:1511.06939; Sun et al. (2019), BERT4Rec,
        arXiv:1904.06690; Zhai et al. (2024), HSTU, arXiv:2402.17152. Differs: see the encoders; the default loss is the cross-entropy over all items,
        as Klenitskiy and Vasilev (2023), arXiv:2309.07602, recommend.
    """

    required_from_datamodule: ClassVar[tuple[str, ...]] = ("catalog",)
    optional_from_datamodule: ClassVar[tuple[str, ...]] = ("behaviors",)
    reads_text: ClassVar[bool] = False
    weight_settings: ClassVar[tuple[str, ...]] = tuple(
        f"encoder.{name}" for name in ("kind", "dim", "num_layers", "num_heads", "max_length", "ffn_dim", "time_buckets")
    )
    new_items: ClassVar[str] = "they are not recommended before the model is trained on them"
    trained_items: Tensor

    def __init__(
        self,
        encoder: EncoderSettings | None = None,
        catalog: Catalog | None = None,
        loss: ItemLoss | None = None,
        negatives: NegativeSampler | None = None,
        exclude_seen: bool = True,
        tuning: Tuning | None = None,
        ks: tuple[int, ...] = (1, 5, 10),
        behaviors: tuple[str, ...] | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(optimizer, lr_scheduler)
        self.encoder: EncoderSettings = from_plain(EncoderSettings, encoder) or EncoderSettings()
        self.catalog = catalog
        self.loss: ItemLoss | None = object_from_plain(ItemLoss, loss)
        self.negatives: NegativeSampler | None = object_from_plain(NegativeSampler, negatives)
        if self.negatives is not None:
            self.negatives.item_weights(1, [1])  # raises an error for samplers that need a model
            self._check_negatives()
        self.exclude_seen = exclude_seen
        self.tuning: Tuning = from_plain(Tuning, tuning) or Tuning(lr=1e-3)
        self.ks = check_ks(ks)
        self.behaviors = behaviors
        self.sampling_epoch: int | None = None
        """Number that the random numbers of a training step depend on; ``None``: the epoch of the Trainer."""
        self._proposal: ItemProposal | None = None
        self.save_config()

    def _check_negatives(self) -> None:
        if self.negatives is not None and self.loss is not None and not self.loss.num_negatives:
            raise ValueError(f"negatives={self.negatives} has no effect: {type(self.loss).__name__} has no negatives; omit it or choose SampledCE")

    def settings(self) -> dict[str, Any]:
        """Return the settings of the encoder that the output of given weights depends on."""
        return {name: getattr(self.encoder, name.removeprefix("encoder.")) for name in self.weight_settings}

    def configure_model(self) -> None:
        """Create the encoder; a second call does nothing."""
        if self.is_built or self.catalog is None:
            return
        if self.loss is None:
            self.loss = default_item_loss(len(self.catalog))
            self._check_negatives()
        # Drawn on the CPU, so that a seed gives the same model on every device.
        with drawn_on_cpu():
            encoder = self.encoder.build(len(self.catalog), len(self.behaviors or ()))
        self.model: SequenceEncoder = encoder.to(self.device)
        self.behaviors = self.behaviors or ()  # the weights do not change if data with types follow
        self.register_buffer("trained_items", torch.ones(len(self.catalog), dtype=torch.bool, device=self.device))

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has created the encoder."""
        return hasattr(self, "model")

    def setup(self, stage: str) -> None:
        """Copy the catalogue and the types of interactions from the data module, and append rows for new items.

        Raises:
            MisconfigurationException: If ZeRO stage 3 partitions the table of embeddings, which every step reads whole.
        """
        if getattr(self.trainer.strategy, "zero_stage_3", False):
            raise MisconfigurationException(
                f"{type(self).__name__} cannot run with ZeRO stage 3: it partitions the table of embeddings, which every step reads whole; use "
                "ddp or ZeRO-2 (--config base/deepspeed_zero2.yaml)"
            )
        super().setup(stage)
        self._proposal = None  # the catalogue may have other numbers of interactions
        if self.is_built and self.catalog is not None:
            self._extend(len(self.catalog))

    @needs_weights
    def compute_loss(self, batch: SequenceBatch | AnswerBatch) -> LossOutput:
        """Compute the mean loss of the targets of an optimizer step."""
        batch = self._prepared(batch)
        masked = None
        if self.encoder.kind == "bert4rec":
            batch, masked = self._hide(batch)
        layout = layout_of(batch)
        states = self._encode(batch, layout, masked)
        index = _all_targets(batch.targets) if batch.supervised is None else batch.supervised
        target = batch.targets.flatten()[index]
        counted = ((target >= 0) & (batch.sample_id >= 0).repeat_interleave(batch.targets.shape[1])[index]).float()
        count = counted.sum()
        normaliser = count if batch.num_step_tokens is None else batch.num_step_tokens * self._share_of_targets(batch)
        draw = self._draw(batch, layout, index) if self._loss.num_negatives else None
        loss: Tensor = self._loss(
            states.flatten(0, 1)[index], self.model.item.weight, target.clamp_min(0), counted / normaliser.clamp_min(MIN_TARGETS), draw
        )
        return LossOutput(loss, {}, count)

    @needs_weights
    def encode(self, batch: RankedRows) -> Tensor:
        """Return a vector for each row, ``(B, d)``: the state after its last item, 0 for rows without items.

        Args:
            batch: Rows with one history each, padded on the left.

        Raises:
            ValueError: If the rows are packed or padded on the right.
        """
        batch = self._prepared(batch)
        if not batch.is_query:
            raise ValueError("encode needs one history in each row, padded on the left: collate rows with the field 'target' (-1 if it is unknown)")
        if self.encoder.kind == "bert4rec":
            batch = append_hidden(batch)
        parts, order = split_by_length(batch)
        return torch.cat([self._last_states(part) for part in parts])[order]

    @needs_weights
    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """Return the embeddings of the items, ``(N, d)``; the score of an item is its inner product with the vector of a row."""
        return self.model.item.weight.detach()

    @needs_weights
    @full_precision
    def scores(self, batch: RankedRows) -> Tensor:
        """Score every item for every row, ``(B, N)`` float32."""
        return self.encode(batch).float() @ self.model.item.weight.float().T

    @needs_weights
    @torch.no_grad()
    def recommend(self, batch: RankedRows, k: int | None = None) -> Recommendations:
        """Find the k best items of each row.

        Args:
            batch: Rows; seen items are excluded with ``exclude_seen``, and candidates restrict the choice.
            k: Number of items; default: the largest cut-off of the metrics.
        """
        table = self.model.item.weight
        if batch.candidates is None:
            allowed, exclude = self.trained_items, batch.seen if self.exclude_seen else None
        else:
            given = allowed_items(batch, len(table), self.exclude_seen)
            allowed, exclude = self.trained_items if given is None else given & self.trained_items, None
        return Recommendations(*nearest(self.encode(batch), table, k or max(self.ks), allowed=allowed, exclude=exclude))

    @float32_by_default()
    def predict_step(self, batch: SequenceBatch | AnswerBatch, batch_idx: int) -> Recommendations:
        """Recommend items."""
        self.check_items(batch)
        return self.recommend(batch)

    def log_loss(self, batch: SequenceBatch | AnswerBatch, split: Split) -> LossOutput | None:
        """Accumulate the loss of an evaluation batch."""
        self.check_items(batch)
        return super().log_loss(batch, split)

    def on_train_start(self) -> None:
        """Allow all items: those that were new in a checkpoint are trained now."""
        super().on_train_start()
        self.trained_items.fill_(True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the generator, and check the items of the batch."""
        super().on_train_batch_start(batch, batch_idx)
        self.check_items(batch)

    def check_items(self, batch: RankedRows) -> None:
        """Check that the items and the types of interactions of a batch exist; see :func:`sequence_inputs.check_items`."""
        assert self.catalog is not None
        check_items(batch, len(self.catalog), len(self.behaviors or ()))

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return AdamW with the settings of ``tuning``."""
        return self.tuning.optimizer(groups)

    def default_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return the scheduler of ``tuning``: a linear warm-up, then the schedule ``tuning.decay``."""
        return self.tuning.scheduler(optimizer, self.trainer.estimated_stepping_batches)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the items and the types of interactions that the weights depend on."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["behaviors"] = list(self.behaviors or ())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the encoder for the stored catalogue, and append rows for new items.

        Raises:
            MisconfigurationException: If items, types of interactions or settings differ.
        """
        super().on_load_checkpoint(checkpoint)
        self.check_settings(checkpoint)
        stored = tuple(checkpoint.get("behaviors", ()))
        if self.behaviors is None:
            self.behaviors = stored
        elif tuple(self.behaviors) != stored:
            raise MisconfigurationException(
                f"the checkpoint was trained with the types of interactions {list(stored)}, got {list(self.behaviors)}; use data with the same types"
            )
        self.configure_model()
        assert self.catalog is not None
        # DeepSpeed loads weights itself.
        state = checkpoint.get("state_dict", {})
        table = state.get("model.item.weight")
        if table is not None and len(table) < len(self.catalog):
            for moments in (own for optimizer in checkpoint.get("optimizer_states", ()) for own in optimizer["state"].values()):
                same = {name: value for name, value in moments.items() if getattr(value, "shape", None) == table.shape}
                moments |= {name: _pad_rows(value, len(self.catalog)) for name, value in same.items()}
            checkpoint["state_dict"] = state | {name: _pad_rows(state[name], len(self.catalog)) for name in ("model.item.weight", "trained_items")}
        self._extend(len(self.catalog))

    @property
    def _loss(self) -> ItemLoss:
        assert self.loss is not None
        return self.loss

    def _extend(self, size: int) -> None:
        """Append rows for new items."""
        if len(self.trained_items) < size:
            self.trained_items = _pad_rows(self.trained_items, size)
            self.model.item.weight = nn.Parameter(_pad_rows(self.model.item.weight.detach(), size))
            self.model.item.num_embeddings = size
            self._proposal = None

    def _prepared(self, batch: RankedRows) -> SequenceBatch:
        """Return a batch of sequences that the encoder can read.

        Raises:
            MisconfigurationException: If a training sequence is too long, or if times are missing.
        """
        batch = as_query(batch)
        if batch.is_query:
            batch = shorten(batch, self.encoder.max_length)
        elif (longest := batch.longest or batch.item_ids.shape[1]) > self.encoder.max_length + 1:
            raise MisconfigurationException(
                f"a training sequence has {longest - 1} items and a target, but encoder.max_length is {self.encoder.max_length}; increase it, or "
                "reduce split.sequence_length of the data"
            )
        if self.model.reads_times and batch.times is None:
            raise MisconfigurationException(
                "encoder.kind 'hstu' reads the times of the items, but these rows have none: use data with times and train_view 'sequence' or "
                "'packed_sequence', and users of the data for prediction (predict_users), because files of histories have no times; or train a model "
                "with encoder.time_buckets 0"
            )
        return batch

    def _encode(self, batch: SequenceBatch, layout: SequenceLayout, masked: Tensor | None) -> Tensor:
        states: Tensor = self.model(batch.item_ids, layout, batch.times, batch.behaviors, masked)
        return states

    def _last_states(self, batch: SequenceBatch) -> Tensor:
        """Return the state of the last position of each row, ``(B, d)``."""
        masked = last_only(batch) if self.encoder.kind == "bert4rec" else None
        return self._encode(batch, layout_of(batch), masked)[:, -1]

    def _hide(self, batch: SequenceBatch) -> tuple[SequenceBatch, Tensor]:
        """Return the batch with hidden items as its targets, and which items are hidden, ``(B, T)`` bool."""
        if batch.is_query:
            batch = append_hidden(batch)
            return batch, last_only(batch)
        hidden = hidden_items(batch, self._seed, self._epoch, self.encoder.mask_rate, self.encoder.last_rate)
        # The item after a position with a target is the target.
        supervised = None if batch.supervised is None else batch.supervised + 1
        return batch.replace(targets=batch.item_ids.masked_fill(~hidden, -1), supervised=supervised), hidden

    def _share_of_targets(self, batch: SequenceBatch) -> float:
        """Return the expected share of targets that contribute to the loss, apart from sequences of which only the last item is hidden.

        With the actual share of a batch, a step would depend on its split into batches. The loss of ``bert4rec`` is therefore a mean only on average.
        """
        return self.encoder.mask_rate if self.encoder.kind == "bert4rec" and not batch.is_query else 1.0

    def _draw(self, batch: SequenceBatch, layout: SequenceLayout, index: Tensor) -> PositionNegatives:
        assert self.catalog is not None
        sampler = self.negatives or Uniform(self._loss.num_negatives)
        if self._proposal is None:
            self._proposal = ItemProposal(len(self.catalog), sampler.item_weights(len(self.catalog), self.catalog.popularity))
        keys = position_keys(batch, layout, self._seed, self._epoch)
        return PositionNegatives(self._proposal, sampler.num_negatives, batch, layout, keys, index)

    @property
    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    @property
    def _epoch(self) -> int:
        if not self.training:
            return -1
        return self.current_epoch if self.sampling_epoch is None else self.sampling_epoch


def _all_targets(targets: Tensor) -> Tensor:
    """Return the positions with a target, as indices of the flattened targets; on accelerators all positions, to avoid a synchronisation."""
    flat = targets.flatten()
    return (flat >= 0).nonzero().flatten() if flat.device.type == "cpu" else torch.arange(len(flat), device=flat.device)


def _pad_rows(table: Tensor, size: int) -> Tensor:
    """Append zeros to the first dimension."""
    return torch.cat([table, table.new_zeros(size - len(table), *table.shape[1:])]) if len(table) < size else table
