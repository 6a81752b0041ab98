"""Options of the callbacks of a configuration, by class: ``--trainer.callbacks.SelfPlayLoop.rounds 3``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from malleable.datamodules.files.yaml_files import parse_yaml
from malleable.layers import drop_replaced
from malleable.recipes import similar

KEY = "trainer.callbacks"
# Options begin with a lower-case letter, classes with a capital one.
_OPTION = re.compile(r"--trainer\.callbacks\.([A-Z]\w*\.[\w.]+)(?:=(.*))?", re.DOTALL)


class CallbackOption(argparse.Action):
    """``--callback CLASS.OPTION=VALUE``, made of ``--trainer.callbacks.CLASS.OPTION VALUE`` by :func:`split_callback_options`.

    The parser itself can only change the callback that was named last.
    """

    def __init__(self, option_strings: Sequence[str], **_: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Change the option of the one callback of that class."""
        key, _, text = values.partition("=")
        name, _, option = key.partition(".")
        option = option.removeprefix("init_args.")
        given = namespace.get(KEY)
        callbacks = list(given) if isinstance(given, list) else [] if given is None else [given]
        place = _find(name, option, callbacks)
        _drop(callbacks[place], option, text)
        # The parser's action changes the last entry, and checks all.
        namespace[KEY] = [*callbacks[:place], *callbacks[place + 1 :], callbacks[place]]
        try:
            parser._option_string_actions[f"--{KEY}"](parser, namespace, text, f"--{KEY}.{option}")
        except TypeError as error:
            raise argparse.ArgumentError(None, str(error).replace(f'Parser key "{KEY}"', f'Parser key "{KEY}.{name}"', 1)) from error
        *others, changed = namespace[KEY]
        namespace[KEY] = [*others[:place], changed, *others[place:]]


def split_callback_options(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the options of callbacks by class out of a command line.

    Args:
        words: The command and its options.

    Returns:
        The other words, and a ``--callback`` for each option; these stand last, so that all files and callbacks precede them.

    Raises:
        ValueError: If an option has no value.
    """
    others: list[str] = []
    options: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not (match := _OPTION.fullmatch(word)):
            others.append(word)
            continue
        value = match[2]
        if value is None:
            if not waiting or waiting[0].startswith("--"):
                raise ValueError(f"{word} needs a value: {word} VALUE")
            value = waiting.pop(0)
        options.append(f"--callback={match[1]}={value}")
    return others, options


def _find(name: str, option: str, callbacks: Sequence[Namespace]) -> int:
    """Return the position of the only callback of a class."""
    names = [str(callback.get("class_path")).rpartition(".")[2] for callback in callbacks]
    places = [place for place, known in enumerate(names) if known == name]
    if len(places) == 1:
        return places[0]
    flag = f"--{KEY}.{name}.{option}"
    if places:
        raise argparse.ArgumentError(None, f"{flag}: there are {len(places)} callbacks {name}; change their options in a file")
    known = f"the callbacks are {', '.join(names)}" if names else "there are no callbacks"
    raise argparse.ArgumentError(
        None, f"{flag}: the configuration has no callback {name}{similar(name, names)}; {known}; add one: --{KEY}+={name} --{KEY}.{option} VALUE"
    )


def _drop(callback: Namespace, option: str, text: str) -> None:
    """Drop the arguments of a class within the callback that the option replaces."""
    try:
        value = parse_yaml(text, option)
    except ValueError:
        return  # the parser will say what is wrong with it
    for part in reversed(option.split(".")):
        value = {part: value}
    drop_replaced(callback, value)
