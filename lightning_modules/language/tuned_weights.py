"""The weights of a module that holds a language model: built, tuned, kept in checkpoints, exported."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.datamodules.identity import check_folder, write_folder
from malleable.lightning_modules.base import LossOutput, Split
from malleable.lightning_modules.functional.defaults import float32_by_default
from malleable.lightning_modules.functional.language.attention import avoid_planned_kernels
from malleable.lightning_modules.functional.language.pass_forms import pass_forms
from malleable.lightning_modules.language.compiled import compile_decoder, compiled_passes
from malleable.lightning_modules.language.config import FINGERPRINT, LanguageModelConfig, build_language_model, fingerprint
from malleable.lightning_modules.language.export import export_result, is_sharded, registered_checkpoint
from malleable.lightning_modules.language.loading import whole_weights
from malleable.lightning_modules.language.model_settings import model_settings
from malleable.lightning_modules.language.precision import check_training_precision
from malleable.lightning_modules.language.tuning import Tuning
from malleable.lightning_modules.patches.names import canonical_name

log = logging.getLogger(__name__)


class TunedWeights(LightningModule):
    """What every module does with its language model ``model``; to stand before the base in a class's line.

    Checkpoints keep what trains or was edited, and know the rest by its fingerprint.
    """

    weight_settings: ClassVar[tuple[str, ...]] = (
        "language_model.quantization",
        "language_model.lora.r",
        "language_model.lora.alpha",
        "language_model.lora.target_modules",
        "language_model.scratch.hidden_size",
        "language_model.scratch.num_layers",
        "language_model.scratch.num_heads",
        "language_model.scratch.intermediate_size",
        "language_model.scratch.max_length",
    )
    strict_loading = False
    language_model: LanguageModelConfig
    tuning: Tuning
    frozen: bool = False
    model: Any
    check_settings: Callable[[dict[str, Any]], None]  # of the base
    _base_fingerprint: str
    _exported: bool = False
    _compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None

    @property
    def is_built(self) -> bool:
        """Whether ``configure_model`` has made the weights."""
        return self.model is not None

    @property
    @abstractmethod
    def words(self) -> Vocabulary | Catalog | None:
        """What knows the tokenizer; ``None`` until the data or a checkpoint has brought it."""

    def setup(self, stage: str) -> None:
        """Refuse a precision in which the weights cannot be trained, and a fit of nothing where the strategy needs an optimizer."""
        if self._compiler_ctx is not None:
            # Of `torch.compile(module)` the decoder remains compiled.
            self._compiler = self._compiler_ctx["dynamo_ctx"]
        super().setup(stage)
        if self.model is not None:
            self._compile()
        if stage == "fit" and not self.frozen:
            check_training_precision(self.trainer, self.language_model)
        elif stage == "fit" and getattr(self.trainer.strategy, "handles_gradient_accumulation", False):
            raise MisconfigurationException(
                f"{type(self).__name__}(frozen=True) cannot run `fit` with {type(self.trainer.strategy).__name__}, which needs an optimizer: use "
                "`test`, `validate` or `predict`, or one device or ddp (--config base/ddp.yaml)"
            )

    @float32_by_default()
    def configure_model(self) -> None:
        """Build the language model; a second call does nothing, and neither does a call before :attr:`words` are there.

        Raises:
            MisconfigurationException: If the model is an exported one that was trained with another tokenizer.
        """
        if self.model is not None or self.words is None:
            return
        for name in (self.language_model.name, self.language_model.adapter):
            check_folder(name, self.words)
        avoid_planned_kernels()
        strategy: Any = getattr(getattr(self, "attached", None), "strategy", None)
        zero3 = strategy.config if getattr(strategy, "zero_stage_3", False) else None
        self.model = build_language_model(self.language_model, self.words, zero3_config=zero3)
        if self.frozen:
            self.model.requires_grad_(False).eval()
        self._base_fingerprint = fingerprint(self.model)
        self._check_passes(zero3)
        self._compile()
        trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        log.info(
            "language model: %s, %.2f M of %.2f M parameters trained",
            self.language_model.name or "from scratch",
            trainable / 1e6,
            sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters()) / 1e6,
        )

    def _compile(self) -> None:
        """Compile the decoder where that is set.

        Raises:
            MisconfigurationException: If weights are sharded: they are gathered by hooks, which are no part of a graph.
        """
        compiler = self._compiler or self.language_model.compile
        if compiler is None:
            return
        strategy: Any = getattr(getattr(self, "attached", None), "strategy", None)
        if getattr(strategy, "zero_stage_3", False) or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise MisconfigurationException(
                "language_model.compile does not work with weights that are sharded over ranks (ZeRO-3, FSDP): use DDP or ZeRO-2, or leave it out"
            )
        compile_decoder(self.model, compiler)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the loss; the decoder runs compiled where that is set."""
        with compiled_passes():
            return super().training_step(batch, batch_idx)

    def log_loss(self, batch: Any, split: Split) -> LossOutput | None:
        """Add up the loss of an evaluation batch; the decoder runs compiled where that is set."""
        with compiled_passes():
            output: LossOutput | None = super().log_loss(batch, split)  # type: ignore[misc]
        return output

    def _check_passes(self, zero3: dict[str, Any] | None) -> None:
        """Find the form of each pass that is exact for the model, and log those that are not the fast ones.

        Raises:
            MisconfigurationException: If the strategy or ``decoding.shared_prompt`` needs a form that is not exact.
        """
        try:
            with whole_weights(zero3):
                forms = pass_forms(self.model)
        except (ValueError, RuntimeError):
            # Where no small twin stands for the model, its partitioned weights would run here, which they do in the engine only: the first pass
            # measures them there, on all ranks together.
            if zero3 is None:
                raise
            return
        if not forms.padded.limit and (zero3 is not None or isinstance(getattr(getattr(self, "attached", None), "strategy", None), FSDPStrategy)):
            raise MisconfigurationException(
                forms.refusal("padded batches", "it runs rows of equal length together, which needs weights that are not sharded: use DDP or ZeRO-2")
            )
        if getattr(getattr(self, "decoding", None), "shared_prompt", None) and not forms.shared.limit:
            raise MisconfigurationException(forms.refusal("a prompt shared by its answers", "leave decoding.shared_prompt out, or set it to false"))
        if summary := forms.summary():
            log.info("passes of %s: %s", forms.model_name, summary)

    def default_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW at the module's own rate."""
        return self.tuning.optimizer(groups)

    def default_lr_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Linear rise, then decay to zero over the run."""
        return self.tuning.scheduler(optimizer, self.trainer.estimated_stepping_batches)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the model as it was built, whatever options or files they came from."""
        settings = model_settings(self.model, scratch=self.language_model.name is None)
        return {"language_model.quantization": self.language_model.quantization, **settings}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what trains or was edited, the identity of what does not train, and what the weights depend on."""
        super().on_save_checkpoint(checkpoint)
        keep_trained(self.model, checkpoint)
        checkpoint["base_fingerprint"] = self._base_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model for a bare checkpoint, and refuse one of another base, vocabulary or catalogue, or other settings."""
        super().on_load_checkpoint(checkpoint)
        self.configure_model()
        self.check_settings(checkpoint)
        refuse_misfit(self, checkpoint, self._base_fingerprint, self.language_model.name)

    def on_train_end(self) -> None:
        """Export the weights in memory where no checkpoint can be read in their place: later they are no longer gathered."""
        self._exported = False
        if is_sharded(self.trainer) and registered_checkpoint(self.trainer) is None and (folder := self._run_folder()) is not None:
            self.export(folder)
            self._exported = True

    def on_fit_end(self) -> None:
        """Export the run's result, which is also what ``test`` measures, after all edits: ``adapter/`` (PEFT) or ``model/`` (Hugging Face).

        A run that was killed between its last step and this one exports when it is resumed.
        """
        folder = self._run_folder()
        if folder is None or self._exported:
            return
        path = registered_checkpoint(self.trainer)
        if not self.trainer.is_global_zero:
            return
        if path is None:
            log.info("no checkpoint was saved: the weights in memory are exported")
        self.export(folder, path)

    def export(self, folder: Path, checkpoint: Path | None = None) -> Path:
        """Save the adapter or the whole model under ``folder``.

        An adapter whose base model was edited is merged into it, and saved as a whole model.

        Args:
            folder: Gets the folder ``adapter`` or ``model``.
            checkpoint: Take the weights from this checkpoint instead of memory; one rank is enough then. From memory, under DeepSpeed every
                rank must call it.
        """
        write = self.global_rank == 0
        path = export_result(self.model, folder, checkpoint=checkpoint, tokenizer=self.words.tokenizer if self.words else None, write=write)
        if write and self.words is not None:
            write_folder(path, "catalog" if isinstance(self.words, Catalog) else "vocabulary", self.words, self.settings())
        return path

    def _run_folder(self) -> Path | None:
        """Return where to export to, ``None`` where there is nothing to export."""
        trainer: Any = self.trainer
        skipped = trainer.log_dir is None or self.frozen or trainer.fast_dev_run or trainer.interrupted
        return None if skipped else Path(trainer.log_dir)


