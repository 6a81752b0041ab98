"""Configuration and construction of causal language models.

A model is a Hugging Face id, a local folder, a GGUF file, or a small Llama from scratch, with full fine-tuning or LoRA (PEFT).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from malleable.datamodules.batch import Vocabulary
from malleable.datamodules.files.run_folders import find_exported_model
from malleable.lightning_modules.functional.defaults import drawn_on_cpu
from malleable.lightning_modules.functional.language.attention import MASKED_ATTENTION
from malleable.lightning_modules.functional.number_checks import check_numbers
from malleable.lightning_modules.language.adapters import with_adapter
from malleable.lightning_modules.language.compiled import Compile
from malleable.lightning_modules.language.loading import DTYPES, load_pretrained, whole_weights

log = logging.getLogger(__name__)


@dataclass
class Scratch:
    """Sizes of a Llama that is built from scratch, with the vocabulary of the data.

    Attributes:
        hidden_size: Width of the hidden states.
        num_layers: Number of decoder layers.
        num_heads: Number of attention heads; must divide ``hidden_size``.
        intermediate_size: Width of the gated feed-forward layer; default: three times ``hidden_size``.
        max_length: Maximum number of tokens of a sequence.
        dropout: Dropout probability of attention weights.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int | None = None
    max_length: int = 1024
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Check the values."""
        sizes = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "max_length")
        check_numbers(self, "scratch.", at_least=dict.fromkeys(sizes, 1) | {"dropout": 0}, below={"dropout": 1})
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"scratch.num_heads must divide scratch.hidden_size, got {self.num_heads} heads and a width of {self.hidden_size}; change one of them"
            )


@dataclass
class LoRA:
    """Settings of low-rank adapters.

    Attributes:
        r: Rank.
        alpha: Scale; updates are multiplied by ``alpha / r``.
        dropout: Dropout probability of the inputs of adapters.
        target_modules: Names of the layers with an adapter; default: all linear layers except the head.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        check_numbers(self, "lora.", at_least={"r": 1, "dropout": 0}, above={"alpha": 0}, below={"dropout": 1})


@dataclass
class LanguageModelConfig:
    """Configuration of a causal language model and of its fine-tuning.

    Attributes:
        name: Hugging Face id, local folder, ``*.gguf`` file, or an alias of :mod:`malleable.datamodules.files.fetch`; ``last:<recipe>`` is the
            folder ``model`` of the latest run of a recipe; ``None`` builds a small Llama from scratch.
        dtype: Dtype of the weights; the dtype of the stored weights is ignored. Adapters and other weights that are trained with them are float32.
        lora: Train adapters only; ``None`` trains all weights.
        adapter: Folder or hub id of a PEFT adapter to continue from, or ``last:<recipe>``.
        quantization: ``4bit`` loads NF4 weights with bitsandbytes (needs a GPU and LoRA).
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant).
        local_files_only: Use the local cache for hub ids, without downloads; the environment variable ``HF_HUB_OFFLINE`` has the same effect.
        attention: Attention implementation. ``sdpa`` runs whole sequences (one answer for each prompt, one document in each row) without a mask, on
            CUDA with FlashAttention, and rows of several sequences with a mask, with memory-efficient kernels. The kernels of cuDNN are disabled, see
            :func:`~malleable.lightning_modules.functional.language.attention.avoid_planned_kernels`. Architectures without SDPA run with ``eager``.
            ``flash_attention_2`` and ``flex_attention`` are not supported: shared prompts and packed documents need a custom mask, which
            FlashAttention does not accept, and FlexAttention has no backward pass on a CPU, where forms of passes are measured.
        compile: Settings of compilation of the decoder in training and validation; ``None`` does not compile.
        scratch: Sizes of the model from scratch.
    """

    name: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    lora: LoRA | None = None
    adapter: str | None = None
    quantization: Literal["4bit"] | None = None
    gradient_checkpointing: bool = False
    local_files_only: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    compile: Compile | None = None
    scratch: Scratch = field(default_factory=Scratch)

    def __post_init__(self) -> None:
        """Replace names of runs by their folders, and check the attention implementation.

        Raises:
            FileNotFoundError: If a run does not exist, or has not exported its weights.
            ValueError: If ``attention`` does not accept custom masks, or if a run exported an adapter instead of a model or vice versa.
        """
        for field_name, folder in (("name", "model"), ("adapter", "adapter")):
            given = getattr(self, field_name)
            if given is not None and given != (found := find_exported_model(given)):
                if Path(found).name != folder:
                    raise ValueError(
                        f"{field_name}={given} is the folder {found}, but must be a folder named {folder}; give an adapter as "
                        "language_model.adapter, and its base model as language_model.name"
                    )
                setattr(self, field_name, found)
        if self.attention not in MASKED_ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(MASKED_ATTENTION)}, got '{self.attention}'; use sdpa")


def build_language_model(config: LanguageModelConfig, vocabulary: Vocabulary, *, zero3_config: dict[str, Any] | None = None) -> nn.Module:
    """Build a language model with its adapters.

    Args:
        config: Configuration of the model.
        vocabulary: Vocabulary of the data.
        zero3_config: Configuration of DeepSpeed with ZeRO stage 3; weights are then loaded in shards.

    Raises:
        ValueError: If settings contradict each other, or if the model does not fit the tokenizer or the adapter.
    """
    if config.quantization and config.lora is None and config.adapter is None:
        raise ValueError("quantization needs adapters: 4-bit weights cannot be trained; set language_model.lora")
    if config.name is None:
        with whole_weights(zero3_config), drawn_on_cpu():
            model = _scratch_model(config, vocabulary)
        model = model.to(torch.get_default_device())
    else:
        model = load_pretrained(config, zero3_config)
    if config.lora is not None or config.adapter is not None:
        # PEFT moves the initial weights to the device of the base model.
        with whole_weights(zero3_config), drawn_on_cpu():
            model = with_adapter(model, config)
    _check_tokens(model.config.vocab_size, vocabulary, config.name)
    if config.gradient_checkpointing:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        # The method was renamed in transformers 5.23.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        base.enable_input_require_grads()
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _skip_padding_check
    built: nn.Module = model.train()
    return built


