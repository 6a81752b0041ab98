"""Command-line options of callbacks, by class name: ``--trainer.callbacks.SelfPlayLoop.rounds 3``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from malleable.datamodules.files.yaml_files import parse_yaml
from malleable.layers import drop_replaced_arguments
from malleable.recipes import similar

KEY = "trainer.callbacks"
# Option names begin with a lower-case letter, class names with an upper-case letter.
_OPTION = re.compile(r"--trainer\.callbacks\.([A-Z]\w*\.[\w.]+)(?:=(.*))?", re.DOTALL)


class CallbackOption(argparse.Action):
    """Action of ``--callback CLASS.OPTION=VALUE``, to which :func:`split_callback_options` converts ``--trainer.callbacks.CLASS.OPTION VALUE``.

    The action of jsonargparse changes only the last callback of the list.
    """

    def __init__(self, option_strings: Sequence[str], **_: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Set the option of the callback of this class."""
        key, _, text = values.partition("=")
        name, _, option = key.partition(".")
        option = option.removeprefix("init_args.")
        given = namespace.get(KEY)
        callbacks = list(given) if isinstance(given, list) else [] if given is None else [given]
        index = _callback_index(name, option, callbacks)
        _drop_replaced_in(callbacks[index], option, text)
        # The action of jsonargparse changes the last element, so the callback is moved to the end for this call.
        namespace[KEY] = [*callbacks[:index], *callbacks[index + 1 :], callbacks[index]]
        try:
            parser._option_string_actions[f"--{KEY}"](parser, namespace, text, f"--{KEY}.{option}")
        except TypeError as error:
            raise argparse.ArgumentError(None, str(error).replace(f'Parser key "{KEY}"', f'Parser key "{KEY}.{name}"', 1)) from error
        *others, changed = namespace[KEY]
        namespace[KEY] = [*others[:index], changed, *others[index:]]


def split_callback_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the options of callbacks from the other arguments of a command line.

    Args:
        argv: Command and options.

    Returns:
        The other arguments, and one ``--callback`` argument for each option. The caller appends these to the other arguments, so that they are parsed
        after all configuration files and callbacks.

    Raises:
        ValueError: If an option has no value.
    """
    others: list[str] = []
    options: list[str] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not (match := _OPTION.fullmatch(argument)):
            others.append(argument)
            continue
        value = match[2]
        if value is None:
            if not remaining or remaining[0].startswith("--"):
                raise ValueError(f"{argument} needs a value: {argument} VALUE")
            value = remaining.pop(0)
        options.append(f"--callback={match[1]}={value}")
    return others, options


def _callback_index(name: str, option: str, callbacks: Sequence[Namespace]) -> int:
    """Return the index of the only callback of a class."""
    names = [str(callback.get("class_path")).rpartition(".")[2] for callback in callbacks]
    indices = [index for index, known in enumerate(names) if known == name]
    if len(indices) == 1:
        return indices[0]
    flag = f"--{KEY}.{name}.{option}"
    if indices:
        raise argparse.ArgumentError(None, f"{flag}: the configuration has {len(indices)} callbacks {name}; change their options in a file")
    known = f"the callbacks are {', '.join(names)}" if names else "there are no callbacks"
    raise argparse.ArgumentError(
        None, f"{flag}: the configuration has no callback {name}{similar(name, names)}; {known}; add one: --{KEY}+={name} --{KEY}.{option} VALUE"
    )


def _drop_replaced_in(callback: Namespace, option: str, text: str) -> None:
    """Remove the arguments of a nested class of the callback if the option replaces this class by another one."""
    try:
        value = parse_yaml(text, option)
    except ValueError:
        return  # the parser reports the invalid value
    for part in reversed(option.split(".")):
        value = {part: value}
    drop_replaced_arguments(callback, value)
