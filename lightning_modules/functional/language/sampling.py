"""Random titles of a catalogue, drawn as a language model would write them.

Shapes: B rows, R rows still searched, P prompt tokens, S samples, C candidates, N items, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.keyed_random import keyed_gumbel, keyed_uniform
from malleable.lightning_modules.functional.language.decoding import BeamSearch
from malleable.lightning_modules.functional.language.tree_attention import evaluating
from malleable.lightning_modules.functional.language.trie import Candidates, Trie
from malleable.lightning_modules.functional.language.trie_search import NEVER, Decoded, TrieSearch, segment_log_softmax


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
    """Draw titles from the model, restricted to the catalogue at each token.

    Args:
        model: Hugging Face causal language model (attention ``eager`` or ``sdpa``).
        trie: The catalogue's titles.
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        seeds: ``(B,)`` int64. A row's samples depend on its own prompt and seed only, whatever batch or rank it is in.
        num_samples: S.
        temperature: Divides the logits, >= 0; 0 takes the most probable token each time, as one beam would.
        top_p: Draw among the most probable tokens that make up this probability, in (0, 1].
        distinct: Draw without replacement.
        allowed: ``(N,)`` or ``(B, N)`` bool, the items that may be drawn; ``None`` allows all.
        sync_any: As in :func:`beam_search`.

    Returns:
        Items ``(B, S)`` in the order drawn, -1 where there is none, and the log-probability with which a single draw gives each.

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
        raise ValueError(f"seeds must hold one number for each of the {len(prompt_ids)} rows, got shape {tuple(seeds.shape)}")
    method = WithoutReplacement if distinct else WithReplacement
    with evaluating(model):
        return method(model, trie, prompt_ids, prompt_mask, allowed, Draw(seeds, num_samples, temperature, top_p)).run(sync_any)


class Draw(NamedTuple):
    """How to draw; see :func:`sample`."""

    seeds: Tensor
    num_samples: int
    temperature: float
    top_p: float


class WithReplacement(TrieSearch):
    """Independent walks down the trie; those at one node share its forward pass. The arguments are those of :func:`sample`.

    Attributes:
        place: ``(R, S)`` int64, which of its row's nodes each sample stands at.
        walking: ``(R, S)`` bool, False once a sample's title is settled.
    """

    def __init__(
        self,
        model: nn.Module,
        trie: Trie,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        allowed: Tensor | None,
        draw: Draw,
    ) -> None:
        super().__init__(model, trie, prompt_ids, prompt_mask, allowed)
        self.draw = draw
        self.seeds = draw.seeds[:, None]
        self.place = self.node.expand(-1, draw.num_samples)
        self.walking = self.live.expand(-1, draw.num_samples)
        self.item = torch.full_like(self.place, -1)
        self.score = torch.zeros(self.walking.shape, dtype=torch.float32, device=self.walking.device).masked_fill(~self.walking, NEVER)

    def result(self) -> Decoded:
        """Return the samples."""
        return Decoded(self.item, self.score)

    def select(self, keep: Tensor) -> None:
        """Keep some rows only."""
        super().select(keep)
        self.seeds, self.place, self.walking = self.seeds[keep], self.place[keep], self.walking[keep]

    def advance(self, logits: Tensor, width: int) -> None:
        """Draw a child for each sample, settle those that lead to a single title, and gather the others' nodes."""
        candidates = self.view.expand(self.node, self.live, width)
        logps = tempered(self.child_logits(logits, candidates), candidates.beam, logits.shape[1], self.draw)
        chosen = self._choose(logps, candidates.beam)
        node = candidates.node.gather(1, chosen)
        self.score[self.rows] += logps.gather(1, chosen).masked_fill(~self.walking, 0.0)
        settled = self.walking & (self.view.count(node) == 1)
        item = self.view.item(self.view.leaf(node))
        self.item[self.rows] = torch.where(settled, item, self.item[self.rows])
        self.walking = self.walking & ~settled
        # candidates that some sample walks on from become the next nodes, in their order
        taken = torch.zeros_like(candidates.node).scatter_reduce(1, chosen, self.walking.long(), "amax")
        self.place = (taken.cumsum(1) - 1).gather(1, chosen).clamp(min=0)
        top = taken.sort(dim=1, descending=True, stable=True)
        self.node, self.parent = candidates.node.gather(1, top.indices), candidates.beam.gather(1, top.indices)
        self.live = top.values > 0

    def _choose(self, logps: Tensor, segment: Tensor) -> Tensor:
        """Choose a candidate of its node for each sample, ``(R, S)``, by the inverse of the cumulative probabilities."""
        ends = logps.double().exp().cumsum(1)
        # probabilities up to the end of each node's candidates, and up to their start
        upto = ends.new_zeros(len(ends), self.node.shape[1]).scatter_reduce(1, segment, ends, "amax").cummax(1).values
        start = torch.nn.functional.pad(upto[:, :-1], (1, 0)).gather(1, self.place)
        counter = torch.arange(self.place.shape[1], device=ends.device) * self.trie.max_length + self.depth
        uniform = keyed_uniform(self.seeds, counter).double()
        return torch.searchsorted(ends, start + uniform * (upto.gather(1, self.place) - start), right=True).clamp(max=ends.shape[1] - 1)