def keep_trained(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Leave frozen weights out of a checkpoint, but for those that patches have changed.

    Args:
        model: The attribute ``model`` of the module whose checkpoint it is.
        checkpoint: Its ``state_dict`` is made anew; ``patches`` names what was changed.
    """
    # Both names of a head that is tied to the embeddings; what quantization puts beside frozen weights has no parameter's name.
    trains = {f"model.{name}": parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    state = checkpoint.get("state_dict")
    if all(trains.values()) or not state:
        return
    patched = (checkpoint.get("patches") or {}).get("originals", {})
    checkpoint["state_dict"] = {
        key: value
        for key, value in state.items()
        if trains.get(key, not key.startswith("model.")) or (key in trains and canonical_name(key, "model.") in patched)
    }


def refuse_misfit(module: LightningModule, checkpoint: dict[str, Any], base_fingerprint: str, name: str | None) -> None:
    """Refuse a checkpoint of another base model or other settings.

    Args:
        module: Its ``model`` is built.
        checkpoint: What is to be loaded.
        base_fingerprint: Of the module's frozen weights.
        name: Of its base model.

    Raises:
        MisconfigurationException: If it does not fit.
    """
    state = checkpoint.get("state_dict") or {}
    if not state:
        return
    stored_base = checkpoint.get("base_fingerprint")
    if stored_base is not None and not stored_base.startswith(FINGERPRINT):
        log.warning("the checkpoint is of an earlier version: its base model cannot be compared with %r", name)
    elif stored_base is not None and stored_base != base_fingerprint:
        raise MisconfigurationException(
            f"the checkpoint was trained on another base model than '{name}' (fingerprint {stored_base[:12]}, here {base_fingerprint[:12]}); "
            "give the base model it was trained on"
        )
    model: Any = module.model
    missing = [f"model.{name}" for name, p in model.named_parameters() if p.requires_grad and f"model.{name}" not in state]
    unexpected = sorted(set(state) - set(module.state_dict()))
    if missing or unexpected:
        raise MisconfigurationException(
            f"the checkpoint does not fit this module: missing {missing[:3]}, unexpected {unexpected[:3]} "
            f"({len(missing)} and {len(unexpected)} in all); build the module with the settings it was trained with"
        )
