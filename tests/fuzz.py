"""Damages files that users or strangers may give, and checks what every reader makes of them.

Each is either read, or refused with an error of this package that names the file: never with the error of a library, without end, or with all memory.

    python tests/fuzz.py                              500 damaged files for each reader, about 40 minutes
    python tests/fuzz.py --count 50 tables patch      fewer, of the readers whose names begin so
    python tests/fuzz.py --seed 1 --keep /tmp/x       other ones; files that a reader does not handle are left there
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
MEMORY = 3 << 30  # on top of what the libraries take
FAULTS = ("foreign", "unnamed", "hang", "crash")


class TooLong(BaseException):
    """A reader has not come to an end."""


def outcome(reader, folder: Path) -> tuple[str, str]:
    """Read a folder, and return what became of it: ``read``, ``refused``, or one of ``FAULTS`` with the traceback."""

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
        return "refused", ""  # the parser of options, after its message
    except Exception as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        return judged(error, folder)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read", ""


def judged(error: Exception, folder: Path) -> tuple[str, str]:
    """Return whether an error is one of ours, and names the file or its folder."""
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
    """Return reader, file and number of damaged files; a short run has fewer for slow readers."""
    chosen = {name: reader for name, reader in READERS.items() if not names or any(name.startswith(begin) for begin in names)}
    return [
        (name, file, -(-count // (reader.slow if count < 500 else 1) // len(reader.files)))
        for name, reader in chosen.items()
        for file in reader.files
    ]


def run(name: str, file: str, numbers, seed: int, home: Path, keep: Path | None, report) -> None:
    """Damage a file again and again, and report every outcome."""
    reader = READERS[name]
    whole = home / "whole"
    if not whole.exists():
        whole.mkdir()
        reader.make(whole)
    for number in numbers:
        report(number, "crash", "")  # stands if this process ends here
        draw = random.Random(f"{seed} {name} {file} {number}")
        copy(whole, home / "now")
        path = home / "now" / file
        path.write_bytes(damaged(path.read_bytes(), file, draw))
        # For loops in C, which no signal handler of Python ends: the process ends, and this case stays a crash.
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
        found, text = outcome(reader, home / "now")
        faulthandler.cancel_dump_traceback_later()
        if found in FAULTS and keep is not None:
            kept = keep / name.replace(" ", "_") / file.replace("/", "_")
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept / f"{number}-{path.name}")
        report(number, found, text)


def in_child(name: str, file: str, numbers: range, seed: int, keep: Path | None) -> dict[int, tuple[str, str]]:
    """Run in processes of their own with bounded memory; where one crashes, another one goes on behind it."""
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
                raise RuntimeError(f"{name}: the reader does not start, see its error above")
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
    """Run, print a table, and return the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of the names of readers (default: all)")
    parser.add_argument("--count", type=int, default=500, help="damaged files for each reader (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for files that are not handled")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a changed name of a tokenizer is one of the hub
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
