import pytest
import torch

from malleable.memory import memory_problem


def test_memory_errors_of_python_and_torch_have_a_message():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    message = memory_problem(raised.value)
    assert message.startswith("out of memory on this machine (")
    assert "lower data.batch_size" in message
    assert memory_problem(MemoryError()).startswith("out of memory on this machine: lower")
    assert memory_problem(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")).startswith("out of memory on the device (CUDA")
    assert memory_problem(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")).startswith("out of memory on the device")


def test_killed_dataloader_worker_has_a_message():
    error = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    assert "lower data.num_workers" in memory_problem(error)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), ValueError("bad_alloc"), RuntimeError("DataLoader worker (pid 1) exited")])
def test_other_errors_have_no_message(error):
    assert memory_problem(error) is None
