"""Export of language models to folders that transformers, PEFT and vLLM can load."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from malleable.datamodules.files.atomic import atomic_write
from malleable.datamodules.files.fetch import hub_snapshot, resolve_model, tokenizer_files
from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.datamodules.stored_identity import restore_tokenizer
from malleable.lightning_modules.language.adapters import target_modules
from malleable.lightning_modules.patches.stack import PatchStack
from malleable.lightning_modules.patches.storage import SECTION, write_section

log = logging.getLogger(__name__)

_ATTRIBUTE = "model."  # prefix of the language model in the state dictionary of a module
_PEFT_PREFIX = "base_model.model."  # prefix of the base model in the names of PEFT


def save_language_model(
    model: Any,
    folder: Path,
    *,
    tokenizer: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    patches: PatchStack | None = None,
    write: bool = True,
) -> None:
    """Save the adapter (PEFT format) or the whole model (Hugging Face format).

    The folder contains the configuration, the generation configuration, the weights and the tokenizer. An existing folder is replaced atomically, so
    that a crash leaves either the old or the new one.

    Args:
        model: Output of :func:`~malleable.lightning_modules.language.config.build_language_model`.
        folder: Output folder; replaced if it exists.
        tokenizer: Folder, GGUF file or id of the tokenizer to save.
        weights: Weights to save instead of those in memory, by name in ``model.state_dict()``; missing tensors are taken from memory.
        patches: Patches of the weights, which are stored for ``malleable patch revert``.
        write: False on ranks that only take part in gathering the weights.
    """
    adapted = hasattr(model, "peft_config")
    state = gathered_state(model, trainable_only=adapted, replaced=weights or {})
    if not write:
        return
    with atomic_write(folder) as building:
        building.mkdir()
        with _without_progress_bars():
            if adapted:
                _save_adapter(model, state, building)
            else:
                _save_model(model, state, building)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, building)
        if patches is not None and patches.patches and not adapted:
            write_section(building / SECTION, patches)


def export_result(model: Any, folder: Path, *, checkpoint: Path | None = None, tokenizer: str | None = None, write: bool = True) -> Path:
    """Save the result of a run as the folder ``adapter`` or ``model``.

    Args:
        model: The trained model.
        folder: Parent of the output folder.
        checkpoint: Checkpoint to read weights and patches from; ``None`` saves the weights in memory.
        tokenizer: As in :func:`save_language_model`.
        write: As in :func:`save_language_model`.

    Returns:
        The output folder.
    """
    weights, stack = read_checkpoint(checkpoint) if checkpoint is not None else ({}, PatchStack())
    adapted = hasattr(model, "peft_config")
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if adapted and stack.patches and frozen & set(weights):
        log.info("the base model of the adapter was edited: both are merged into one model")
        model = copy.deepcopy(model)
        model.load_state_dict(weights, strict=False)
        model, weights, stack, adapted = model.merge_and_unload(), {}, PatchStack(), False
    path = folder / ("adapter" if adapted else "model")
    save_language_model(model, path, tokenizer=tokenizer, weights=weights, patches=stack, write=write)
    return path


def is_sharded(trainer: Trainer) -> bool:
    """Return whether the strategy of the Trainer shards the weights."""
    strategy: Any = trainer.strategy
    return bool(getattr(strategy, "zero_stage_3", False)) or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def registered_checkpoint(trainer: Trainer) -> Path | None:
    """Return the checkpoint that ``test`` measures: the edited or best one, or else the last one.

    ``None`` if there is none, or under ZeRO stage 3, where the weights in memory are tested. All ranks must call this function, because the first
    rank checks whether the checkpoint exists.
    """
    callback: Any = trainer.checkpoint_callback
    name = getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", "")
    if not name or getattr(trainer.strategy, "zero_stage_3", False):
        return None
    if not trainer.strategy.broadcast(Path(name).exists()):
        log.warning("the checkpoint %s does not exist any more: the weights in memory are exported", name)
        return None
    return Path(name)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], PatchStack]:
    """Return the weights of the language model and their patches from a checkpoint of any strategy."""
    if (path / "latest").is_file():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        # The checkpoint was written by this run, so that it can be read with pickle; only DeepSpeed can read its format.
        checkpoint = {"state_dict": get_fp32_state_dict_from_zero_checkpoint(str(path), tag="checkpoint")}
    elif path.is_dir():
        from lightning.fabric.utilities.load import _load_distributed_checkpoint

        checkpoint = _load_distributed_checkpoint(path)
    else:
        checkpoint = read_plain(path)
    state: dict[str, Tensor] = {}
    for key, tensor in (checkpoint.get("state_dict") or checkpoint["model"]).items():
        name = key.removeprefix("_forward_module.")
        if name.startswith(_ATTRIBUTE):
            state[name.removeprefix(_ATTRIBUTE)] = tensor
    return state, PatchStack.from_plain(checkpoint.get(SECTION), str(path))


def gathered_state(model: nn.Module, trainable_only: bool = False, replaced: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the complete weights on the CPU, also if DeepSpeed or FSDP shards them; all ranks must call this function.

    Args:
        model: A model, with or without PEFT.
        trainable_only: Leave out buffers and frozen parameters, except embeddings that an adapter has resized.
        replaced: Values by name in ``model.state_dict()`` that replace those of the model; the replaced tensors are not gathered.
    """
    replaced = replaced or {}
    resized = set()
    if trainable_only and getattr(getattr(model, "get_base_model", lambda: model)(), "resized_embeddings", False):
        resized = {id(parameter) for layer in _embeddings(model) for parameter in layer.parameters()}
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        if trainable_only and not tensor.requires_grad and id(tensor) not in resized:
            continue
        seen.add(id(tensor))
        if name in replaced:
            state[name] = replaced[name].detach().to("cpu", tensor.dtype)
            continue
        with _gathered(tensor):
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            state[name] = whole.detach().cpu().clone()
    return state


