"""PyTorch Lightning training for models that stay malleable: align, personalise, edit, make forget, and measure every change.

Every public class can be imported from here. Modules are imported when one of their classes is first used.

Files:
    main.py: Entry point of the command ``malleable``.
    cli.py: Commands ``fit``, ``validate``, ``test`` and ``predict``.
    commands/: Commands without a Trainer.
    argument_checks.py: Checks of command-line arguments without torch.
    callback_options.py: Command-line options of callbacks.
    option_errors.py: Short error messages for wrong options.
    unused.py: Checks for options that have no effect.
    help_pages.py: Help pages.
    layers.py: Merging of configurations.
    recipes.py: Search for recipes by name.
    checkpoints.py: Checkpoint I/O, and search for checkpoints.
    runs.py: Creation of run folders.
    interruption.py: Messages and exit status of interrupted commands.
    memory.py: Messages for errors of insufficient memory.
    __main__.py: Entry point of ``python -m malleable``.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING

import lazy_loader

_FOLDERS = ("callbacks", "datamodules", "lightning_modules")

__version__ = metadata.version("malleable")

if TYPE_CHECKING:
    from malleable.callbacks import *  # noqa: F403  (the stubs of the folders list the public names)
    from malleable.datamodules import *  # noqa: F403
    from malleable.lightning_modules import *  # noqa: F403
else:
    __getattr__, __dir__, __all__ = lazy_loader.attach(
        __name__, submod_attrs={folder: import_module(f"malleable.{folder}").__all__ for folder in _FOLDERS}
    )
    __all__ += ["__version__"]
