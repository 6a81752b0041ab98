"""Tiny random models of every causal language model that transformers ships, and plain passes to hold other passes against."""

import copy
import inspect
import random
from functools import cache
from typing import Any

import torch
from tiny import batch_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from malleable.lightning_modules.functional.language.free_text import generate_text
from malleable.lightning_modules.functional.language.grounding import embed_texts
from malleable.lightning_modules.functional.language.logps import answer_token_logps, packed_token_logps
from malleable.lightning_modules.functional.language.trie import Trie
from malleable.lightning_modules.functional.language.trie_beam_search import beam_search
from malleable.lightning_modules.functional.language.whole_rows import reset_rope

VOCAB, EOS, WINDOW = 64, 2, 8
LAYERS, HIDDEN, HEADS, HEAD = 4, 32, 4, 8

# Sizes by the names that configurations give them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "attention_hidden_size", "lru_width", "embedding_size"), HIDDEN
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "kv_channels"), HEAD),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "intermediate_size_mlp", "dense_intermediate_size"), 48
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 16
    ),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts", "moe_top_k"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 128),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "mamba_head_dim"), 8
    ),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "n_group", "topk_group", "n_shared_experts", "mamba_ngroups", "first_k_dense_replace"), 1),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": HEAD,
    "v_head_dim": HEAD,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
DROPOUT = ("dropout", "_pdrop", "layerdrop")

# Latent attention: rotary embeddings are as wide as the rotated part of a head, and each head has a key of its own.
LATENT = ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu")

SPECIAL: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 4, "num_key_value_heads": HEADS} for kind in LATENT},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "cpmant": {"dim_head": HEAD, "dim_ff": 48},
    "ctrl": {"dff": 48},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "falcon": {"new_decoder_architecture": True},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
        "intermediate_size": [48] * LAYERS,
    },
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"] * 2},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", *["sparse"] * 3],
        "linear_head_dim": HEAD,
        "linear_num_heads": HEADS,
        "num_experts_per_token": 2,
        "num_key_value_heads": HEADS,
        "head_dim": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": HEADS,
        "attention_hidden_size": 2 * HIDDEN,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "use_mamba_kernels": False,
    },
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon alibi": (
        "falcon",
        {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": False, "num_kv_heads": HEADS},
    ),
    "gpt_neo wide": ("gpt_neo", {"window_size": 24}),
    "llama dynamic": ("llama", {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
}


@cache
def causal_kinds() -> list[str]:
    """Model types of all causal language models of the installed transformers; of models with several modalities, the text part has its own."""
    return [kind for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if not has_text_part(kind)]


def has_text_part(kind: str) -> bool:
    """Whether the configuration of a model type holds that of a text model."""
    try:
        config = AutoConfig.for_model(kind)
        return type(config.get_text_config(decoder=True)) is not type(config)
    # Some types have no default configuration.
    except Exception:
        return False


def tiny_model(kind: str, **options: Any) -> Any:
    """Build a model in evaluation mode, under SDPA where it has it; weights are wide enough that every layer shows in the logits."""
    kind, settings = VARIANTS.get(kind, (kind, {}))
    default = AutoConfig.for_model(kind)
    names = set(vars(default)) | set(default.attribute_map) | set(inspect.signature(type(default).__init__).parameters)
    sizes = {name: value for name, value in SIZES.items() if name in names}
    sizes |= {name: 0.0 for name in names if name.endswith(DROPOUT)}
    config = AutoConfig.for_model(kind, **(sizes | SPECIAL.get(kind, {}) | settings | options))
    attention = "sdpa" if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", True) else "eager"
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention, dtype=torch.float32)
    if (size := sum(parameter.numel() for parameter in empty.parameters())) > 2_000_000:
        raise ValueError(f"{size:,} parameters: sizes of the configuration have other names")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "A_log" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    return model.eval()


@torch.no_grad()
def plain_logps(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """Log-probabilities of an answer's tokens by one pass over the sequence alone."""
    reset_rope(model)
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(answer)[:, None])[:, 0]


