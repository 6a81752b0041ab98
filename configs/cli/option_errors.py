"""Short error messages for wrong options, and help pages for the options of nested classes."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pkgutil import resolve_name
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from malleable.recipes import similar

_KEY = re.compile(r'Parser key "([\w.+]+)":')
_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':")
_TYPES = re.compile(r"Subtypes: \[(.*)\]")
_REFUSED = re.compile(r"Option '([^']+)' is not accepted")
_NAME = re.compile(r"Expected a dot import path string: (\S+)")
_MISSING = re.compile(r"(?:module|type object) '([\w.]+)' has no attribute '(\w+)'")
_EXPECTED = re.compile(r"Expected an? (?:<class '(?:[\w.]*\.)?(\w+)'>|typing\.Literal\[(.*)\])")
_UNKNOWN = re.compile(r"[Uu]nrecognized arguments: (--[\w.+]+)")
_REQUIRED = re.compile(r"the following arguments are required: (\w+)\.model\b")
_HELP = re.compile(r"--((?:model|data)\.[\w.]+)\.help")
CALLBACKS = "trainer.callbacks"
# Examples of values on the command line, by type.
EXAMPLES = {"tuple": "'[5, 10]'", "list": "'[5, 10]'", "Sequence": "'[5, 10]'", "set": "'[5, 10]'", "dict": "'{name: value}'"}
# Lines of a parser's report that contain no cause.
_NO_CAUSE = re.compile(r"Does not validate|Errors:|Given value|Expected a <class 'NoneType'>|Expected a path but")


class Cause(NamedTuple):
    """Cause of an error in the report of jsonargparse.

    Attributes:
        key: Dotted name of the option.
        text: Line of the report.
        owner: Import path of the class that has the option; empty if there is none.
        types: Allowed types of the option, as written in the report.
        depth: Number of keys and classes that contain the cause.
    """

    key: str
    text: str
    owner: str
    types: str
    depth: int


class OptionParser(LightningArgumentParser):
    """LightningArgumentParser with short error messages, which does not accept abbreviated names of options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the deepest cause as message. Parsers of nested classes, and all parsers with ``MALLEABLE_DEBUG=1``, report all causes."""
        nested = not self.exit_on_error or os.environ.get("MALLEABLE_DEBUG")
        parser = getattr(ex, "subcommand_parser", None) or self
        super().error(message if nested else explain(message, list(parser._option_string_actions)), ex)


def split_help_option(argv: Sequence[str]) -> tuple[list[str], str]:
    """Separate an option such as ``--data.split.help`` from the other arguments. jsonargparse lists this option, but fails without a class name.

    Args:
        argv: Command and options.

    Returns:
        The other arguments, and the dotted name, e.g. ``data.split``. The name is empty if there is no such option, or if a class name follows it.
    """
    for index, (argument, following) in enumerate(zip(argv, [*argv[1:], "--"], strict=True)):
        if (match := _HELP.fullmatch(argument)) and following.startswith("-"):
            return [*argv[:index], *argv[index + 1 :]], match[1]
    return list(argv), ""


def print_help(name: str, config: Namespace) -> NoReturn:
    """Print the options of a nested class of a configuration, and exit.

    Args:
        name: Dotted name, e.g. ``data.split``.
        config: Configuration of a command.

    Raises:
        ValueError: If the configuration has no class of this name.
    """
    kind: Any = None
    value: Any = config
    for part in name.split("."):
        value = value.get("init_args", value).get(part) if isinstance(value, Namespace) else None
        class_path = value.get("class_path") if isinstance(value, Namespace) else None
        kind = resolve_name(class_path) if class_path else _annotated_dataclass(kind, part)
    if kind is None:
        raise ValueError(f"--{name}.help: the configuration has no class {name}; give a class: --{name}.help CLASS")
    parser = OptionParser(usage=f"--{name}.OPTION VALUE", description=f"Options of {kind.__name__}.", add_help=False)
    parser.add_class_arguments(kind, name)
    parser.print_help()
    sys.exit(0)


def _annotated_dataclass(kind: Any, parameter: str) -> Any:
    """Return the dataclass in the type annotation of a constructor parameter; ``None`` if there is none."""
    try:
        annotation = get_type_hints(kind.__init__)[parameter]
    except (AttributeError, KeyError, NameError, TypeError):
        return None
    return next((found for found in (annotation, *get_args(annotation)) if is_dataclass(found)), None)


def explain(message: str, options: Sequence[str] = ()) -> str:
    """Return the deepest cause of a report of jsonargparse in one sentence.

    Args:
        message: The report, with nested lines for each alternative of each type.
        options: Options of the parser.
    """
    if match := _REQUIRED.search(message):
        return (
            f"no model is given; write `malleable {match[1]} --config RECIPE` with a YAML file or a packaged recipe (`malleable recipes` lists "
            "them), or give a class with --model CLASS"
        )
    found = list(causes(message))
    if not found:
        return message
    depth = max(cause.depth for cause in found)
    first = next(cause for cause in found if cause.depth == depth)
    same_option = [cause for cause in found if (cause.key, cause.depth) == (first.key, depth)]
    return _sentence(first, same_option, message, options)


def causes(message: str) -> Iterator[Cause]:
    """Yield the causes in a report of jsonargparse, in the order of its lines."""
    above: list[tuple[int, str, str]] = []  # indentation, key and class of the enclosing lines
    types = ""
    for line in filter(str.strip, message.splitlines()):
        text = line.strip().removeprefix("- ")
        indentation = len(line) - len(line.lstrip())
        above = [part for part in above if part[0] < indentation]
        if match := _KEY.match(text):
            above.append((indentation, match[1], ""))
        elif match := _CLASS.match(text):
            above.append((indentation, "", match[1]))
        elif match := _TYPES.match(text):
            types = match[1]
        elif not _NO_CAUSE.match(text):
            key = ".".join(key for _, key, _ in above if key)
            owner = next((name for _, _, name in reversed(above) if name), "")
            yield Cause(key, text, owner, types, len(above))


def _sentence(cause: Cause, same_option: Sequence[Cause], message: str, options: Sequence[str]) -> str:
    option = f"--{cause.key}"
    if match := _UNKNOWN.match(cause.text):
        name = f"{option}.{match[1].removeprefix('--')}" if cause.key else match[1]
        return f"there is no option {name}{similar(name, options)}"
    if match := _REFUSED.match(cause.text):
        known = _options(cause.owner)
        name = cause.owner.rpartition(".")[2]
        others = f". For another callback, write --{CALLBACKS}.CLASS.{match[1]}" if cause.key == CALLBACKS else ""
        return f"{option}.{match[1]}: {name} has no option {match[1]!r}{similar(match[1], known)}; its options are {', '.join(known)}{others}"
    if match := _NAME.match(cause.text):
        return f"{option}: there is no class {match[1]}{similar(match[1], _subclasses(cause.types))}; give a class of malleable or an import path"
    if match := _MISSING.match(cause.text):
        return f"{option}: {match[1]} has no {match[2]}{similar(match[2], _public_names(match[1]))}"
    expected = list(dict.fromkeys(match[1] or match[2] for other in same_option if (match := _EXPECTED.match(other.text))))
    if expected:
        given = re.findall(r"(?:Given value|Got value): (?!NestedArg)(.*)", message)
        example = next((f"; write it as {option} {EXAMPLES[name]}" for name in expected if name in EXAMPLES), "")
        return f"{option}: expected {' or '.join(expected)}{f', got {given[0]}' if given else ''}{example}"
    return f"{option}: {cause.text}" if cause.key else cause.text


def _options(class_path: str) -> list[str]:
    try:
        parameters = inspect.signature(resolve_name(class_path)).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    return [parameter.name for parameter in parameters if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]


def _subclasses(types: str) -> list[str]:
    names: list[str] = []
    for path in re.findall(r"[\w.]+\.[A-Z]\w+", types):
        try:
            remaining = [resolve_name(path)]
        except (ImportError, AttributeError, ValueError):
            continue
        while remaining:
            found = remaining.pop()
            names.append(found.__name__)
            remaining.extend(found.__subclasses__())
    return sorted(set(names))


def _public_names(module: str) -> list[str]:
    try:
        return [name for name in dir(resolve_name(module)) if not name.startswith("_")]
    except (ImportError, AttributeError, ValueError):
        return []
