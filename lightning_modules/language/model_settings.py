"""Settings of a built language model that affect its output for given weights, as plain values."""

from __future__ import annotations

import json
from typing import Any

# Fields of a Hugging Face configuration that do not affect the output.
_IGNORED = {
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "return_dict",
    "initializer_range",
    "id2label",
    "label2id",
    "problem_type",
    "chunk_size_feed_forward",
    "output_hidden_states",
    "output_attentions",
    "pad_token_id",
    "eos_token_id",
    "bos_token_id",
    "pretraining_tp",
}
# Fields of PEFT configurations that do not affect the output. Target modules are stored as names of layers.
_IGNORED_OF_ADAPTERS = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "exclude_modules",
    "init_lora_weights",
    "init_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "megatron_config",
    "megatron_core",
}
# Names of options, for messages, by the field of the configuration that they set.
_SCRATCH_OPTIONS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_length",
}
_LORA_OPTIONS = {"r": "r", "lora_alpha": "alpha", "target_modules": "target_modules"}


def model_settings(model: Any, *, scratch: bool) -> dict[str, Any]:
    """Return the settings of the architecture and the adapters of a model.

    Args:
        model: Hugging Face model, with or without a PEFT adapter.
        scratch: Whether the model was built from ``language_model.scratch``; fields are then named like the options.
    """
    values = {name: value for name, value in model.config.to_dict().items() if _affects_output(name)}
    settings = {
        f"language_model.scratch.{_SCRATCH_OPTIONS[name]}" if scratch and name in _SCRATCH_OPTIONS else f"config.{name}": _to_json_types(value)
        for name, value in values.items()
    }
    adapters = getattr(model, "peft_config", {})
    settings["adapters"] = len(adapters)
    for adapter in adapters.values():
        own = {name: value for name, value in adapter.to_dict().items() if name not in _IGNORED_OF_ADAPTERS and "drop" not in name}
        settings |= {f"language_model.lora.{_LORA_OPTIONS.get(name, name)}": _to_json_types(value) for name, value in own.items()}
    return settings


def _affects_output(name: str) -> bool:
    return not (name.startswith("_") or name in _IGNORED or "drop" in name or name.endswith("pdrop") or name == "quantization_config")


def _to_json_types(value: Any) -> Any:
    """Convert a value to JSON types and sets to sorted lists, so that stored and current values can be compared."""
    return json.loads(json.dumps(value, sort_keys=True, default=lambda other: sorted(other) if isinstance(other, (set, frozenset)) else str(other)))
