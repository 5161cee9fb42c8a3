"""Reference values in a bundle, and engines that are checked with them when they are loaded."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BackendUnavailableError, BundleError, IntegrityError, ParityError
from diffloss_engine.fp32_precision import fp32_precision
from diffloss_engine.plan_cache import PlanCache
from diffloss_engine.trt_build import FLAVOURS, build_plan
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.contract import GRADIENT, REFERENCE, SEMANTIC_GRADIENT, UNET_CONFIG, UNET_WEIGHTS
from diffloss_trt.inputs import Backward
from diffloss_trt.probe import (
    CHECK_WEIGHTS,
    Probe,
    Result,
    deviations,
    first_beyond,
    held_to,
    record,
    recorded,
    run_evaluator,
)
from diffloss_trt.tolerances import DIFFERENCE, Tolerance, timestep_at
from exports import edit_json, rehash, repoint

Exported = tuple[Path, Any, NoiseSchedule]


@pytest.fixture
def copied(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "copied"))


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / REFERENCE)
    edit(tensors)
    save_file(tensors, folder / REFERENCE)
    rehash(folder)


def leave_out_reference(folder: Path) -> None:
    (folder / REFERENCE).unlink()
    edit_json(folder / "manifest.json", lambda manifest: manifest["files"].pop(REFERENCE))


def test_what_is_recorded_is_the_eager_loss(exported: Exported) -> None:
    folder, unet, schedule = exported
    found = recorded(Bundle.open(folder))
    assert found is not None
    probe, expected = found
    assert expected.keys() == {GRADIENT, SEMANTIC_GRADIENT}
    for graph, result in expected.items():
        loss = DiffLoss.from_unet(
            unet,
            schedule,
            naturalness_weight=float(graph == GRADIENT),
            semantic_weight=1.0,
            value_range=(-1, 1),
            reduction="none",
        )
        restored = probe.restored.clone().requires_grad_()
        terms = loss.terms(restored, probe.target, noise=probe.noise, timesteps=probe.timesteps.long())
        (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
        torch.testing.assert_close(result.gradient, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
        torch.testing.assert_close(result.semantic, terms.semantic, rtol=1e-6, atol=0)
        if graph == GRADIENT:
            torch.testing.assert_close(result.naturalness, terms.naturalness, rtol=1e-6, atol=0)
        else:
            assert result.naturalness is None


def test_an_evaluator_with_a_gradient_of_its_own_is_run_too(exported: Exported) -> None:
    bundle = Bundle.open(exported[0])
    found = recorded(bundle)
    assert found is not None
    probe, expected = found
    evaluator = DiffLoss.load(bundle.path, "onnxruntime", "cpu").evaluator
    for graph, weights in CHECK_WEIGHTS.items():
        result = run_evaluator(evaluator, probe, weights, torch.float32)
        assert first_beyond(result, expected[graph], DIFFERENCE["fp32"]) is None
        assert first_beyond(result, expected[graph], Tolerance(0.0, 0.0, 1.0)) is not None


@pytest.mark.parametrize("weights", [(1e-3, 1e-6), (0.0, 1.0)])
def test_an_engine_that_computes_wrongly_is_not_used(
    weights: tuple[float, float], copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The graphs have one weight in another's place, as a miscompiled engine might."""
    for graph in (GRADIENT, SEMANTIC_GRADIENT):
        repoint(copied / f"{graph}.onnx", "mid_block.resnets.0.conv1.weight")
    rehash(copied)
    settings = {"naturalness_weight": weights[0], "semantic_weight": weights[1], "device": "cpu"}
    name = GRADIENT if weights[0] else SEMANTIC_GRADIENT
    with pytest.raises(ParityError, match=f"onnxruntime on cpu computes the {name} graph wrongly.* is off by"):
        DiffLoss.load(copied, "onnxruntime", **settings)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        loss = DiffLoss.load(copied, "auto", **settings)  # type: ignore[arg-type]
    assert loss.evaluator.backend == "torch"
    (record,) = caplog.records
    assert "torch on cpu; not onnxruntime, because" in record.getMessage()
    assert "wrongly" in record.getMessage()


