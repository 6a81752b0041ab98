"""The command line ``malleable``. Commands that train are in :mod:`malleable.cli`, which is imported only for them."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from json import JSONDecodeError
from traceback import walk_tb

from malleable import __version__
from malleable.commands.recipes import run_recipes
from malleable.datamodules.files.escape import for_terminal
from malleable.datamodules.files.user_files import first_line, format_problem, system_problem
from malleable.early import TRAINER_COMMANDS, check_words
from malleable.help_pages import HELP, command_help
from malleable.memory import memory_problem

log = logging.getLogger("malleable")


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Words after the program's name; default: those of this process. Errors of a command line become a message
            and an exit status; called from Python with ``args``, they are raised as they are.
    """
    words = list(sys.argv[1:] if args is None else args)
    if args is None and sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)  # a segmentation fault, e.g. of torch without memory, would say nothing
    try:
        with _log_to_stderr():
            _run(words)
            sys.stdout.flush()
    except BrokenPipeError:
        if args is not None:
            raise
        # The reader of the output, such as `head`, has ended; discard the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = _message(error)
        if args is not None or os.environ.get("MALLEABLE_DEBUG") or message is None:
            raise
        sys.stderr.write(for_terminal(f"malleable: error: {message}\n", keep="\n"))
        sys.exit(1)


def _run(words: list[str]) -> None:
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        sys.stdout.write(HELP)
    elif command == "--version":
        sys.stdout.write(f"malleable {__version__}\n")
    elif command == "recipes":
        run_recipes(words[1:])
    elif command == "compare":
        from malleable.commands.compare import run_compare  # numpy takes a tenth of a second to import

        run_compare(words[1:])
    elif command == "patch":
        from malleable.commands.patch import run as run_patch  # torch takes a second to import

        run_patch(words[1:])
    elif command in TRAINER_COMMANDS and words[1:] in (["--help"], ["-h"]):
        sys.stdout.write(command_help(command))
    else:
        check_words(words)
        from malleable.cli import run  # torch and Lightning take seconds to import

        run(words[:-1] if words[1:] == ["--help", "all"] else words)


_DEBUG = "MALLEABLE_DEBUG=1 shows where"


def _message(error: BaseException | None) -> str | None:
    """Return what an error says to the user, ``None`` for a bug, which keeps its traceback.

    Errors that this package or Lightning raises on purpose, and those of the system and of parsers, become one message.
    """
    while error is not None:
        if message := _known(error):
            return message
        error = error.__cause__  # the parser wraps what a constructor raises
    return None


def _known(error: BaseException) -> str | None:
    *_, (frame, _) = walk_tb(error.__traceback__)
    ours = str(frame.f_globals.get("__name__")).partition(".")[0] == "malleable"
    problem = system_problem(error)
    if problem is not None:
        files = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name is not None]
        return f"{' and '.join(files)}: {problem}" if files else f"{problem} ({first_line(error)}; {_DEBUG})"
    if type(error).__name__ == "MisconfigurationException" or (ours and isinstance(error, (ValueError, OSError, ImportError)) and not _is_raw(error)):
        return str(error)
    if message := memory_problem(error):
        return message
    damaged = None if isinstance(error, RecursionError) else format_problem(error)
    return None if damaged is None else f"a file {damaged}; {_DEBUG}"


def _is_raw(error: BaseException) -> bool:
    """Whether an error comes from a parser of the standard library, which knows no path."""
    return isinstance(error, (UnicodeError, JSONDecodeError))


# Messages of libraries that tell a user of this command line nothing, by logger.
_NOISE = {
    "lightning.pytorch.utilities.rank_zero": "try installing [litlogger]",
    "DeepSpeed": "Setting accelerator to CPU",  # at its import, which transformers does in any run
}


def _is_no_noise(record: logging.LogRecord) -> bool:
    return _NOISE[record.name] not in str(record.msg)


class _Plain(logging.Formatter):
    """Formatter that escapes control characters, so that labels of files cannot send commands to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record), keep="\n\t")


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    """Show the package's messages of the first process, and warnings of all."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    first = os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))) == "0"
    handler.setLevel(logging.INFO if first else logging.WARNING)
    level = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    noisy = [logging.getLogger(name) for name in _NOISE]
    for logger in noisy:
        logger.addFilter(_is_no_noise)
    try:
        yield
    finally:
        log.removeHandler(handler)
        for logger in noisy:
            logger.removeFilter(_is_no_noise)
        log.setLevel(level)
