import logging
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A cache folder of its own for each test, and all log records at hand."""
    monkeypatch.setenv("MALLEABLE_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, logger="malleable")
    return tmp_path / "cache"
