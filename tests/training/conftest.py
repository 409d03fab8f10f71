from __future__ import annotations

import pytest

from tests.conftest import write_training_shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards of 50 pairs."""
    return write_training_shards(tmp_path_factory.mktemp("shards"), 50)