def _skip_padding_check(input_ids: Any, attention_mask: Any) -> None:
    """Do nothing, instead of a warning about padding without a mask: right-padded rows need no mask, and the check synchronises with the device."""


def _check_tokens(rows: int, vocabulary: Vocabulary, name: str | None) -> None:
    """Check that all tokens of the data have an embedding; tokens that occur in no text need none."""
    known = vocabulary.largest_token_id
    largest = vocabulary.vocab_size - 1 if known is None else known
    if largest < rows:
        return
    if known is None and (added := _added_tokens(vocabulary, rows)):
        log.warning(
            "the model '%s' embeds %d tokens, but the tokenizer has %d: texts must not contain the added tokens %s",
            name, rows, vocabulary.vocab_size, ", ".join(added[:3]) + (", ..." if len(added) > 3 else ""),
        )  # fmt: skip
        return
    if known is None:
        raise ValueError(
            f"the tokenizer has {vocabulary.vocab_size} tokens, but the model '{name}' embeds {rows}; use the tokenizer of the model for the data"
        )
    raise ValueError(
        f"the texts of the data contain the token {_token(vocabulary, largest)}, but the model '{name}' embeds only {rows} tokens; "
        "use the tokenizer of the model for the data, or remove the token from texts, template and padding"
    )


def _added_tokens(vocabulary: Vocabulary, rows: int) -> list[str]:
    """Return the tokens without an embedding if all of them are added tokens, which occur only in texts that spell them out; otherwise ``[]``."""
    if vocabulary.tokenizer is None or max(vocabulary.eos_token_id, vocabulary.pad_token_id) >= rows:
        return []
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(vocabulary.tokenizer, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        return []
    added = tokenizer.added_tokens_decoder
    missing = range(rows, vocabulary.vocab_size)
    return [str(added[token_id]) for token_id in missing] if all(token_id in added for token_id in missing) else []


def _token(vocabulary: Vocabulary, token_id: int) -> str:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(vocabulary.tokenizer), local_files_only=True, trust_remote_code=False)
        return f"{tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})"
    except (OSError, ValueError):
        return str(token_id)


def _scratch_model(config: LanguageModelConfig, vocabulary: Vocabulary) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = config.scratch
    if vocabulary.vocab_size < 1:
        raise ValueError("a model from scratch needs the vocabulary of a tokenizer, but the data have none; set the tokenizer of the data module")
    settings = LlamaConfig(
        vocab_size=vocabulary.vocab_size,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size or 3 * sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        max_position_embeddings=sizes.max_length,
        attention_dropout=sizes.dropout,
        tie_word_embeddings=True,
        pad_token_id=vocabulary.pad_token_id,
        eos_token_id=vocabulary.eos_token_id,
        bos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(settings, attn_implementation=config.attention, dtype=DTYPES[config.dtype])


@contextmanager
def dropout_off(model: nn.Module) -> Iterator[None]:
    """Disable dropout, including functional dropout and dropout in recomputed activations.

    Blocks with gradient checkpointing must stay in training mode, or they would not recompute activations. The checkpointed functions run in
    evaluation mode, both in this pass and when they are recomputed in the backward pass, which may come after this context.
    """
    modes = [(module, module.training) for module in model.modules()]
    recomputing = {module: module._gradient_checkpointing_func for module in _recomputing(model)}
    for module, mode in modes:
        module.training = mode and module in recomputing
    for module, checkpoint in recomputing.items():
        module._gradient_checkpointing_func = partial(_checkpoint_without_dropout, module, checkpoint)
    try:
        yield
    finally:
        for module, checkpoint in recomputing.items():
            module._gradient_checkpointing_func = checkpoint
        for module, mode in modes:
            module.training = mode


def _recomputing(model: nn.Module) -> list[Any]:
    """Return the modules with gradient checkpointing: blocks, not decoders, which have the same flag but apply dropout to embeddings themselves."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    flagged = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]
    return [module for module in flagged if isinstance(module, GradientCheckpointingLayer)] or flagged


def _checkpoint_without_dropout(module: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a function of a module so that it runs in evaluation mode, now and when it is recomputed."""

    @wraps(function)
    def run(*inputs: Any, **options: Any) -> Any:
        modes = [(part, part.training) for part in module.modules()]
        for part, _ in modes:
            part.training = False
        try:
            return function(*inputs, **options)
        finally:
            for part, mode in modes:
                part.training = mode

    return checkpoint(run, *args, **kwargs)


FINGERPRINT = "2:"
"""Version prefix of fingerprints; fingerprints of different versions cannot be compared."""


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the frozen weights: names, shapes, and 1024 evenly spaced values of each tensor, as bfloat16.

    Trainable weights are ignored, so that the fingerprint of an adapter's base model is the same before and after training. Base models that are
    edited or fine-tuned have another fingerprint; the dtype, float32 or bfloat16, has no effect.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            continue
        digest.update(f"{name.replace('.base_layer', '')}{tuple(getattr(parameter, 'ds_shape', parameter.shape))}".encode())
        if parameter.numel() and not hasattr(parameter, "ds_shape"):
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // 1024)]
            digest.update(values.float().cpu().to(torch.bfloat16).float().numpy().tobytes())
    return f"{FINGERPRINT}{digest.hexdigest()}"
