"""Selection of the fastest form of each pass that is exact for a model.

A form is a layout of the sequences of a pass in rows, with its mask and cache. It is exact for a model if its results equal those of reference
passes, which run one sequence at a time.

The passes of training, of a frozen reference, of decoding and of embedding have a fast form each: several sequences share a row (a prompt and its
answers, packed documents, a tree of beams), or rows are padded on the left with a cache. The fast form is not exact for some models. This depends on
sliding windows, positions counted by column (ALiBi), recurrent or convolutional layers, and rotary embeddings that are scaled by the longest row.
:func:`pass_forms` measures it once for each configuration, on random tokens.

Every pass then uses the first of these forms that is exact:

1. the fast form, with one mask (``exact``) or with a mask for each layer's window (``windowed``);
2. whole sequences, one in each row, padded on the right, without a cache (``separate``), by causal kernels if these are exact;
3. whole sequences without padding: sequences of equal length are run together (``unpadded``).

A prompt with a single answer and a row with a single document are whole sequences. For them, the second form with causal kernels is the fastest.

If no form is exact, the pass raises a ``ValueError``. Callers that use their own mask or cache can check ``pass_forms(model)``: ``cached`` states for
which rows left-padded decoding with the model's own cache is exact, and ``padded`` for which rows padding on the right is exact.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import nn

from malleable.lightning_modules.functional.language.attention import AttentionSpan
from malleable.lightning_modules.functional.language.chunked_head import HeadForm

RowForm = Literal["causal", "padded", "unpadded"]
"""Form of whole sequences: padded on the right with causal kernels, padded on the right, or without padding."""

ATTENTION_COST = 0.65
"""Time of a multiplication in attention, in relation to one in a product with weights; see :func:`sharing_pays`.

Fitted to times on a CPU of Llamas of width 128 and 576, with prompts of 16 to 512 tokens and answers of 12 to 1,024. Both forms take about the same
time near the limit. It was not measured on CUDA.
"""


@dataclass(frozen=True)
class Capability:
    """Rows for which a form is exact.

    Attributes:
        limit: Maximum length of a row in tokens; infinite if the form is always exact, 0 if never.
        plan: Attention spans of its masks; see :func:`~malleable.lightning_modules.functional.language.attention.model_mask`.
    """

    limit: float = 0
    plan: tuple[AttentionSpan, ...] = ()

    def fits(self, width: int) -> bool:
        """Return whether rows of ``width`` tokens are exact."""
        return width <= self.limit

    @property
    def windowed(self) -> bool:
        """Return whether a mask has a window or chunk."""
        return any(span.size for span in self.plan)


@dataclass(frozen=True)
class PassForms:
    """Forms of passes that are exact for a model.

    Attributes:
        model_name: Name of the model's class.
        shared: A prompt and its answers in one row.
        packed: Concatenated documents in one row.
        tree: Beams that share the cache of a prompt.
        cached: Left-padded rows with the model's own cache, one token at a time.
        padded: Whole sequences padded on the right; logits.
        embedding: Whole sequences padded on the right; hidden states.
        causal: Whole sequences padded on the right with causal kernels, without a mask; logits and hidden states.
        unpadded: Whether batches of whole sequences of equal length are exact; logits and hidden states.
        states: Whether the model returns one hidden state for each token, which embeddings need.
        head: Function from the output of the language-model head to logits, so that the head can run in chunks of positions; ``None`` if the model
            computes logits in another way.
        reasons: Pairs of the name of a form and the reason why it is not exact.
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
    head: HeadForm | None = None
    reasons: tuple[tuple[str, str], ...] = ()

    def row_form(self, width: int) -> RowForm:
        """Return the fastest exact form of whole sequences.

        Args:
            width: Number of tokens of the longest sequence.

        Raises:
            ValueError: If no form is exact.
        """
        if self.causal.fits(width):
            return "causal"
        if self.padded.fits(width):
            return "padded"
        if self.unpadded:
            return "unpadded"
        raise ValueError(self.refusal("batches of sequences", "use another model, or batches of one sequence"))

    def refusal(self, what: str, instead: str) -> str:
        """Return an error message: the model, the pass ``what``, the reasons, and the alternative ``instead``."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.reasons)
        return f"{self.model_name} does not compute {what} exactly{f' ({reasons})' if reasons else ''}; {instead}"

    def describe(self) -> dict[str, str]:
        """Return the form of each pass: ``exact``, ``windowed``, ``separate``, ``unpadded`` or ``refused``, with its limit."""
        fallback = _spell(self.padded, "separate", "unpadded" if self.unpadded else "refused")
        table = {name: _spell(getattr(self, name), None, fallback) for name in ("shared", "packed", "tree", "cached")}
        # The fast form of embedding, right-padded rows, is the first fallback of the other passes.
        return table | {"embedding": _spell(self.embedding, "separate", "unpadded" if self.unpadded and self.states else "refused")}

    def summary(self) -> str:
        """Return a line for the log with the passes that do not use their fast form; empty if all do."""
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

    The measurement runs a small copy of the model, built from the same class and configuration, or the model itself if no copy can be built. It does
    not change random generators, training modes or gradients. With sharded weights (ZeRO-3, FSDP), all ranks must call this function together.

    Args:
        model: Hugging Face causal language model, with or without PEFT.
    """
    bare = bare_model(model)
    attention = getattr(bare.config, "_attn_implementation", None)
    known = _BY_MODEL.get(bare)
    if known is not None and known[0] == attention:
        return known[1]
    key = configuration_key(bare)
    if key not in _BY_CONFIGURATION:
        # Imported here because the passes, which `pass_check` runs, import this module.
        from malleable.lightning_modules.functional.language.pass_check import check_passes

        _BY_CONFIGURATION[key] = check_passes(bare)
    _BY_MODEL[bare] = attention, _BY_CONFIGURATION[key]
    return _BY_CONFIGURATION[key]


