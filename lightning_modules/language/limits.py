"""Checks for unsupported combinations of models and strategies."""

from __future__ import annotations

import logging
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from malleable.lightning_modules.functional.language.pass_forms import pass_forms
from malleable.lightning_modules.language.loading import whole_weights

log = logging.getLogger(__name__)


def check_compile(strategy: Any) -> None:
    """Check that a decoder can be compiled; sharded weights are gathered by hooks, which cannot be compiled.

    Raises:
        MisconfigurationException: If the strategy shards weights.
    """
    if getattr(strategy, "zero_stage_3", False) or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            "language_model.compile does not support weights that are sharded over ranks (ZeRO-3, FSDP): use DDP or ZeRO-2, or omit compile"
        )


def check_passes(model: nn.Module, strategy: Any, zero3: dict[str, Any] | None, *, shared_prompt: bool) -> None:
    """Measure the forms of passes that are exact for a model, and log passes that do not use their fast form.

    Args:
        model: The language model.
        strategy: Strategy of the Trainer; ``None`` without a Trainer.
        zero3: Configuration of DeepSpeed with ZeRO stage 3; ``None`` otherwise.
        shared_prompt: Whether a prompt must be shared by its answers.

    Raises:
        MisconfigurationException: If the strategy or ``shared_prompt`` needs a form that is not exact.
    """
    try:
        with whole_weights(zero3):
            forms = pass_forms(model)
    except (ValueError, RuntimeError):
        # If no small copy of the model can be built, the partitioned weights must run, which needs the engine. The first pass then measures the
        # forms, on all ranks together.
        if zero3 is None:
            raise
        return
    if not forms.padded.limit and (zero3 is not None or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))):
        raise MisconfigurationException(
            forms.refusal("padded batches", "rows of equal length must be run together, which sharded weights do not allow: use DDP or ZeRO-2")
        )
    if shared_prompt and not forms.shared.limit:
        raise MisconfigurationException(forms.refusal("a prompt shared by its answers", "omit decoding.shared_prompt, or set it to false"))
    if summary := forms.summary():
        log.info("passes of %s that do not run in their fast form: %s", forms.model_name, summary)
