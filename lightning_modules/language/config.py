"""Causal language models: one way to build them for every method.

Any Hugging Face id, local folder or GGUF file, or a small Llama from scratch; full tuning or LoRA through PEFT.
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
from malleable.datamodules.files.run_folders import exported
from malleable.lightning_modules.functional.defaults import drawn_on_cpu
from malleable.lightning_modules.functional.language.attention import MASKED_ATTENTION
from malleable.lightning_modules.language.adapters import with_adapter
from malleable.lightning_modules.language.compiled import Compile
from malleable.lightning_modules.language.loading import DTYPES, load_pretrained, whole_weights

log = logging.getLogger(__name__)


@dataclass
class Scratch:
    """Sizes of a Llama built from scratch; its vocabulary is the data's tokenizer.

    Attributes:
        hidden_size: Width.
        num_layers: Decoder blocks.
        num_heads: Attention heads; must divide ``hidden_size``.
        intermediate_size: Width of the gated feed-forward layer; default: three times ``hidden_size``.
        max_length: Longest sequence.
        dropout: Dropout of attention weights.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int | None = None
    max_length: int = 1024
    dropout: float = 0.0


@dataclass
class LoRA:
    """Low-rank adapters.

    Attributes:
        r: Rank.
        alpha: Scale; updates are multiplied by ``alpha / r``.
        dropout: Dropout before the adapter.
        target_modules: Names of the layers that get one; default: every linear layer but the head.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] | None = None


@dataclass
class LanguageModelConfig:
    """Which causal language model, and how it is tuned.

    Attributes:
        name: Hugging Face id, local folder, ``*.gguf`` file, or an alias of :mod:`malleable.datamodules.files.fetch`; ``last:<recipe>`` is the
            folder ``model`` of the latest run of a recipe; ``None`` builds a small Llama from scratch.
        dtype: Number format of the weights; never taken from the checkpoint, so that results do not depend on it. Adapters, and whatever else
            trains beside them, are float32 on any base.
        lora: Train adapters only; ``None`` tunes every weight.
        adapter: Folder or hub id of a PEFT adapter to continue from, or ``last:<recipe>``.
        quantization: ``4bit`` loads NF4 weights through bitsandbytes (needs a GPU and LoRA).
        gradient_checkpointing: Recompute activations in the backward pass, without re-entrance.
        local_files_only: Take a hub id from the local cache only; the environment variable ``HF_HUB_OFFLINE`` has the same effect.
        attention: Attention implementation. ``sdpa`` runs whole sequences (one answer to a prompt, one document a row) without a mask, by
            FlashAttention on CUDA, and rows of several sequences under a mask, by memory-efficient kernels; those of cuDNN are switched off, see
            :func:`~malleable.lightning_modules.functional.language.attention.avoid_planned_kernels`. Architectures without SDPA run with ``eager``.
            ``flash_attention_2`` and ``flex_attention`` are refused: a prompt shared by its answers and packed documents need a mask of their own,
            FlashAttention takes none, and FlexAttention has no backward pass on a CPU, where forms of passes are measured. Neither is tested here.
        compile: Compile the decoder in training and validation; ``None`` does not; see
            :class:`~malleable.lightning_modules.language.compiled.Compile`.
        scratch: Sizes of the from-scratch model.
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
        """Find runs that are named, and refuse attention implementations that training passes do not support.

        Raises:
            FileNotFoundError: If a named run does not exist, or has not exported its weights.
            ValueError: If ``attention`` is not one that takes masks of our own, or a named run has an adapter where a model is needed or vice versa.
        """
        for field_name, folder in (("name", "model"), ("adapter", "adapter")):
            given = getattr(self, field_name)
            if given is not None and given != (found := exported(given)):
                if Path(found).name != folder:
                    raise ValueError(f"{field_name}={given} is {found}, not a folder {folder}; an adapter goes into `adapter`, its base into `name`")
                setattr(self, field_name, found)
        if self.attention not in MASKED_ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(MASKED_ATTENTION)}, got '{self.attention}'; use sdpa")


