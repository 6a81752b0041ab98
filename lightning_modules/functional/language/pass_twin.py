"""Small models of the same class and configuration as another one, to measure what its attention and its state can do.

A twin has random weights in float32, windows short enough to matter in a dozen tokens, and narrow layers where the model is large.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from malleable.lightning_modules.functional.language.attention import MASKED_ATTENTION

WINDOW = 4
ROPE_LENGTH = 6  # some sequences are longer, some are not
MAX_PARAMETERS = 20_000_000  # of a twin; larger models get narrow ones
VOCABULARY = 96
WIDTH = 64  # of narrow feed-forward layers
EXPERTS = 4


def small_windows(config: Any, *, rope: bool = True) -> tuple[Any, float]:
    """Shorten everything in a configuration beyond whose size layers compute another function.

    Args:
        config: A Hugging Face configuration; not changed.
        rope: Shorten the length from which rotary embeddings are scaled, too.

    Returns:
        The changed copy, and the longest row in tokens that none of the original sizes touches; infinite where there is none.
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
    """Shorten the length from which rotary embeddings are scaled by the row; return the longest row that is not."""
    original: int | None = None
    if rope.get("rope_type") == "dynamic":
        original, config.max_position_embeddings = config.max_position_embeddings, ROPE_LENGTH
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
        rope["original_max_position_embeddings"] = ROPE_LENGTH
        if hasattr(config, "original_max_position_embeddings"):
            config.original_max_position_embeddings = ROPE_LENGTH
    # Of rows as long as this, rotary embeddings that were scaled before keep their scale.
    return math.inf if original is None else original - 1


def build_twin(model: Any, config: Any) -> nn.Module:
    """Build a small model on the CPU.

    Args:
        model: Gives the class and the size; its weights are not read.
        config: Gives the architecture; not changed.

    Raises:
        Exception: Whatever the class raises where it cannot be built narrow.
    """
    config = copy.deepcopy(config)
    large = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()) > MAX_PARAMETERS
    if large:
        _narrow(config.get_text_config() if hasattr(config, "get_text_config") else config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # FSDP2 puts a class of its own before the model's.
    kind: Any = next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))
    attention = getattr(config, "_attn_implementation", None)
    # Other implementations need a device; without a mask of ours they compute the same.
    attention = attention if attention in MASKED_ATTENTION else "sdpa"
    if large:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind._from_config(copy.deepcopy(config), dtype=torch.float32).parameters())
        if size > 2 * MAX_PARAMETERS:
            raise ValueError(f"{kind.__name__} has {size:,} parameters where it should be narrow")
    with torch.device("cpu"):
        twin: nn.Module = kind._from_config(config, attn_implementation=attention, dtype=torch.float32)
    _draw_weights(twin)
    return twin.eval()


@torch.no_grad()
def _draw_weights(model: nn.Module) -> None:
    """Draw matrices wide enough that each layer shows in the logits; fresh models start with layers of almost no effect."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "A_log" not in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))


FEED_FORWARD = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


def _narrow(config: Any) -> None:
    """Keep all layers and head widths, but two heads, few experts, and small feed-forward layers and vocabulary."""
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
