"""Causal language models: one way to build them for every method, one way to save them.

Any Hugging Face id, local folder or GGUF file, or a small Llama from scratch; full tuning or LoRA through PEFT; saved as
PEFT adapters or Hugging Face folders, so that transformers, PEFT and vLLM load the result.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from malleable.datamodules.batch import Catalog, Vocabulary
from malleable.datamodules.fetch import resolve_model
from malleable.lightning_modules.functional.defaults import drawn_on_cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        name: Hugging Face id, local folder, ``*.gguf`` file, or an alias of :mod:`malleable.datamodules.fetch`;
            ``None`` builds a small Llama from scratch.
        dtype: Number format of the weights; never taken from the checkpoint, so that results do not depend on it.
        lora: Train adapters only; ``None`` tunes every weight.
        adapter: Folder of a PEFT adapter to go on from.
        quantization: ``4bit`` loads NF4 weights through bitsandbytes (needs a GPU and LoRA).
        gradient_checkpointing: Recompute activations in the backward pass, without re-entrance.
        local_files_only: Never ask a hub.
        attention: Attention implementation.
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
    scratch: Scratch = field(default_factory=Scratch)


def build_language_model(config: LanguageModelConfig, vocabulary: Vocabulary | Catalog, *, zero3_config: dict[str, Any] | None = None) -> nn.Module:
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
        model = _pretrained_model(config, zero3_config)
    rows = model.config.vocab_size
    if rows < vocabulary.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocabulary.vocab_size} tokens but the model '{config.name}' embeds {rows}; "
            "use the model's own tokenizer for the data"
        )
    if config.gradient_checkpointing:
        # The name since transformers 5.23, and the one before it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if config.lora is not None or config.adapter is not None:
        # PEFT moves what is drawn to the base model's device.
        with whole_weights(zero3_config), drawn_on_cpu():
            model = _with_adapter(model, config)
    built: nn.Module = model.train()
    return built


def _scratch_model(config: LanguageModelConfig, vocabulary: Vocabulary | Catalog) -> Any:
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


def _pretrained_model(config: LanguageModelConfig, zero3_config: dict[str, Any] | None) -> Any:
    from transformers import AutoModelForCausalLM

    assert config.name is not None
    folder, gguf_file = resolve_model(config.name)
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype], "attn_implementation": config.attention, "local_files_only": config.local_files_only}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    if config.quantization == "4bit":
        options["quantization_config"] = _four_bits(DTYPES[config.dtype])
    with _partitioned_loading(zero3_config):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model


def _four_bits(dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: F401
    except ImportError as error:
        raise ValueError("quantization='4bit' needs bitsandbytes: pip install bitsandbytes (GPU machines), or leave quantization out") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)


@contextmanager
def _partitioned_loading(zero3_config: dict[str, Any] | None) -> Iterator[None]:
    """Let transformers know of ZeRO stage 3 while it loads; it must be told before ``from_pretrained``."""
    if zero3_config is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    keeper = HfDeepSpeedConfig(zero3_config)
    yield
    del keeper


@contextmanager
def whole_weights(zero3_config: dict[str, Any] | None) -> Iterator[None]:
    """Initialise weights before ZeRO stage 3 cuts them up: into empty shards nothing can be drawn, or not the same on any devices."""
    if zero3_config is None:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()


def _with_adapter(model: Any, config: LanguageModelConfig) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

    if config.quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    if config.adapter is not None:
        _check_adapter(Path(config.adapter), model)
        return PeftModel.from_pretrained(model, config.adapter, is_trainable=True)
    lora = config.lora
    assert lora is not None
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        base_model_name_or_path=config.name,
    )
    return get_peft_model(model, settings)


def _check_adapter(folder: Path, model: Any) -> None:
    """Refuse an adapter whose tensors do not fit the base model, before PEFT loads what matches and is silent on the rest."""
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise ValueError(f"adapter '{folder}' has no adapter_model.safetensors; give the folder that save_language_model or PEFT wrote")
    layers = dict(model.named_modules())
    with safe_open(path, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            layer_name = key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            layer = layers.get(layer_name)
            width = tensors.get_slice(key).get_shape()[1 if ".lora_A." in key else 0]
            expected = None if layer is None else getattr(layer, "in_features" if ".lora_A." in key else "out_features", width)
            if expected != width:
                raise ValueError(
                    f"adapter '{folder}' was made for another base model: {key} has width {width}, the model's layer '{layer_name}' has {expected}"
                )


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """Context in which the base model speaks, not the adapter."""
    return model.disable_adapter() if hasattr(model, "peft_config") else nullcontext()


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


def fingerprint(model: nn.Module) -> str:
    """Identity of the frozen weights: shapes, and the sum of each tensor's first values.

    Trainable weights do not count, so an adapter's checkpoint recognises its base before and after training.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            continue
        digest.update(f"{name.replace('.base_layer', '')}{tuple(getattr(parameter, 'ds_shape', parameter.shape))}".encode())
        if parameter.numel() and not hasattr(parameter, "ds_shape"):
            digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().round(4).tobytes())
    return digest.hexdigest()


def gathered_state(model: nn.Module, trainable_only: bool = False) -> dict[str, Tensor]:
    """Whole weights on the CPU, also when DeepSpeed has partitioned them; every rank must call it."""
    state = {}
    for name, parameter in model.named_parameters():
        if trainable_only and not parameter.requires_grad:
            continue
        with _gathered(parameter):
            state[name] = parameter.detach().cpu().clone()
    return state


def _gathered(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    gathering: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([parameter])
    return gathering


def save_language_model(model: Any, folder: Path, *, tokenizer: str | None = None, write: bool = True) -> None:
    """Save the adapter (PEFT format) or the whole model (Hugging Face format); nothing is half-written.

    Args:
        model: What :func:`build_language_model` returned.
        folder: Where to; replaced when it exists.
        tokenizer: Folder or id of the tokenizer to put beside it.
        write: False on the ranks that only take part in the gathering.
    """
    adapted = hasattr(model, "peft_config")
    state = gathered_state(model, trainable_only=adapted)
    if not write:
        return
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with _quietly():
        model.save_pretrained(temporary, state_dict=state)
    if tokenizer is not None and Path(tokenizer).is_dir():
        for file in Path(tokenizer).glob("*.json"):
            shutil.copy(file, temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers' own progress bars out of the Trainer's."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
