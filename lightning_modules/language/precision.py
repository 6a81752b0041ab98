"""Precision in which a language model computes, and check of the precision in which it is trained."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from malleable.lightning_modules.functional.precision import autocast_dtype
from malleable.lightning_modules.language.config import LanguageModelConfig

HALF_WEIGHTS = {
    "bf16-true": "bfloat16",
    "16-true": "float16",
    "transformer-engine": "bfloat16",
    "transformer-engine-float16": "float16",
}
"""Dtypes of weights under the precisions of a Trainer that convert weights."""


def check_training_precision(trainer: Trainer, config: LanguageModelConfig) -> None:
    """Check that optimizer steps are not lost in half precision, and warn if they are rounded.

    DeepSpeed keeps float32 copies of trained weights, and is not checked.

    Args:
        trainer: Trainer with precision and strategy.
        config: Configuration of the language model.

    Raises:
        MisconfigurationException: If adapters would be trained in half precision, or any weights in float16.
    """
    if getattr(trainer.strategy, "handles_gradient_accumulation", False):
        return
    converted = HALF_WEIGHTS.get(str(trainer.precision))
    if config.lora is not None or config.adapter is not None:
        if converted is not None:
            raise MisconfigurationException(
                f"precision='{trainer.precision}' converts adapters and optimizer moments to {converted}, in which most updates are rounded to zero: "
                "use language_model.dtype: bfloat16 and precision 32-true or bf16-mixed; adapters are then float32"
            )
        return
    trained = converted or config.dtype
    if trained == "float16":
        raise MisconfigurationException(
            f"weights cannot be trained in float16 (precision='{trainer.precision}', language_model.dtype: {config.dtype}): gradients and Adam's "
            "epsilon underflow; use language_model.dtype: float32 and precision bf16-mixed or 16-mixed"
        )
    if trained == "bfloat16":
        rank_zero_warn(
            f"all weights are trained in bfloat16 (precision='{trainer.precision}', language_model.dtype: {config.dtype}): updates below 1/256 of a "
            "weight are lost, which increased val_loss by 0.28 in the quick start; language_model.dtype: float32 with precision bf16-mixed avoids "
            "this, and needs 8 more bytes for each weight"
        )


def compute_dtype(model: nn.Module, device: torch.device) -> torch.dtype:
    """Return the data type of matrix products: that of autocast if it is enabled, otherwise that of the first floating-point weights.

    float32 products of a GPU that are computed in TF32 (:func:`torch.set_float32_matmul_precision`) count as bfloat16.
    """
    if (dtype := autocast_dtype(device)) is not None:
        return dtype
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    rounded = dtype == torch.float32 and device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return torch.bfloat16 if rounded else dtype
