"""One small bundle, which processes and threads share."""

from __future__ import annotations

import pytest

from diffloss_export.pipeline import export_bundle
from exports import make_model


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a bundle for batches of 2 images of 16x16."""
    folder = tmp_path_factory.mktemp("load") / "bundle"
    export_bundle(make_model(), folder, batch_size=2)
    return str(folder)
