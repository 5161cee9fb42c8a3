"""`diffloss-export profile`: refused without a GPU, run where there is one; the picture is drawn for real."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib.image
import pytest
import torch

from diffloss_engine.errors import InputError, MissingPackageError
from diffloss_engine.trt_profile import Profile
from diffloss_export.cli import main
from diffloss_export.profile import draw, to_json
from exports import Exported


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_without_a_gpu_that_is_said(
    backend: str, exported: Callable[..., Exported], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", str(exported().bundle.path), "--backend", backend]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("diffloss-export: a profile is taken ")
    assert "GPU" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for PyTorch without a GPU")
def test_a_gpu_that_pytorch_cannot_use(
    exported: Callable[..., Exported], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyCUDA and TensorRT find it; PyTorch is built for CPUs, or for a later driver."""
    driver, tensorrt = ModuleType("pycuda.driver"), ModuleType("tensorrt")
    driver.__dict__.update(init=lambda: None, Device=SimpleNamespace(count=lambda: 1))
    tensorrt.__dict__.update(__version__="11.4.0")
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    assert main(["profile", str(exported().bundle.path)]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("["))
    assert line.startswith("diffloss-export: a profile of tensorrt needs a PyTorch that can use the GPU, and PyTorch ")
    assert "docs/gpu.md says what to install" in line


def test_number_of_runs_is_checked(exported: Callable[..., Exported], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(exported().bundle.path), "--runs", "0"]) == 2
    assert "runs is 0; expected at least 1" in capsys.readouterr().err


PROFILES = {
    "encoder": Profile((2.0, 1.0, 3.0), {"conv_in": 0.5, "norm": 0.25}),
    "gradient": Profile(
        (9.0,), {f"layer {index}, of a name that is much too long for an axis of a picture": 1.0 for index in range(50)}
    ),
}


def test_picture(tmp_path: Path) -> None:
    draw(PROFILES, tmp_path / "profile.png")
    image = matplotlib.image.imread(tmp_path / "profile.png")
    assert image.shape[:2] == (900, 1000)
    assert image.std() > 0.05


def test_pictures_that_cannot_be_drawn(
    exported: Callable[..., Exported], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle = exported().bundle.path
    for path, message in (
        (tmp_path / "profile", "does not end like a picture"),
        (tmp_path / "profile.txt", "does not end like a picture"),
        (tmp_path / "none" / "profile.png", "there is no folder"),
        (bundle / "profile.png", "it would be in the bundle"),
    ):
        assert main(["profile", str(bundle), "-o", str(path)]) == 2
        assert message in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert main(["profile", str(bundle), "-o", str(tmp_path / "profile.png")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("diffloss-export: a picture is drawn with matplotlib, which cannot be imported")
        with pytest.raises(MissingPackageError, match=r"install '\.\[profile\]'"):
            draw(PROFILES, tmp_path / "profile.png")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    with pytest.raises(InputError, match=r"folder\.png cannot be written"):
        draw(PROFILES, folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_json() -> None:
    found = json.loads(json.dumps(to_json(PROFILES)))
    assert found["encoder"] == {
        "runs": 3,
        "latency_ms": {"p50": 2.0, "p90": 3.0, "p99": 3.0},
        "layers_ms": {"conv_in": 0.5, "norm": 0.25},
    }


def test_table(
    exported: Callable[..., Exported], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    profiles = {"encoder": Profile((2.0,), {"{ForeignNode[a...b]} + [/conv_in]": 0.5})}
    monkeypatch.setattr("diffloss_export.profile.profile_bundle", lambda *_, **__: profiles)
    assert main(["profile", str(exported().bundle.path)]) == 0
    assert "{ForeignNode[a...b]} + [/conv_in]" in capsys.readouterr().out


@pytest.mark.gpu
def test_profile(
    flavour: str,
    exported: Callable[..., Exported],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pycuda")
    monkeypatch.setenv("DIFFLOSS_CACHE", str(tmp_path / "plans"))
    bundle, picture = exported(precision="fp16").bundle, tmp_path / "profile.png"
    assert main(["profile", str(bundle.path), "--backend", flavour, "--json", "-o", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == bundle.graphs.keys()
    for profile in found.values():
        assert 0 < profile["latency_ms"]["p50"] <= profile["latency_ms"]["p99"]
        assert sum(profile["layers_ms"].values()) > 0
    assert picture.stat().st_size > 1000
