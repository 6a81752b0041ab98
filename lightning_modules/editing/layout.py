"""Where a decoder keeps what an edit reads and changes: its blocks, and the projection that ends each block's MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Names of the last projection of an MLP, within a block.
PROJECTIONS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3
    "mlp.c_proj",  # GPT-2
    "mlp.fc_out",  # GPT-J
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon
    "mlp.fc2",  # Phi
    "fc2",  # OPT
)
# Transposed, they are made of weights `(width in, width out)`.
CONVOLUTIONS = ("Conv1D",)
TOLERANCE = 1e-3


class Projection(NamedTuple):
    """The matrix that an edit changes, ``value = W key``.

    Attributes:
        name: Of the module, as in ``model.named_modules()``.
        module: Its input is the key.
        weight: Its parameter.
        transposed: The parameter is ``W^T``.
    """

    name: str
    module: nn.Module
    weight: nn.Parameter
    transposed: bool

    @property
    def width(self) -> int:
        """Width of a key, d."""
        return self.weight.shape[0 if self.transposed else 1]

    def oriented(self, update: Tensor) -> Tensor:
        """Turn an update ``(v, d)`` into the parameter's shape."""
        return update.T if self.transposed else update


@dataclass(frozen=True)
class Layout:
    """Names of a decoder's parts, ``{}`` for the number of the layer.

    Attributes:
        block: The blocks, whose outputs are the residual stream.
        projection: The last projection of each block's MLP.
    """

    block: str
    projection: str

    def block_of(self, model: nn.Module, layer: int) -> nn.Module:
        """The block of a layer."""
        return model.get_submodule(self.block.format(layer))

    def num_layers(self, model: nn.Module) -> int:
        """Number of blocks."""
        return len(model.get_submodule(self.block.removesuffix(".{}")))  # type: ignore[arg-type]

    def projection_of(self, model: nn.Module, layer: int) -> Projection:
        """The projection of a layer; of one that an adapter wraps, the frozen matrix.

        Raises:
            ValueError: If its weight cannot be edited.
        """
        name = self.projection.format(layer)
        module = model.get_submodule(name)
        base: Any = getattr(module, "base_layer", module)
        weight = getattr(base, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point() or hasattr(weight, "quant_state"):
            raise ValueError(f"{name} ({type(base).__name__}) has no floating-point matrix to edit; load the model without quantization")
        return Projection(name, module, weight, type(base).__name__ in CONVOLUTIONS)


def find_layout(model: nn.Module, block: str | None = None, projection: str | None = None) -> Layout:
    """Find the blocks and their projections, or check the names given.

    Args:
        model: A decoder, wrapped by adapters or not.
        block: Template of the blocks' names, such as ``model.layers.{}``.
        projection: Template of the projections' names, such as ``model.layers.{}.mlp.down_proj``.

    Raises:
        ValueError: If there are none, or there are experts instead.
    """
    names = {name: module for name, module in model.named_modules() if name}
    if block is None:
        lists = [(len(module), name) for name, module in names.items() if isinstance(module, nn.ModuleList) and ".experts" not in name]
        if not lists:
            raise ValueError(f"{type(model).__name__} has no list of blocks; name them, e.g. block='model.layers.{{}}'")
        # The first of the longest: inner lists come after the one that holds them.
        longest = max(length for length, _ in lists)
        block = next(name for length, name in lists if length == longest) + ".{}"
    for kind, template in (("block", block), ("projection", projection)):
        if template is not None and (template.count("{}") != 1 or template.format(0) not in names):
            raise ValueError(f"{kind}={template!r} names no module of {type(model).__name__}; it must hold one {{}} for the layer's number")
    if projection is None:
        first = block.format(0)
        found = [name for name in PROJECTIONS if f"{first}.{name}" in names]
        if not found:
            raise ValueError(_no_projection(model, first, names))
        projection = f"{block}.{found[0]}"
    return Layout(block, projection)


def _no_projection(model: nn.Module, block: str, names: dict[str, nn.Module]) -> str:
    parts = [name.removeprefix(f"{block}.") for name in names if name.startswith(f"{block}.")]
    if any("expert" in part for part in parts):
        return f"{type(model).__name__} has mixtures of experts, whose matrices see only some tokens: they cannot be edited"
    return (
        f"no projection at the end of an MLP in {block} of {type(model).__name__}: it has {', '.join(parts[:12])}; "
        f"known are {', '.join(PROJECTIONS)}. Name it, e.g. projection='{block.removesuffix('.0')}.{{}}.mlp.down_proj'"
    )


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
