"""Small random models of Hugging Face, ways to store them, and random patches of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from malleable.lightning_modules.patches.delta import Delta
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.storage import open_container
from malleable.lightning_modules.patches.tensors import fingerprint

DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    """Two layers, 16 wide."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=tied)).to(dtype)


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """One layer, 16 wide, with the tied head and the transposed weights of its family."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))


def with_lora(model: nn.Module, target: str = "q_proj", **settings: Any) -> nn.Module:
    """Rank 2 adapters that are not zero."""
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=[target], fan_in_fan_out=target == "c_attn", **settings))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return wrapped


def save_checkpoint(model: nn.Module, path: Path, only: str = "", **others: Any) -> Path:
    """What Lightning stores of a module that holds ``model``; ``only`` keeps the keys that contain it."""
    state = {f"model.{key}": value for key, value in model.state_dict().items() if only in key}
    torch.save({"state_dict": state, "epoch": 3, "optimizer_states": [{"step": torch.tensor(7)}], **others}, path)
    return path


def random_patch(tensors: Mapping[str, Tensor], names: Iterable[str] = (DOWN,), seed: int = 0, rank: int | None = 2, **fields: Any) -> Patch:
    """A patch of these tensors; low rank unless ``rank`` is ``None``."""
    draws = torch.Generator().manual_seed(seed)
    deltas = {}
    for name in names:
        d1, d0 = tensors[name].shape
        if rank is None:
            deltas[name] = Delta(0.1 * torch.randn(d1, d0, generator=draws))
        else:
            deltas[name] = Delta(torch.randn(d1, rank, generator=draws), 0.1 * torch.randn(rank, d0, generator=draws))
    base = fields.pop("base", None) or fingerprint(tensors)
    return Patch(**{"kind": "alpha_edit", "deltas": deltas, "base": base, "title": f"edit {seed}", **fields})


def apply(path: Path, patch: Patch, out: Path | None = None, **options: bool) -> Path:
    """Apply a patch to what lies in files."""
    target = open_container(path)
    return target.write(target.stack.apply(patch, target.tensors, **options), out)


def revert(path: Path, *ids: str) -> Path:
    """Revert patches of what lies in files; all, if none is named."""
    target = open_container(path)
    return target.write(target.stack.revert(ids or target.stack.ids, target.tensors))
