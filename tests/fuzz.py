"""Damage input files at random, and check that every reader handles the damaged files.

A reader must either read a damaged file, or raise an error of this package that names the file. It is a fault if the error comes from a library
(``foreign``), if it does not name the file (``unnamed``), if the reader does not end (``hang``), or if the process ends (``crash``).
The memory of the process is limited.

    python tests/fuzz.py                              500 damaged files for each reader, about 40 minutes
    python tests/fuzz.py --count 50 tables patch      50 files for readers whose names start with "tables" or "patch"
    python tests/fuzz.py --seed 1 --keep /tmp/x       other damage; files that cause a fault are copied to /tmp/x
"""

import argparse
import collections
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from damage import damaged
from readers import READERS, copy

SECONDS = 20
MEMORY = 3 << 30  # bytes, in addition to the memory of the imported libraries
FAULTS = ("foreign", "unnamed", "hang", "crash")


class TooLong(BaseException):
    """A reader did not end within the time limit."""


def outcome(reader, folder: Path) -> tuple[str, str]:
    """Read a folder. Return the kind of the outcome (``read``, ``refused``, or one of ``FAULTS``), and the error or its traceback as text."""

    def stop(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
    except TooLong:
        return "hang", traceback.format_exc(limit=-4)
    except SystemExit:
        return "refused", ""  # raised by the parser of options, after it has printed its message
    except Exception as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return judged(error, folder)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read", ""


def judged(error: Exception, folder: Path) -> tuple[str, str]:
    """Return the kind of an error and a text: ``refused`` if it is raised by this package and names the file or its folder, else the fault."""
    *_, last = traceback.walk_tb(error.__traceback__)
    ours = str(last[0].f_globals.get("__name__")).partition(".")[0] == "malleable"
    if type(error).__name__ != "MisconfigurationException" and not (
        ours and isinstance(error, (ValueError, OSError)) and type(error).__module__ != "json"
    ):
        return "foreign", "".join(traceback.format_exception(error, limit=-3))
    names = [str(folder), *(path.name for path in folder.rglob("*"))]
    if not any(name in str(error) for name in names) and "checkpoint" not in str(error):
        return "unnamed", str(error)
    return "refused", str(error)


def cases(names, count: int) -> list[tuple[str, str, int]]:
    """Return name of the reader, file, and number of damaged copies of this file. Short runs have fewer copies for slow readers."""
    chosen = {name: reader for name, reader in READERS.items() if not names or any(name.startswith(begin) for begin in names)}
    return [
        (name, file, -(-count // (reader.slow if count < 500 else 1) // len(reader.files)))
        for name, reader in chosen.items()
        for file in reader.files
    ]


def run(name: str, file: str, numbers, seed: int, home: Path, keep: Path | None, report) -> None:
    """Damage a file in a different way for each of the numbers, and report each outcome."""
    reader = READERS[name]
    whole = home / "whole"
    if not whole.exists():
        whole.mkdir()
        reader.make(whole)
    for number in numbers:
        report(number, "crash", "")  # remains the outcome if this process ends during the case
        draw = random.Random(f"{seed} {name} {file} {number}")
        copy(whole, home / "now")
        path = home / "now" / file
        path.write_bytes(damaged(path.read_bytes(), file, draw))
        # Signal handlers of Python cannot interrupt loops in C. After a longer time, the process ends, and the outcome remains a crash.
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
        found, text = outcome(reader, home / "now")
        faulthandler.cancel_dump_traceback_later()
        if found in FAULTS and keep is not None:
            kept = keep / name.replace(" ", "_") / file.replace("/", "_")
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept / f"{number}-{path.name}")
        report(number, found, text)


def in_child(name: str, file: str, numbers: range, seed: int, keep: Path | None) -> dict[int, tuple[str, str]]:
    """Run the cases in a child process with limited memory. If it crashes, another process continues with the next case."""
    found: dict[int, tuple[str, str]] = {}
    while len(found) < len(numbers):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as results:
            child = os.fork()
            if child == 0:
                _child(name, file, numbers[len(found) :], seed, Path(folder), keep, results)
            os.waitpid(child, 0)
            results.seek(0)
            before = len(found)
            found.update({number: (kind, text) for number, kind, text in map(json.loads, results)})
            if len(found) == before:
                raise RuntimeError(f"{name}: the child process ended before its first case; see its error above")
    return found


def _child(name, file, numbers, seed, folder, keep, results) -> None:
    code = 1
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  (until the process ends)

        def report(*result):
            results.write(json.dumps(result) + "\n")
            results.flush()

        run(name, file, numbers, seed, folder, keep, report)
        code = 0
    except BaseException:
        sys.__stderr__.write(traceback.format_exc())
    finally:
        os._exit(code)


def main() -> int:
    """Run all cases, print a line for each reader and file, and return the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="prefixes of the names of readers (default: all)")
    parser.add_argument("--count", type=int, default=500, help="number of damaged files for each reader (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder to which files that cause a fault are copied")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged name of a tokenizer would be searched on the hub
    import lightning  # noqa: F401  (before the first child is forked)

    total: collections.Counter[str] = collections.Counter()
    for name, file, count in cases(options.names, options.count):
        started = time.monotonic()
        found = in_child(name, file, range(count), options.seed, options.keep)
        kinds = collections.Counter(kind for kind, _ in found.values())
        total.update(kinds)
        print(f"{name:<36} {file:<40} {dict(kinds)} {time.monotonic() - started:.0f} s", flush=True)  # noqa: T201
        shown = {
            text.strip().splitlines()[-1][:150] if text.strip() else "": (number, kind, text)
            for number, (kind, text) in found.items()
            if kind in FAULTS
        }
        for number, kind, text in list(shown.values())[:6]:
            print(f"  {kind} {number}: {text}", flush=True)  # noqa: T201
    print(f"all: {dict(total)}")  # noqa: T201
    return sum(total[fault] for fault in FAULTS)


if __name__ == "__main__":
    sys.exit(min(1, main()))
