"""The command line: what it prints, its exit status, and one clear line for whatever a user can get wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from diffloss_export.cli import main
from diffloss_export.verify import Report


def refused(capsys: pytest.CaptureFixture[str], status: int, *arguments: str | Path) -> str:
    """Run a command that must fail with `status`; return the one line that it says."""
    assert main([str(argument) for argument in arguments]) == status
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(said) == 1
    return said[0].removeprefix("diffloss-export: ")


def test_inspect(exported: tuple[Path, Report], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(exported[0]), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["format_version"] == 1
    assert described["unet"]["class"] == "UNet2DModel"
    assert described["unet"]["parameters"] > 0
    assert len(described["unet"]["sha256"]) == 64
    assert (described["resolution"], described["batch_size"], described["precision"]) == ([16, 16], 4, "fp32")
    assert described["plans"] == {}
    assert set(described["graphs"]) == {"encoder", "noise_head"}
    for graph in described["graphs"].values():
        assert graph["nodes"] > 0
        assert graph["inputs"]
        assert graph["outputs"]
        assert len(graph["sha256"]) == 64
    assert main(["inspect", str(exported[0])]) == 0
    assert "every hash right" in capsys.readouterr().out


def test_verify(exported: tuple[Path, Report], capsys: pytest.CaptureFixture[str]) -> None:
    for backend in ("auto", "onnxruntime", "torch"):
        assert main(["verify", str(exported[0]), "--backend", backend, "--device", "cpu"]) == 0
        printed = capsys.readouterr().out
        assert "gradient" in printed
        assert "FAILED" not in printed


def test_export_and_overwrite(
    model_folder: Path, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "exists already" in refused(capsys, 2, "onnx", model_folder, "-o", bundle)
    assert main(["onnx", str(model_folder), "-o", str(bundle), "--batch-size", "1", "--overwrite"]) == 0
    assert "worst difference from float64" in capsys.readouterr().out
    assert json.loads((bundle / "manifest.json").read_text())["batch_size"] == 1
    assert "is not a bundle" in refused(capsys, 2, "onnx", model_folder, "-o", tmp_path, "--overwrite")


def test_models_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in ("no such model", tmp_path / "missing", "weights.pt", tmp_path):
        assert refused(capsys, 2, "onnx", model, "-o", tmp_path / "bundle")
        assert not (tmp_path / "bundle").exists()
    assert "does not exist" in refused(capsys, 2, "onnx", "builtin", "-o", tmp_path / "missing" / "bundle")


def test_resolution_that_the_unet_cannot_take(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, 2, "onnx", model_folder, "-o", tmp_path / "bundle", "--resolution", "15")
    assert "multiples of 2" in said


def alter(bundle: Path) -> None:
    path = bundle / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def newer(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))


def link(bundle: Path) -> None:
    (bundle / "schedule.json").rename(bundle.parent / "schedule.json")
    (bundle / "schedule.json").symlink_to(bundle.parent / "schedule.json")


def leave(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"schedule.json"', '"../schedule.json"'))


@pytest.mark.parametrize(
    ("damage", "status", "message"),
    [
        (lambda bundle: (bundle / "noise_head.onnx").unlink(), 1, "noise_head.onnx"),
        (lambda bundle: (bundle / "notes.txt").write_text("mine"), 1, "notes.txt"),
        (alter, 1, "was altered"),
        (newer, 2, "99"),
        (link, 2, "symbolic link"),
        (leave, 2, "../schedule.json"),
        (lambda bundle: (bundle / "manifest.json").unlink(), 2, "is not a bundle"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), 2, "manifest.json"),
    ],
)
def test_damaged_bundles(
    bundle: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], status: int, message: str
) -> None:
    damage(bundle)
    for command in ("verify", "inspect", "bench"):
        assert message in refused(capsys, status, command, bundle)


@pytest.mark.parametrize(
    "arguments",
    [[], ["onnx"], ["onnx", "builtin"], ["verify"], ["onnx", "builtin", "-o", "x", "--precision", "int4"], ["unknown"],
     ["onnx", "builtin", "-o", "x", "--resolution", "big"]],
)  # fmt: skip
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys; from diffloss_export.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'diffusers', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
def test_bench(exported: tuple[Path, Report], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(exported[0]), "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"device", "torch", "rows"}
    assert len(result["rows"]) == 3
    for row in result["rows"]:
        assert set(row) == {"name", "median_ms", "speedup_vs_eager", "peak_memory_bytes"}
        assert row["median_ms"] > 0
    assert result["rows"][0]["speedup_vs_eager"] == 1.0
