"""Checks of what a checkpoint stores: the classes that it names, and weights that do not fit."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from malleable.datamodules.files.plain_checkpoint import read_plain
from malleable.datamodules.files.user_files import first_line

_PACKAGES = {"malleable", "lightning", "torch", "torchmetrics"}
_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)+")
_SHOWN = 3


class CheckedLoading(LightningModule):
    """A module whose checkpoints run no code, and whose weights are named where they do not fit."""

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build a module with the arguments and weights of a checkpoint, which is read as tensors and plain data.

        Args:
            checkpoint_path: A file of this machine.
            map_location: As of Lightning, and so are the next two.
            hparams_file: A file of arguments of the module.
            strict: Refuse weights that are missing or unexpected.
            weights_only: ``False`` is refused.
            kwargs: Arguments of the module, which win over stored ones.

        Raises:
            ValueError: If the file holds more than tensors and plain data, or its arguments name classes of other packages, which are imported where
                they are given here instead.
        """
        if weights_only is False:
            raise ValueError("weights_only=False would run code from the checkpoint; checkpoints are read as tensors and plain data")
        stored = read_plain(Path(checkpoint_path)).get("hyper_parameters") or {}
        if foreign := foreign_classes({name: value for name, value in stored.items() if name not in kwargs and not name.startswith("_")}):
            raise ValueError(
                f"{checkpoint_path} names {foreign[0]}, which is not of malleable, and importing it could run code; if you trust it, give "
                f"{cls.__name__}.load_from_checkpoint the argument that it is part of"
            )
        try:
            module: Self = super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, weights_only=True, **kwargs)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"{checkpoint_path} does not make a {cls.__name__}: its arguments or entries are damaged, or those of another class "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        return module

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights.

        Raises:
            MisconfigurationException: If they are those of a module of another class or size.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except (RuntimeError, AttributeError, TypeError) as error:
            if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
                raise
            raise MisconfigurationException(f"the checkpoint does not fit {type(self).__name__}: {misfit(self, state_dict)}") from error


def foreign_classes(arguments: Any, known: Collection[str] = ()) -> list[str]:
    """Return the import paths in stored arguments of a class that are neither of this package, PyTorch or Lightning, nor known.

    Parsers import what a ``class_path`` names, and a text where a class is expected, so that a stranger's file could run any module that is found.

    Args:
        arguments: Plain data.
        known: Import paths that the user has named.
    """
    return sorted({path for path, named in _texts(arguments) if path not in known and _is_foreign(path, named)})


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, bool]]:
    """Yield every text, and whether it is the value of ``class_path``."""
    if isinstance(value, str):
        yield value, key == "class_path"
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _texts(part, str(name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _texts(part, key)


def _is_foreign(path: str, named: bool) -> bool:
    if not _PATH.fullmatch(path) or path.partition(".")[0] in _PACKAGES:
        return False
    if named:
        return True
    try:
        return find_spec(path.partition(".")[0]) is not None and not Path(path).is_file()
    except (ImportError, ValueError):
        return True


def misfit(module: nn.Module, state: Mapping[str, Any]) -> str:
    """Return in which tensors stored weights and a module differ."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    stored = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    both = sorted(own.keys() & stored.keys())
    parts = {
        "of another shape": [f"{name} {stored[name]} (here {own[name]})" for name in both if stored[name] != own[name]],
        "missing": sorted(own.keys() - stored.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
    }
    found = [f"{len(names)} {what}, such as {', '.join(names[:_SHOWN])}" for what, names in parts.items() if names]
    return f"{'; '.join(found) or 'a tensor is damaged'}; build the module with the class and the settings that it was trained with"
