"""`verify_bundle` on good bundles, and on bundles in which graph and UNet disagree: those must fail."""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onnx import TensorProto, helper

from diffloss_engine.bundle import MANIFEST, Bundle
from diffloss_engine.errors import BackendUnavailableError, BundleError, IntegrityError, ParityError
from diffloss_export.pipeline import export_bundle
from diffloss_export.verify import Report, Row, verify_bundle
from diffloss_export.widened import write_widened
from diffloss_trt.contract import (
    ENCODER,
    GRADIENT,
    NOISE_HEAD,
    SCHEDULE,
    SEMANTIC_GRADIENT,
    UNET_CONFIG,
    UNET_WEIGHTS,
)
from diffloss_trt.difference import RULES
from diffloss_trt.norms import group_norm
from diffloss_trt.probe import Probe
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.tolerances import DIFFERENCE, PLAIN, Tolerance
from exports import Exported, edit_json, make_model, make_schedule, read_graph, rehash, repoint

RECOMPUTED = ("recomputed loss", "recomputed semantic loss alone")


def failed(report: Report) -> set[str]:
    return {row.check for row in report.rows if not row.passed}


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "torch"])
def test_every_backend_agrees_with_float64(bundle: Bundle, backend: str) -> None:
    report = verify_bundle(bundle, backend=backend, device="cpu")
    report.raise_for_failure()
    assert report.backend == ("torch" if backend == "torch" else "onnxruntime")
    # Where the loss runs no graphs, the graphs are replayed all the same, and what it runs instead.
    program = {f"{name}, run by torch" for name in (GRADIENT, SEMANTIC_GRADIENT)} if backend == "torch" else set()
    assert {ENCODER, NOISE_HEAD, GRADIENT, SEMANTIC_GRADIENT, *RECOMPUTED} | program == {
        row.check for row in report.rows
    }