def build_language_model(config: LanguageModelConfig, vocabulary: Vocabulary, *, zero3_config: dict[str, Any] | None = None) -> nn.Module:
    """Build the model, its adapters and its training settings.

    Args:
        config: What to build.
        vocabulary: The data's, of texts or of the catalogue's titles.
        zero3_config: DeepSpeed's configuration when parameters are partitioned (stage 3); weights then load shard by shard.

    Raises:
        ValueError: If the settings contradict each other or the model does not fit the tokenizer or the adapter.
    """
    if config.quantization and config.lora is None and config.adapter is None:
        raise ValueError("quantization needs adapters: 4-bit weights cannot be trained; set lora")
    if config.name is None:
        with whole_weights(zero3_config), drawn_on_cpu():
            model = _scratch_model(config, vocabulary)
        model = model.to(torch.get_default_device())
    else:
        model = load_pretrained(config, zero3_config)
    if config.lora is not None or config.adapter is not None:
        # PEFT moves what is drawn to the base model's device.
        with whole_weights(zero3_config), drawn_on_cpu():
            model = with_adapter(model, config)
    _check_tokens(model.config.vocab_size, vocabulary, config.name)
    if config.gradient_checkpointing:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        # The name since transformers 5.23, and the one before it.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        base.enable_input_require_grads()
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _skip_padding_check
    built: nn.Module = model.train()
    return built


def _skip_padding_check(input_ids: Any, attention_mask: Any) -> None:
    """Replace the check of some models that warns of padding without a mask: rows padded on the right need none, and it waits for the device."""


def _check_tokens(rows: int, vocabulary: Vocabulary, name: str | None) -> None:
    """Refuse a token without an embedding; tokens that no text has, as tokenizers often have some, need none."""
    known = vocabulary.largest_token_id
    largest = vocabulary.vocab_size - 1 if known is None else known
    if largest < rows:
        return
    if known is None and (added := _added_tokens(vocabulary, rows)):
        log.warning(
            "the model '%s' embeds %d tokens, and the tokenizer has %d: texts must not have the added tokens %s",
            name, rows, vocabulary.vocab_size, ", ".join(added[:3]) + (", ..." if len(added) > 3 else ""),
        )  # fmt: skip
        return
    if known is None:
        raise ValueError(
            f"the tokenizer has {vocabulary.vocab_size} tokens but the model '{name}' embeds {rows}; use the model's own tokenizer for the data"
        )
    raise ValueError(
        f"the data's texts have the token {_token(vocabulary, largest)}, but the model '{name}' embeds {rows} tokens only; "
        "use the model's own tokenizer for the data, or remove the token from texts, template and padding"
    )


def _added_tokens(vocabulary: Vocabulary, rows: int) -> list[str]:
    """Return the tokens without an embedding if all are added to the vocabulary, where only texts that spell them out have them; else none."""
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
    if sizes.hidden_size % sizes.num_heads:
        raise ValueError(f"num_heads must divide hidden_size, got {sizes.num_heads} and {sizes.hidden_size}")
    if vocabulary.vocab_size < 1:
        raise ValueError("a model from scratch takes its vocabulary from the catalogue's tokenizer, but the catalogue has none")
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
    """Switch dropout off, also in layers that drop as functions of their own mode and where activations are recomputed.

    A block that recomputes its activations stays in training mode, or it would not; what it checkpoints runs in evaluation mode, in this pass and
    when it runs again in the backward pass, which may come after this context.
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
    """Return the modules that checkpoint; decoders carry the flag of their blocks, but drop at their embeddings by their own mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    flagged = [
        module for module in model.modules() if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]
    return [module for module in flagged if isinstance(module, GradientCheckpointingLayer)] or flagged


def _checkpoint_without_dropout(module: nn.Module, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a function of a module that then runs in evaluation mode, now and when it is recomputed."""

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
"""Beginning of fingerprints; those of another version cannot be compared."""


def fingerprint(model: nn.Module) -> str:
    """Identity of the frozen weights: names, shapes, and 1024 values of each tensor, spread over it, as bfloat16.

    Trainable weights do not count, so an adapter's checkpoint recognises its base before and after training. A base that was edited or tuned by
    little is another one; one that is loaded in float32 or bfloat16 is the same.
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
