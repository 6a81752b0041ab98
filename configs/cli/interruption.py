"""Interruption of a command by SIGINT or SIGTERM: handlers, message and exit status."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from traceback import walk_tb
from types import FrameType
from typing import Any, NoReturn

from malleable.argument_checks import TRAINER_COMMANDS

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a command does, by the name of a function in the traceback. The innermost function counts.
_STAGES = {
    "parse_arguments": "reading the options",
    "instantiate_classes": "creating model and data",
    "prepare_data": "preparing the data",
    "_call_setup_hook": "setting up data and model",
    "_call_configure_model": "building the model",
    "_restore_modules_and_callbacks": "reading the checkpoint",
    "restore_training_state": "reading the checkpoint",
    "_run_sanity_check": "checking the validation",
}
_CKPT_PATH = "--ckpt_path"
_pending: list[int] = []


@contextmanager
def interruptible(argv: Sequence[str]) -> Iterator[None]:
    """Context in which SIGINT and SIGTERM raise an exception, which ends the process with one message and the status 130 or 143.

    Both signals are also handled if the process was started with SIGINT ignored, as jobs in the background of a shell script are. Otherwise, a signal
    would have no effect before training and end it later. A second signal ends the process immediately. With ``MALLEABLE_DEBUG=1``, the exception is
    shown with its traceback.

    Args:
        argv: Command and options, for the message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def receive(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker of a data loader, which its main process ends
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        signal.signal(number, signal.SIG_DFL)
        _pending.append(number)
        _raise(number)

    earlier = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    except BaseException as error:
        number = _pending[-1] if _pending else interrupting_signal(error)
        if number is None or os.environ.get("MALLEABLE_DEBUG"):
            raise
        report(error, argv)
        raise SystemExit(128 + number) from None
    finally:
        _pending.clear()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def raise_pending() -> None:
    """Raise the exception of a signal again if the command still runs. Python ignores exceptions in destructors, and libraries suppress some."""
    if _pending:
        _raise(_pending[-1])


def interrupting_signal(error: BaseException) -> int | None:
    """Return the number of the signal that caused an exception; ``None`` if no signal did."""
    if isinstance(error, KeyboardInterrupt):
        return signal.SIGINT
    if not isinstance(error, SystemExit):
        return None
    if error.code == 128 + signal.SIGTERM:
        return signal.SIGTERM
    # Lightning converts the exception to SystemExit(1).
    return signal.SIGINT if isinstance(error.__context__, KeyboardInterrupt) else None


def report(error: BaseException, argv: Sequence[str], saved: str = "") -> None:
    """Log what was interrupted, what was saved, and the command that goes on, unless an earlier call or a callback has done it.

    Args:
        error: The exception of the signal. It gets the message as a note.
        argv: Command and options.
        saved: Path of the last checkpoint; empty if there is none.
    """
    cause = error.__context__ if isinstance(error.__context__, KeyboardInterrupt) else error
    if getattr(cause, "__notes__", None):
        return
    names = [frame.f_code.co_name for frame, _ in walk_tb(cause.__traceback__)]
    command = argv[0] if argv else ""
    uses_trainer = command in TRAINER_COMMANDS
    running = f"starting `{command}`" if uses_trainer and "_run_stage" not in names else f"running `{command}`"
    stage = next((_STAGES[name] for name in reversed(names) if name in _STAGES), running)
    if saved:
        advice = f"the last checkpoint is {saved}; to resume, run: {command_line(argv, saved)}"
    else:
        resumes = command == "fit" and any(option.partition("=")[0] == _CKPT_PATH for option in argv)
        advice = f"to {'resume' if resumes else 'start again'}, run: {shlex.join(['malleable', *argv])}"
        advice = f"nothing was saved; {advice}" if uses_trainer else advice
    message = f"interrupted while {stage}; {advice}"
    cause.add_note(message)
    log.info(message)


def command_line(argv: Sequence[str], ckpt_path: str | None = None) -> str:
    """Return the text of a command with another checkpoint.

    Args:
        argv: Command and options.
        ckpt_path: Value of ``--ckpt_path``; ``None`` omits the option.
    """
    others = [
        option
        for option, previous in zip(argv, ["", *argv], strict=False)
        if previous != _CKPT_PATH and option != _CKPT_PATH and not option.startswith(f"{_CKPT_PATH}=")
    ]
    return shlex.join(["malleable", *others, *([] if ckpt_path is None else [_CKPT_PATH, ckpt_path])])


def _raise(number: int) -> NoReturn:
    exception: Any = KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    raise exception
