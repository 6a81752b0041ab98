"""Recommending language models with a few thousand weights, as modules."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_catalog, tiny_config

from malleable.lightning_modules.language.config import LanguageModelConfig, LoRA, build_language_model
from malleable.lightning_modules.language.export import save_language_model
from malleable.lightning_modules.language.language_model import LanguageModel
from malleable.lightning_modules.recommendation.sft import SFT


def ready(kind: type[LanguageModel] = SFT, seed: int = 0, **settings: Any) -> Any:
    """A module with weights, which are wide enough to have preferences, in evaluation mode."""
    torch.manual_seed(seed)
    module = kind(**{"language_model": tiny_config(), "catalog": tiny_catalog(), "ks": (1, 3), **settings})
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(3)
    return module.eval()


def save_base(folder: Path, seed: int = 0) -> str:
    """A base model on disk."""
    torch.manual_seed(seed)
    save_language_model(build_language_model(tiny_config(), tiny_catalog().vocabulary), folder)
    return str(folder)


def lora(base: str, dropout: float = 0.5, **changes: Any) -> LanguageModelConfig:
    """Adapters of rank 2 on a base model."""
    return LanguageModelConfig(name=base, lora=LoRA(r=2, alpha=4, dropout=dropout), **changes)
