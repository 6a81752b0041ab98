"""Run commands of ``malleable`` one after another on this rank: ``python commands_run.py COMMANDS``, the file as of :func:`run_on_ranks`.

A start of the interpreter costs more than a tiny run, so all strategies of a recipe share one.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from launch import launch

from malleable.recipes import FOLDER


def run_on_ranks(folder: Path, commands: Mapping[str, Sequence[Sequence[str]]], *, ranks: int = 2, timeout_s: float = 300.0) -> dict[str, list[str]]:
    """Run commands on several ranks.

    Args:
        folder: Each name gets a folder of its own in it, which is the working directory of its commands.
        commands: For each name, the words of its commands. After a command that fails, the next name follows.
        ranks: Number of processes.
        timeout_s: For all commands together.

    Returns:
        For each name, the error of each rank, empty where all its commands ended.
    """
    for name in commands:
        (folder / name).mkdir()
    (folder / "commands.json").write_text(json.dumps(commands))
    launch([__file__, folder / "commands.json"], ranks=ranks, cwd=folder, timeout_s=timeout_s, env={"CPU_DEEPSPEED_PARTITION_ALL": "1"})
    found = [json.loads((folder / f"errors_{rank}.json").read_text()) for rank in range(ranks)]
    return {name: [errors[name] for errors in found] for name in commands}


def cpu_strategy(fragment: str) -> list[str]:
    """Return the options that run a fragment of ``configs/base`` without a GPU: for DeepSpeed its subclass, with the fragment's own arguments."""
    strategy = yaml.safe_load((FOLDER / "base" / f"{fragment}.yaml").read_text())["trainer"].get("strategy", {})
    if isinstance(strategy, str) or not strategy.get("class_path", "").endswith("DeepSpeedStrategy"):
        return []
    # The command line drops the arguments of a class that is replaced by name.
    return ["--trainer.strategy", json.dumps(strategy | {"class_path": "cpu_deepspeed.CPUDeepSpeedStrategy"})]


def main(file: Path) -> None:
    """Run all commands and write the errors of this rank beside the file."""
    from malleable.cli import run

    errors: dict[str, Any] = {}
    for name, commands in json.loads(file.read_text()).items():
        os.chdir(file.parent / name)
        errors[name] = ""
        try:
            for words in commands:
                run(words)
        except (Exception, SystemExit) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    (file.parent / f"errors_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
