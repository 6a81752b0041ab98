"""Which number formats the weights of a language model can be trained in."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from malleable.lightning_modules.language.config import LanguageModelConfig

HALF_WEIGHTS = {
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "transformer-engine": "bfloat16",
    "transformer-engine-float16": "float16",
}
"""Precisions of a Trainer that convert the weights, and to what."""


def check_training_precision(trainer: Trainer, config: LanguageModelConfig) -> None:
    """Refuse a training whose optimizer steps are lost in half precision, and warn where they are rounded.

    DeepSpeed keeps float32 copies of the weights it trains, so nothing is lost there.

    Args:
        trainer: Its precision and strategy.
        config: Which weights train, and their dtype.

    Raises:
        MisconfigurationException: If adapters, or any weights in float16, would be trained in half precision.
    """
    if getattr(trainer.strategy, "handles_gradient_accumulation", False):
        return
    converted = HALF_WEIGHTS.get(str(trainer.precision))
    if config.lora is not None or config.adapter is not None:
        if converted is not None:
            raise MisconfigurationException(
                f"precision='{trainer.precision}' turns adapters and optimizer moments into {converted}, which rounds most of their steps away: "
                "use language_model.dtype: bfloat16 and precision 32-true or bf16-mixed; the adapters then stay in float32"
            )
        return
    trained = converted or config.dtype
    if trained == "float16":
        raise MisconfigurationException(
            f"weights cannot be trained in float16 (precision='{trainer.precision}', language_model.dtype: {config.dtype}): gradients and Adam's "
            "epsilon vanish in it; use language_model.dtype: float32 and precision bf16-mixed or 16-mixed"
        )
    if trained == "bfloat16":
        rank_zero_warn(
            f"all weights are trained in bfloat16 (precision='{trainer.precision}', language_model.dtype: {config.dtype}): steps below 1/256 of a "
            "weight are lost, in the quick start at a cost of 0.28 in val_loss; with language_model.dtype: float32 and precision bf16-mixed "
            "none is, for 8 more bytes a weight"
        )
