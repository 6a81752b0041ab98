"""Run a script on several CPU processes that meet over gloo, as a cluster launcher would."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HELPERS = Path(__file__).resolve().parent
RANK = HELPERS / "rank.py"


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(
    command: str | Sequence[str | Path],
    *,
    ranks: int = 2,
    cwd: str | Path | None = None,
    timeout_s: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """Run a Python script (source text, or a file with its arguments) once per rank and wait for all.

    The environment is torchrun's (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so that both
    ``torch.distributed.init_process_group`` and a Trainer with ``devices=ranks`` find their peers. With one rank the
    script runs as an ordinary process, with more each runs under :mod:`rank`, which lies beside this file.

    Returns:
        What each rank wrote to its standard output.

    Raises:
        AssertionError: If a rank fails or the time is up; the message ends with the output of every rank.
    """
    arguments = ["-c", command] if isinstance(command, str) else [str(part) for part in command]
    base = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    base |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": _path(), **(env or {})}
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(ranks):
            meeting = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": "test",
            }
            with (Path(folder) / f"{rank}.out").open("w") as out, (Path(folder) / f"{rank}.err").open("w") as err:
                variables = base | (meeting if ranks > 1 else {})
                started = [sys.executable, *([RANK] if ranks > 1 else []), *arguments]
                processes.append(subprocess.Popen(started, env=variables, cwd=cwd, stdout=out, stderr=err))
        problem = _wait(processes, timeout_s)
        outputs = [(Path(folder) / f"{rank}.out").read_text() for rank in range(ranks)]
        if problem:
            errors = [(Path(folder) / f"{rank}.err").read_text() for rank in range(ranks)]
            tails = [f"--- rank {rank}\n{outputs[rank][-2000:]}\n{errors[rank][-4000:]}" for rank in range(ranks)]
            raise AssertionError("\n".join([problem, *tails]))
    return outputs


def _wait(processes: Sequence[subprocess.Popen], timeout_s: float) -> str:
    """Wait for all; once one fails or the time is up, stop the others. Return what went wrong, or nothing."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        if failed or time.monotonic() > deadline:
            for process in processes:
                process.kill()
                process.wait()
            return f"rank {failed[0]} failed" if failed else f"not finished after {timeout_s} s"
        time.sleep(0.05)
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    return f"rank {failed[0]} ended with status {processes[failed[0]].returncode}" if failed else ""


def _path() -> str:
    return os.pathsep.join(part for part in (str(HELPERS), os.environ.get("PYTHONPATH", "")) if part)


_LAUNCHER_VARIABLES = {
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
}