class WithoutReplacement(BeamSearch):
    """Stochastic beams: log-probabilities with Gumbel noise whose maximum over siblings is their parent's.

    The arguments are those of :func:`sample`.
    """

    def __init__(self, model: nn.Module, trie: Trie, prompt_ids: Tensor, prompt_mask: Tensor, allowed: Tensor | None, draw: Draw) -> None:
        super().__init__(model, trie, prompt_ids, prompt_mask, allowed, draw.num_samples, draw.num_samples, renormalize=True)
        self.draw = draw
        self.seeds = draw.seeds[:, None]

    def select(self, keep: Tensor) -> None:
        """Keep some rows only."""
        super().select(keep)
        self.seeds = self.seeds[keep]

    def log_probs(self, logits: Tensor, candidates: Candidates) -> Tensor:
        """Return the log-probability of each candidate after its parent, tempered and cut, ``(R, C)``."""
        return tempered(self.child_logits(logits, candidates), candidates.beam, logits.shape[1], self.draw)

    def priorities(self, candidates: Candidates, score: Tensor) -> Tensor:
        """Perturb the scores."""
        noisy = score + keyed_gumbel(self.seeds, candidates.node)
        shape = (len(score), self.node.shape[1])
        peak = score.new_full(shape, torch.finfo(score.dtype).min).scatter_reduce(1, candidates.beam, noisy, "amax").gather(1, candidates.beam)
        parent = self.priority.gather(1, candidates.beam)
        # -log(exp(-parent) - exp(-peak) + exp(-noisy)), as in the paper's appendix B.3
        shift = parent - noisy + torch.log1p(-(noisy - peak).exp())
        priority = parent - shift.clamp(min=0) - torch.log1p((-shift.abs()).exp())
        return priority.masked_fill(score == NEVER, NEVER)


def tempered(logits: Tensor, segment: Tensor, num_segments: int, draw: Draw) -> Tensor:
    """Normalise the children of each node, sharpened and cut to the most probable ones.

    Args:
        logits: ``(R, C)`` float32, ``-inf`` on children that are not allowed.
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
    order = order.gather(1, segment.gather(1, order).sort(dim=1, stable=True).indices)  # by node, the best child first
    best = torch.nn.functional.pad(segment.diff(dim=1) > 0, (1, 0), value=True)
    if draw.temperature == 0:
        kept = best
    else:
        probs = logps.gather(1, order).double().exp()
        before = probs.cumsum(1) - probs
        kept = best | (before - (before * best).cummax(1).values < draw.top_p)
    kept = torch.zeros_like(kept).scatter(1, order, kept)
    return segment_log_softmax(logps.masked_fill(~kept, NEVER), segment, num_segments)
