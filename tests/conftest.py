"""Every test starts seeded, offline and in an empty working directory, and must leave the process as it found it."""

import os
import random
import socket
import time

# Before anything reads them.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DS_ACCELERATOR="cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

_STARTED = time.monotonic()
# Set by a seeded run; removed before the fixtures of a module, before each test and after it.
_SEEDS = {"PL_GLOBAL_SEED", "PL_SEED_WORKERS"}
# What torch, Lightning and pytest set once per process.
_ONCE = {
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_MODULE_LOADING",
    "KMP_DUPLICATE_LIB_OK",
    "KMP_INIT_AT_FORK",
    "PYTEST_CURRENT_TEST",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "TORCHINDUCTOR_CACHE_DIR",
}


def pytest_xdist_auto_num_workers(config):
    """Spread the whole suite over processes; run selected files in this one, which starts faster and shows output at once."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(os.cpu_count() or 1, 4) if whole else 0


def pytest_collection_modifyitems(items):
    # The longest tests start first, so that no process waits for one of them at the end.
    items.sort(key=lambda item: -max((mark.kwargs.get("minutes", 0) for mark in item.iter_markers("slow")), default=0))
    if not torch.cuda.is_available() and os.environ.get("MALLEABLE_GPU_TESTS_ON") != "cpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; MALLEABLE_GPU_TESTS_ON=cpu runs the same code on a CPU"))


def pytest_runtest_setup(item):
    """Start no test after ``MALLEABLE_TEST_SECONDS`` seconds, so that a slow machine ends in time; what is left out is reported."""
    seconds = os.environ.get("MALLEABLE_TEST_SECONDS")
    if seconds and time.monotonic() - _STARTED > float(seconds):
        pytest.skip(f"the {seconds} s of MALLEABLE_TEST_SECONDS are over")


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
    """Keep what tests fetch and build out of the user's cache."""
    os.environ["MALLEABLE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def seeded_module():
    """Seed what a module's fixtures draw: they run before the fixtures of its tests."""
    seed()


@pytest.fixture(autouse=True)
def seeded():
    seed()


def seed():
    for name in _SEEDS:
        os.environ.pop(name, None)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (what is drawn outside our code draws from here)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def working_directory(no_leaks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def offline(no_leaks, request, monkeypatch):
    """Refuse connections other than to this machine."""
    if "network" in request.keywords:
        return

    def guarded(original):
        def connect(self, address, *args):
            if self.family != socket.AF_UNIX and not _is_local(address[0]):
                raise OSError(f"tests run offline, refused: {address}")
            return original(self, address, *args)

        return connect

    def look_up(host, *args, **kwargs):
        if host is not None and not _is_local(host):
            raise socket.gaierror(f"tests run offline, refused: {host}")
        return resolve(host, *args, **kwargs)

    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", look_up)


@pytest.fixture(autouse=True)
def no_leaks(seeded):
    """Fail a test that leaves environment variables, a process group or determinism flags behind.

    Fixtures that use ``monkeypatch`` depend on this one, so that their changes are undone before it looks.
    """
    before = dict(os.environ)
    yield
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)} - _ONCE
    for name in changed:
        os.environ.pop(name, None)
    os.environ.update({name: before[name] for name in changed & before.keys()})
    leaked = sorted(changed - _SEEDS)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
    if grouped:
        torch.distributed.destroy_process_group()
    assert not leaked, f"the test leaves environment variables changed: {leaked}"
    assert not grouped, "the test leaves a process group behind"
    assert not deterministic, "the test leaves deterministic algorithms switched on"


def _is_local(host):
    name = host.decode() if isinstance(host, bytes) else str(host)
    return name in ("", "localhost", "::1", "0.0.0.0", socket.gethostname()) or name.startswith("127.")
