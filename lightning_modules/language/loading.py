"""Loading of pretrained weights from the hub, a folder or a GGUF file. Of a multimodal model, only the text part is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from malleable.datamodules.files.fetch import gguf_errors, hub_errors, resolve_model
from malleable.datamodules.files.user_files import reading

if TYPE_CHECKING:
    from malleable.lightning_modules.language.config import LanguageModelConfig

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names of the text part in checkpoints of multimodal models (old and new), and in the text model.
_TEXT_KEYS = {
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.model\.": "model.",
    r"^(?:model\.)?language_model\.": "model.",
}


def load_pretrained(config: LanguageModelConfig, zero3_config: dict[str, Any] | None = None) -> Any:
    """Load a causal language model.

    Only the text part of a multimodal model is loaded. If PEFT and transformers load the whole multimodal model under this name, the returned model
    has the attribute ``text_prefix``: the name of the text part in the multimodal model.

    Args:
        config: Configuration with the name of the model.
        zero3_config: Configuration of DeepSpeed with ZeRO stage 3.

    Raises:
        OSError: If the model is not found, is gated, or cannot be downloaded.
        ValueError: If transformers has no causal language model for it, or if weights are missing in the checkpoint.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    assert config.name is not None
    model: Any
    info: dict[str, Any]
    auto: Any = AutoModelForCausalLM
    folder, gguf_file = resolve_model(config.name)
    source: dict[str, Any] = {"local_files_only": config.local_files_only, "trust_remote_code": False}
    options: dict[str, Any] = {"dtype": DTYPES[config.dtype], "output_loading_info": True, **source}
    if config.quantization == "4bit":
        options["quantization_config"] = _four_bit_config(DTYPES[config.dtype])
    if _is_adapter(Path(folder)):
        raise ValueError(f"{config.name!r} is an adapter; give its base model as language_model.name and the folder as language_model.adapter")
    damaged = nullcontext() if gguf_file is None else gguf_errors(Path(folder) / gguf_file)
    local = reading(folder) if Path(folder).is_dir() else nullcontext()  # errors of the hub must not be reported as damaged files
    with hub_errors("model", config.name), damaged, local, _partitioned_loading(zero3_config):
        file = {} if gguf_file is None else {"gguf_file": gguf_file}
        whole = AutoConfig.from_pretrained(folder, **file, **source)
        text = whole if file else whole.get_text_config(decoder=True)
        options["attn_implementation"] = _attention(config, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None))
        if text is whole:
            model, info = auto.from_pretrained(folder, config=whole, **file, **options)
        else:
            model, info = _text_class(whole, text, config.name).from_pretrained(folder, config=text, key_mapping=_TEXT_KEYS, **options)
    _check_complete(model, set(info["missing_keys"]), whole, config.name)
    if text is not whole:
        _keep_own_names(model)
        built: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(whole), None)
        if built is not type(model):
            model.text_prefix = _text_prefix(whole, model)
    return model


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _attention(config: LanguageModelConfig, kind: Any) -> str:
    """Return the attention implementation: ``eager`` for classes without SDPA, such as state space models and some models with soft-capping."""
    if config.attention != "sdpa" or getattr(kind, "_supports_sdpa", True):
        return config.attention
    log.info("%s (%s) has no SDPA attention in transformers and runs with attention: eager", config.name, kind.__name__)
    return "eager"


def _text_class(whole: Any, text: Any, name: str) -> Any:
    """Return the class of the text part of a multimodal model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text), None)
    if kind is None:
        raise ValueError(
            f"transformers has no causal language model for the text part of {name!r} ({type(text).__name__}); "
            "choose a model whose text part is one, such as Gemma 3, Gemma 4, Mistral 3, Qwen 3.5 or Llama 4"
        )
    if getattr(whole, "quantization_config", None) is not None:
        text.quantization_config = whole.quantization_config
    return kind


def _check_complete(model: Any, missing: set[str], whole: Any, name: str) -> None:
    """Raise an error if weights are missing; transformers would initialise them randomly with a log message only."""
    head = {key for key, module in model.named_modules() if module is model.get_output_embeddings()}
    if missing and missing <= {f"{key}.weight" for key in head} and getattr(whole, "tie_word_embeddings", False):
        # The setting of the multimodal model overrides that of its text part.
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return
    if missing:
        raise ValueError(
            f"{len(missing)} weights of {type(model).__name__} are missing in the checkpoint of {name!r}, such as {sorted(missing)[0]!r}; "
            "give a complete checkpoint of a causal language model"
        )


def _keep_own_names(model: Any) -> None:
    """Remove the renaming of weights, which transformers would revert when the text model is saved."""
    from transformers.core_model_loading import PrefixChange

    patterns = set(_TEXT_KEYS)
    model._weight_conversions = [
        change
        for change in getattr(model, "_weight_conversions", None) or ()
        if not isinstance(change, PrefixChange) and not patterns & set(getattr(change, "_original_source_patterns", change.source_patterns))
    ]


def _text_prefix(whole: Any, model: Any) -> str | None:
    """Return the name of the text part in the multimodal model, or ``None`` if transformers cannot build the multimodal model."""
    from transformers import AutoModelForImageTextToText

    if type(whole) not in AutoModelForImageTextToText._model_mapping:
        return None
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(whole, trust_remote_code=False)
    return next((name for name, module in built.named_modules() if type(module) is type(model.base_model)), None)


def _four_bit_config(dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # type: ignore[import-not-found, import-untyped, unused-ignore] # noqa: F401
    except ImportError as error:
        raise ValueError("quantization='4bit' needs bitsandbytes: pip install bitsandbytes (needs a GPU), or omit quantization") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # ZeRO-3 and FSDP shard tensors of one dtype, so packed weights must be stored in the dtype of the others.
        bnb_4bit_quant_storage=dtype,
    )


@contextmanager
def _partitioned_loading(zero3_config: dict[str, Any] | None) -> Iterator[None]:
    """Enable ZeRO stage 3 in transformers while ``from_pretrained`` runs."""
    if zero3_config is None:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    keeper = HfDeepSpeedConfig(zero3_config)
    yield
    del keeper


@contextmanager
def whole_weights(zero3_config: dict[str, Any] | None) -> Iterator[None]:
    """Disable the sharding of ZeRO stage 3 while weights are initialised, because initial values of shards would depend on the number of devices."""
    if zero3_config is None:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
