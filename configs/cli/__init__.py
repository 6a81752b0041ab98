"""Train models that stay malleable: align, personalise, edit, make forget, and measure every change.

Every public class is importable from here; nothing heavy is imported until it is used.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

_FOLDERS = ("malleable.callbacks", "malleable.datamodules", "malleable.lightning_modules")
_HOMES = {name: folder for folder in _FOLDERS for name in import_module(folder).__all__}

__all__ = ["__version__", *_HOMES]
__version__ = metadata.version("malleable")

if TYPE_CHECKING:
    from malleable.callbacks import *  # noqa: F403  (the folders' own lists are the public names)
    from malleable.datamodules import *  # noqa: F403
    from malleable.lightning_modules import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'malleable' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__() -> list[str]:
        return sorted(__all__)
