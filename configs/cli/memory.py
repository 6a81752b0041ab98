"""Errors that mean that memory is used up, as a message with a remedy. No import of torch."""

from __future__ import annotations

# What torch and its loaders say, on Linux, Windows and macOS.
_SIGNS = ("can't allocate memory", "not enough memory: you tried to allocate", "bad_alloc", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_WORKER = ("DataLoader worker", "killed by signal: Killed")

_REMEDY = (
    "lower data.batch_size (global_batch_size keeps the optimizer step) or data.eval_batch_size; for a language model also "
    "data.split.history_length, data.max_prompt_length or model.decoding.num_beams; or use a smaller model or file"
)


def memory_problem(error: BaseException) -> str | None:
    """Return what to do about an error if it means that memory is used up, else ``None``."""
    text = str(error)
    if all(sign in text for sign in _WORKER):
        return "a process that reads data was killed, most likely because memory is used up: lower data.num_workers or data.batch_size"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        device = "the device" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    elif isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS):
        device = "the device" if "CU" in text.partition(":")[0] else "this machine"
    else:
        return None
    first = text.strip().partition("\n")[0]
    return f"out of memory on {device}{f' ({first[:200]})' if first else ''}: {_REMEDY}"
