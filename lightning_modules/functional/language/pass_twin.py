"""Small copies of a model, of the same class and configuration, on which the forms of passes are measured.

A copy has random float32 weights, windows so short that a dozen tokens exceed them, and narrow layers if the model is large.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from malleable.lightning_modules.functional.language.attention import MASKED_ATTENTION

WINDOW = 4
ROPE_LENGTH = 6  # some sequences of the sample are longer, others are not
MAX_PARAMETERS = 20_000_000  # copies of larger models get narrow layers
VOCABULARY = 96
WIDTH = 64  # width of narrow feed-forward layers
EXPERTS = 4


def small_windows(config: Any, *, rope: bool = True) -> tuple[Any, float]:
    """Shorten all windows in a configuration, i.e. the lengths above which layers compute another function.

    Args:
        config: A Hugging Face configuration; not changed.
        rope: Also shorten the length above which rotary embeddings are scaled.

    Returns:
        The changed copy, and the maximum length of a row in tokens that is within all original windows; infinite without windows.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [math.inf]
    for name, value in list(vars(text).items()):
        if isinstance(value, int) and not isinstance(value, bool) and value > 0 and _is_window(name):
            limits.append(value)
            setattr(text, name, min(value, WINDOW))
    scaling = (getattr(text, "rope_parameters", None) or {}) if rope else {}
    limits += [_shorten_rope(text, part) for part in (scaling, *(value for value in scaling.values() if isinstance(value, dict)))]
    return config, min(limits)


def _is_window(name: str) -> bool:
    return (("window" in name or "chunk" in name) and "layer" not in name) or name in ("index_topk", "local_attention")


def _shorten_rope(config: Any, rope: dict[str, Any]) -> float:
    """Shorten the length above which rotary embeddings are scaled; return the maximum length of a row without scaling."""
    original: int | None = None
    if rope.get("rope_type") == "dynamic":
        original, config.max_position_embeddings = config.max_position_embeddings, ROPE_LENGTH
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
        rope["original_max_position_embeddings"] = ROPE_LENGTH
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = ROPE_LENGTH
    # Rows of exactly this length do not reset embeddings that were scaled before.
    return math.inf if original is None else original - 1


def build_twin(model: Any, config: Any) -> nn.Module:
    """Build a small copy of a model on the CPU.

    Args:
        model: Model to copy; its class and size are used, its weights are not read.
        config: Configuration of the copy; not changed.

    Raises:
        Exception: Any exception of the class, if it cannot be built with narrow layers.
    """
    config = copy.deepcopy(config)
    large = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()) > MAX_PARAMETERS
    if large:
        _narrow(config.get_text_config() if hasattr(config, "get_text_config") else config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # FSDP2 prepends a class to the MRO.
    kind: Any = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    attention = getattr(config, "_attn_implementation", None)
    # Other implementations need a GPU; without a custom mask they compute the same function.
    attention = attention if attention in MASKED_ATTENTION else "sdpa"
    if large:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind._from_config(copy.deepcopy(config), dtype=torch.float32).parameters())
        if size > 2 * MAX_PARAMETERS:
            raise ValueError(f"the narrow copy of {kind.__name__} has {size:,} parameters, more than {2 * MAX_PARAMETERS:,}")
    with torch.device("cpu"):
        twin: nn.Module = kind._from_config(config, attn_implementation=attention, dtype=torch.float32)
    _draw_weights(twin)
    return twin.eval()


@torch.no_grad()
def _draw_weights(model: nn.Module) -> None:
    """Draw weights with a variance so large that each layer affects the logits; default initialisations are too small for this."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "A_log" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))


FEED_FORWARD = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def _narrow(config: Any) -> None:
    """Reduce a configuration to two heads, few experts, and a small feed-forward width and vocabulary; keep all layers and head widths."""
    heads = config.num_attention_heads
    grouped = getattr(config, "num_key_value_heads", heads) not in (None, heads)
    config.hidden_size = config.hidden_size * 2 // heads
    config.num_attention_heads = 2
    experts = max(EXPERTS, getattr(config, "num_experts_per_tok", None) or 1) if getattr(config, "n_group", 1) in (None, 1) else math.inf
    sizes: dict[str, Any] = dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 1 if grouped else 2)
    sizes |= dict.fromkeys(FEED_FORWARD, WIDTH)
    sizes |= {"word_embed_proj_dim": config.hidden_size, "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if isinstance(count := getattr(config, name, None), int):
            sizes[name] = min(count, experts)
    for name, size in sizes.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, size)
