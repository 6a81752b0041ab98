"""Where a decoder keeps what an edit reads and changes: its blocks, and the projection that ends each block's MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

# Names of the last projection of an MLP, within a block.
PROJECTIONS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3
    "mlp.c_proj",  # GPT-2
    "mlp.fc_out",  # GPT-J
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon
    "mlp.fc2",  # Phi
    "feed_forward.down_proj",  # Jamba, Falcon-H1, Bamba
    "feed_forward.w2",  # LFM2
    "fc2",  # OPT
)
# Transposed, they are made of weights `(width in, width out)`.
CONVOLUTIONS = ("Conv1D",)

OTHER_TOWERS = ("vision", "visual", "audio")


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

    def editable_layers(self, model: nn.Module) -> list[int]:
        """Layers that have the projection: models may mix dense layers and experts."""
        names = dict(model.named_modules())
        return [layer for layer in range(self.num_layers(model)) if self.projection.format(layer) in names]

    def projection_of(self, model: nn.Module, layer: int) -> Projection:
        """The projection of a layer; of one that an adapter wraps, the frozen matrix.

        Raises:
            ValueError: If its weight cannot be edited.
        """
        name = self.projection.format(layer)
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"layer {layer} of {type(model).__name__} has no {name}: it may be a mixture of experts, which "
                f"cannot be edited; layers that can be edited: {self.editable_layers(model)}. Choose some with layers=[...]"
            ) from None
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
        block = _find_blocks(model, names)
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


def _find_blocks(model: nn.Module, names: dict[str, nn.Module]) -> str:
    """Name the list of a decoder's blocks; beside it there may be experts, and towers that read images or sound."""
    lists = [(len(module), name) for name, module in names.items() if isinstance(module, nn.ModuleList) and ".experts" not in name]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks; name them, e.g. block='model.layers.{{}}'")
    config: Any = getattr(model, "config", None)
    number = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) if hasattr(config, "get_text_config") else None
    own = [(length, name) for length, name in lists if length == number and not any(part in name for part in OTHER_TOWERS)]
    # The first of the longest: inner lists come after the one that holds them.
    longest = max(length for length, _ in own or lists)
    return next(name for length, name in own or lists if length == longest) + ".{}"


def _no_projection(model: nn.Module, block: str, names: dict[str, nn.Module]) -> str:
    parts = [name.removeprefix(f"{block}.") for name in names if name.startswith(f"{block}.")]
    if any("expert" in part for part in parts):
        return f"{type(model).__name__} has mixtures of experts, whose matrices see only some tokens: they cannot be edited; take a dense model"
    return (
        f"no projection at the end of an MLP in {block} of {type(model).__name__}: it has {', '.join(parts[:12])}; "
        f"known are {', '.join(PROJECTIONS)}. Name it, e.g. projection='{block.removesuffix('.0')}.{{}}.mlp.down_proj'"
    )