@pytest.mark.gpu
def test_a_plan_that_computes_something_else_is_not_used(
    exported: Exported, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole bundle, right key, right hash: but the plan was made of a graph with one weight in another's place."""
    monkeypatch.setenv("DIFFLOSS_CACHE", str(tmp_path / "plans"))
    folder, device, flavours = exported[0], torch.device("cuda", torch.cuda.current_device()), []
    for flavour in FLAVOURS:
        with contextlib.suppress(BackendUnavailableError):
            DiffLoss.load(folder, flavour, device)
            flavours.append(flavour)
    if not flavours:
        pytest.skip("no TensorRT runs here")
    altered, cache = copied / f"{GRADIENT}.onnx", PlanCache()
    repoint(altered, "mid_block.resnets.0.conv1.weight")
    for key in cache.list_keys():
        plan = cache.find(key)
        assert plan is not None
        cache.reject(key, plan, "another takes its place")
        cache.get(key, functools.partial(build_plan, altered, flavour=key["flavour"], precision=key["precision"]))
    for flavour in flavours:
        with pytest.raises(ParityError, match=f"{flavour} on {device} computes the {GRADIENT} graph wrongly.* is off"):
            DiffLoss.load(folder, flavour, device)
    caplog.clear()
    loss = DiffLoss.load(folder, "auto", device)
    assert loss.evaluator.backend not in flavours
    (record,) = (record for record in caplog.records if record.getMessage().startswith("backend auto"))
    assert record.levelno == logging.WARNING
    for flavour in flavours:
        assert f"not {flavour}, because: {flavour} on {device} computes the {GRADIENT} graph" in record.getMessage()


def test_one_wrong_value_is_seen(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors[f"{GRADIENT}.naturalness"].mul_(1 + 3e-5))
    with pytest.raises(ParityError, match="naturalness is off by 3e-05, and 1e-05 is allowed"):
        DiffLoss.load(copied, "onnxruntime", "cpu")


def test_values_that_are_no_numbers_are_seen(copied: Path) -> None:
    rewrite(copied, lambda tensors: tensors[f"{GRADIENT}.gradient"][0].fill_(torch.nan))
    with pytest.raises(ParityError, match="gradient is off by inf"):
        DiffLoss.load(copied, "onnxruntime", "cpu")


def test_a_bundle_without_reference_values_is_loaded(copied: Path) -> None:
    leave_out_reference(copied)
    assert recorded(Bundle.open(copied)) is None
    assert DiffLoss.load(copied, "onnxruntime", "cpu").evaluator.backend == "onnxruntime"


@pytest.mark.parametrize(
    "edit",
    [
        lambda tensors: tensors.pop("target"),
        lambda tensors: tensors.pop(f"{GRADIENT}.semantic"),
        lambda tensors: tensors.update(noise=tensors["noise"][:, :, 1:].contiguous()),
        lambda tensors: tensors.update(timesteps=tensors["timesteps"][1:]),
        lambda tensors: tensors.update({name: tensor[:0] for name, tensor in tensors.items()}),
        lambda tensors: tensors.update(target=tensors["target"].sum()),
        lambda tensors: tensors.update(
            {name: tensor[:, :1].contiguous() for name, tensor in tensors.items() if tensor.ndim == 4}
        ),
        lambda tensors: tensors.update(noise=tensors["noise"][:, :1].contiguous()),
        lambda tensors: tensors.update({f"{GRADIENT}.semantic": tensors[f"{GRADIENT}.semantic"][:, None]}),
        lambda tensors: tensors["timesteps"].add_(0.5),
        lambda tensors: tensors["timesteps"].sub_(1),
        lambda tensors: tensors["timesteps"].fill_(1000),
        lambda tensors: tensors["timesteps"].fill_(torch.nan),
    ],
    ids=[
        "no target",
        "no semantic",
        "another size",
        "another count",
        "no images",
        "no image",
        "other channels",
        "one of other channels",
        "terms of two axes",
        "between timesteps",
        "before the first timestep",
        "beyond the last timestep",
        "no timestep",
    ],
)
def test_a_file_that_does_not_fit(edit: Callable[[dict[str, Tensor]], object], copied: Path) -> None:
    rewrite(copied, edit)
    for backward in ("fused", "recompute"):
        with pytest.raises(BundleError, match="does not hold reference values"):
            DiffLoss.load(copied, "onnxruntime", "cpu", backward=backward)


def test_a_file_that_is_no_safetensors_file(copied: Path) -> None:
    (copied / REFERENCE).write_bytes(b"nothing of the kind")
    rehash(copied)
    with pytest.raises(BundleError, match="is not a safetensors file"):
        DiffLoss.load(copied, "onnxruntime", "cpu")


def test_an_altered_file(copied: Path) -> None:
    content = bytearray((copied / REFERENCE).read_bytes())
    content[-1] ^= 1
    (copied / REFERENCE).write_bytes(content)
    with pytest.raises(IntegrityError, match=r"reference\.safetensors was altered"):
        DiffLoss.load(copied, "onnxruntime", "cpu")


def test_record_keeps_what_it_is_given(tmp_path: Path) -> None:
    probe = Probe.make(3, (8, 8), torch.tensor([0, 5]), [20.0, 50.0])
    result = Result(None, torch.rand(2, dtype=torch.float64), torch.rand(2, 3, 8, 8, dtype=torch.float64))
    record(tmp_path / REFERENCE, probe, {SEMANTIC_GRADIENT: result})
    tensors = load_file(tmp_path / REFERENCE)
    assert torch.equal(tensors["restored"].double(), probe.restored)
    assert torch.equal(tensors[f"{SEMANTIC_GRADIENT}.semantic"], result.semantic.float())
    assert f"{SEMANTIC_GRADIENT}.naturalness" not in tensors


def test_deviations_are_of_the_worst_sample() -> None:
    expected = Result(torch.ones(3), torch.tensor([1.0, 2.0, 0.0]), torch.ones(3, 1, 2, 2))
    found = Result(torch.ones(3), torch.tensor([1.0, 2.2, 0.0]), torch.ones(3, 1, 2, 2))
    found.gradient[1] = -1
    errors = {row.quantity: row.error for row in deviations(found, expected, DIFFERENCE["fp32"])}
    assert errors["semantic"] == pytest.approx(0.1)
    assert errors["naturalness"] == 0
    assert errors["gradient"] == pytest.approx(2)
    assert errors["1 - cosine of gradient"] == pytest.approx(2)


def damage_header(folder: Path) -> None:
    path = folder / UNET_WEIGHTS
    content = bytearray(path.read_bytes())
    content[20] = 0
    path.write_bytes(content)


def zero_a_weight(folder: Path) -> None:
    weights = load_file(folder / UNET_WEIGHTS)
    weights["up_blocks.0.resnets.0.conv1.weight"].zero_()
    save_file(weights, folder / UNET_WEIGHTS)


def configure(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / UNET_CONFIG, lambda config: config.update(changes))


@pytest.mark.parametrize(
    ("alter", "way", "error", "message"),
    [
        (configure(norm_eps=0.1), ("onnxruntime", "recompute"), ParityError, "gradient is off by"),
        (configure(center_input_sample=True), ("torch", "fused"), ParityError, "is off by"),
        (configure(mid_block_scale_factor=2), ("torch", "recompute"), ParityError, "is off by"),
        (configure(mid_block_scale_factor="x"), ("torch", "recompute"), BundleError, "UNet cannot be run"),
        (configure(freq_shift="x"), ("onnxruntime", "recompute"), BundleError, "UNet cannot be run"),
        (configure(in_channels=0), ("onnxruntime", "fused"), BundleError, "in_channels is 0, expected at least 1"),
        (configure(in_channels=None), ("torch", "fused"), BundleError, "in_channels is null, expected"),
        (configure(layers_per_block=10**100), ("torch", "recompute"), BundleError, "layers_per_block is 1000"),
        (
            configure(up_block_types=["AttnUpBlock2D", 3]),
            ("torch", "fused"),
            BundleError,
            "do not fit its configuration",
        ),
        (damage_header, ("torch", "fused"), BundleError, "is not a safetensors file"),
        (zero_a_weight, ("torch", "recompute"), ParityError, "naturalness is off by"),
        (
            lambda folder: repoint(folder / "encoder.onnx", "mid_block.resnets.0.conv1.weight"),
            ("onnxruntime", "recompute"),
            ParityError,
            "semantic is off by",
        ),
    ],
)
def test_what_altered_bundles_were_once_taken_for(
    copied: Path, alter: Callable[[Path], None], way: tuple[str, Backward], error: type[Exception], message: str
) -> None:
    """With hashes that fit, as somebody would alter them on purpose; found by `tests/fuzz/run.py`."""
    alter(copied)
    rehash(copied)
    with pytest.raises(error, match=message):
        DiffLoss.load(copied, way[0], "cpu", backward=way[1])


@pytest.mark.parametrize(
    ("device", "backend", "backward", "precision", "held"),
    [
        ("cpu", "onnxruntime", "fused", "fp32", "fp32"),
        ("cpu", "torch", "fused", "bf16", "fp32"),
        ("cpu", "inductor", "fused", "bf16", "bf16"),
        ("cuda", "tensorrt", "fused", "fp32", "fp32"),
        ("cuda", "tensorrt", "recompute", "fp32", "fp16"),
        ("cuda", "inductor", "fused", "fp32", "fp16"),
        ("cuda", "torch", "recompute", "bf16", "bf16"),
    ],
)
def test_tf32_is_allowed_for_where_pytorch_multiplies(
    device: str, backend: str, backward: str, precision: str, held: str
) -> None:
    runs: Any = SimpleNamespace(device=torch.device(device), backend=backend, backward=backward)
    bundle: Any = SimpleNamespace(precision=precision)
    assert held_to(runs, bundle) == held


@pytest.mark.parametrize(
    ("backend", "backward", "precision", "held"),
    [
        ("torch", "fused", "fp32", ("fp32", "fp16", "bf16")),
        ("torch", "recompute", "fp16", ("fp32", "fp16", "bf16")),
        ("inductor", "fused", "fp32", ("fp32", "fp16", "bf16")),
        ("inductor", "fused", "fp16", ("fp16", "fp16", "bf16")),
        ("inductor", "fused", "bf16", ("bf16", "bf16", "bf16")),
        ("onnxruntime", "recompute", "fp32", ("fp32", "fp16", "bf16")),
        ("onnxruntime", "fused", "fp32", ("fp32", "fp32", "fp32")),
    ],
)
@pytest.mark.parametrize("operation", ["matmul", "conv"])
def test_what_a_trainer_lets_pytorch_round_on_a_cpu_is_allowed_for(
    backend: str, backward: str, precision: str, held: tuple[str, ...], operation: str
) -> None:
    """As `torch.set_float32_matmul_precision` allows it for matrix products; afterwards everything is as it was."""
    runs: Any = SimpleNamespace(device=torch.device("cpu"), backend=backend, backward=backward)
    bundle: Any = SimpleNamespace(precision=precision)
    setting = getattr(torch.backends.mkldnn, operation)
    found = []
    with fp32_precision("ieee"):
        assert held_to(runs, bundle) == held[0]
        for allowed in ("tf32", "bf16"):
            setting.fp32_precision = allowed
            found.append(held_to(runs, bundle))
    assert tuple(found) == held[1:]


def test_only_the_first_place_is_the_first_timestep_however_short_the_schedule() -> None:
    assert [timestep_at(place, 1000) for place in (0.0, 0.01, 0.1, 0.5, 1.0)] == [0, 10, 100, 500, 999]
    assert [timestep_at(place, 25) for place in (0.0, 0.01, 0.1, 0.5, 1.0)] == [0, 1, 2, 12, 24]
    assert [timestep_at(place, 1) for place in (0.0, 0.01, 1.0)] == [0, 0, 0]
