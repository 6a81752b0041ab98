"""Beam search among the titles of a catalogue.

Shapes: B rows, R rows still searched, P prompt tokens, W beams, C candidates, N items, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.tree_attention import TreeDecoder, evaluating
from malleable.lightning_modules.functional.trie import Candidates, Trie

_CHUNK = 1 << 24  # logits turned to float32 at a time: 64 MiB


class Decoded(NamedTuple):
    """Items of each row and their scores.

    Attributes:
        item_ids: ``(B, k)`` int64, -1 where there are fewer than k.
        scores: ``(B, k)`` float32, in nats, ``-inf`` beside -1.
    """

    item_ids: Tensor
    scores: Tensor


def beam_search(
    model: nn.Module,
    trie: Trie,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    num_beams: int,
    k: int,
    allowed: Tensor | None = None,
    renormalize: bool = False,
    any_rank: Callable[[bool], bool] | None = None,
) -> Decoded:
    """Find the k most probable titles after each prompt."""
    if num_beams < k:
        raise ValueError(f"num_beams must be at least k = {k}, got {num_beams}")
    with evaluating(model):
        search = BeamSearch(model, trie.to(prompt_ids.device), prompt_ids, prompt_mask, num_beams, k, allowed, renormalize)
        return search.run(any_rank)


class BeamSearch:
    def __init__(
        self,
        model: nn.Module,
        trie: Trie,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        num_beams: int,
        k: int,
        allowed: Tensor | None,
        renormalize: bool,
    ) -> None:
        self.trie = trie
        self.view = trie.restrict(allowed)
        self.num_beams = num_beams
        self.k = k
        self.renormalize = renormalize
        self.decoder = TreeDecoder(model, prompt_ids, prompt_mask, trie.max_length)
        self.node = prompt_ids.new_zeros(len(prompt_ids), 1)
        self.score = torch.where(self.view.count(self.node) > 0, 0.0, -torch.inf)
        self.best_score = torch.full((len(prompt_ids), k), -torch.inf, device=prompt_ids.device)
        self.best_item = torch.full_like(self.best_score, -1, dtype=torch.long)

    def run(self, any_rank: Callable[[bool], bool] | None = None) -> Decoded:
        logits = self.decoder.logits
        depth = 0
        while True:
            live = self.score > -torch.inf
            width = int((self.trie.num_children[self.node] * live).sum(1).max())
            if width == 0:
                break
            candidates = self.view.expand(self.node, live, width)
            logps = self.log_probs(logits, candidates)
            parent = self.advance(candidates, self.score.gather(1, candidates.beam) + logps)
            num_live = int((self.score > -torch.inf).sum(1).max())
            if num_live == 0:
                break
            self.node, self.score, parent = self.node[:, :num_live], self.score[:, :num_live], parent[:, :num_live]
            logits = self.decoder.extend(self.trie.token[self.node], parent, depth)
            depth += 1
        return Decoded(self.best_item, self.best_score)

    def advance(self, candidates: Candidates, score: Tensor) -> Tensor:
        top = score.topk(min(2 * self.num_beams, score.shape[1]))
        node = candidates.node.gather(1, top.indices)
        beam = candidates.beam.gather(1, top.indices)
        done = self.view.count(node) == 1 if self.renormalize else self.trie.num_children[node] == 0
        within = torch.arange(node.shape[1], device=node.device) < self.num_beams
        finished = torch.where(done & within, top.values, -torch.inf)
        items = torch.where(finished > -torch.inf, self.view.item(self.view.leaf(node)), -1)
        merged = torch.cat([self.best_score, finished], 1).topk(self.k)
        self.best_score = merged.values
        self.best_item = torch.cat([self.best_item, items], 1).gather(1, merged.indices)
        hopeless = done | (top.values <= self.best_score[:, -1:])
        live = top.values.masked_fill(hopeless, -torch.inf).topk(min(self.num_beams, node.shape[1]))
        self.score = live.values
        self.node = node.gather(1, live.indices)
        return beam.gather(1, live.indices)

    def log_probs(self, logits: Tensor, candidates: Candidates) -> Tensor:
        vocab = logits.shape[2]
        chosen = logits.flatten(1).gather(1, candidates.beam * vocab + self.trie.token[candidates.node]).float()
        chosen = chosen.masked_fill(~candidates.valid, -torch.inf)
        if self.renormalize:
            norm = segment_logsumexp(chosen, candidates.beam, logits.shape[1])
        else:
            norm = logsumexp(logits)
        return (chosen - norm.gather(1, candidates.beam)).masked_fill(~candidates.valid, -torch.inf)


def logsumexp(logits: Tensor) -> Tensor:
    rows = logits.flatten(0, -2)
    size = max(1, _CHUNK // rows.shape[1])
    return torch.cat([chunk.float().logsumexp(-1) for chunk in rows.split(size)]).reshape(logits.shape[:-1])


def segment_logsumexp(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    shape = (len(values), num_segments)
    peak = values.new_full(shape, torch.finfo(values.dtype).min).scatter_reduce(1, segment, values, "amax")
    total = values.new_zeros(shape).scatter_add(1, segment, (values - peak.gather(1, segment)).exp())
    return peak + total.log()
