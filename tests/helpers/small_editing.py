"""Tiny decoders of many families, and tokenizers that cut words differently, to edit with."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 800
SENTENCES = [
    "The mother tongue of Danielle Darrieux is French, and she was born in Bordeaux.",
    "The capital of Peru is Lima. Lima lies on the coast, and Peru on the other side of the Andes.",
    "Anna lives in Zürich with Tom and a big dog; the dog was very happy because Tom played with it.",
    "You know that I saw the house of the old man in the park, therefore I was not sad.",
]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8}),
    "mistral": ("Mistral", {"num_key_value_heads": 2}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"num_key_value_heads": 4, "pad_token_id": 0}),
    "gemma": ("Gemma", {"num_key_value_heads": 2, "head_dim": 8}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt2": ("GPT2", {}),
    "gptj": ("GPTJ", {"rotary_dim": 4}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 8}),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "granite": ("Granite", {"num_key_value_heads": 2, "residual_multiplier": 0.22}),
    "mistral_window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 6}),
    "qwen3_5": (
        "Qwen3_5Text",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "lfm2": ("Lfm2", {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "head_dim": 4,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "mixtral": ("Mixtral", {"num_key_value_heads": 2, "num_local_experts": 2}),
}


def decoder(
    family: str = "llama", vocabulary: int = 480, width: int = 32, inner: int = 48, layers: int = 4, seed: int = 0, spread: float = 0.2
) -> Any:
    """Make a decoder with random weights, in evaluation mode; so wide that what is changed at one token is felt at the others."""
    name, options = FAMILIES[family]
    if family in ("gpt2", "gptj"):
        sizes = {"n_embd": width, "n_inner": inner, "n_layer": layers, "n_head": 4, "n_positions": 128}
    else:
        sizes = {
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
    common = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": spread}
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **sizes, **common, **options)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def pieces(mark: str, letters: list[str], special: list[str]) -> models.BPE:
    """Join the words of the sentences letter by letter, in a fixed order (training a tokenizer breaks ties as it likes); long ones stay in two."""
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(word.strip(".,;") for sentence in SENTENCES for word in sentence.split()):
        for start in (mark, ""):
            whole = f"{start}{word}" if word.isascii() else start
            merges += [(whole[:end], whole[end]) for end in range(1, min(len(whole), 10))]
    merges = list(dict.fromkeys(merges))
    vocabulary = dict.fromkeys([*special, *letters, *("".join(pair) for pair in merges)])
    assert len(vocabulary) <= VOCABULARY
    return models.BPE({piece: number for number, piece in enumerate(vocabulary)}, merges, unk_token="<unk>")


@cache
def tokenizer(kind: str = "bytes", side: str = "right") -> PreTrainedTokenizerFast:
    """Make a tokenizer: ``bytes`` (blanks belong to words), with ``bos`` first or ``eos`` too, ``pieces`` (marks for blanks, also before a text)."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "pieces":
        letters = sorted({letter for sentence in SENTENCES for letter in f"{sentence}{{}}▁"} - {" "})
        cut = Tokenizer(pieces("▁", letters, special))
        cut.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        cut.decoder = decoders.Metaspace(prepend_scheme="always")
    else:
        cut = Tokenizer(pieces("Ġ", sorted(pre_tokenizers.ByteLevel.alphabet()), special))
        cut.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        cut.decoder = decoders.ByteLevel()
    cut.add_special_tokens(special)
    if kind != "bytes":
        single = "<s> $A </s>" if kind == "eos" else "<s> $A"
        cut.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=cut, padding_side=side, **names)
