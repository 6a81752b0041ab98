"""Entry point of the command ``malleable``. Commands that use a Trainer import :mod:`malleable.cli`; the others do not."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from json import JSONDecodeError
from traceback import walk_tb

from malleable import __version__
from malleable.argument_checks import TRAINER_COMMANDS, check_arguments
from malleable.commands.recipes import run_recipes
from malleable.datamodules.files.escape import for_terminal
from malleable.datamodules.files.user_files import first_line, format_problem, system_problem
from malleable.help_pages import HELP, command_help
from malleable.interruption import interruptible
from malleable.memory import memory_problem

log = logging.getLogger("malleable")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Command and options; default: the arguments of this process. With the default, an error is printed as a message and the process exits
            with status 1, and with status 130 or 143 at SIGINT or SIGTERM. If ``args`` is given, errors are raised.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if args is None and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # reports segmentation faults, which torch can cause if memory is insufficient
    try:
        with _log_to_stderr(), interruptible(argv) if args is None else nullcontext():
            _run(argv)
            sys.stdout.flush()
    except BrokenPipeError:
        if args is not None:
            raise
        # The reader of the output, such as `head`, has ended. Discard the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = _message(error)
        if args is not None or os.environ.get("MALLEABLE_DEBUG") or message is None:
            raise
        sys.stderr.write(for_terminal(f"malleable: error: {message}\n", keep="\n"))
        sys.exit(1)


def _run(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        sys.stdout.write(HELP)
    elif command == "--version":
        sys.stdout.write(f"malleable {__version__}\n")
    elif command == "recipes":
        run_recipes(argv[1:])
    elif command == "compare":
        from malleable.commands.compare import run_compare  # numpy takes a tenth of a second to import

        run_compare(argv[1:])
    elif command == "patch":
        from malleable.commands.patch import run as run_patch  # torch takes a second to import

        run_patch(argv[1:])
    elif command in TRAINER_COMMANDS and argv[1:] in (["--help"], ["-h"]):
        sys.stdout.write(command_help(command))
    else:
        check_arguments(argv)
        from malleable.cli import run  # torch and Lightning take seconds to import

        run(argv[:-1] if argv[1:] == ["--help", "all"] else argv)


_DEBUG = "set MALLEABLE_DEBUG=1 to see the traceback"


def _message(error: BaseException | None) -> str | None:
    """Return the message of an expected error; ``None`` for a bug, which is shown with its traceback.

    Expected errors are those that this package or Lightning raises for wrong input, and errors of the system and of parsers.
    """
    while error is not None:
        if message := _own_message(error):
            return message
        error = error.__cause__  # jsonargparse wraps the errors of constructors
    return None


def _own_message(error: BaseException) -> str | None:
    """Return the message of an error without its causes."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    ours = str(frame.f_globals.get("__name__")).partition(".")[0] == "malleable"
    problem = system_problem(error)
    if problem is not None:
        files = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name is not None]
        return f"{' and '.join(files)}: {problem}" if files else f"{problem} ({first_line(error)}; {_DEBUG})"
    if type(error).__name__ == "MisconfigurationException" or (
        ours and isinstance(error, (ValueError, OSError, ImportError)) and not _is_parser_error(error)
    ):
        return str(error)
    if message := memory_problem(error):
        return message
    damaged = None if isinstance(error, RecursionError) else format_problem(error)
    return None if damaged is None else f"a file {damaged}; {_DEBUG}"


def _is_parser_error(error: BaseException) -> bool:
    """Return whether an error comes from a parser of the standard library, whose messages do not contain the file."""
    return isinstance(error, (UnicodeError, JSONDecodeError))


# Messages of libraries that are not useful here, by logger.
_SUPPRESSED = {
    "lightning.pytorch.utilities.rank_zero": (
        "try installing [litlogger]",
        "Trainer already configured with model summary",
        "Detected KeyboardInterrupt",  # the interruption has its own message
    ),
    "DeepSpeed": ("Setting accelerator to CPU",),  # logged when transformers imports DeepSpeed
}

_WARNINGS = ("`is_gradient_checkpointing` is deprecated",)  # peft 0.21 calls this property of transformers 5
# Without a terminal, output consists of lines. transformers reads this variable when it is imported.
_NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


def _is_shown(record: logging.LogRecord) -> bool:
    return not any(text in str(record.msg) for text in _SUPPRESSED[record.name])


def _without_flops(record: logging.LogRecord) -> bool:
    """Remove a line of the model summary that is always 0, because modules have no example input."""
    record.msg = re.sub(r"\n0 +Total Flops", "", str(record.msg))
    return True


_FILTERS = [*((name, _is_shown) for name in _SUPPRESSED), ("lightning.pytorch.callbacks.model_summary", _without_flops)]


class _EscapingFormatter(logging.Formatter):
    """Formatter that escapes control characters, because labels of data files could contain terminal commands."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record), keep="\n\t")


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Log to stderr: messages of this package from the first process, and warnings from all processes."""
    handler = logging.StreamHandler()
    handler.setFormatter(_EscapingFormatter())
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))) == "0"
    handler.setLevel(logging.INFO if first else logging.WARNING)
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    for name, function in _FILTERS:
        logging.getLogger(name).addFilter(function)
    bars = os.environ.get(_NO_BARS)
    if not sys.stderr.isatty():
        os.environ.setdefault(_NO_BARS, "1")
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        log.removeHandler(handler)
        if bars is None:
            os.environ.pop(_NO_BARS, None)
        for name, function in _FILTERS:
            logging.getLogger(name).removeFilter(function)
        log.setLevel(level)
