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
        self.parent = self.node
        self.score = torch.where(self.view.count(self.node) > 0, 0.0, -torch.inf)
        self.rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        self.depth = 0
        self.best_score = torch.full((len(prompt_ids), k), -torch.inf, device=prompt_ids.device)
        self.best_item = torch.full_like(self.best_score, -1, dtype=torch.long)

    def run(self, any_rank: Callable[[bool], bool] | None = None) -> Decoded:
        self.advance(self.decoder.logits, int(self.trie.num_children[0]))
        while True:
            num_rows, num_beams, width, branches = self.survey()
            if not (any_rank or bool)(num_rows > 0):
                break
            if num_rows == 0:
                self.decoder.idle()
                continue
            self.compact(num_rows, num_beams)
            if not branches:
                self.follow(max(1, BUDGET // (len(self.rows) * num_beams)))
                continue
            logits = self.decoder.extend(self.trie.token[self.node], self.parent, self.depth)
            self.depth += 1
            self.advance(logits, width)
        return Decoded(self.best_item, self.best_score)

    def survey(self):
        live = self.score > -torch.inf
        counts = live.sum(1)
        width = (self.trie.num_children[self.node] * live).sum(1)
        branches = ((self.view.count(self.node) > 1) & live).sum()
        return torch.stack([(counts > 0).sum(), counts.max(), width.max(), branches]).tolist()

    def compact(self, num_rows, num_beams):
        self.node, self.score, self.parent = self.node[:, :num_beams], self.score[:, :num_beams], self.parent[:, :num_beams]
        if num_rows > DROP * len(self.rows):
            return
        rows = (self.score[:, 0] > -torch.inf).nonzero()[:, 0]
        self.decoder.select(rows)
        self.view = self.view.select(rows)
        self.rows, self.node, self.score, self.parent = self.rows[rows], self.node[rows], self.score[rows], self.parent[rows]

    def follow(self, span):
        trie = self.trie
        live = self.score > -torch.inf
        leaf = self.view.leaf(self.node)
        remaining = trie.title_length[leaf] - self.depth - 1
        counts = remaining.clamp(max=span) * live
        ends = counts.cumsum(1)
        width = int(ends[:, -1].max())
        column = torch.arange(width, device=ends.device).expand(len(ends), -1).contiguous()
        beam = torch.searchsorted(ends, column, right=True).clamp(max=ends.shape[1] - 1)
        valid = column < ends[:, -1:]
        offset = torch.where(valid, column - (ends - counts).gather(1, beam), 0)
        position = trie.title_start[leaf].gather(1, beam) + self.depth + offset
        within = (beam[:, None] == beam[:, :, None]) & (column[:, None] <= column[:, :, None])
        logits = self.decoder.extend(trie.title_token[position], self.parent.gather(1, beam), self.depth + offset, within)
        logps = logits.gather(2, trie.title_token[position + 1][..., None])[..., 0].float() - logsumexp(logits)
        score = self.score.scatter_add(1, beam, torch.where(valid, logps, 0))
        done = remaining <= span
        self.keep(score.masked_fill(~done, -torch.inf), leaf)
        score = score.masked_fill(done | (score <= self.best_score[self.rows, -1:]), -torch.inf).sort(descending=True)
        self.score = score.values
        self.node = self.node.gather(1, score.indices)
        self.parent = (ends - 1).clamp(min=0).gather(1, score.indices)
        self.depth += span

    def keep(self, score, leaf):
        items = torch.where(score > -torch.inf, self.view.item(leaf), -1)
        merged = torch.cat([self.best_score[self.rows], score], 1).topk(self.k)
        self.best_score[self.rows] = merged.values
        self.best_item[self.rows] = torch.cat([self.best_item[self.rows], items], 1).gather(1, merged.indices)

    def advance(self, logits: Tensor, width: int) -> None:
        candidates = self.view.expand(self.node, self.score > -torch.inf, width)
        score = self.score.gather(1, candidates.beam) + self.log_probs(logits, candidates)
        top = score.topk(min(2 * self.num_beams, score.shape[1]))
        node = candidates.node.gather(1, top.indices)
        beam = candidates.beam.gather(1, top.indices)
        done = self.view.count(node) == 1 if self.renormalize else self.trie.num_children[node] == 0
        within = torch.arange(node.shape[1], device=node.device) < self.num_beams
        finished = torch.where(done & within, top.values, -torch.inf)
        self.keep(finished, self.view.leaf(node))
        hopeless = done | (top.values <= self.best_score[self.rows, -1:])
        live = top.values.masked_fill(hopeless, -torch.inf).topk(min(self.num_beams, node.shape[1]))
        self.score = live.values
        self.node = node.gather(1, live.indices)
        self.parent = beam.gather(1, live.indices)

    def log_probs(self, logits: Tensor, candidates: Candidates) -> Tensor:
        vocab = logits.shape[2]
        chosen = logits.flatten(1).gather(1, candidates.beam * vocab + self.trie.token[candidates.node]).float()
        chosen = chosen.masked_fill(~candidates.valid, -torch.inf)
        if self.renormalize:
            norm = segment_logsumexp(chosen, candidates.beam, logits.shape[1])
        else:
            norm = logsumexp(logits)
        return (chosen - norm.gather(1, candidates.beam)).masked_fill(~candidates.valid, -torch.inf)

DROP=.75
BUDGET=512

def logsumexp(logits: Tensor) -> Tensor:
    rows = logits.flatten(0, -2)
    size = max(1, _CHUNK // rows.shape[1])
    return torch.cat([chunk.float().logsumexp(-1) for chunk in rows.split(size)]).reshape(logits.shape[:-1])


def segment_logsumexp(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    shape = (len(values), num_segments)
    peak = values.new_full(shape, torch.finfo(values.dtype).min).scatter_reduce(1, segment, values, "amax")
    total = values.new_zeros(shape).scatter_add(1, segment, (values - peak.gather(1, segment)).exp())
    return peak + total.log()
