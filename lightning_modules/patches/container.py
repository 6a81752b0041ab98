"""Where patched weights lie: a Lightning checkpoint, a PEFT adapter's folder, or a Hugging Face model's folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from malleable.lightning_modules.patches.stack import Change, PatchStack


class Container(ABC):
    """Stored weights and the patches applied to them.

    Attributes:
        path: The file or folder, symbolic links resolved.
        tensors: The weights as stored, by canonical name; read when asked for. Tied ones are there once.
        stack: The patches applied.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    stack: PatchStack

    def write(self, change: Change, out: Path | None = None) -> Path:
        """Write the weights as changed, whole or not at all, and return where to.

        What else is stored stays as it is. This object keeps showing the state before; open the path again for the new one.

        Args:
            change: What :attr:`stack` made of :attr:`tensors`. An empty stack leaves no trace.
            out: Where to; default: in place of the old ones.

        Raises:
            FileExistsError: If there is something at ``out`` already.
            OSError: If the system does not let it be written.
        """
        if out is not None and out.exists():
            raise FileExistsError(f"{out} exists already; give a new path with --out, or none to change {self.path} itself")
        self._write(change, self.path if out is None else out)
        return out or self.path

    @abstractmethod
    def _write(self, change: Change, target: Path) -> None:
        """Write to ``target``, which is ``self.path`` or does not exist."""
