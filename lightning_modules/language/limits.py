"""Combinations of models and strategies that are refused."""

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
    """Refuse to compile a decoder whose weights are sharded: they are gathered by hooks, which are no part of a graph.

    Raises:
        MisconfigurationException: If the strategy shards weights.
    """
    if getattr(strategy, "zero_stage_3", False) or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            "language_model.compile does not work with weights that are sharded over ranks (ZeRO-3, FSDP): use DDP or ZeRO-2, or leave it out"
        )


def check_passes(model: nn.Module, strategy: Any, zero3: dict[str, Any] | None, *, shared_prompt: bool) -> None:
    """Find the form of each pass that is exact for a model, and log those that are not the fast ones.

    Args:
        model: The language model.
        strategy: Of the Trainer; ``None`` outside of one.
        zero3: DeepSpeed's configuration where it partitions parameters.
        shared_prompt: Whether a prompt must be shared by its answers.

    Raises:
        MisconfigurationException: If the strategy or ``shared_prompt`` needs a form that is not exact.
    """
    try:
        with whole_weights(zero3):
            forms = pass_forms(model)
    except (ValueError, RuntimeError):
        # Without a small copy of the architecture, the partitioned weights themselves would run here, which only the engine can do: the first pass
        # measures the forms there, on all ranks together.
        if zero3 is None:
            raise
        return
    if not forms.padded.limit and (zero3 is not None or isinstance(strategy, FSDPStrategy)):
        raise MisconfigurationException(
            forms.refusal("padded batches", "it runs rows of equal length together, which needs weights that are not sharded: use DDP or ZeRO-2")
        )
    if shared_prompt and not forms.shared.limit:
        raise MisconfigurationException(forms.refusal("a prompt shared by its answers", "leave decoding.shared_prompt out, or set it to false"))
    if summary := forms.summary():
        log.info("passes of %s: %s", forms.model_name, summary)
