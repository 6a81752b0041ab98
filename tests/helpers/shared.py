"""Test data too large or too restricted to travel with the code: a folder ``shared`` beside the checkout, where there is one."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def shared_data(name: str) -> Path:
    """Return a file or folder of the shared test data, or skip the test where it is absent."""
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"needs test data that is not part of the checkout: {path}")
    return path
