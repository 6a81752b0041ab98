"""Prefix tree of the titles of a catalogue, as tensors.

Shapes: N items, L leaves (distinct titles), M nodes, R rows, W beams, C candidates.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trie:
    """Prefix tree of token sequences; each leaf is one distinct title.

    Nodes are numbered level by level from the root, 0, so that the children of a node have consecutive numbers, in the order of their tokens. Leaves
    are numbered in depth-first order, so that the leaves below a node have consecutive numbers, too.

    Attributes:
        token: ``(M,)`` int64, the token that leads to each node; 0 at the root.
        first_child: ``(M,)`` int64, the first child of each node.
        num_children: ``(M,)`` int64; 0 at leaves.
        first_leaf: ``(M,)`` int64, the first leaf at or below each node.
        last_leaf: ``(M,)`` int64, one past the last leaf at or below each node.
        item_leaf: ``(N,)`` int64, the leaf of each item; items with equal titles share a leaf.
        title_start: ``(L,)`` int64, start of the title of each leaf in ``title_token``.
        title_length: ``(L,)`` int64, number of tokens of the title of each leaf.
        title_token: Tokens of all titles, in the order of the leaves.
        max_length: Number of tokens of the longest title.
        max_token: Largest token id.
        duplicates: Groups of items with equal titles; a tuple of items for each group.
    """

    token: Tensor
    first_child: Tensor
    num_children: Tensor
    first_leaf: Tensor
    last_leaf: Tensor
    item_leaf: Tensor
    title_start: Tensor
    title_length: Tensor
    title_token: Tensor
    max_length: int
    max_token: int
    duplicates: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def build(cls, token_ids: Sequence[Sequence[int]]) -> Trie:
        """Build the tree of a catalogue.

        Args:
            token_ids: Tokens of each item's title, in item order, each title ending with the end-of-sequence token.

        Raises:
            ValueError: If there is no item, if a title is empty, or if a title is a prefix of another one.
        """
        if not token_ids:
            raise ValueError("a trie needs at least one item, got an empty catalogue")
        titles = [tuple(map(int, title)) for title in token_ids]
        if () in titles:
            raise ValueError(f"item {titles.index(())} has no tokens; every title needs at least its end-of-sequence token")
        distinct = sorted(set(titles))
        for shorter, longer in pairwise(distinct):
            if longer[: len(shorter)] == shorter:
                raise ValueError(
                    f"the title of item {titles.index(shorter)} is a prefix of the title of item {titles.index(longer)}; "
                    f"end every title with the end-of-sequence token"
                )
        leaf_of = {title: leaf for leaf, title in enumerate(distinct)}
        item_leaf = [leaf_of[title] for title in titles]
        lengths = torch.tensor([len(title) for title in distinct])
        tokens = torch.tensor([token for title in distinct for token in title])
        return cls(
            **_link(lengths, tokens),
            item_leaf=torch.tensor(item_leaf),
            title_start=lengths.cumsum(0) - lengths,
            title_length=lengths,
            title_token=tokens,
            max_length=int(lengths.max()),
            max_token=max(map(max, distinct)),
            duplicates=_duplicates(item_leaf),
        )

    def to(self, device: torch.device | str) -> Trie:
        """Return the tree with its tensors on ``device``."""
        tables: dict[str, Any] = {field.name: value.to(device) for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}
        return replace(self, **tables)

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.item_leaf)

    def restrict(self, allowed: Tensor | None = None) -> TrieView:
        """Return a view of the tree with the allowed items only.

        Args:
            allowed: ``(N,)`` or ``(B, N)`` bool; ``None`` allows every item.

        Raises:
            ValueError: If ``allowed`` is not boolean or has another number of items.
        """
        if allowed is None:
            allowed = torch.ones(len(self), dtype=torch.bool, device=self.token.device)
        if allowed.dtype != torch.bool or allowed.ndim not in (1, 2) or allowed.shape[-1] != len(self):
            raise ValueError(
                f"allowed must be a boolean tensor of shape ({len(self)},) or (B, {len(self)}), got {allowed.dtype} of shape {tuple(allowed.shape)}"
            )
        allowed = allowed.to(self.token.device).reshape(-1, len(self))
        items = torch.arange(len(self), device=allowed.device)
        num_leaves = len(self.title_start)
        none = torch.full((len(allowed), num_leaves), len(self), device=allowed.device)
        leaf_item = none.scatter_reduce(1, self.item_leaf.expand_as(allowed), torch.where(allowed, items, len(self)), "amin")
        return TrieView(self, leaf_item, torch.nn.functional.pad((leaf_item < len(self)).cumsum(1), (1, 0)))


class Candidates(NamedTuple):
    """Children of the beams of each row, concatenated.

    Attributes:
        beam: ``(R, C)`` int64, index of the parent beam.
        node: ``(R, C)`` int64.
        valid: ``(R, C)`` bool, False for padding and for nodes without an allowed item below.
    """

    beam: Tensor
    node: Tensor
    valid: Tensor


@dataclass(frozen=True)
class TrieView:
    """View of a tree with the allowed items of each row.

    Attributes:
        trie: The complete tree.
        leaf_item: ``(1 or R, L)`` int64, the lowest allowed item of each leaf, N if there is none.
        leaves_before: ``(1 or R, L + 1)`` int64, number of allowed leaves before each leaf.
    """

    trie: Trie
    leaf_item: Tensor
    leaves_before: Tensor

    def select(self, rows: Tensor) -> TrieView:
        """Return the view of the rows at the positions ``rows``."""
        if len(self.leaf_item) == 1:
            return self
        return TrieView(self.trie, self.leaf_item[rows], self.leaves_before[rows])

    def count(self, node: Tensor) -> Tensor:
        """Count the allowed leaves at or below each node, ``(R, W)`` int64."""
        before = self.leaves_before.expand(len(node), -1)
        return before.gather(1, self.trie.last_leaf[node]) - before.gather(1, self.trie.first_leaf[node])

    def leaf(self, node: Tensor) -> Tensor:
        """Find the first allowed leaf at or below each node, ``(R, W)`` int64; arbitrary for nodes without one."""
        before = self.leaves_before
        rank = before.expand(len(node), -1).gather(1, self.trie.first_leaf[node])
        # Do not expand a common row: that would copy (R, L + 1) numbers in every step.
        return (torch.searchsorted(before[0] if len(before) == 1 else before, rank + 1) - 1).clamp(max=self.leaf_item.shape[1] - 1)

    def item(self, leaf: Tensor) -> Tensor:
        """Return the lowest allowed item of each leaf, ``(R, W)`` int64."""
        return self.leaf_item.expand(len(leaf), -1).gather(1, leaf)

    def expand(self, node: Tensor, live: Tensor, width: int) -> Candidates:
        """Return the children of the live beams.

        Args:
            node: ``(R, W)`` int64, the node of each beam.
            live: ``(R, W)`` bool.
            width: C, maximum over the rows of the number of children of live beams.
        """
        counts = self.trie.num_children[node] * live
        ends = counts.cumsum(1)
        column = torch.arange(width, device=node.device).expand(len(node), -1).contiguous()
        beam = torch.searchsorted(ends, column, right=True).clamp(max=node.shape[1] - 1)
        valid = column < ends[:, -1:]
        child = self.trie.first_child[node].gather(1, beam) + column - (ends - counts).gather(1, beam)
        child = torch.where(valid, child, 0)
        return Candidates(beam, child, valid & (self.count(child) > 0))


def _link(lengths: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Number the nodes of sorted distinct titles level by level and link them.

    Args:
        lengths: ``(L,)`` tokens of each title.
        tokens: Tokens of all titles, one after the other.
    """
    table = torch.full((len(lengths), int(lengths.max()) + 1), -1)
    table[:, 0] = 0  # the root, as a first token that all titles share
    filled = torch.arange(table.shape[1] - 1) < lengths[:, None]
    table[:, 1:][filled] = tokens
    starts = torch.ones_like(table, dtype=torch.bool)
    starts[1:] = (table[1:] != table[:-1]).cumsum(1) > 0
    is_node = starts & (table >= 0)
    levels = is_node.T.contiguous()  # (level, row): flattened order is the order of the node numbers
    number = torch.where(levels, levels.flatten().cumsum(0).reshape(levels.shape) - 1, 0).cummax(1).values
    level, row = levels.nonzero(as_tuple=True)
    token = table.T[level, row]
    parent = number[level - 1, row][1:]
    num_children = torch.bincount(parent, minlength=len(token))
    # the leaves of a node end where the next prefix of the same length starts
    ends = torch.where(starts, torch.arange(len(lengths))[:, None], len(lengths)).flip(0).cummin(0).values.flip(0)
    ends = torch.nn.functional.pad(ends[1:], (0, 0, 0, 1), value=len(lengths))
    return {
        "token": token,
        "first_child": 1 + num_children.cumsum(0) - num_children,
        "num_children": num_children,
        "first_leaf": row,
        "last_leaf": ends[row, level],
    }


def _duplicates(leaves: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Group the items that share a leaf."""
    groups: dict[int, list[int]] = {}
    for item, leaf in enumerate(leaves):
        groups.setdefault(leaf, []).append(item)
    shared = tuple(tuple(group) for group in groups.values() if len(group) > 1)
    if shared:
        log.warning(
            "%d titles belong to several items each (e.g. items %s); decoding returns only the lowest allowed id", len(shared), list(shared[0])
        )
    return shared
