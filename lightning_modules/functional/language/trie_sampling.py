"""Sampling of titles of a catalogue from a language model, constrained by their trie (prefix tree).

Shapes: B rows, R rows still searched, P prompt tokens, S samples, C candidates, N items, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.keyed_random import keyed_gumbel, keyed_uniform
from malleable.lightning_modules.functional.language.tree_attention import evaluating
from malleable.lightning_modules.functional.language.trie import Candidates, Trie
from malleable.lightning_modules.functional.language.trie_beam_search import BeamSearch
from malleable.lightning_modules.functional.language.trie_search_base import NEG_INF, Decoded, TrieSearch, segment_log_softmax


def sample(
    model: nn.Module,
    trie: Trie,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    seeds: Tensor,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    distinct: bool = False,
    allowed: Tensor | None = None,
    sync_any: Callable[[bool], bool] | None = None,
) -> Decoded:
    """Sample titles token by token, restricted at each token to titles of the catalogue.

    Args:
        model: Hugging Face causal language model (attention ``eager`` or ``sdpa``).
        trie: The catalogue's titles.
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        seeds: ``(B,)`` int64. The samples of a row depend only on its prompt and seed, not on the batch or rank.
        num_samples: S.
        temperature: Divides the logits, >= 0; 0 selects the most probable token (greedy search).
        top_p: Sample from the most probable tokens that together have this probability, in (0, 1].
        distinct: Sample without replacement.
        allowed: ``(N,)`` or ``(B, N)`` bool, the items that may be sampled; ``None`` allows all.
        sync_any: As in :func:`~malleable.lightning_modules.functional.language.trie_beam_search.beam_search`.

    Returns:
        Items ``(B, S)`` in the order of sampling, padded with -1, and the log-probability of each under sampling with replacement.

    Raises:
        ValueError: If ``temperature``, ``top_p`` or ``num_samples`` is out of range, or if there is not one seed for each row.

    Source:
        Without replacement: Kool et al. (2019), Stochastic Beams and Where to Find Them, arXiv:1903.06059, Algorithm 1.
    """
    if temperature < 0 or not 0 < top_p <= 1 or num_samples < 1:
        raise ValueError(
            f"sampling needs temperature >= 0, 0 < top_p <= 1 and num_samples >= 1, "
            f"got temperature={temperature}, top_p={top_p}, num_samples={num_samples}"
        )
    if seeds.shape != prompt_ids.shape[:1]:
        raise ValueError(f"seeds must contain one number for each of the {len(prompt_ids)} rows, got shape {tuple(seeds.shape)}")
    method = WithoutReplacement if distinct else WithReplacement
    with evaluating(model):
        return method(model, trie, prompt_ids, prompt_mask, allowed, SamplingOptions(seeds, num_samples, temperature, top_p)).run(sync_any)


class SamplingOptions(NamedTuple):
    """Arguments of :func:`sample` that control the distribution."""

    seeds: Tensor
    num_samples: int
    temperature: float
    top_p: float


class WithReplacement(TrieSearch):
    """Independent samples; samples at the same node share a forward pass. The arguments are those of :func:`sample`.

    Attributes:
        place: ``(R, S)`` int64, index of the current node of each sample among the nodes of its row.
        active: ``(R, S)`` bool, False once the title of a sample is determined.
    """

    def __init__(
        self,
        model: nn.Module,
        trie: Trie,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        allowed: Tensor | None,
        draw: SamplingOptions,
    ) -> None:
        super().__init__(model, trie, prompt_ids, prompt_mask, allowed)
        self.draw = draw
        self.seeds = draw.seeds[:, None]
        self.place = self.node.expand(-1, draw.num_samples)
        self.active = self.live.expand(-1, draw.num_samples)
        self.item = torch.full_like(self.place, -1)
        self.score = torch.zeros(self.active.shape, dtype=torch.float32, device=self.active.device).masked_fill(~self.active, NEG_INF)

    def result(self) -> Decoded:
        """Return the samples."""
        return Decoded(self.item, self.score)

    def select(self, rows: Tensor) -> None:
        """Keep only the rows at the positions ``rows`` of the batch."""
        super().select(rows)
        self.seeds, self.place, self.active = self.seeds[rows], self.place[rows], self.active[rows]

    def advance(self, logits: Tensor, width: int) -> None:
        """Sample a child for each sample, finish samples that lead to a single title, and gather the nodes of the others."""
        candidates = self.view.expand(self.node, self.live, width)
        logps = truncated_log_softmax(self.child_logits(logits, candidates), candidates.beam, logits.shape[1], self.draw)
        chosen = self._choose(logps, candidates.beam)
        node = candidates.node.gather(1, chosen)
        self.score[self.rows] += logps.gather(1, chosen).masked_fill(~self.active, 0.0)
        finished = self.active & (self.view.count(node) == 1)
        item = self.view.item(self.view.leaf(node))
        self.item[self.rows] = torch.where(finished, item, self.item[self.rows])
        self.active = self.active & ~finished
        # the candidates of active samples become the next nodes, in their order
        taken = torch.zeros_like(candidates.node).scatter_reduce(1, chosen, self.active.long(), "amax")
        self.place = (taken.cumsum(1) - 1).gather(1, chosen).clamp(min=0)
        top = taken.sort(dim=1, descending=True, stable=True)
        self.node, self.parent = candidates.node.gather(1, top.indices), candidates.beam.gather(1, top.indices)
        self.live = top.values > 0

    def _choose(self, logps: Tensor, segment: Tensor) -> Tensor:
        """For each sample, draw a child of its node by inverse transform sampling; return the indices of the candidates, ``(R, S)``."""
        ends = logps.double().exp().cumsum(1)
        # cumulative probability at the end and at the start of the candidates of each node
        upto = ends.new_zeros(len(ends), self.node.shape[1]).scatter_reduce(1, segment, ends, "amax").cummax(1).values
        start = torch.nn.functional.pad(upto[:, :-1], (1, 0)).gather(1, self.place)
        counter = torch.arange(self.place.shape[1], device=ends.device) * self.trie.max_length + self.depth
        uniform = keyed_uniform(self.seeds, counter).double()
        return torch.searchsorted(ends, start + uniform * (upto.gather(1, self.place) - start), right=True).clamp(max=ends.shape[1] - 1)


class WithoutReplacement(BeamSearch):
    """Stochastic beam search: log-probabilities with Gumbel noise, whose maximum over siblings equals the value of their parent.

    The arguments are those of :func:`sample`.
    """

    def __init__(self, model: nn.Module, trie: Trie, prompt_ids: Tensor, prompt_mask: Tensor, allowed: Tensor | None, draw: SamplingOptions) -> None:
        super().__init__(model, trie, prompt_ids, prompt_mask, allowed, draw.num_samples, draw.num_samples, renormalize=True)
        self.draw = draw
        self.seeds = draw.seeds[:, None]

    def select(self, rows: Tensor) -> None:
        """Keep only the rows at the positions ``rows`` of the batch."""
        super().select(rows)
        self.seeds = self.seeds[rows]

    def log_probs(self, logits: Tensor, candidates: Candidates) -> Tensor:
        """Return the log-probability of each candidate given its parent, with temperature and top-p, ``(R, C)``."""
        return truncated_log_softmax(self.child_logits(logits, candidates), candidates.beam, logits.shape[1], self.draw)

    def priorities(self, candidates: Candidates, score: Tensor) -> Tensor:
        """Return the scores with Gumbel noise, ``(R, C)``."""
        noisy = score + keyed_gumbel(self.seeds, candidates.node)
        shape = (len(score), self.node.shape[1])
        peak = score.new_full(shape, torch.finfo(score.dtype).min).scatter_reduce(1, candidates.beam, noisy, "amax").gather(1, candidates.beam)
        parent = self.priority.gather(1, candidates.beam)
        # -log(exp(-parent) - exp(-peak) + exp(-noisy)), as in the paper's appendix B.3
        shift = parent - noisy + torch.log1p(-(noisy - peak).exp())
        priority = parent - shift.clamp(min=0) - torch.log1p((-shift.abs()).exp())
        return priority.masked_fill(score == NEG_INF, NEG_INF)


def truncated_log_softmax(logits: Tensor, segment: Tensor, num_segments: int, draw: SamplingOptions) -> Tensor:
    """Compute the log-probabilities of the children of each node, with temperature and top-p.

    Args:
        logits: ``(R, C)`` float32, ``-inf`` for children that are not allowed.
        segment: ``(R, C)`` int64, ascending, the node of each child.
        num_segments: Number of nodes.
        draw: Temperature and top-p.

    Returns:
        Log-probabilities ``(R, C)``.
    """
    logps = segment_log_softmax(logits / (draw.temperature or 1.0), segment, num_segments)
    if draw.temperature > 0 and draw.top_p == 1:
        return logps
    order = logps.sort(dim=1, descending=True, stable=True).indices
    order = order.gather(1, segment.gather(1, order).sort(dim=1, stable=True).indices)  # by node, then by descending probability
    best = torch.nn.functional.pad(segment.diff(dim=1) > 0, (1, 0), value=True)
    if draw.temperature == 0:
        selected = best
    else:
        probs = logps.gather(1, order).double().exp()
        before = probs.cumsum(1) - probs
        selected = best | (before - (before * best).cummax(1).values < draw.top_p)
    selected = torch.zeros_like(selected).scatter(1, order, selected)
    return segment_log_softmax(logps.masked_fill(~selected, NEG_INF), segment, num_segments)
