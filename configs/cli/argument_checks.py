"""Checks of command-line arguments without torch and Lightning, so that typing errors are reported without a delay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from malleable.datamodules.files.yaml_files import parse_yaml, read_yaml
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
# Options of data modules that give the rows of `predict`, each with a value; the same test compares them with the constructors.
PREDICT_OPTIONS = {
    "RecommendationDataModule": ("predict_file FILE", "predict_users all"),
    "KnowledgeGraphDataModule": ("predict_file FILE",),
    "PreferenceDataModule": ("predict_file FILE",),
    "EditingDataModule": (),
}
_DATA_FLAG = re.compile(r"--(data(?:\.\w+)*)")


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
    if command == "predict" and not any(option.startswith("--print_config") or option.endswith(("help", "-h")) for option in options):
        # Options of all layers together: an option that a later layer resets is found by the check after parsing.
        layers = list(_data_layers(options))
        names = [str(layer["class_path"]) for layer in layers if layer.get("class_path")]
        check_predict_options(names[-1] if names else "", {key: value for layer in layers for key, value in layer.items() if value is not None})


def check_predict_options(class_path: str, values: Mapping[str, Any]) -> None:
    """Check that a data module of this package has rows to predict for. Other data modules are not checked.

    Args:
        class_path: Class name or import path of the data module.
        values: Options of the data module.

    Raises:
        ValueError: If none of the options is given. The message contains them.
    """
    folder, _, name = class_path.rpartition(".")
    given = PREDICT_OPTIONS.get(name)
    if given is None or folder.partition(".")[0] not in ("", "malleable") or any(values.get(option.split()[0]) is not None for option in given):
        return
    remedy = f"add {', or '.join(f'--data.{option}' for option in given)}" if given else "use `test`"
    raise ValueError(f"{name} has no data for prediction: {remedy}")


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


def _data_layers(options: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the values of the section ``data`` of each file and option, without the key ``init_args``. Invalid values are left to the parser."""
    for option, following in zip_longest(options, options[1:], fillvalue=""):
        flag, equals, value = option.partition("=")
        value = value if equals else following
        if flag in ("--config", "-c") and value:
            inline = value.lstrip().startswith("{")
            content = parse_yaml(value, flag) if inline else read_yaml(find_recipe(value))
            yield _data_values(content.get("data"))
        elif match := _DATA_FLAG.fullmatch(flag):
            with suppress(ValueError):
                values: Any = parse_yaml(value, flag)
                for part in reversed(match[1].split(".")[1:]):
                    values = {part: values}
                yield _data_values(values)


def _data_values(data: Any) -> dict[str, Any]:
    if isinstance(data, str):
        return {"class_path": data}
    if not isinstance(data, dict):
        return {}
    arguments = data.get("init_args")
    return {**data, **(arguments if isinstance(arguments, dict) else {})}
