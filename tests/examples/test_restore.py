"""The main job on real input: the built-in prior, exported, on photographs with real restoration errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

import restore
from degradations import DEGRADATIONS
from diffloss_engine.bundle import Bundle
from diffloss_export.models import load_model
from diffloss_trt import DiffLoss
from diffloss_trt.tolerances import DIFFERENCE
from photographs import HELD_OUT, load
from unets import make_unet

ROOT = Path(__file__).parents[2]


def test_builtin_prior_is_small_enough(builtin_bundle: Path) -> None:
    weights = ROOT / "export" / "diffloss_export" / "builtin" / "unet" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 5_000_000
    assert Bundle.open(builtin_bundle).resolution == (64, 64)


@pytest.fixture(scope="module")
def losses(builtin_bundle: Path) -> tuple[DiffLoss, DiffLoss]:
    """The bundle's loss, and eager PyTorch's in float64."""
    model = load_model("builtin")
    reference = DiffLoss.from_unet(model.unet.double(), model.schedule, reduction="none")
    return DiffLoss.load(builtin_bundle, device="cpu", reduction="none"), reference


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_builtin_prior_on_degraded_photographs(losses: tuple[DiffLoss, DiffLoss], task: str) -> None:
    """Value and gradient of the bundle against float64 eager PyTorch, on photographs kept out of its training."""
    target = torch.stack([load(name)[:, 100:164, 200:264] for name in HELD_OUT])
    degraded = DEGRADATIONS[task](target, torch.Generator().manual_seed(0))
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([10, 100, 500])
    results = []
    for loss, dtype in zip(losses, (torch.float32, torch.float64), strict=True):
        restored = degraded.to(dtype).requires_grad_()
        terms = loss.terms(restored, target.to(dtype), timesteps=timesteps, noise=noise.to(dtype))
        (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
        results.append((terms.naturalness.double(), terms.semantic.double(), gradient.double().flatten(1)))
    (naturalness, semantic, gradient), (true_naturalness, true_semantic, true_gradient) = results
    tolerance = DIFFERENCE["fp32"]
    assert ((naturalness - true_naturalness).abs() / true_naturalness).max() < tolerance.term
    assert ((semantic - true_semantic).abs() / true_semantic).max() < tolerance.term
    assert ((gradient - true_gradient).norm(dim=1) / true_gradient.norm(dim=1)).max() < tolerance.gradient


def test_example_writes_pictures_curves_and_table(
    builtin_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "out"), "--task", "rain", "--steps", "4", "--bundle", str(builtin_bundle)]
    monkeypatch.setattr(sys, "argv", ["restore.py", *arguments])
    assert restore.main() == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"grid_rain.png", "loss_curve_rain.png", "table.md", "table.json"}
    rows = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {row["photograph"] for row in rows} == set(HELD_OUT)
    assert {row["image"] for row in rows} == {"degraded", "without DiffLoss", "with DiffLoss"}
    assert all(5 < row["psnr"] < 60 and 0 < row["ssim"] < 1 for row in rows)
    assert "rain, mean" in capsys.readouterr().out


def test_example_refuses_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "restore.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, "--bundle", str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "does not exist" in done.stderr


def test_a_model_is_exported_once_and_verified_where_the_loss_is_computed(tmp_path: Path) -> None:
    unet = make_unet("one_level", dtype=torch.float32)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "model")
    bundle = restore.make_bundle(str(tmp_path / "model"), tmp_path)
    assert Bundle.open(bundle).batch_size == restore.BATCH_SIZE
    assert restore.make_bundle("another model", tmp_path) == bundle
    (bundle / "gradient.onnx").unlink()
    with pytest.raises(subprocess.CalledProcessError):
        restore.make_bundle("another model", tmp_path)
