"""Kill a process at every step that it takes in the file system while it patches, and look at what the next one finds.

``python crash_run.py FOLDER NAME PATCH`` changes ``FOLDER/NAME``; prints ``old`` or ``new`` for each step, in order.
Every step is a copy of the folder and a fork: importing torch once is enough.
"""

import hashlib
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch

from malleable.lightning_modules.patches import storage
from malleable.lightning_modules.patches.patch import Patch
from malleable.lightning_modules.patches.storage import open_container

_STEPS = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir"}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def apply(path: Path, patch: Patch) -> None:
    target = open_container(path)
    target.write(target.stack.apply(patch, target.tensors))


def apply_and_die(path: Path, patch: Patch, step: int) -> None:
    """Apply, and be killed before the given step; step 0 is half way through writing a checkpoint."""
    taken = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal taken
        if event in _STEPS or (event == "open" and arguments[2] & os.O_CREAT):
            taken += 1
            if taken == step:
                die()

    def half(content: object, file: Path) -> None:
        whole = file.with_name("whole")
        torch_save(content, whole)
        file.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        whole.unlink()
        die()

    torch_save = torch.save
    if step == 0:
        storage.torch.save = half
    sys.addaudithook(watch)
    apply(path, patch)
    os._exit(0)


def state(path: Path) -> str:
    """Digest of all that a target says and holds."""
    target = open_container(path)
    digest = hashlib.sha256(str(target.stack.ids).encode())
    for name in target.tensors:
        digest.update(target.tensors[name].numpy())
    files = sorted(item.relative_to(path.parent).as_posix() for item in path.parent.rglob("*"))
    digest.update(str(files).encode())
    return digest.hexdigest()


def main(folder: Path, name: str, patch: Patch) -> None:
    def fresh(label: str) -> Path:
        return Path(shutil.copytree(folder, folder.parent / f"run-{label}")) / name

    states = {state(fresh("old")): "old"}
    done = fresh("new")
    apply(done, patch)
    states[state(done)] = "new"
    for step in count(0 if done.is_file() else 1):
        path = fresh(str(step))
        child = os.fork()
        if child == 0:
            apply_and_die(path, patch, step)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{states.get(state(path), 'broken')}\n")
        if not os.WIFSIGNALED(status):
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Patch.read(Path(sys.argv[3])))
