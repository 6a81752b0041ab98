"""Low-rank adapters of a language model: new adapters, and adapters saved by PEFT."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from malleable.datamodules.files.fetch import hub_errors
from malleable.datamodules.files.text_files import read_json
from malleable.datamodules.files.user_files import check_model_folder, first_line, reading
from malleable.lightning_modules.patches.tensors import open_tensors

if TYPE_CHECKING:
    from malleable.lightning_modules.language.config import LanguageModelConfig

_PEFT_PREFIX = "base_model.model."
_MODULES_TO_SAVE = ".modules_to_save."
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "lm_head", "embed_out")


def with_adapter(model: Any, config: LanguageModelConfig) -> Any:
    """Wrap a language model with a new adapter, or with a stored adapter for further training.

    Trained weights are float32 for any dtype of the base model.

    Args:
        model: The base model.
        config: Configuration with ``lora`` or ``adapter``.

    Raises:
        ValueError: If the adapter does not fit the base model.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if config.quantization:
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=config.gradient_checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    if config.adapter is not None:
        adapted = _stored_adapter(model, config)
    else:
        lora = config.lora
        assert lora is not None
        settings = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules or "all-linear",
            exclude_modules=None if lora.target_modules else _routers(model),
        )
        adapted = get_peft_model(model, settings)
    _train_in_float32(adapted)
    return adapted


def _routers(model: nn.Module) -> list[str] | None:
    """Return the names of linear layers with a custom forward pass, such as routers of experts, which PEFT would replace by a matrix product."""
    found = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and type(layer).__module__.startswith("transformers.models")
    ]
    return found or None


def _stored_adapter(model: Any, config: LanguageModelConfig) -> Any:
    from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict

    name = str(config.adapter)
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder)
    local = reading(folder) if folder.is_dir() else nullcontext()  # errors of the hub must not be reported as damaged files
    with hub_errors("adapter", name), local:
        settings = _settings(name, config)
        tensors: dict[str, Tensor] = load_peft_weights(name, device="cpu", local_files_only=config.local_files_only)
    if settings.is_prompt_learning:
        raise ValueError(f"adapter '{name}' adds tokens to each prompt ({settings.peft_type.value}); give an adapter of weights, such as LoRA")
    settings.inference_mode = False
    settings.base_model_name_or_path = None  # PEFT sets it to the name of the model, and warns if another name was set
    # With resized embeddings, PEFT stores fully trained layers twice.
    tensors = {key: tensor for key, tensor in tensors.items() if _MODULES_TO_SAVE not in key or key.replace(_MODULES_TO_SAVE, ".") not in tensors}
    tensors = _for_text_part(model, settings, tensors)
    _fit_embeddings(model, tensors)
    try:
        adapted = get_peft_model(model, settings)
        result: Any = set_peft_model_state_dict(adapted, tensors)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError, StopIteration) as error:
        raise ValueError(
            f"adapter '{name}' was made for another base model than '{config.name}': {' '.join(str(error).split())[:500]}; "
            "give the base model that it was trained with"
        ) from error
    trained = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    missing, unexpected = sorted(trained & set(result.missing_keys)), sorted(result.unexpected_keys)
    if missing or unexpected:
        raise ValueError(
            f"adapter '{name}' was made for another base model than '{config.name}', or does not match its adapter_config.json: "
            f"missing {missing[:2]}, unexpected {unexpected[:2]} ({len(missing)} and {len(unexpected)} in total); "
            "give the base model that it was trained with"
        )
    return adapted


def _settings(name: str, config: LanguageModelConfig) -> Any:
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(name, local_files_only=config.local_files_only)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"adapter_config.json of adapter '{name}' is damaged ({type(error).__name__}: {first_line(error)}); copy it again"
        ) from error


def _check_folder(folder: Path) -> None:
    """Check that a folder contains an adapter that PEFT can read.

    Raises:
        ValueError: If it is damaged or not an adapter.
    """
    check_model_folder(folder)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"adapter '{folder}' has no {name}; give the folder that save_language_model or PEFT wrote")
    settings = read_json(folder / "adapter_config.json")
    if not isinstance(settings, dict) or not isinstance(settings.get("peft_type"), str):
        raise ValueError(f"{folder / 'adapter_config.json'} does not describe an adapter; give the folder that save_language_model or PEFT wrote")
    with open_tensors(folder / "adapter_model.safetensors") as stored:
        stored.keys()


def _for_text_part(model: Any, settings: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an adapter of a multimodal model, of which only the text part is loaded."""
    prefix = getattr(model, "text_prefix", None)
    whole = f"{_PEFT_PREFIX}{prefix}."
    if prefix is None or not any(key.startswith(whole) for key in tensors):
        return tensors
    own = f"{_PEFT_PREFIX}{model.base_model_prefix}."
    renamed = {own + key.removeprefix(whole) if key.startswith(whole) else key: tensor for key, tensor in tensors.items()}
    settings.target_modules = target_modules(renamed)
    return renamed


def target_modules(tensors: dict[str, Tensor]) -> set[str]:
    """Return the full names of the layers that have an adapter."""
    return {key.removeprefix(_PEFT_PREFIX).rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key}


def _fit_embeddings(model: Any, tensors: dict[str, Tensor]) -> None:
    """Resize the embeddings of the base model to those of the adapter, which may have padding or additional tokens."""
    rows = set()
    for key, tensor in tensors.items():
        layer, _, part = key.removesuffix(".weight").removeprefix(_PEFT_PREFIX).partition(".lora_")
        if layer.removesuffix(".base_layer").rsplit(".", 1)[-1] in _EMBEDDINGS and part in ("", "embedding_A", "B"):
            rows.add(tensor.shape[1] if part == "embedding_A" else tensor.shape[0])
    embeddings = model.get_input_embeddings()
    if len(rows) == 1 and (count := rows.pop()) > embeddings.weight.shape[0]:
        model.resize_token_embeddings(count, mean_resizing=False)
        model.resized_embeddings = True


def _train_in_float32(model: Any) -> None:
    """Convert all trained weights to float32; PEFT does this for adapters, but not for fully trained layers."""
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]:
        for layer in wrapper.modules_to_save.values():
            dtype = next((parameter.dtype for parameter in layer.parameters()), torch.float32)
            if dtype != torch.float32:
                layer.float()
                layer.register_forward_pre_hook(_to_float32)
                if isinstance(layer, nn.Embedding):
                    layer.register_forward_hook(lambda _module, _inputs, output, dtype=dtype: output.to(dtype))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _to_float32(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.float() if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs)
