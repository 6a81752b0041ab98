"""Runs of a part of a decoder: up to a block, on from a block, logits at a few tokens only."""

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
    """Check that what a layer's projection gives is what its block adds to the residual stream, as edits take for granted.

    Args:
        model: In evaluation mode.
        layout: Names of its parts.
        layer: Which.
        input_ids: ``(1, T)`` any text.

    Raises:
        ValueError: If a norm or a factor lies between (Gemma 2 and 3, OLMo 2, Granite, OPT-350m).
    """
    module = layout.projection_of(model, layer).module
    shift: list[Tensor] = []

    def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(output.shape[-1], generator=generator).to(output) * output.float().square().mean().sqrt().to(output.dtype)
        shift.append(drawn)
        return output + drawn

    before = read_block(model, layout, layer, input_ids)
    handle = module.register_forward_hook(add)
    try:
        after = read_block(model, layout, layer, input_ids)
    finally:
        handle.remove()
    error = float((after.float() - before.float() - shift[0].float()).norm() / (after.float() - before.float()).norm().clamp_min(1e-30))
    # Half precision rounds sums of the residual stream's size.
    if error > max(TOLERANCE, 64 * torch.finfo(before.dtype).eps):
        raise ValueError(
            f"the blocks of {type(model).__name__} change by something else than their MLP gives (relative difference {error:.2g}): a norm or a "
            "factor lies between, so that targets for the residual stream are none for the projection; such models cannot be edited"
        )


def read_block(model: nn.Module, layout: Layout, layer: int, input_ids: Tensor) -> Tensor:
    """Output of a block, ``(B, T, v)``; the rest of the model is not run."""
    with stopping(model, layout, layer, []) as seen:
        seen.run(input_ids=input_ids)
    assert seen.output is not None
    return seen.output


class Seen:
    """What a pass through the first blocks has shown.

    Attributes:
        keys: Inputs ``(B, T, d)`` of the projections asked for, by layer.
        output: Output ``(B, T, v)`` of the last block that ran.
        rest: What the block returned behind it; ``None`` where it returned nothing but the output.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.keys: dict[int, Tensor] = {}
        self.output: Tensor | None = None
        self.rest: tuple[Any, ...] | None = None

    def run(self, **inputs: Tensor) -> None:
        """Run the model until the last block that is asked for."""
        self.keys, self.output = {}, None
        try:
            self._model(**inputs, use_cache=False)
        except _Stop:
            return


class _Stop(Exception):
    """Ends a forward pass."""


@contextmanager
def stopping(model: nn.Module, layout: Layout, last: int, layers: Sequence[int]) -> Iterator[Seen]:
    """Watch passes through blocks ``0..last``, and end each after that.

    Args:
        model: Run by :meth:`Seen.run`.
        layout: Names of its parts.
        last: The last block to run.
        layers: Layers whose keys are kept.
    """
    seen = Seen(model)

    def keep(layer: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.keys[layer] = inputs[0]

        return hook

    def stop(_: nn.Module, __: Any, output: Any) -> None:
        seen.output, seen.rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        raise _Stop

    handles = [layout.projection_of(model, layer).module.register_forward_pre_hook(keep(layer)) for layer in layers]
    handles.append(layout.block_of(model, last).register_forward_hook(stop))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(model: nn.Module, layout: Layout, last: int, hidden: Tensor, rest: tuple[Any, ...] | None) -> Iterator[None]:
    """Let the model go on from the output ``(B, T, v)`` of block ``last``, and what it returns behind it, without running the blocks up to it."""

    def skip(states: Tensor, *_: Any, **__: Any) -> Any:
        return states if rest is None else (states, *rest)

    def give(*_: Any, **__: Any) -> Any:
        return hidden if rest is None else (hidden, *rest)

    blocks = [layout.block_of(model, layer) for layer in range(last + 1)]
    own = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = give if block is blocks[-1] else skip
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def replace_output(model: nn.Module, layout: Layout, layer: int, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let the model go on from something else than a block's output ``(B, T, v)``."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)

    handle = layout.block_of(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def at_positions(model: Any, rows: Tensor, tokens: Tensor) -> Iterator[None]:
    """Compute logits at these tokens only: ``(1, P, V)`` instead of ``(B, T, V)``."""

    def gather(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0][rows, tokens][None],)

    handle = model.get_output_embeddings().register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
