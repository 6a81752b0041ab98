"""Random models of a few thousand weights that read text and images."""

import torch
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedModel

_TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IMAGE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_QWEN_IMAGE = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32}
_WINDOWS = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
# Configuration class, text part, image part.
KINDS = {
    "gemma3": ("Gemma3Config", _WINDOWS | {"query_pre_attn_scalar": 8}, _IMAGE),
    "gemma4": (
        "Gemma4Config",
        _WINDOWS | {"global_head_dim": 8, "hidden_size_per_layer_input": 0},
        _IMAGE | {"num_key_value_heads": 2, "head_dim": 8},
    ),
    "mistral3": ("Mistral3Config", {"model_type": "mistral", "sliding_window": None}, _IMAGE | {"model_type": "pixtral", "head_dim": 8}),
    "llama4": (
        "Llama4Config",
        {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
        _IMAGE | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "qwen3_5": ("Qwen3_5Config", _LINEAR | {"layer_types": ["linear_attention", "full_attention"]}, _QWEN_IMAGE),
    "llava": ("LlavaConfig", {"model_type": "llama"}, _IMAGE | {"model_type": "clip_vision_model"}),
    "qwen3_vl": ("Qwen3VLConfig", {}, _QWEN_IMAGE | {"deepstack_visual_indexes": []}),
}


def image_model(kind: str) -> PreTrainedModel:
    """A random model of text and images, as transformers builds it."""
    torch.manual_seed(0)
    name, text, image = KINDS[kind]
    config = getattr(transformers, name)(text_config=_TEXT | text, vision_config=image)
    built: PreTrainedModel = AutoModelForImageTextToText.from_config(config).eval()
    return built
