"""What `bench` measures: the parts of it always, the whole with torch.compile when there is time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch._inductor import config

from diffloss_engine.bundle import Bundle
from diffloss_engine.inductor import has_bfloat16
from diffloss_export import bench
from diffloss_export.cli import main
from exports import Exported

CPU = torch.device("cpu")


def test_every_way_computes_the_same_gradient(bundle: Bundle) -> None:
    """Comparing the speed of different things would be worth nothing; torch.compile compiles at its first call."""
    steps = {name: load() for name, load in bench._ways(bundle, "onnxruntime", CPU).items()}
    compiled, ours = "torch.compile float32", "diffloss-trt onnxruntime, fused, fp32"
    assert list(steps) == [bench.EAGER, compiled, ours]
    eager = steps[bench.EAGER]()
    assert eager.shape == (2, 3, 16, 16)
    assert eager.abs().max() > 0
    assert float((steps[ours]() - eager).norm() / eager.norm()) < 2e-3


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_rows_say_what_they_are(exported: Callable[..., Exported], precision: str) -> None:
    backend = "torch" if precision == "bf16" else "onnxruntime"
    ways = bench._ways(exported(precision=precision).bundle, backend, CPU)
    # On a CPU fp16 is emulated, and bf16 unless the processor multiplies it: then what is compiled is fp32.
    compiled = "bfloat16" if precision == "bf16" and has_bfloat16(CPU) else "float32"
    assert list(ways) == [
        "eager PyTorch fp32",
        f"torch.compile {compiled}",
        f"diffloss-trt {backend}, fused, {precision}",
    ]


def test_a_compiler_that_fails_costs_its_row_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.compiler.reset()  # of what other tests have compiled
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        assert main(["bench", str(bundle.path), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == [bench.EAGER, "diffloss-trt onnxruntime, fused, fp32"]
    (note,) = result["notes"]
    assert note.startswith("torch.compile float32 is left out: InvalidCxxCompiler: No working C++ compiler")
    monkeypatch.setattr("diffloss_export.bench.bench_bundle", lambda *_, **__: result)
    assert main(["bench", str(bundle.path), "--device", "cpu"]) == 0
    assert f"note: {note}" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["loading", "a step"])
def test_a_peer_without_memory_costs_its_row_alone(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    # Ours runs an ONNX graph, and has none of these.
    monkeypatch.setattr(UNet2DModel, "load_state_dict", refuse) if where == "loading" else monkeypatch.setattr(
        nn.Conv2d, "forward", refuse
    )
    torch.compiler.reset()
    assert main(["bench", str(bundle.path), "--device", "cpu", "--backend", "onnxruntime", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (row,) = result["rows"]
    assert row["name"] == "diffloss-trt onnxruntime, fused, fp32"
    assert row["median_ms"] > 0
    assert row["speedup_vs_eager"] is None
    assert row.keys() == {"name", "median_ms", "speedup_vs_eager", "peak_memory_bytes"}
    left_out = f"{bench.EAGER} is left out: CUDA out of memory. Tried to allocate 9.00 GiB."
    assert result["notes"][0] == left_out
    assert len(result["notes"]) == 2
    monkeypatch.setattr("diffloss_export.bench.bench_bundle", lambda *_, **__: result)
    assert main(["bench", str(bundle.path), "--device", "cpu"]) == 0
    _, row, *notes = capsys.readouterr().out.splitlines()
    assert "ms" in row
    assert "x " not in row
    assert "None" not in row
    assert notes[0] == f"note: {left_out}"


def test_on_a_gpu_rows_claim_no_more_than_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("diffloss_engine.fp32_precision.fp32_settings", lambda _: {"conv": "tf32"})
    assert bench.eager_name(CPU) == bench.EAGER
    assert bench.eager_name(gpu) == "eager PyTorch fp32, convolutions in TF32"
    monkeypatch.setattr("diffloss_engine.fp32_precision.fp32_settings", lambda _: {"conv": "ieee"})
    assert bench.eager_name(gpu) == bench.EAGER
    for backend in ("onnxruntime", "onnxruntime-tensorrt"):
        assert bench._tells(f"diffloss-trt {backend}, fused, fp32", CPU)
        assert not bench._tells(f"diffloss-trt {backend}, fused, fp32", gpu)
    assert bench._tells("diffloss-trt tensorrt, fused, fp16", gpu)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is told by Linux alone")
def test_peak_memory_is_that_of_the_step() -> None:
    size = 64 * 2**20

    def step() -> torch.Tensor:
        return torch.ones(size, dtype=torch.uint8)[:1].clone()

    peak = bench._peak_memory(step, CPU)
    assert peak is not None
    assert 0.9 * size < peak < 1.5 * size


def test_peak_memory_is_unknown_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: str) -> int:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "write_text", refuse)
    assert bench._peak_memory(lambda: torch.zeros(1), CPU) is None


@pytest.mark.slow
def test_bench_prints_one_object(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle.path), "--json", "--device", "cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["device"].startswith("CPU, ")
    assert result["torch"] == torch.__version__
    assert [row["name"] for row in result["rows"]] == [
        "eager PyTorch fp32",
        "torch.compile float32",
        "diffloss-trt onnxruntime, fused, fp32",
    ]
    eager = result["rows"][0]["median_ms"]
    for row in result["rows"]:
        assert row.keys() == {"name", "median_ms", "speedup_vs_eager", "peak_memory_bytes"}
        assert row["median_ms"] > 0
        assert row["speedup_vs_eager"] == pytest.approx(eager / row["median_ms"])
        assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= 0


@pytest.mark.slow
def test_bench_in_words(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(bundle.path), "--device", "cpu"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert "batch 2, value and gradient of one step" in heading
    assert len(rows) == 3
    assert "1.00x" in rows[0]
