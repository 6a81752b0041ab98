"""Beam search over the titles of a catalogue, constrained by their trie (prefix tree).

Shapes: B rows, R rows still searched, P prompt tokens, W beams, C candidates, N items, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.tree_attention import evaluating
from malleable.lightning_modules.functional.language.trie import Candidates, Trie
from malleable.lightning_modules.functional.language.trie_search_base import NEG_INF, Decoded, TrieSearch, logsumexp, segment_log_softmax

# Number of tokens in a forward pass below which its overhead dominates. Feeding more tokens of a title at once saves passes, but also processes
# tokens of titles that would have been pruned. Measured on two cores with 1 M parameters: 128 to 1024 make no difference.
PASS_TOKENS = 512
ACCELERATOR_PASS_TOKENS = 4096  # not measured; larger, because kernel launches cost more


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
    sync_any: Callable[[bool], bool] | None = None,
) -> Decoded:
    """Find the k most probable titles after each prompt.

    The score of a title is the sum of the log-probabilities of its tokens, including the end-of-sequence token, without length penalty. With as many
    beams as titles, the search is exact.

    Args:
        model: Hugging Face causal language model (attention ``eager`` or ``sdpa``).
        trie: The catalogue's titles.
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        num_beams: Number of beams of each row, at least k.
        k: Number of items to return for each row.
        allowed: ``(N,)`` or ``(B, N)`` bool, the items that may be returned; ``None`` allows all.
        renormalize: Normalise each step over the tokens that lead to an allowed item instead of the vocabulary. The probabilities of all
            allowed titles then sum to 1, tokens without an alternative have log-probability 0, and a beam that leads to a single title is finished.
        sync_any: Returns whether its argument is true on any rank. If given, all ranks run the model equally often, as sharded weights (ZeRO-3,
            FSDP) require; each rank must then have at least one row.

    Returns:
        The items of each row, best first. Of items with equal titles, only the lowest allowed id is returned.

    Raises:
        ValueError: If ``num_beams`` is smaller than k, or if k is not positive.

    Source:
        De Cao et al. (2021), Autoregressive Entity Retrieval, arXiv:2010.00904: beam search constrained by a prefix tree.
        Bao et al. (2024), D3, arXiv:2406.14900: effect of tokens without an alternative ("ghost tokens") on scores; ``renormalize`` removes it.
        Differs: no length penalty; a beam is pruned once the k best finished titles are all better.
    """
    if not 1 <= k <= num_beams:
        raise ValueError(f"k must be at least 1 and at most num_beams = {num_beams}, got {k}")
    with evaluating(model):
        return BeamSearch(model, trie, prompt_ids, prompt_mask, allowed, num_beams, k, renormalize).run(sync_any)


class BeamSearch(TrieSearch):
    """Beam search for the titles of highest score; the arguments are those of :func:`beam_search`.

    Attributes:
        score: ``(R, W)`` float32, log-probability of each node; ``-inf`` for nodes that are not live.
        priority: ``(R, W)`` float32, sort key of the beams: the score.
    """

    def __init__(
        self,
        model: nn.Module,
        trie: Trie,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        allowed: Tensor | None,
        num_beams: int,
        k: int,
        renormalize: bool,
    ) -> None:
        super().__init__(model, trie, prompt_ids, prompt_mask, allowed)
        self.num_beams = num_beams
        self.k = k
        self.renormalize = renormalize
        # Explicit float32: `torch.where` of two numbers would use the default dtype.
        self.score = torch.zeros(self.live.shape, dtype=torch.float32, device=self.live.device).masked_fill(~self.live, NEG_INF)
        self.priority = self.score
        empty = self.score.new_full((len(prompt_ids), k), NEG_INF)
        self.best_priority, self.best_score, self.best_item = empty, empty.clone(), torch.full_like(empty, -1, dtype=torch.long)

    def result(self) -> Decoded:
        """Return the k best items of each row."""
        return Decoded(self.best_item, self.best_score)

    def narrow(self, num_nodes: int) -> None:
        """Keep only the best beams of each row."""
        super().narrow(num_nodes)
        self.score, self.priority = self.score[:, :num_nodes], self.priority[:, :num_nodes]

    def select(self, rows: Tensor) -> None:
        """Keep only the rows at the positions ``rows`` of the batch."""
        super().select(rows)
        self.score, self.priority = self.score[rows], self.priority[rows]

    def advance(self, logits: Tensor, width: int) -> None:
        """Collect the finished children, and continue with the best unfinished ones."""
        candidates = self.view.expand(self.node, self.live, width)
        score = self.score.gather(1, candidates.beam) + self.log_probs(logits, candidates)
        # each beam has at most one finished child, so 2 * num_beams candidates contain num_beams unfinished ones
        top = self.priorities(candidates, score).topk(min(2 * self.num_beams, width))
        node, score, parent = (values.gather(1, top.indices) for values in (candidates.node, score, candidates.beam))
        done = self.view.count(node) == 1 if self.renormalize else self.trie.num_children[node] == 0
        # as in `generate` of transformers, a title that is not among the best num_beams candidates is discarded
        entered = done & (torch.arange(node.shape[1], device=node.device) < self.num_beams)
        self.collect_finished(torch.where(entered, top.values, NEG_INF), score, node)
        self.keep_best(top.values.masked_fill(done, NEG_INF), score, node, parent)

    def log_probs(self, logits: Tensor, candidates: Candidates) -> Tensor:
        """Return the log-probability of each candidate given its parent, ``(R, C)``."""
        chosen = self.child_logits(logits, candidates)
        if self.renormalize:
            return segment_log_softmax(chosen, candidates.beam, logits.shape[1])
        return chosen - logsumexp(logits).gather(1, candidates.beam)

    def priorities(self, candidates: Candidates, score: Tensor) -> Tensor:
        """Return the sort key of the candidates, ``(R, C)``; it is at most the key of the parent."""
        return score

    def collect_finished(self, priority: Tensor, score: Tensor, node: Tensor) -> None:
        """Merge the finished titles, i.e. nodes of finite priority, with the best titles so far."""
        found = priority > NEG_INF
        top = torch.cat([self.best_priority[self.rows], priority], 1).topk(self.k)
        item = torch.where(found, self.view.item(self.view.leaf(node)), -1)
        self.best_priority[self.rows] = top.values
        self.best_item[self.rows] = torch.cat([self.best_item[self.rows], item], 1).gather(1, top.indices)
        self.best_score[self.rows] = torch.cat([self.best_score[self.rows], score.masked_fill(~found, NEG_INF)], 1).gather(1, top.indices)

    def keep_best(self, priority: Tensor, score: Tensor, node: Tensor, parent: Tensor) -> None:
        """Keep the best beams, without beams that can no longer become one of the k best titles."""
        pruned = priority <= self.best_priority[self.rows, -1:]
        top = priority.masked_fill(pruned, NEG_INF).topk(min(self.num_beams, priority.shape[1]))
        self.priority, self.live = top.values, top.values > NEG_INF
        self.node, self.parent = node.gather(1, top.indices), parent.gather(1, top.indices)
        self.score = score.gather(1, top.indices).masked_fill(~self.live, NEG_INF)

    def step(self, width: int, num_branching: int) -> None:
        """Run the model once; feed several tokens of each beam if no beam branches any more."""
        if num_branching:
            super().step(width, num_branching)
        else:
            self._feed_several()

    def _feed_several(self) -> None:
        """Feed several tokens of titles that no longer branch, so that the overhead of a forward pass does not dominate."""
        trie, leaf = self.trie, self.view.leaf(self.node)
        span = max(1, (PASS_TOKENS if leaf.device.type == "cpu" else ACCELERATOR_PASS_TOKENS) // leaf.numel())
        remaining = trie.title_length[leaf] - self.depth - 1
        counts = remaining.clamp(max=span) * self.live
        ends = counts.cumsum(1)
        column = torch.arange(int(ends[:, -1].max()), device=leaf.device).expand(len(leaf), -1).contiguous()
        beam = torch.searchsorted(ends, column, right=True).clamp(max=leaf.shape[1] - 1)
        valid = column < ends[:, -1:]
        offset = torch.where(valid, column - (ends - counts).gather(1, beam), 0)
        place = torch.where(valid, trie.title_start[leaf].gather(1, beam) + self.depth + offset, 0)
        within = (beam[:, :, None] == beam[:, None]) & (column[:, :, None] >= column[:, None])
        logits = self.decoder.extend(trie.title_token[place], self.parent.gather(1, beam), self.depth + offset, within)
        logps = logits.gather(2, trie.title_token[place + 1, None])[..., 0].float() - logsumexp(logits)
        score = self.score.scatter_add(1, beam, logps.masked_fill(~valid, 0.0))
        done = remaining <= span
        self.depth += span
        self.collect_finished(score.masked_fill(~done, NEG_INF), score, self.node)
        self.keep_best(score.masked_fill(done, NEG_INF), score, self.node, (ends - 1).clamp(min=0))
