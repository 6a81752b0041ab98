"""Messages with a remedy for errors of insufficient memory, without torch."""

from __future__ import annotations

# Parts of the error messages of torch and its loaders, on Linux, Windows and macOS.
_SIGNS = ("can't allocate memory", "not enough memory: you tried to allocate", "bad_alloc", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_WORKER = ("DataLoader worker", "killed by signal: Killed")

_REMEDY = (
    "lower data.batch_size (the optimizer step still uses global_batch_size rows) or data.eval_batch_size; for a language model also "
    "data.split.history_length, data.max_prompt_length or model.decoding.num_beams; or use a smaller model or file"
)


def memory_problem(error: BaseException) -> str | None:
    """Return a message with a remedy for an error of insufficient memory; ``None`` for other errors."""
    text = str(error)
    if all(sign in text for sign in _WORKER):
        return "a worker process of a dataloader was killed, most likely for lack of memory: lower data.num_workers or data.batch_size"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        device = "the device" if type(error).__name__ == "OutOfMemoryError" else "this machine"
    elif isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS):
        device = "the device" if "CU" in text.partition(":")[0] else "this machine"
    else:
        return None
    first = text.strip().partition("\n")[0]
    return f"out of memory on {device}{f' ({first[:200]})' if first else ''}: {_REMEDY}"
