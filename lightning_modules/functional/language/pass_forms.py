"""Which form of each pass is exact for a model.

Training, reference, decoding and embedding have a fast form each: several sequences share a row (a prompt and its answers, packed documents, a tree
of beams), or rows are padded on the left under a cache. Whether a model computes the same function there as in a plain pass of one sequence
depends on its attention and its state: sliding windows, positions counted by column (ALiBi), recurrent or convolutional layers, rotary embeddings
that are scaled by the longest row. :func:`pass_forms` measures it once for each configuration, on random tokens, against plain passes.

Every pass then takes the fastest form that is exact:

1. the fast form, under one mask or under masks of each layer's window (``exact``, ``windowed``);
2. whole sequences, one a row, padded on the right, without a cache (``separate``), by causal kernels where these are exact;
3. the same without padding, rows of equal length together (``unpadded``).

A prompt with a single answer, and rows of a single document, are whole sequences: by causal kernels the second form is the fastest one.

Where none is exact, the pass raises a ``ValueError`` that names the model. Callers that run a model in a form of their own (another mask, another
cache) can ask ``pass_forms(model)``: ``cached`` is left-padded decoding under the model's own cache, ``padded`` are right-padded rows.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from malleable.lightning_modules.functional.language.attention import Reach

RowForm = Literal["causal", "padded", "unpadded"]
"""How whole sequences run: padded on the right by causal kernels, padded on the right, or those of equal length together."""


@dataclass(frozen=True)
class Capability:
    """For which rows a form is exact.

    Attributes:
        limit: Longest row in tokens; infinite for all, 0 for none.
        plan: The masks that it needs; see :func:`~malleable.lightning_modules.functional.language.attention.model_mask`.
    """

    limit: float = 0
    plan: tuple[Reach, ...] = ()

    def fits(self, width: int) -> bool:
        """Return whether rows of ``width`` tokens are exact."""
        return width <= self.limit

    @property
    def windowed(self) -> bool:
        """Return whether masks hold a window or a chunk."""
        return any(reach.size for reach in self.plan)


@dataclass(frozen=True)
class PassForms:
    """What a model's attention and state can do.

    Attributes:
        model_name: Name of the model's class.
        shared: A prompt and its answers in one row.
        packed: Documents end to end in one row.
        tree: Beams that share a prompt's cache.
        cached: Left-padded rows under the model's own cache, a token at a time.
        padded: Whole sequences padded on the right; logits.
        embedding: The same; hidden states.
        causal: The same by causal kernels, without any mask; logits and hidden states.
        unpadded: Whether batches of whole sequences of equal length are exact; logits and hidden states.
        states: Whether the model returns one hidden state for each token; models that return several streams cannot embed.
        reasons: Name of a form and why it is not exact, where running it failed.
    """

    model_name: str
    shared: Capability = Capability()
    packed: Capability = Capability()
    tree: Capability = Capability()
    cached: Capability = Capability()
    padded: Capability = Capability()
    embedding: Capability = Capability()
    causal: Capability = Capability()
    unpadded: bool = False
    states: bool = True
    reasons: tuple[tuple[str, str], ...] = ()

    def row_form(self, width: int) -> RowForm:
        """Choose the form of whole sequences.

        Args:
            width: Tokens of the longest one.

        Raises:
            ValueError: If the model can run none.
        """
        if self.causal.fits(width):
            return "causal"
        if self.padded.fits(width):
            return "padded"
        if self.unpadded:
            return "unpadded"
        raise ValueError(self.refusal("batches of sequences", "use another model, or batches of one sequence"))

    def refusal(self, what: str, instead: str) -> str:
        """Return the message of an error: the model, the pass, and the alternative."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.reasons)
        return f"{self.model_name} does not compute {what} exactly{f' ({reasons})' if reasons else ''}; {instead}"

    def describe(self) -> dict[str, str]:
        """Return the form that each pass takes: ``exact``, ``windowed``, ``separate``, ``unpadded`` or ``refused``, with its limit."""
        fallback = _spell(self.padded, "separate", "unpadded" if self.unpadded else "refused")
        table = {name: _spell(getattr(self, name), None, fallback) for name in ("shared", "packed", "tree", "cached")}
        # Embedding reads right-padded rows: its fast form is the first fallback of the others.
        return table | {"embedding": _spell(self.embedding, "separate", "unpadded" if self.unpadded and self.states else "refused")}

    def summary(self) -> str:
        """Return one line for a log: which forms are not the fast ones; empty where all are."""
        slow = {name: form for name, form in self.describe().items() if form != ("separate" if name == "embedding" else "exact")}
        return ", ".join(f"{name}: {form}" for name, form in slow.items())


def _spell(capability: Capability, name: str | None, fallback: str) -> str:
    if capability.limit == 0:
        return fallback
    name = name or ("windowed" if capability.windowed else "exact")
    return name if capability.limit == math.inf else f"{name} up to {capability.limit} tokens, {fallback}"


_BY_MODEL: WeakKeyDictionary[nn.Module, tuple[str | None, PassForms]] = WeakKeyDictionary()
_BY_CONFIGURATION: dict[str, PassForms] = {}


def pass_forms(model: nn.Module) -> PassForms:
    """Return the forms that are exact for a model, measured at the first call for its configuration.

    The measurement runs a small twin of the model, built from the same class and configuration, or the model itself where no twin can be built.
    Random generators, training modes and gradients stay as they are. Under sharded weights (ZeRO-3, FSDP) all ranks must call it together.

    Args:
        model: Hugging Face causal language model, bare or under PEFT.
    """
    bare = bare_model(model)
    attention = getattr(bare.config, "_attn_implementation", None)
    known = _BY_MODEL.get(bare)
    if known is not None and known[0] == attention:
        return known[1]
    key = configuration_key(bare)
    if key not in _BY_CONFIGURATION:
        # The measurement runs the passes, which need this module.
        from malleable.lightning_modules.functional.language.pass_check import check_passes

        _BY_CONFIGURATION[key] = check_passes(bare)
    _BY_MODEL[bare] = attention, _BY_CONFIGURATION[key]
    return _BY_CONFIGURATION[key]


def bare_model(model: Any) -> Any:
    """Return the language model below PEFT and wrappers of strategies."""
    while True:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "_fsdp_wrapped_module", None)
        if inner is None or inner is model:
            return model
        model = inner


def configuration_key(model: Any) -> str:
    """Return what the forms of a model depend on: its class, its configuration and its attention implementation."""
    settings = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    attention = getattr(model.config, "_attn_implementation", None)
    return json.dumps([f"{type(model).__module__}.{type(model).__qualname__}", attention, settings], sort_keys=True, default=str)
