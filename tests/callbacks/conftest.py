"""What several tests read of one run on two ranks."""

import pytest
import reference_run
from launch import launch


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    """Folder that ``reference_run.py`` left on two ranks."""
    folder = tmp_path_factory.mktemp("two_ranks")
    launch([reference_run.__file__, folder, "ddp"])
    return folder
