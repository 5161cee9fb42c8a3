"""What `import diffloss_trt` offers: the loss, every error, and a version, which sources alone have too."""

from __future__ import annotations

import importlib.metadata

import pytest

import diffloss_trt
from diffloss_engine import errors
from diffloss_engine.errors import DiffLossError


def test_every_error_is_re_exported() -> None:
    kinds = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type)}
    assert DiffLossError in kinds.values()
    for name, kind in kinds.items():
        assert getattr(diffloss_trt, name) is kind
    assert kinds.keys() <= set(diffloss_trt.__all__)


def test_all_names_are_there() -> None:
    assert all(hasattr(diffloss_trt, name) for name in diffloss_trt.__all__)
    with pytest.raises(AttributeError, match="module 'diffloss_trt' has no attribute 'no_such_name'"):
        diffloss_trt.no_such_name  # type: ignore[attr-defined] # noqa: B018


def test_version() -> None:
    assert diffloss_trt.__version__ == importlib.metadata.version("diffloss-trt")


def test_sources_without_metadata_have_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(diffloss_trt, "version", missing)
    assert diffloss_trt.__version__ == "0+unknown"
