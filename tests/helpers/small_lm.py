"""Language models and catalogues small enough to score every title by hand."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

VOCAB, EOS, PAD = 40, 1, 0


def small_lm(kind: str = "llama", attention: str = "sdpa", **options):
    """A random model of two layers; weights wide enough for decided preferences."""
    torch.manual_seed(0)
    tokens = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": VOCAB, "attn_implementation": attention}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **tokens)).eval()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    return model(config(**sizes, initializer_range=0.4, **tokens, **options)).eval()


def random_titles(count: int = 40, seed: int = 0) -> list[list[int]]:
    """Distinct titles over six tokens: many shared beginnings, some that are the beginning of others."""
    rng = random.Random(seed)
    titles: dict[tuple[int, ...], None] = {(2, 3): None, (2, 3, 4): None}
    while len(titles) < count:
        titles[tuple(rng.choices(range(2, 8), k=rng.randint(1, 6)))] = None
    order = list(titles)
    rng.shuffle(order)
    return [[*title, EOS] for title in order]


def prompts(lengths: Sequence[int] = (9, 3, 1, 6), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random prompts padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    ids = torch.randint(2, VOCAB, mask.shape, generator=generator)
    return ids.masked_fill(~mask, PAD), mask


@torch.no_grad()
def title_logps(model, titles: Sequence[Sequence[int]], prompt: Sequence[int]) -> list[list[Tensor]]:
    """The log-probabilities of all tokens, ``(V,)``, at each position of each title: one plain forward pass a title."""
    result = []
    for title in titles:
        logits = model(torch.tensor([[*prompt, *title]])).logits[0].float()
        result.append(list(logits[len(prompt) - 1 : -1].log_softmax(-1)))
    return result


def score_all(model, titles: Sequence[Sequence[int]], prompt: Sequence[int]) -> Tensor:
    """The score of each title, ``(N,)``."""
    logps = title_logps(model, titles, prompt)
    return torch.stack([sum(row[token] for row, token in zip(rows, title, strict=True)) for rows, title in zip(logps, titles, strict=True)])


def score_all_in_trie(model, titles: Sequence[Sequence[int]], prompt: Sequence[int], allowed: Sequence[bool] | None = None) -> Tensor:
    """The score of each title when every step is normalised over the tokens that lead to an allowed title, ``(N,)``."""
    kept = [title for item, title in enumerate(titles) if allowed is None or allowed[item]]
    scores = []
    for title, logps in zip(kept, title_logps(model, kept, prompt), strict=True):
        score = torch.zeros(())
        for depth, token in enumerate(title):
            options = sorted({other[depth] for other in kept if other[:depth] == title[:depth]})
            score = score + logps[depth][token] - logps[depth][options].logsumexp(0)
        scores.append(score)
    full = torch.full((len(titles),), -torch.inf)
    full[[item for item in range(len(titles)) if allowed is None or allowed[item]]] = torch.stack(scores)
    return full


def real(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows without their padding."""
    return [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
