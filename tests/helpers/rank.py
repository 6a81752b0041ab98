"""Run a script as ``python`` would and end the process at once: ``python rank.py (-c SOURCE | -m MODULE | FILE) [ARGUMENT ...]``.

Threads of gloo that outlive the interpreter now and then abort the process while it shuts down ("terminate called without an
active exception"), after all its work is done. Hence a rank of :mod:`launch` takes its exit functions and leaves.
"""

import atexit
import os
import runpy
import sys
import traceback
from pathlib import Path
from types import ModuleType


def main(how: str, *words: str) -> None:
    """Run what a Python command line asks for; ``sys.argv`` and ``__main__`` are as there."""
    if how == "-c":
        sys.argv = ["-c", *words[1:]]
        sys.modules["__main__"] = script = ModuleType("__main__")
        exec(words[0], vars(script))
    elif how == "-m":
        sys.argv = [*words]
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [how, *words]
        sys.path.insert(0, str(Path(how).resolve().parent))
        runpy.run_path(how, run_name="__main__")


def status(ended: BaseException) -> int:
    """Report what ended a script, as the interpreter does, and return the exit status."""
    if not isinstance(ended, SystemExit):
        traceback.print_exception(ended)
        return 1
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    sys.stderr.write(f"{ended.code}\n")
    return 1


if __name__ == "__main__":
    code = 0
    try:
        main(*sys.argv[1:])
    except BaseException as ended:
        code = status(ended)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
