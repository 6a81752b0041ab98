"""Completeness of checkpoint folders, which sharded strategies write with one file for each rank."""

from __future__ import annotations

import pickletools
import re
import zipfile
from contextlib import suppress
from pathlib import Path

# Files of DeepSpeed in the subfolder that the file `latest` names.
_RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_\d+_(model|optim)_states\.pt")
_STAGE_2, _STAGE_3 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"


def missing_part(folder: Path) -> str:
    """Return the path of a missing or truncated file of a checkpoint folder, relative to the folder; empty if the checkpoint is complete.

    Folders of DeepSpeed and of ``torch.distributed.checkpoint`` are known. Folders with other files count as complete. Nothing is unpickled.

    Args:
        folder: Checkpoint folder.
    """
    files = [path for path in folder.rglob("*") if path.is_file()]
    if (folder / ".metadata").is_file() or any(path.suffix == ".distcp" for path in files) or (folder / "meta.pt").is_file():
        return _missing_of_torch(folder)
    if (folder / "latest").is_file() or any(path.name.endswith("_states.pt") for path in files):
        return _missing_of_deepspeed(folder)
    # DeepSpeed creates a subfolder before its files.
    return "" if files else "latest"


def _missing_of_torch(folder: Path) -> str:
    # torch writes `.metadata` after all shards, under a temporary name first, and Lightning writes `meta.pt` after it.
    if not (folder / ".metadata").is_file():
        return ".metadata"
    if not any(folder.glob("*.distcp")):
        return "__0_0.distcp"
    return "" if zipfile.is_zipfile(folder / "meta.pt") else "meta.pt"


def _missing_of_deepspeed(folder: Path) -> str:
    # Rank 0 writes `latest` after its own files, but does not wait for those of other ranks.
    if not (folder / "latest").is_file():
        return "latest"
    shards = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    found = [match for path in shards.glob("*.pt") if (match := _RANK_FILE.fullmatch(path.name))]
    # In stage 3, each rank writes its part of the model.
    model = shards / (_STAGE_3 if any(match[2] == "model" for match in found) else _STAGE_2)
    expected = {model}
    ranks = _world_size(model) or max((int(match[1]) + 1 for match in found), default=0)
    for match in found:
        expected |= {shards / match[0].replace(f"pp_rank_{match[1]}_", f"pp_rank_{rank}_") for rank in range(ranks)}
    # torch writes the end of the archive last.
    return next((str(path.relative_to(folder)) for path in sorted(expected) if not (path.is_file() and zipfile.is_zipfile(path))), "")


def _world_size(file: Path) -> int | None:
    """Return the number of ranks that is stored in a file of DeepSpeed; ``None`` if it is unknown. The pickle is read, but not executed."""
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), "")
        is_value = False
        for operation, argument, _ in pickletools.genops(archive.read(name)):
            if is_value and isinstance(argument, int) and operation.name.startswith("BININT"):
                return argument
            # A key is memoized before its value.
            is_value = argument == "dp_world_size" or (is_value and "PUT" in operation.name) or (is_value and operation.name == "MEMOIZE")
    return None
