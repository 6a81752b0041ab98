"""Language models as folders that transformers, PEFT and vLLM load."""

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
from malleable.datamodules.identity import restore_tokenizer
from malleable.lightning_modules.language.adapters import target_modules
from malleable.lightning_modules.patches.stack import PatchStack
from malleable.lightning_modules.patches.storage import SECTION, write_section

log = logging.getLogger(__name__)

_ATTRIBUTE = "model."  # of the module whose checkpoint it is
_WRAPPED = "base_model.model."


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

    The folder holds the configuration, the generation configuration, the weights and the tokenizer of the model itself. It takes the place of
    an earlier one when it is complete, so that a crash leaves the old or the new one.

    Args:
        model: Output of :func:`~malleable.lightning_modules.language.config.build_language_model`.
        folder: Where to; replaced when it exists.
        tokenizer: Folder, GGUF file or id of the tokenizer to save with it.
        weights: Weights to save instead of those in memory, by name in ``model.state_dict()``; tensors that are missing come from memory.
        patches: What the weights were patched with, so that ``malleable patch revert`` finds it in the folder.
        write: False on the ranks that only take part in the gathering.
    """
    adapted = hasattr(model, "peft_config")
    state = gathered_state(model, trainable_only=adapted, replaced=weights or {})
    if not write:
        return
    with atomic_write(folder) as building:
        building.mkdir()
        with _quietly():
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
        model: As it was trained.
        folder: Where to put it.
        checkpoint: Whose weights and patches to take; ``None`` takes the weights in memory.
        tokenizer: As in :func:`save_language_model`.
        write: As in :func:`save_language_model`.

    Returns:
        The folder written.
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
    """Return whether the weights in memory are cut into pieces while the Trainer runs."""
    strategy: Any = trainer.strategy
    return bool(getattr(strategy, "zero_stage_3", False)) or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy))


def registered_checkpoint(trainer: Trainer) -> Path | None:
    """Return the checkpoint that a run registered as its result, which ``test`` measures: the best or edited one, else the last.

    ``None`` if there is none, or under ZeRO stage 3, where the weights in memory are tested. Every rank must call it: the first one decides
    whether the checkpoint exists, so that all take the same way.
    """
    callback: Any = trainer.checkpoint_callback
    name = getattr(callback, "best_model_path", "") or getattr(callback, "last_model_path", "")
    if not name or getattr(trainer.strategy, "zero_stage_3", False):
        return None
    if not trainer.strategy.broadcast(Path(name).exists()):
        log.warning("the checkpoint %s is not here any more: the weights in memory are exported", name)
        return None
    return Path(name)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], PatchStack]:
    """Return the weights of the language model in a checkpoint of any strategy, and the patches that they have."""
    if (path / "latest").is_file():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        # Written by this run; DeepSpeed's own reader is the only one of its format.
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
    """Whole weights on the CPU, also when DeepSpeed or FSDP have partitioned them; every rank must call it.

    Args:
        model: A model, wrapped by PEFT or not.
        trainable_only: Leave out frozen parameters, except embeddings that an adapter has resized, and buffers.
        replaced: Values to take instead of the model's; they need not be gathered.
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
    _make_valid(model)
    model.save_pretrained(folder, state_dict=state)


def _make_valid(model: Any) -> None:
    """Correct a published generation configuration that transformers loads with a warning, but refuses to save."""
    settings = getattr(model, "generation_config", None)
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        # The usual case: a temperature or top_p beside do_sample=False.
        settings.do_sample = True


def _save_adapter(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    base = model.get_base_model()
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=getattr(base, "resized_embeddings", False))
    prefix = getattr(base, "text_prefix", None)
    if prefix is None:
        return
    # PEFT and transformers load the base with all its modalities, where the layers have longer names.
    own = f"{_WRAPPED}{base.base_model_prefix}."
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {f"{_WRAPPED}{prefix}.{key.removeprefix(own)}" if key.startswith(own) else key: value for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    stored = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps(stored | {"target_modules": sorted(target_modules(tensors))}, indent=2, sort_keys=True), encoding="utf-8")


def _save_tokenizer(name: str, folder: Path) -> None:
    """Copy all files of a tokenizer as they are, and nothing else of its folder; one inside a GGUF file is converted."""
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
            log.warning("%s: the tokenizer %s was removed while the run went on; it is saved as it was read", folder.name, name)
            return
        log.warning("%s is saved without a tokenizer: %s cannot be read (%s); copy the tokenizer's files there", folder.name, name, error)


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