@torch.no_grad()
def stepwise_logps(model: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """The same by one pass for each token, over what stands before it: what decoding means where logits depend on what follows."""
    return torch.stack([next_logps(model, prompt + answer[:index])[token] for index, token in enumerate(answer)])


@torch.no_grad()
def next_logps(model: Any, tokens: list[int]) -> Tensor:
    """Log-probabilities of the token behind a sequence, ``(V,)``, by one pass over it alone."""
    reset_rope(model)
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float().log_softmax(-1)


def rows_and_titles() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of different lengths, longer than a window, and titles that share beginnings."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(count)]

    stem = tokens(2)
    titles = [stem + tokens(2) + [EOS], stem + tokens(1) + [EOS], [*tokens(1), EOS], [*tokens(4), EOS]]
    return [tokens(3), tokens(13), tokens(9)], titles


@torch.no_grad()
def pass_errors(model: Any, logps: Any = plain_logps) -> dict[str, float | str]:
    """The largest difference of each pass from plain passes, in nats, or the message of its refusal.

    ``logps`` says what a title's score is: one pass over the whole sequence, or one for each token.
    """
    prompts, titles = rows_and_titles()
    batch: Any = batch_of([{"sample_id": row, "prompt": prompt, "answers": titles[:3]} for row, prompt in enumerate(prompts)])
    passes = {
        "answers": lambda: answers_error(model, batch, None),
        "separate": lambda: answers_error(model, batch, False),
        "packed": lambda: packed_error(model),
        "beams": lambda: beams_error(model, batch, logps),
        "text": lambda: text_error(model, batch),
        "embedding": lambda: embedding_error(model),
    }
    errors: dict[str, float | str] = {}
    for name, run in passes.items():
        try:
            errors[name] = run()
        except ValueError as refusal:
            errors[name] = str(refusal)
    return errors


def answers_error(model: Any, batch: Any, shared_prompt: bool | None) -> float:
    prompts, titles = rows_and_titles()
    parts = (batch.prompt_ids, batch.prompt_mask, batch.answer_ids, batch.answer_mask)
    got = answer_token_logps(model, *parts, shared_prompt=shared_prompt, num_columns=batch.answer_columns)
    return max(
        difference(got[row, k, : len(titles[k])], plain_logps(model, prompt, titles[k])) for row, prompt in enumerate(prompts) for k in range(3)
    )


def packed_error(model: Any) -> float:
    prompts, titles = rows_and_titles()
    documents = [prompts[1] + titles[0], prompts[0] + titles[2], prompts[2] + titles[3]]
    tokens = [token for document in documents for token in document]
    numbers = [number for number, document in enumerate(documents, 1) for _ in document]
    rows: Any = batch_of([{"sample_id": 0, "input_ids": tokens, "document_ids": numbers}])
    got, targets = packed_token_logps(model, rows.input_ids, rows.document_ids, rows.position_ids)
    return difference(got[targets], torch.cat([plain_logps(model, document[:1], document[1:]) for document in documents]))


def beams_error(model: Any, batch: Any, logps: Any) -> float:
    prompts, titles = rows_and_titles()
    found = beam_search(model, Trie.build(titles), batch.prompt_ids, batch.prompt_mask, num_beams=4, k=4)
    scores = torch.stack([torch.stack([logps(model, prompt, title).sum() for title in titles]) for prompt in prompts])
    return difference(found.scores, scores.gather(1, found.item_ids)) + float((scores.argmax(1) != found.item_ids[:, 0]).sum())


def text_error(model: Any, batch: Any) -> float:
    """How much less probable than the best token any written one is."""
    prompts, _ = rows_and_titles()
    written = generate_text(model, batch.prompt_ids, batch.prompt_mask, max_new_tokens=6, eos_token_id=-1, pad_token_id=0)
    regret = 0.0
    for prompt, row in zip(prompts, written.tolist(), strict=True):
        for index, token in enumerate(row):
            logps = next_logps(model, prompt + row[:index])
            regret = max(regret, float(logps.max() - logps[token]))
    return regret


def embedding_error(model: Any) -> float:
    states = []
    texts = [prompt + title for prompt, title in zip(*rows_and_titles(), strict=False)]
    for tokens in texts:
        reset_rope(model)
        states.append(model(input_ids=torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states[-1][0, -1])
    return difference(embed_texts(model, texts), torch.stack(states))


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference."""
    return float((got.float() - expected.float()).abs().max())
