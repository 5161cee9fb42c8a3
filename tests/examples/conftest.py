"""The built-in prior as a bundle, exported once for all examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffloss_export.cli import main


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the built-in prior as a user would."""
    folder = tmp_path_factory.mktemp("builtin") / "bundle"
    assert main(["onnx", "builtin", "-o", str(folder), "--batch-size", "4"]) == 0
    return folder
