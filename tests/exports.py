"""Small models to export, and ways to alter a bundle so that it still opens."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import onnx
import torch
from diffusers import DDPMScheduler

from diffloss_engine.bundle import MANIFEST, Bundle, file_sha256
from diffloss_export.models import LoadedModel
from diffloss_export.pipeline import export_bundle
from diffloss_export.verify import Report
from diffloss_trt import DiffLoss
from diffloss_trt.contract import GRADIENT, SEMANTIC_GRADIENT
from diffloss_trt.evaluators import Evaluator
from diffloss_trt.inputs import Backward
from diffloss_trt.schedule import NoiseSchedule
from unets import make_unet

# The fixture of that name.
Once = Callable[[str, Callable[[Path], Any]], Any]


def make_schedule(prediction_type: str = "epsilon") -> NoiseSchedule:
    """Return the linear schedule of 1000 steps that the paper's prior was trained with, as diffusers computes it."""
    return NoiseSchedule.from_scheduler(DDPMScheduler(prediction_type=prediction_type))


def make_model(kind: str = "one_level", prediction_type: str = "epsilon", **changes: Any) -> LoadedModel:
    """Return what `load_model` would; the exporter converts it in place, so each export needs a new one."""
    unet = make_unet(kind, dtype=torch.float32, **changes)
    return LoadedModel(unet, make_schedule(prediction_type), kind, ())


@dataclass(frozen=True)
class Exported:
    """A bundle that must not be altered, because tests share it, and what its export reported."""

    bundle: Bundle
    report: Report
    stages: tuple[str, ...]

    @classmethod
    def of(
        cls,
        once: Once,
        kind: str = "one_level",
        precision: str = "fp32",
        prediction_type: str = "epsilon",
        resolution: tuple[int, int] | None = None,
    ) -> Self:
        """Return the bundle of batch 2 of a small model, exported once for all tests; `once` is the fixture."""

        def make(folder: Path) -> Exported:
            stages: list[str] = []
            bundle, report = export_bundle(
                make_model(kind, prediction_type),
                folder / "bundle",
                resolution=resolution,
                batch_size=2,
                precision=precision,
                on_stage=stages.append,
            )
            return cls(bundle, report, tuple(stages))

        size = "x".join(map(str, resolution or ()))
        found: Self = once(f"exported-{kind}-{precision}-{prediction_type}-{size}", make)
        return found


@functools.cache
def shared_evaluator(folder: Path, backend: str = "onnxruntime", backward: Backward = "fused") -> Evaluator:
    """Return what computes a bundle's loss, opened once for all tests of a process: PyTorch's is traced for seconds.

    A `DiffLoss` of it has settings and draws of its own. Whoever puts something else into it puts back what was there.
    """
    return DiffLoss.load(folder, backend, "cpu", backward=backward).evaluator


def rehash(folder: Path) -> None:
    """Make the manifest fit the files again, as somebody would who alters a bundle on purpose."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    for relative, entry in manifest["files"].items():
        entry["sha256"], entry["bytes"] = file_sha256(folder / relative), (folder / relative).stat().st_size
    for graph in manifest["graphs"].values():
        graph["sha256"] = manifest["files"][graph["file"]]["sha256"]
    path.write_text(json.dumps(manifest))


def edit_json(path: Path, edit: Callable[[Any], object]) -> None:
    """Apply `edit` to the content of a JSON file, in place."""
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def read_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file without the weights that lie elsewhere."""
    return onnx.load(path, load_external_data=False)


def external_entries(tensor: onnx.TensorProto) -> dict[str, str]:
    """Return location, offset and length of an initializer; empty if its data is in the graph's own file."""
    return {entry.key: entry.value for entry in tensor.external_data}


def without_gradient(folder: Path, copy_to: Path) -> Path:
    """Return a copy of a bundle as an export with --no-gradient writes it."""
    shutil.copytree(folder, copy_to)
    for name in (GRADIENT, SEMANTIC_GRADIENT):
        (copy_to / f"{name}.onnx").unlink()

    def forget(manifest: dict[str, dict[str, object]]) -> None:
        for name in (GRADIENT, SEMANTIC_GRADIENT):
            del manifest["graphs"][name], manifest["files"][f"{name}.onnx"]

    edit_json(copy_to / MANIFEST, forget)
    return copy_to


def repoint(graph_file: Path, find: str) -> None:
    """Let the first weight whose name contains `find` be read from the place of another one of the same shape."""
    model = read_graph(graph_file)
    weight = next(tensor for tensor in model.graph.initializer if find in tensor.name)
    other = next(
        tensor
        for tensor in model.graph.initializer
        if tensor.name != weight.name and tensor.dims == weight.dims and tensor.external_data
    )
    del weight.external_data[:]
    weight.external_data.extend(other.external_data)
    graph_file.write_bytes(model.SerializeToString())