def _embeddings(model: Any) -> list[nn.Module]:
    return [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]


def _gathered(tensor: Tensor) -> AbstractContextManager[Any]:
    if not hasattr(tensor, "ds_id"):
        return nullcontext()
    import deepspeed

    gathering: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([tensor])
    return gathering


def _save_model(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    _correct_generation_config(model)
    model.save_pretrained(folder, state_dict=state)


def _correct_generation_config(model: Any) -> None:
    """Correct a generation configuration that transformers loads with a warning, but cannot save."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        # The common case is a temperature or top_p with do_sample=False.
        settings.do_sample = True


def _save_adapter(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    base = model.get_base_model()
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=getattr(base, "resized_embeddings", False))
    prefix = getattr(base, "text_prefix", None)
    if prefix is None:
        return
    # PEFT and transformers load the multimodal base model, in which the names of the layers have a prefix.
    own = f"{_PEFT_PREFIX}{base.base_model_prefix}."
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {f"{_PEFT_PREFIX}{prefix}.{key.removeprefix(own)}" if key.startswith(own) else key: value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    stored = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(stored | {"target_modules": sorted(target_modules(tensors))}, indent=2, sort_keys=True), encoding="utf-8")


def _save_tokenizer(name: str, folder: Path) -> None:
    """Copy the files of a tokenizer; a tokenizer in a GGUF file is converted."""
    from transformers import AutoTokenizer

    try:
        source, gguf_file = resolve_model(name)
        if gguf_file is not None:
            AutoTokenizer.from_pretrained(source, gguf_file=gguf_file, trust_remote_code=False).save_pretrained(folder)
            return
        origin = Path(source).expanduser() if Path(source).expanduser().is_dir() else hub_snapshot(source)
        files = {} if origin is None else tokenizer_files(origin)
        if not files:
            raise FileNotFoundError(f"no file of a tokenizer in {origin or 'the hub cache'}")
        for path, place in files.items():
            (folder / place).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / place)
    except (OSError, ValueError) as error:
        if restore_tokenizer(name, folder):
            log.warning("%s: the files of the tokenizer %s were removed during the run; a copy in memory is saved", folder.name, name)
            return
        log.warning("%s is saved without a tokenizer: %s cannot be read (%s); copy its files into this folder", folder.name, name, error)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers, which would interfere with that of the Trainer."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
