"""The loop that all searches of a trie share: feed the live nodes of each row, choose among their children, again.

Shapes: B rows, R rows still searched, P prompt tokens, W nodes fed in a row, C candidates, S segments, V vocabulary.
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

NEVER = -torch.inf
CHUNK = 1 << 19  # logits normalised at a time: 2 MiB in float32 stay in a processor's cache
ACCELERATOR_CHUNK = 1 << 26  # 256 MiB, so that launches do not count
MIN_LIVE_SHARE = 0.75  # once fewer of the rows than this are still searched, the others leave the batch


class Decoded(NamedTuple):
    """Items of each row and their scores.

    Attributes:
        item_ids: ``(B, k)`` int64, -1 where there are fewer than k.
        scores: ``(B, k)`` float32, in nats, ``-inf`` beside -1.
    """

    item_ids: Tensor
    scores: Tensor


class TrieSearch(ABC):
    """Rows that walk down a trie, several nodes of a level at a time.

    Args:
        model: Hugging Face causal language model; see :class:`TreeDecoder`.
        trie: The catalogue.
        prompt_ids: ``(B, P)`` int64, padded on the left.
        prompt_mask: ``(B, P)`` bool, True on real tokens.
        allowed: ``(N,)`` or ``(B, N)`` bool; ``None`` allows every item.

    Attributes:
        rows: ``(R,)`` int64, the rows still in the batch.
        node: ``(R, W)`` int64, the nodes to be fed next.
        live: ``(R, W)`` bool; live nodes stand before the others.
        parent: ``(R, W)`` int64, the token of the previous call that each node follows.
        depth: Tokens between the prompt and the nodes.

    Raises:
        ValueError: If the trie has tokens that the model has not, or if ``allowed`` has another number of rows.
    """

    def __init__(self, model: nn.Module, trie: Trie, prompt_ids: Tensor, prompt_mask: Tensor, allowed: Tensor | None) -> None:
        self.trie = trie.to(prompt_ids.device)
        self.view = self.trie.restrict(allowed)
        if len(self.view.leaf_item) not in (1, len(prompt_ids)):
            raise ValueError(
                f"allowed has {len(self.view.leaf_item)} rows, but there are {len(prompt_ids)} prompts; give one row for each or for all"
            )
        self.decoder = beam_decoder(model, prompt_ids, prompt_mask, trie.max_length)
        vocab_size = self.decoder.logits.shape[2]
        if trie.max_token >= vocab_size:
            raise ValueError(f"the titles have token {trie.max_token}, but the model knows {vocab_size} tokens; use the model's own tokenizer")
        self.rows = torch.arange(len(prompt_ids), device=prompt_ids.device)
        self.node = prompt_ids.new_zeros(len(prompt_ids), 1)
        self.live = self.view.count(self.node) > 0
        self.parent = self.node
        self.depth = 0

    def run(self, sync_any: Callable[[bool], bool] | None = None) -> Decoded:
        """Search until no row has a live node; ranks that finish early keep step with the others where ``sync_any`` is given."""
        self.advance(self.decoder.logits, int(self.trie.num_children[0]))
        while True:
            num_rows, num_nodes, width, num_branching = self._survey()
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
        """Choose the next nodes.

        Args:
            logits: ``(R, W, V)``, after each node.
            width: Largest number of children of a row's live nodes.
        """

    @abstractmethod
    def result(self) -> Decoded:
        """Return what was found."""

    def step(self, width: int, num_branching: int) -> None:
        """Run the model once, and go on from there.

        Args:
            width: Largest number of children of a row's live nodes.
            num_branching: Live nodes that lead to several titles, over all rows.
        """
        logits = self.decoder.extend(self.trie.token[self.node], self.parent, self.depth)
        self.depth += 1
        self.advance(logits, width)

    def narrow(self, num_nodes: int) -> None:
        """Keep the first nodes of each row only."""
        self.node, self.live, self.parent = self.node[:, :num_nodes], self.live[:, :num_nodes], self.parent[:, :num_nodes]

    def select(self, keep: Tensor) -> None:
        """Keep some of the rows still in the batch only, by their position in it."""
        self.decoder.select(keep)
        self.view = self.view.select(keep)
        self.rows, self.node, self.live, self.parent = self.rows[keep], self.node[keep], self.live[keep], self.parent[keep]

    def child_logits(self, logits: Tensor, candidates: Candidates) -> Tensor:
        """Gather each candidate's logit, ``(R, C)`` float32, ``-inf`` on invalid ones."""
        column = candidates.beam * logits.shape[2] + self.trie.token[candidates.node]
        return logits.flatten(1).gather(1, column).float().masked_fill(~candidates.valid, NEVER)

    def _survey(self) -> list[int]:
        """Count the rows with live nodes, the most live nodes and children of a row, and live nodes above several titles."""
        counts = self.live.sum(1)
        children = (self.trie.num_children[self.node] * self.live).sum(1)
        branching = self.live & (self.view.count(self.node) > 1)
        return [int(value) for value in torch.stack([(counts > 0).sum(), counts.max(), children.max(), branching.sum()]).tolist()]


def beam_decoder(model: nn.Module, prompt_ids: Tensor, prompt_mask: Tensor, max_new_tokens: int) -> TreeDecoder | RowDecoder:
    """Return the fastest decoder that is exact for a model.

    Args:
        model: Hugging Face causal language model.
        prompt_ids: ``(R, P)`` int64, padded on the left.
        prompt_mask: ``(R, P)`` bool, True on real tokens.
        max_new_tokens: Tokens of the longest continuation.

    Raises:
        ValueError: If the model can run no batch of sequences.
    """
    forms, width = pass_forms(model), prompt_ids.shape[1] + max_new_tokens
    if forms.tree.fits(width):
        return TreeDecoder(model, prompt_ids, prompt_mask, forms.tree.plan)
    return RowDecoder(model, prompt_ids, prompt_mask, form=forms.row_form(width))


def logsumexp(logits: Tensor) -> Tensor:
    """Reduce ``(..., V)`` in float32, a part at a time."""
    flat = logits.flatten(0, -2)
    size = max(1, (CHUNK if logits.device.type == "cpu" else ACCELERATOR_CHUNK) // flat.shape[1])
    return torch.cat([part.float().logsumexp(-1) for part in torch.split(flat, size)]).reshape(logits.shape[:-1])


def segment_log_softmax(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Normalise within segments.

    Args:
        values: ``(R, C)`` float32; ``-inf`` takes no part.
        segment: ``(R, C)`` int64, the segment of each value.
        num_segments: S.

    Returns:
        Log-probabilities ``(R, C)``, ``-inf`` where ``values`` are.
    """
    shape = (len(values), num_segments)
    # a finite minimum, for segments without any value
    peak = values.new_full(shape, torch.finfo(values.dtype).min).scatter_reduce(1, segment, values, "amax")
    shifted = values - peak.gather(1, segment)
    total = values.new_zeros(shape).scatter_add(1, segment, shifted.exp())
    return (shifted - total.log().gather(1, segment)).masked_fill(values == NEVER, NEVER)
