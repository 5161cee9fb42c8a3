"""One small bundle, which processes and threads share."""

from __future__ import annotations

import pytest

from exports import Exported, Once


@pytest.fixture(scope="session")
def bundle(once: Once) -> str:
    """The folder of a bundle for batches of 2 images of 16x16."""
    return str(Exported.of(once).bundle.path)
