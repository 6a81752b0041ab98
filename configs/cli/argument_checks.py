"""Checks of command-line arguments without torch and Lightning, so that typing errors are reported without a delay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from malleable.datamodules.files.yaml_files import read_yaml
from malleable.recipes import find_recipe, similar

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = (*TRAINER_COMMANDS, "compare", "recipes", "patch")
# Top-level keys of a configuration; tests/cli/test_argument_checks.py compares them with those of the parsers.
SECTIONS = (
    "allow_untrained",
    "checkpoint",
    "ckpt_path",
    "data",
    "extend_catalog",
    "model",
    "return_predictions",
    "seed_everything",
    "test_after_fit",
    "trainer",
    "verbose",
    "weights_only",
)


def check_arguments(argv: Sequence[str]) -> None:
    """Check the command, the names of configuration files, and the top-level keys of files and options.

    Args:
        argv: Command and options.

    Raises:
        ValueError: If the command or a key is unknown, or if a file is not a YAML mapping. The message contains similar names.
        FileNotFoundError: If a file of ``--config`` does not exist.
    """
    command, *options = argv
    if command not in COMMANDS and not command.startswith("-"):
        raise ValueError(f"unknown command {command!r}{similar(command, COMMANDS)}; the commands are {', '.join(COMMANDS)}")
    for name in config_names(options):
        if not name.lstrip().startswith("{"):
            _check_file(find_recipe(name))
    for option in options:
        key = option.removeprefix("--").partition("=")[0].partition(".")[0].removesuffix("+")
        if option.startswith("--") and key not in (*SECTIONS, "config", "help", "print_config", "replace", ""):
            raise ValueError(f"unknown option {option.partition('=')[0]}{similar(key, SECTIONS, '--')}; `malleable {command} --help` lists all")


def config_names(options: Sequence[str]) -> list[str]:
    """Return the values of ``--config`` and ``-c``, written with or without ``=``."""
    names = []
    for option, following in zip_longest(options, options[1:], fillvalue=""):
        flag, equals, value = option.partition("=")
        if flag in ("--config", "-c"):
            names.append(value if equals else following)
    return [name for name in names if name]


def _check_file(path: Path) -> None:
    unknown = [str(key) for key in read_yaml(path) if str(key).removesuffix("+") not in SECTIONS]
    if unknown:
        hints = "; ".join(f"{key!r}{similar(key, SECTIONS)}" for key in unknown)
        raise ValueError(f"{path} has unknown keys: {hints}; the keys are {', '.join(SECTIONS)}")
