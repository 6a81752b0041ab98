"""Commands of ``boring.yaml`` in the working directory that receive a signal at a chosen moment, as a script of its own.

    python interrupted_commands.py

Writes ``ended.json``: for each case, the exit status and what was written to stderr. Each case is a fork, because the imports take longer than a run.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from boring import BoringDataModule, BoringModule
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from malleable.main import main
from malleable.option_errors import OptionParser

INT, TERM = signal.SIGINT, signal.SIGTERM
QUIET = [
    "--trainer.accelerator",
    "cpu",
    "--trainer.devices",
    "1",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
]
FIRST = "runs/boring/version_0/checkpoints/last.ckpt"  # of the first case
RESUME = ["--trainer.max_epochs", "2", "--ckpt_path", FIRST]
# For each case: command and options, signal, and the function before which the signal is sent. ``background`` starts with SIGINT ignored; in
# ``ignored``, the exception is raised in a destructor, where Python ignores it.
CASES: dict[str, tuple[list[str], int, Any, str]] = {
    "whole": (["fit"], 0, BoringModule, "training_step"),
    "options": (["fit"], INT, OptionParser, "parse_args"),
    "data": (["fit"], INT, BoringDataModule, "prepare_data"),
    "data, terminated": (["fit"], TERM, BoringDataModule, "prepare_data"),
    "background": (["fit"], INT, BoringDataModule, "prepare_data"),
    "model": (["fit"], TERM, BoringModule, "configure_model"),
    "resumed": (["fit", *RESUME], INT, _CheckpointConnector, "restore_callbacks"),
    "ignored": (["fit", *RESUME], INT, _FitLoop, "setup_data"),
    "first step": (["fit"], INT, BoringModule, "training_step"),
    "resumed step": (["fit", *RESUME], TERM, BoringModule, "training_step"),
    "tested after fit": (["fit", "--test_after_fit"], INT, BoringModule, "test_step"),
    "validate": (["validate", "--ckpt_path", FIRST], TERM, BoringModule, "validation_step"),
    "test": (["test", "--ckpt_path", FIRST], TERM, BoringModule, "test_step"),
    "predict": (["predict", "--ckpt_path", FIRST], INT, BoringModule, "predict_step"),
}


class Sender:
    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.kill(os.getpid(), self.number)


def send_before(owner: Any, name: str, number: int, destructor: bool) -> None:
    """Send a signal to this process before the first call of a function."""
    original = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        setattr(owner, name, original)
        if destructor:
            Sender(number)
        else:
            os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(owner, name, call)


def run(case: str) -> int:
    words, number, owner, name = CASES[case]
    sys.argv = ["malleable", words[0], "--config", "boring.yaml", *QUIET, *words[1:]]
    if number:
        send_before(owner, name, number, case == "ignored")
    signal.signal(signal.SIGINT, signal.SIG_IGN if case == "background" else signal.default_int_handler)
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        return 99
    return 0


if __name__ == "__main__":
    found = {}
    for case in CASES:
        child = os.fork()
        if not child:
            os.dup2(os.open("err.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            status = run(case)
            sys.stderr.flush()
            os._exit(status)
        found[case] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), Path("err.txt").read_text()
        Path("ended.json").write_text(json.dumps(found))
