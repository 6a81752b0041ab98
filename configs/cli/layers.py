"""Merging of configurations: recipes by name, and removal of the arguments of replaced classes."""

from __future__ import annotations

import argparse
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ActionConfigFile, Namespace

from malleable.datamodules.files.yaml_files import parse_yaml, read_yaml
from malleable.recipes import find_recipe

log = logging.getLogger(__name__)

_FLAG = re.compile(r"--([\w.]+)(?:=(.*))?", re.DOTALL)


class RecipeFile(ActionConfigFile):
    """Action of ``--config``: a file, the name of a packaged recipe, or inline YAML in braces."""

    def __call__(self, parser: argparse.ArgumentParser, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Merge the file into the configuration. Its values override earlier ones."""
        text = str(values)
        if text.lstrip().startswith("{"):
            content = parse_yaml(text, "--config") or {}
        else:
            values = str(find_recipe(text))
            content = read_yaml(Path(values))
        drop_replaced_arguments(cfg, content)
        self.apply_config(parser, cfg, self.dest, values)


class Replace(argparse.Action):
    """Action of the hidden option ``--replace KEY=VALUE``: if VALUE is another class, remove the arguments of the class that KEY had.

    :func:`mark_replacements` inserts the option before each option ``--KEY VALUE``.
    """

    def __init__(self, option_strings: Sequence[str], **_: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Remove the arguments of a class if the following option replaces the class."""
        key, _, text = values.partition("=")
        try:
            value = parse_yaml(text, key)
        except ValueError:
            return  # the parser reports the invalid value of the following option
        for part in reversed(key.split(".")):
            value = {part: value}
        drop_replaced_arguments(namespace, value)


def mark_replacements(argv: Sequence[str]) -> list[str]:
    """Insert ``--replace`` before each option of a command line, so that a new class does not get the arguments of the class it replaces."""
    marked: list[str] = []
    for argument, following in zip(argv, [*argv[1:], "--"], strict=True):
        if match := _FLAG.fullmatch(argument):
            key, value = match.groups(default=following)
            if not value.startswith("--"):
                marked.append(f"--replace={key}={value}")
        marked.append(argument)
    return marked


def given_options(argv: Sequence[str]) -> set[str]:
    """Return the dotted names of the options of a command line, without the key ``init_args``."""
    names = [match[1] for argument in argv if (match := _FLAG.fullmatch(argument))]
    return {".".join(part for part in name.split(".") if part != "init_args") for name in names}


def is_given(name: str, options: set[str]) -> bool:
    """Return whether options of a command line set a value, a part of it, or an option that contains it. The choice of a class does not count."""
    return any(name == option or option.startswith(f"{name}.") or ("." in option and name.startswith(f"{option}.")) for option in options)


def drop_replaced_arguments(config: Namespace, layer: Mapping[str, Any]) -> None:
    """Remove the arguments of each class in ``config`` that ``layer`` replaces by another class.

    Otherwise, jsonargparse would keep ``lr`` and ``weight_decay`` if ``SGD`` replaced ``AdamW {lr: 1e-3, weight_decay: 0.1}``.

    Args:
        config: Merged configuration of the earlier layers; changed in place.
        layer: Configuration that overrides ``config``. The key ``init_args`` may be omitted, as on the command line.
    """
    for key, value in layer.items():
        old = config.get(str(key))
        if old is None and isinstance(config.get("init_args"), Namespace):
            old = config.init_args.get(str(key))
        if not isinstance(old, Namespace):
            continue
        new = _as_mapping(value)
        name = new.get("class_path")
        if name and "class_path" in old and not _same_class(old.class_path, name):
            _log_dropped(str(key), old.class_path, name, tuple(vars(old.get("init_args") or Namespace())))
            for stale in ("init_args", "dict_kwargs"):
                old.pop(stale, None)
        else:
            drop_replaced_arguments(old, new)


@functools.cache  # logs once, although options are parsed several times
def _log_dropped(key: str, old: str, new: str, names: tuple[str, ...]) -> None:
    if names:
        classes = [path.rpartition(".")[2] for path in (old, new)]
        log.info("%s: %s replaces %s, whose settings are dropped: %s", key, classes[1], classes[0], ", ".join(names))


def _as_mapping(value: Any) -> Mapping[str, Any]:
    """Convert a value to a mapping as the parser does: a mapping, a class name, or a file that contains one of them."""
    if isinstance(value, str) and Path(value).is_file():
        value = read_yaml(Path(value))
    if isinstance(value, str):
        return {"class_path": value}
    return value if isinstance(value, Mapping) else {}


def _same_class(old: str, new: str) -> bool:
    if "." not in new:
        return old.rpartition(".")[2] == new
    try:
        return resolve_name(old) is resolve_name(new)
    except (ImportError, AttributeError, ValueError):
        return False
