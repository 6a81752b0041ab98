"""Checks of checkpoints: classes that they name, and weights that do not fit a module."""

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
    """Module that loads checkpoints without running code from them, and whose errors name the tensors that do not fit."""

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
        """Build a module from a checkpoint, which is read as tensors and plain data.

        Args:
            checkpoint_path: A local file.
            map_location: As in Lightning.
            hparams_file: As in Lightning.
            strict: Whether missing or unexpected weights are an error.
            weights_only: Must not be ``False``.
            kwargs: Arguments of the module; they override stored ones.

        Raises:
            ValueError: If the file contains anything other than tensors and plain data, or if its arguments name classes of other packages. Pass such
                arguments as ``kwargs`` instead.
        """
        if weights_only is False:
            raise ValueError("weights_only=False would run code from the checkpoint; leave it out: checkpoints are read as tensors and plain data")
        stored = read_plain(Path(checkpoint_path)).get("hyper_parameters") or {}
        if foreign := foreign_classes({name: value for name, value in stored.items() if name not in kwargs and not name.startswith("_")}):
            raise ValueError(
                f"{checkpoint_path} names {foreign[0]}, which is not part of malleable; importing it could run code. If you trust it, pass the "
                f"argument that contains it to {cls.__name__}.load_from_checkpoint"
            )
        try:
            module: Self = super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, weights_only=True, **kwargs)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, RuntimeError) as error:
            raise ValueError(
                f"cannot build {cls.__name__} from {checkpoint_path}: the checkpoint is damaged or was written by another class "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        return module

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights.

        Raises:
            MisconfigurationException: If the weights have other names or shapes than those of this module.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except (RuntimeError, AttributeError, TypeError) as error:
            if isinstance(error, RuntimeError) and "loading state_dict" not in str(error):
                raise
            raise MisconfigurationException(f"the checkpoint does not fit {type(self).__name__}: {misfit(self, state_dict)}") from error


def foreign_classes(arguments: Any, known: Collection[str] = ()) -> list[str]:
    """Return the import paths in stored arguments that belong to other packages than malleable, PyTorch and Lightning.

    Parsers import every ``class_path``, and strings where a class is expected. A checkpoint from an untrusted source could therefore run code of any
    installed module.

    Args:
        arguments: Plain data.
        known: Import paths that the user has given; they are not returned.
    """
    return sorted({path for path, named in _texts(arguments) if path not in known and _is_foreign(path, named)})


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, bool]]:
    """Yield every string, and whether it is the value of ``class_path``."""
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
    """Return the part of an error message that names the tensors in which stored weights and a module differ, with a remedy."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    stored = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    both = sorted(own.keys() & stored.keys())
    parts = {
        "tensors of another shape": [f"{name} {stored[name]} (here {own[name]})" for name in both if stored[name] != own[name]],
        "missing tensors": sorted(own.keys() - stored.keys()),
        "unexpected tensors": sorted(state.keys() - own.keys()),
    }
    found = [f"{what}: {len(names)}, such as {', '.join(names[:_SHOWN])}" for what, names in parts.items() if names]
    return f"{'; '.join(found) or 'a tensor is damaged'}; build the module with the class and the settings that it was trained with"
