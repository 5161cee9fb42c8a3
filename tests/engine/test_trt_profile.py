"""What a profile is, without a GPU; taking one is tested where there is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffloss_engine import BackendUnavailableError
from diffloss_engine.trt_profile import Profile, import_driver, largest, profile_plan


def test_percentiles() -> None:
    profile = Profile(tuple(float(ms) for ms in range(100, 0, -1)), {})
    assert [profile.percentile(percent) for percent in (0, 50, 99)] == [1, 51, 100]
    assert Profile((3.0,), {}).percentile(99) == 3


def test_largest_names_the_rest() -> None:
    layers = {"conv": 3.0, "norm": 2.0, "silu": 1.0, "add": 0.5}
    assert largest(layers, 2) == [("conv", 3.0), ("norm", 2.0), ("2 others", 1.5)]
    assert largest(layers, 4) == list(layers.items())


def test_without_pycuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(BackendUnavailableError, match=r"PyCUDA cannot be imported .* docs/gpu.md says how"):
        import_driver()
    with pytest.raises(BackendUnavailableError, match="PyCUDA"):
        profile_plan(b"", inputs=(), flavour="tensorrt", runs=1)


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module such as PyCUDA's on a machine with the driver's library and without a device."""
    (tmp_path / "pycuda").mkdir()
    (tmp_path / "pycuda" / "__init__.py").touch()
    (tmp_path / "pycuda" / "driver.py").write_text("def init():\n    raise RuntimeError('cuInit failed: no device')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(BackendUnavailableError, match="PyCUDA finds none: cuInit failed: no device"):
        import_driver()
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name, raising=False)
