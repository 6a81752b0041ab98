"""Partial forward passes of a decoder: up to a block, from a block on, or with logits at selected tokens only.

Shapes: B rows, T tokens, d width of a key, v width of the residual stream, V vocabulary, P selected tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from malleable.lightning_modules.editing.layout import Layout

TOLERANCE = 1e-3


@torch.no_grad()
def check_additive(model: nn.Module, layout: Layout, layer: int, input_ids: Tensor) -> None:
    """Check that a block adds the output of its MLP projection to the residual stream unchanged. Edits depend on this.

    Args:
        model: Model in evaluation mode.
        layout: Names of its modules.
        layer: Layer to check.
        input_ids: ``(1, T)`` any text.

    Raises:
        ValueError: If the block normalises or scales the output of the MLP (Gemma 2 and 3, OLMo 2, Granite, OPT-350m).
    """
    module = layout.projection_of(model, layer).module
    shift: list[Tensor] = []

    def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(output.shape[-1], generator=generator).to(output) * output.float().square().mean().sqrt().to(output.dtype)
        shift.append(drawn)
        return output + drawn

    before = block_output(model, layout, layer, input_ids)
    handle = module.register_forward_hook(add)
    try:
        after = block_output(model, layout, layer, input_ids)
    finally:
        handle.remove()
    error = float((after.float() - before.float() - shift[0].float()).norm() / (after.float() - before.float()).norm().clamp_min(1e-30))
    # In half precision, sums are rounded relative to the magnitude of the residual stream.
    if error > max(TOLERANCE, 64 * torch.finfo(before.dtype).eps):
        raise ValueError(
            f"the blocks of {type(model).__name__} do not add the output of their MLP to the residual stream unchanged (relative difference "
            f"{error:.2g}): they contain a norm or a factor after the MLP, so a target for the residual stream is not a target for the projection; "
            "such models cannot be edited; use another model"
        )


def block_output(model: nn.Module, layout: Layout, layer: int, input_ids: Tensor) -> Tensor:
    """Return the output of a block, ``(B, T, v)``; later blocks are not run."""
    with capture_until(model, layout, layer, []) as captured:
        captured.run(input_ids=input_ids)
    assert captured.output is not None
    return captured.output


class Captured:
    """Activations of the latest pass through the first blocks.

    Attributes:
        keys: Inputs ``(B, T, d)`` of the requested projections, by layer.
        output: Output ``(B, T, v)`` of the last block that was run.
        extra_outputs: Other outputs of that block; ``None`` if its output is not a tuple.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.keys: dict[int, Tensor] = {}
        self.output: Tensor | None = None
        self.extra_outputs: tuple[Any, ...] | None = None

    def run(self, **inputs: Tensor) -> None:
        """Run the model up to the last requested block."""
        self.keys, self.output = {}, None
        try:
            self._model(**inputs, use_cache=False)
        except _StopForward:
            return


class _StopForward(Exception):
    """Ends a forward pass."""


@contextmanager
def capture_until(model: nn.Module, layout: Layout, last: int, layers: Sequence[int]) -> Iterator[Captured]:
    """Capture activations of passes through blocks ``0..last``, and stop each pass after block ``last``.

    Args:
        model: Model, run by :meth:`Captured.run`.
        layout: Names of its modules.
        last: Last block to run.
        layers: Layers whose keys are captured.
    """
    captured = Captured(model)

    def capture_key(layer: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            captured.keys[layer] = inputs[0]

        return hook

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        captured.output, captured.extra_outputs = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        raise _StopForward

    handles = [layout.projection_of(model, layer).module.register_forward_pre_hook(capture_key(layer)) for layer in layers]
    handles.append(layout.block_of(model, last).register_forward_hook(stop))
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resume_from(model: nn.Module, layout: Layout, last: int, hidden: Tensor, extra_outputs: tuple[Any, ...] | None) -> Iterator[None]:
    """Replace the output of block ``last`` by ``hidden``, and skip the blocks up to it.

    Args:
        model: Model.
        layout: Names of its modules.
        last: Last block to skip.
        hidden: ``(B, T, v)`` output of block ``last``.
        extra_outputs: Other outputs of the block; ``None`` if its output is not a tuple.
    """

    def skip(states: Tensor, *_: Any, **__: Any) -> Any:
        return states if extra_outputs is None else (states, *extra_outputs)

    def replace(*_: Any, **__: Any) -> Any:
        return hidden if extra_outputs is None else (hidden, *extra_outputs)

    blocks = [layout.block_of(model, layer) for layer in range(last + 1)]
    originals = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = replace if block is blocks[-1] else skip
    try:
        yield
    finally:
        for block, forward in zip(blocks, originals, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def replace_block_output(model: nn.Module, layout: Layout, layer: int, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output ``(B, T, v)`` of a block by the result of a function of it."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    handle = layout.block_of(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def logits_at(model: Any, rows: Tensor, tokens: Tensor) -> Iterator[None]:
    """Compute logits at selected tokens only: ``(1, P, V)`` instead of ``(B, T, V)``.

    Args:
        model: Model.
        rows: ``(P,)`` row of each token.
        tokens: ``(P,)`` position of each token in its row.
    """

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0][rows, tokens][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
