"""Module names of a decoder's blocks and of the last projection of each block's MLP, which edits change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

# Names of the last projection of an MLP, relative to the block.
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
# Layers that store the transposed weight, `(width in, width out)`.
TRANSPOSED = ("Conv1D",)

# Parts of the names of encoders of other modalities.
OTHER_ENCODERS = ("vision", "visual", "audio")


class Projection(NamedTuple):
    """Matrix ``W`` that an edit changes; ``value = W key``.

    Attributes:
        name: Name of the module in ``model.named_modules()``.
        module: Module whose input is the key.
        weight: Parameter of the module.
        transposed: Whether the parameter is ``W^T``.
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
        """Return an update ``(v, d)`` in the shape of the parameter."""
        return update.T if self.transposed else update


@dataclass(frozen=True)
class Layout:
    """Templates of module names of a decoder, with ``{}`` for the index of the layer.

    Attributes:
        block: Blocks, whose outputs are the residual stream.
        projection: Last projection of the MLP of each block.
    """

    block: str
    projection: str

    def block_of(self, model: nn.Module, layer: int) -> nn.Module:
        """Return the block of a layer."""
        return model.get_submodule(self.block.format(layer))

    def num_layers(self, model: nn.Module) -> int:
        """Return the number of blocks."""
        return len(model.get_submodule(self.block.removesuffix(".{}")))  # type: ignore[arg-type]

    def editable_layers(self, model: nn.Module) -> list[int]:
        """Return the layers that have the projection; layers whose MLP is a mixture of experts do not have it."""
        names = dict(model.named_modules())
        return [layer for layer in range(self.num_layers(model)) if self.projection.format(layer) in names]

    def projection_of(self, model: nn.Module, layer: int) -> Projection:
        """Return the projection of a layer; if an adapter wraps it, the frozen matrix.

        Raises:
            ValueError: If the layer has no such module, or its weight cannot be edited.
        """
        name = self.projection.format(layer)
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"layer {layer} of {type(model).__name__} has no module {name}; it may be a mixture of experts, which cannot be edited. Layers that "
                f"can be edited: {self.editable_layers(model)}; select some with layers=[...]"
            ) from None
        base: Any = getattr(module, "base_layer", module)
        weight = getattr(base, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.is_floating_point() or hasattr(weight, "quant_state"):
            raise ValueError(f"{name} ({type(base).__name__}) has no floating-point matrix to edit; load the model without quantization")
        return Projection(name, module, weight, type(base).__name__ in TRANSPOSED)


def find_layout(model: nn.Module, block: str | None = None, projection: str | None = None) -> Layout:
    """Find the blocks and their projections, or check the given names.

    Args:
        model: Decoder, with or without adapters.
        block: Template of the names of blocks, such as ``model.layers.{}``. Default: found automatically.
        projection: Template of the names of projections, such as ``model.layers.{}.mlp.down_proj``. Default: found automatically.

    Raises:
        ValueError: If blocks or projections are not found, if a given name does not exist, or if the MLPs are mixtures of experts.
    """
    names = {name: module for name, module in model.named_modules() if name}
    if block is None:
        block = _find_blocks(model, names)
    for kind, template in (("block", block), ("projection", projection)):
        if template is not None and (template.count("{}") != 1 or template.format(0) not in names):
            raise ValueError(f"{kind}={template!r} names no module of {type(model).__name__}; it must contain {{}} once, for the index of the layer")
    if projection is None:
        first = block.format(0)
        found = [name for name in PROJECTIONS if f"{first}.{name}" in names]
        if not found:
            raise ValueError(_no_projection(model, first, names))
        projection = f"{block}.{found[0]}"
    return Layout(block, projection)


def _find_blocks(model: nn.Module, names: dict[str, nn.Module]) -> str:
    """Return the template of the names of blocks; the lists of experts and of encoders of images or sound are not considered."""
    lists = [(len(module), name) for name, module in names.items() if isinstance(module, nn.ModuleList) and ".experts" not in name]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks; give their names, e.g. block='model.layers.{{}}'")
    config: Any = getattr(model, "config", None)
    number = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None) if hasattr(config, "get_text_config") else None
    own = [(length, name) for length, name in lists if length == number and not any(part in name for part in OTHER_ENCODERS)]
    # The first list of the greatest length, because nested lists follow the list that contains them.
    longest = max(length for length, _ in own or lists)
    return next(name for length, name in own or lists if length == longest) + ".{}"


def _no_projection(model: nn.Module, block: str, names: dict[str, nn.Module]) -> str:
    parts = [name.removeprefix(f"{block}.") for name in names if name.startswith(f"{block}.")]
    if any("expert" in part for part in parts):
        return f"{type(model).__name__} has mixtures of experts, which process only some tokens each and cannot be edited; use a dense model"
    return (
        f"{block} of {type(model).__name__} has none of the known MLP projections {', '.join(PROJECTIONS)}; it has {', '.join(parts[:12])}. "
        f"Give the name of the projection, e.g. projection='{block.removesuffix('.0')}.{{}}.mlp.down_proj'"
    )