def sharing_pays(model: Any, prompt: int, answers: int, longest: int, columns: int) -> bool:
    """Return whether a row with a prompt and its answers takes no more computation than a row for each answer, with causal kernels.

    A shared row has fewer tokens, but its attention is computed for all pairs of tokens, while causal kernels skip half of them. Products with
    weights are counted for each token, and attention for each pair. The choice depends on shapes and on the configuration only.

    Args:
        model: Hugging Face causal language model.
        prompt: Number of prompt tokens of the batch's longest prompt.
        answers: Number of answers of a row.
        longest: Number of tokens of the longest answer.
        columns: Number of tokens of all answers of a row without the last token of each.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config

    def size(name: str, default: int) -> int:
        value = getattr(config, name, None)
        # Some configurations have a number for each layer.
        return value if isinstance(value, int) and value > 0 else default

    hidden = size("hidden_size", 1024)
    heads = size("num_attention_heads", max(1, hidden // 64))
    width = heads * size("head_dim", max(1, hidden // heads))
    # Weights of a layer: queries and outputs, keys and values, and a gated feed-forward layer.
    weights = hidden * (2 * width + 2 * width * size("num_key_value_heads", heads) // heads + 3 * size("intermediate_size", 4 * hidden))

    def cost(length: int, pairs: float) -> float:
        return length * weights + pairs * 2 * width * ATTENTION_COST

    shared, separate = prompt + columns, prompt + max(0, longest - 1)
    return cost(shared, shared**2) <= answers * cost(separate, separate**2 / 2)


def bare_model(model: Any) -> Any:
    """Return the language model without PEFT and wrappers of strategies."""
    while True:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else getattr(model, "_fsdp_wrapped_module", None)
        if inner is None or inner is model:
            return model
        model = inner


def configuration_key(model: Any) -> str:
    """Return a key of the class, configuration and attention implementation of a model, on which the exact forms depend."""
    settings = model.config.to_dict() if hasattr(model.config, "to_dict") else vars(model.config)
    attention = getattr(model.config, "_attn_implementation", None)
    return json.dumps([f"{type(model).__module__}.{type(model).__qualname__}", attention, settings], sort_keys=True, default=str)
