"""Merging of configurations: recipes by name, and classes that are replaced together with their arguments."""

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
    """``--config``: a file, the name of a packaged recipe, or YAML between braces."""

    def __call__(self, parser: argparse.ArgumentParser, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Merge the file into the configuration; its values override earlier ones."""
        text = str(values)
        if text.lstrip().startswith("{"):
            content = parse_yaml(text, "--config") or {}
        else:
            values = str(find_recipe(text))
            content = read_yaml(Path(values))
        drop_replaced(cfg, content)
        self.apply_config(parser, cfg, self.dest, values)


class Replace(argparse.Action):
    """``--replace KEY=VALUE``, put by :func:`mark_replacements` before the option that it announces."""

    def __init__(self, option_strings: Sequence[str], **_: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Drop the arguments of the class that the announced option replaces."""
        key, _, text = values.partition("=")
        try:
            value = parse_yaml(text, key)
        except ValueError:
            return  # the option itself will say what is wrong with it
        for part in reversed(key.split(".")):
            value = {part: value}
        drop_replaced(namespace, value)


def mark_replacements(words: Sequence[str]) -> list[str]:
    """Put ``--replace`` before every option of a command line, so that a class named there does not get the arguments of another."""
    marked: list[str] = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if match := _FLAG.fullmatch(word):
            key, value = match.groups(default=following)
            if not value.startswith("--"):
                marked.append(f"--replace={key}={value}")
        marked.append(word)
    return marked


def given_options(words: Sequence[str]) -> set[str]:
    """Return the dotted names of the options of a command line, without the parts ``init_args``."""
    names = [match[1] for word in words if (match := _FLAG.fullmatch(word))]
    return {".".join(part for part in name.split(".") if part != "init_args") for name in names}


def is_given(name: str, options: set[str]) -> bool:
    """Whether options of a command line set a value, a part of it, or what it is part of; the choice of a class alone does not."""
    return any(name == option or option.startswith(f"{name}.") or ("." in option and name.startswith(f"{option}.")) for option in options)


def drop_replaced(config: Namespace, layer: Mapping[str, Any]) -> None:
    """Remove the arguments of each class in ``config`` that ``layer`` replaces by another class.

    Without this, ``SGD`` laid over ``AdamW {lr: 1e-3, weight_decay: 0.1}`` would silently keep both numbers.

    Args:
        config: What was given so far; changed in place.
        layer: What comes next; ``init_args`` may be left out between keys, as on the command line.
    """
    for key, value in layer.items():
        old = config.get(str(key))
        if old is None and isinstance(config.get("init_args"), Namespace):
            old = config.init_args.get(str(key))
        if not isinstance(old, Namespace):
            continue
        new = _content(value)
        name = new.get("class_path")
        if name and "class_path" in old and not _same_class(old.class_path, name):
            _log_dropped(str(key), old.class_path, name, tuple(vars(old.get("init_args") or Namespace())))
            for stale in ("init_args", "dict_kwargs"):
                old.pop(stale, None)
        else:
            drop_replaced(old, new)


@functools.cache  # options are parsed several times
def _log_dropped(key: str, old: str, new: str, names: tuple[str, ...]) -> None:
    if names:
        classes = [path.rpartition(".")[2] for path in (old, new)]
        log.info("%s: %s replaces %s, whose settings are dropped: %s", key, classes[1], classes[0], ", ".join(names))


def _content(value: Any) -> Mapping[str, Any]:
    """Read a value the way the parser does: a mapping, a class's name, or a file with either."""
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
