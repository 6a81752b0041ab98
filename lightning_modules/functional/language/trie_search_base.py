"""Base class of searches in a trie, which run the model on the live nodes of each row and select among their children.

The searches are ``trie_beam_search.py`` (titles of highest score) and ``trie_sampling.py`` (random titles).

Shapes: B rows, R rows still searched, P prompt tokens, W nodes fed in a row, C candidates (children of live nodes), S segments, N items,
V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from malleable.lightning_modules.functional.language.pass_forms import pass_forms
from malleable.lightning_modules.functional.language.tree_attention import TreeDecoder
from malleable.lightning_modules.functional.language.trie import Candidates, Trie
from malleable.lightning_modules.functional.language.whole_rows import RowDecoder

NEG_INF = -torch.inf
CHUNK = 1 << 19  # logits normalised at once: 2 MiB in float32 fit the cache of a CPU
ACCELERATOR_CHUNK = 1 << 26  # 256 MiB make launch overhead negligible
MIN_LIVE_SHARE = 0.75  # finished rows are removed from the batch when the share of unfinished rows falls below this


class Decoded(NamedTuple):
    """Items of each row and their scores.

    Attributes:
        item_ids: ``(B, k)`` int64, padded with -1.
        scores: ``(B, k)`` float32, in nats, ``-inf`` for padding.
    """

    item_ids: Tensor
    scores: Tensor


class TrieSearch(ABC):
    """Search in a trie, level by level, with several nodes of each row at a time.

    Args:
        model: Hugging Face causal language model; see :class:`TreeDecoder`.
        trie: Trie of the titles of the catalogue.
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        allowed: ``(N,)`` or ``(B, N)`` bool; ``None`` allows every item.

    Attributes:
        rows: ``(R,)`` int64, the rows that are still in the batch.
        node: ``(R, W)`` int64, the nodes whose tokens are fed next.
        live: ``(R, W)`` bool, whether the search continues below a node; such (live) nodes come first in each row.
        parent: ``(R, W)`` int64, index in the previous call of the token before each node.
        depth: Number of tokens between the prompt and the nodes.

    Raises:
        ValueError: If the trie has tokens outside the model's vocabulary, or if ``allowed`` has another number of rows.
    """

    def __init__(self, model: nn.Module, trie: Trie, prompt_ids: Tensor, prompt_mask: Tensor, allowed: Tensor | None) -> None:
        self.trie = trie.to(prompt_ids.device)
        self.view = self.trie.restrict(allowed)
        if len(self.view.leaf_item) not in (1, len(prompt_ids)):
            raise ValueError(
                f"allowed has {len(self.view.leaf_item)} rows, but there are {len(prompt_ids)} prompts; give one row for each prompt, or one for all"
            )
        self.decoder = beam_decoder(model, prompt_ids, prompt_mask, trie.max_length)
        vocab_size = self.decoder.logits.shape[2]
        if trie.max_token >= vocab_size:
            raise ValueError(f"the titles contain token {trie.max_token}, but the model has {vocab_size} tokens; use the tokenizer of the model")
        self.rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        self.node = prompt_ids.new_zeros(len(prompt_ids), 1)
        self.live = self.view.count(self.node) > 0
        self.parent = self.node
        self.depth = 0

    def run(self, sync_any: Callable[[bool], bool] | None = None) -> Decoded:
        """Search until no row has a live node; with ``sync_any``, ranks that finish early run the model as often as the others."""
        self.advance(self.decoder.logits, int(self.trie.num_children[0]))
        while True:
            num_rows, num_nodes, width, num_branching = self._count_live()
            if not (sync_any or bool)(num_rows > 0):
                return self.result()
            if num_rows == 0:
                self.decoder.idle()
                continue
            self.narrow(num_nodes)
            if num_rows < MIN_LIVE_SHARE * len(self.rows):
                self.select(self.live[:, 0].nonzero()[:, 0])
            self.step(width, num_branching)

    @abstractmethod
    def advance(self, logits: Tensor, width: int) -> None:
        """Select the next nodes.

        Args:
            logits: ``(R, W, V)``, logits after each node.
            width: Maximum over the rows of the number of children of live nodes.
        """

    @abstractmethod
    def result(self) -> Decoded:
        """Return the items found."""

    def step(self, width: int, num_branching: int) -> None:
        """Run the model once and select the next nodes.

        Args:
            width: Maximum over the rows of the number of children of live nodes.
            num_branching: Number of live nodes of all rows that lead to several titles.
        """
        logits = self.decoder.extend(self.trie.token[self.node], self.parent, self.depth)
        self.depth += 1
        self.advance(logits, width)

    def narrow(self, num_nodes: int) -> None:
        """Keep only the first ``num_nodes`` nodes of each row."""
        self.node, self.live, self.parent = self.node[:, :num_nodes], self.live[:, :num_nodes], self.parent[:, :num_nodes]

    def select(self, rows: Tensor) -> None:
        """Keep only the rows at the positions ``rows`` of the batch."""
        self.decoder.select(rows)
        self.view = self.view.select(rows)
        self.rows, self.node, self.live, self.parent = self.rows[rows], self.node[rows], self.live[rows], self.parent[rows]

    def child_logits(self, logits: Tensor, candidates: Candidates) -> Tensor:
        """Return the logit of each candidate, ``(R, C)`` float32, ``-inf`` for invalid ones."""
        column = candidates.beam * logits.shape[2] + self.trie.token[candidates.node]
        return logits.flatten(1).gather(1, column).float().masked_fill(~candidates.valid, NEG_INF)

    def _count_live(self) -> list[int]:
        """Return the number of rows with live nodes, the maximum numbers of live nodes and children of a row, and the number of branching nodes."""
        counts = self.live.sum(1)
        children = (self.trie.num_children[self.node] * self.live).sum(1)
        branching = self.live & (self.view.count(self.node) > 1)
        return [int(value) for value in torch.stack([(counts > 0).sum(), counts.max(), children.max(), branching.sum()]).tolist()]


def beam_decoder(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> TreeDecoder | RowDecoder:
    """Return the fastest exact decoder of a model for several continuations of each row.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(R, P)`` int64, padded on the left.
        prompt_mask: ``(R, P)`` bool, True on real tokens.
        max_new_tokens: Number of tokens of the longest continuation.

    Raises:
        ValueError: If no decoder is exact for the model.
    """
    forms, width = pass_forms(model), prompt_ids.shape[1] + max_new_tokens
    if forms.tree.fits(width):
        return TreeDecoder(model, prompt_ids, prompt_mask, forms.tree.plan)
    return RowDecoder(model, prompt_ids, prompt_mask, form=forms.row_form(width))


def logsumexp(logits: Tensor) -> Tensor:
    """Compute ``logsumexp`` over the last dimension of ``(..., V)`` in float32, in parts."""
    flat = logits.flatten(0, -2)
    size = max(1, (CHUNK if logits.device.type == "cpu" else ACCELERATOR_CHUNK) // flat.shape[1])
    return torch.cat([part.float().logsumexp(-1) for part in torch.split(flat, size)]).reshape(logits.shape[:-1])


def segment_log_softmax(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Compute the log-softmax within segments.

    Args:
        values: ``(R, C)`` float32; entries of ``-inf`` are ignored.
        segment: ``(R, C)`` int64, the segment of each value.
        num_segments: S.

    Returns:
        Log-probabilities ``(R, C)``, ``-inf`` where ``values`` are ``-inf``.
    """
    shape = (len(values), num_segments)
    # start from a finite minimum, because a segment may have no finite value
    peak = values.new_full(shape, torch.finfo(values.dtype).min).scatter_reduce(1, segment, values, "amax")
    shifted = values - peak.gather(1, segment)
    total = values.new_zeros(shape).scatter_add(1, segment, shifted.exp())
    return (shifted - total.log().gather(1, segment)).masked_fill(values == NEG_INF, NEG_INF)