def test_the_program_that_torch_runs_is_checked(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it differs from the graph, which was made of the same rules."""
    right = RULES[group_norm]
    monkeypatch.setitem(RULES, group_norm, lambda tape, x, groups, gain, *more, **options: right(
        tape, x, groups, gain * 1.01, *more, **options
    ))  # fmt: skip
    program = {f"{name}, run by torch" for name in (GRADIENT, SEMANTIC_GRADIENT)}
    assert failed(verify_bundle(bundle, backend="torch", device="cpu")) == program


def test_errors_are_of_the_size_of_the_precision(exported: Callable[..., Exported]) -> None:
    """A half-precision bundle whose graphs were as exact as fp32 would not be one."""
    errors = {
        precision: max(row.error for row in exported(precision=precision).report.rows if row.check == NOISE_HEAD)
        for precision in ("fp32", "fp16")
    }
    assert errors["fp32"] < 1e-5 < 1e-4 < errors["fp16"] < 5e-3


def test_bf16_says_how_its_graphs_were_replayed(exported: Callable[..., Exported]) -> None:
    report = exported(precision="bf16").report
    assert len(report.notes) == 4
    assert all("replayed in float32" in note for note in report.notes)
    assert exported(precision="fp16").report.notes == []


def test_one_widened_graph_at_a_time_is_on_the_disk(
    exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its weights in float32: gigabytes of a large UNet."""
    bundle = exported(precision="bf16").bundle
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left: dict[str, list[Path]] = {}
    widened: list[Path] = []

    def write(source: Path, destination: Path) -> None:
        write_widened(source, destination)
        widened.extend(tmp_path.rglob("*.weights"))

    monkeypatch.setattr("diffloss_export.verify.write_widened", write)
    verify_bundle(bundle, device="cpu", on_stage=lambda stage: left.update({stage: list(tmp_path.rglob("*.weights"))}))
    assert sorted(path.stem for path in widened) == sorted(bundle.graphs)
    assert len(left) > len(widened)
    assert not any(left.values())


@pytest.mark.parametrize(
    ("backend", "message"),
    [("onnxruntime", "ONNX Runtime has no bf16 kernels for CPUs"), ("tensorrt", "tensorrt needs a GPU")],
)
def test_bf16_on_a_cpu_and_a_backend_that_cannot(exported: Callable[..., Exported], backend: str, message: str) -> None:
    stages: list[str] = []
    with pytest.raises(BackendUnavailableError, match=message):
        verify_bundle(exported(precision="bf16").bundle, backend=backend, device="cpu", on_stage=stages.append)
    assert not any("computing" in stage for stage in stages)


@pytest.mark.parametrize(
    ("precision", "graph", "weight"),
    [
        ("fp32", ENCODER, "mid_block.resnets.0.conv1.weight"),
        ("fp32", ENCODER, "mid_block.attentions.0.to_q.weight"),
        ("fp32", NOISE_HEAD, "up_blocks.0.resnets.0.norm2.weight"),
        ("bf16", ENCODER, "mid_block.attentions.0.to_q.weight"),
        pytest.param("bf16", NOISE_HEAD, "up_blocks.0.resnets.0.norm2.weight", marks=pytest.mark.slow),
    ],
)
def test_graph_that_disagrees_with_the_unet_fails(
    copied: Callable[..., Path], precision: str, graph: str, weight: str
) -> None:
    folder = copied(precision=precision)
    repoint(folder / f"{graph}.onnx", weight)
    rehash(folder)
    bundle = Bundle.open(folder)
    bundle.verify_hashes()
    report = verify_bundle(bundle, device="cpu")
    # The graph itself, and not the other one; the loss too, unless it runs without the graphs.
    assert graph in failed(report)
    assert {ENCODER, NOISE_HEAD} - {graph} <= {row.check for row in report.rows} - failed(report)
    assert ("recomputed loss" in failed(report)) == (report.backend == "onnxruntime")
    with pytest.raises(ParityError, match=r"the error against float64 is .*, allowed"):
        report.raise_for_failure()


@pytest.mark.parametrize("change", [{"norm_eps": 0.1}, {"act_fn": "gelu"}])
def test_unet_that_disagrees_with_the_graphs_fails(copied: Callable[..., Path], change: dict[str, object]) -> None:
    folder = copied()
    edit_json(folder / UNET_CONFIG, lambda config: config.update(change))
    rehash(folder)
    report = verify_bundle(Bundle.open(folder), device="cpu")
    assert {ENCODER, NOISE_HEAD, GRADIENT, SEMANTIC_GRADIENT, "recomputed loss"} <= failed(report)


def test_schedule_that_disagrees_with_the_graph_fails(copied: Callable[..., Path]) -> None:
    folder = copied("variance", "fp16", "v_prediction")
    edit_json(
        folder / SCHEDULE, lambda schedule: schedule.update(alphas_cumprod=[a**2 for a in schedule["alphas_cumprod"]])
    )
    rehash(folder)
    assert NOISE_HEAD in failed(verify_bundle(Bundle.open(folder), device="cpu"))


def test_graph_of_another_prediction_type_is_named(copied: Callable[..., Path]) -> None:
    folder = copied("variance", "fp16", "v_prediction")
    edit_json(folder / SCHEDULE, lambda schedule: schedule.update(prediction_type="epsilon"))
    edit_json(folder / MANIFEST, lambda manifest: manifest["unet"].update(prediction_type="epsilon"))
    rehash(folder)
    with pytest.raises(BundleError, match=r"the noise_head graph takes .*'noisy', 'timesteps'.*UNet and schedule"):
        verify_bundle(Bundle.open(folder), device="cpu")


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_bundle_without_a_graph_is_refused(copied: Callable[..., Path], backend: str) -> None:
    folder = copied()
    (folder / "noise_head.onnx").unlink()

    def forget(manifest: dict[str, dict[str, object]]) -> None:
        del manifest["graphs"][NOISE_HEAD], manifest["files"]["noise_head.onnx"]

    edit_json(folder / "manifest.json", forget)
    with pytest.raises(BundleError, match="no graph 'noise_head'"):
        verify_bundle(Bundle.open(folder), backend=backend, device="cpu")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_graph_that_returns_no_number_fails(copied: Callable[..., Path], value: float) -> None:
    folder = copied()
    path = folder / "encoder.onnx"
    model = read_graph(path)
    # The bottleneck, with one element replaced.
    last = next(node for node in model.graph.node if "bottleneck" in node.output)
    last.output[:] = ["finite" if name == "bottleneck" else name for name in last.output]
    spoiled = torch.zeros(2, 16, 16, 16)
    spoiled[1, 5, 2, 3] = value
    model.graph.initializer.append(
        helper.make_tensor("spoiled", TensorProto.FLOAT, spoiled.shape, spoiled.flatten().tolist())
    )
    model.graph.node.append(helper.make_node("Add", ["finite", "spoiled"], ["bottleneck"]))
    path.write_bytes(model.SerializeToString())
    rehash(folder)
    report = verify_bundle(Bundle.open(folder), device="cpu")
    (row,) = (row for row in report.rows if (row.check, row.quantity) == (ENCODER, "bottleneck"))
    assert row.error == math.inf
    assert report.worst.error == math.inf
    with pytest.raises(ParityError, match="is inf, allowed"):
        report.raise_for_failure()


def test_altered_file_fails_before_anything_is_run(copied: Callable[..., Path]) -> None:
    folder = copied()
    content = bytearray((folder / UNET_WEIGHTS).read_bytes())
    content[-3] ^= 1
    (folder / UNET_WEIGHTS).write_bytes(content)
    stages: list[str] = []
    with pytest.raises(IntegrityError, match="was altered"):
        verify_bundle(Bundle.open(folder), on_stage=stages.append, device="cpu")
    assert stages == ["checking hashes"]


@pytest.mark.slow
def test_schedule_that_ends_in_pure_noise_can_be_checked(tmp_path: Path) -> None:
    model = make_model()
    table = make_schedule().alphas_cumprod
    table[-1] = 0
    _, report = export_bundle(
        dataclasses.replace(model, schedule=NoiseSchedule(table)), tmp_path / "bundle", batch_size=2
    )
    report.raise_for_failure()


def test_report_names_its_worst_row() -> None:
    good, near, over, far = (
        Row("loss", "term", error, tolerance) for error, tolerance in ((1e-9, 1.0), (0.9, 1.0), (1.1, 1.0), (1e3, 1.0))
    )
    assert Report("torch", [good, near]).worst is near
    assert Report("torch", [over, near, good]).worst is over
    assert Report("torch", [over, far, near]).worst is far
    Report("torch", [good, near]).raise_for_failure()
    with pytest.raises(ParityError, match=r"^loss, term: the error against float64 is 1.1, allowed 1$"):
        Report("torch", [over, good]).raise_for_failure()


@pytest.mark.parametrize("error", [math.nan, math.inf])
def test_row_without_a_number_has_not_passed(error: float) -> None:
    row = Row("loss", "term", error, 1.0)
    assert not row.passed
    assert Report("torch", [Row("loss", "other", 0.999, 1.0), row]).worst is row


@pytest.mark.parametrize(("channels", "resolution"), [(3, (32, 32)), (1, (16, 48))])
def test_probe_is_an_image_and_its_restoration_at_the_tables_distance(
    channels: int, resolution: tuple[int, int]
) -> None:
    wanted = [20.0, 35.0, 50.0]
    probe = Probe.make(channels, resolution, torch.tensor([0, 5, 9]), wanted)
    assert probe.target.shape == probe.restored.shape == probe.noise.shape == (3, channels, *resolution)
    assert probe.target.dtype == torch.float64
    assert probe.target.abs().max() <= 1
    decibels = 10 * (4 / (probe.restored - probe.target).square().mean((1, 2, 3))).log10()
    assert (decibels - torch.tensor(wanted)).abs().max() < 1
    assert torch.equal(probe.restored, probe.restored.float().double())
    again = Probe.make(channels, resolution, torch.tensor([0, 5, 9]), wanted)
    assert torch.equal(probe.restored, again.restored)


@pytest.mark.parametrize("table", [PLAIN, DIFFERENCE], ids=["plain", "difference"])
def test_lower_precision_is_allowed_more(table: dict[str, Tolerance]) -> None:
    rows = [dataclasses.astuple(table[name])[:2] for name in ("fp32", "fp16", "bf16")]
    assert all(a < b for fine, coarse in itertools.pairwise(rows) for a, b in zip(fine, coarse, strict=True))
    assert table["fp32"].cosine > table["fp16"].cosine > table["bf16"].cosine
