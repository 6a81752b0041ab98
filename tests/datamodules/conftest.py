import logging
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test, and all log records at hand."""
    monkeypatch.setenv("MALLEABLE_CACHE", str(tmp_path / "cache"))
    logging.getLogger("malleable").setLevel(logging.INFO)
    return tmp_path / "cache"
