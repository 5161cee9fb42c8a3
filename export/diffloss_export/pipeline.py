"""Model -> bundle: the steps of an export, in order."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffloss_engine.bundle import Bundle, Graph, file_sha256
from diffloss_engine.bundle_writer import BundleWriter
from diffloss_engine.errors import InputError, ModelError
from diffloss_engine.manifest import LARGEST_BATCH, LONGEST_SIDE
from diffloss_engine.ort_session import import_runtime
from diffloss_engine.tensor_files import save_tensors
from diffloss_export.onnx_write import WeightFile, write_graph
from diffloss_export.programs import blank_feature_programs, trace
from diffloss_export.reference import Reference
from diffloss_export.verify import Report, verify_bundle
from diffloss_trt.contract import (
    GRADIENT,
    PRECISIONS,
    REFERENCE,
    SCHEDULE,
    SEMANTIC_GRADIENT,
    UNET_CONFIG,
    UNET_WEIGHTS,
)
from diffloss_trt.gradient import trace_gradient
from diffloss_trt.probe import record
from diffloss_trt.unet import TappedUNet
from diffloss_trt.unet_config import describe_unet

if TYPE_CHECKING:
    from diffloss_export.models import LoadedModel

Stage = Callable[[str], None]

# Such a UNet predicts nearly what it is given, so that noise is a difference of near-equals.
_SAMPLE_NOTE = (
    "of a UNet that predicts the sample, the gradient of smooth differences is less exact in {precision} at small "
    "timesteps (docs/models.md); fp32 is not affected"
)


def export_bundle(
    model: LoadedModel,
    destination: str | PathLike[str],
    *,
    resolution: tuple[int, int] | None = None,
    batch_size: int = 8,
    precision: str = "fp32",
    gradient: bool = True,
    overwrite: bool = False,
    on_stage: Stage = lambda _: None,
) -> tuple[Bundle, Report]:
    """Write the bundle of `model`, replay its graphs against eager PyTorch, and return it with the differences found.

    Nothing appears at `destination` before everything has been checked. The model is converted in place.

    Args:
        model: what `load_model` returned.
        destination: a folder that does not exist yet, or, with `overwrite`, an older bundle.
        resolution: height and width of the images; by default the UNet's own sample size.
        batch_size: how many images the graphs take at once.
        precision: "fp32", "fp16" or "bf16", of weights and activations.
        gradient: whether to write the gradient graphs, without which `backward="fused"` is not possible.
        on_stage: called with the name of each step as it begins.

    Raises:
        InputError: an argument cannot be used.
        BackendUnavailableError: there is no ONNX Runtime to replay the graphs with.
        ModelError: the model cannot be expressed in ONNX.
        ParityError: a graph does not compute what eager PyTorch does.
    """
    check_request(batch_size, precision)
    activation = model.unet.config.act_fn
    if activation not in ("silu", "swish"):
        raise ModelError(f"the UNet has act_fn {activation!r}; expected 'silu', the only one that can be exported")
    tapped = TappedUNet(model.unet, model.schedule)
    resolution = check_resolution(tapped, resolution)
    with BundleWriter(destination, overwrite=overwrite) as writer:
        on_stage("writing the UNet")
        # Weights beyond fp16's range would become infinite; checked before anything is built on them.
        tapped.to(PRECISIONS[precision])
        _check_finite(tapped, precision)
        unet = write_unet(tapped, writer.path)
        graphs = write_graphs(tapped, writer.path, batch_size, resolution, gradient=gradient, on_stage=on_stage)
        on_stage("widening the UNet to float64")
        reference = Reference.of_unet(tapped, resolution)
        _record(reference, writer.path / REFERENCE, on_stage)
        reports: list[Report] = []

        def check(bundle: Bundle) -> None:
            reports.append(verify_bundle(bundle, device="cpu", reference=reference, on_stage=on_stage))
            if model.schedule.prediction_type == "sample" and precision != "fp32":
                reports[0].notes.append(_SAMPLE_NOTE.format(precision=precision))
            reports[0].raise_for_failure()

        bundle = writer.commit(
            unet=unet,
            resolution=resolution,
            batch_size=batch_size,
            precision=precision,
            graphs=graphs,
            check=check,
        )
    return bundle, reports[0]


def check_request(batch_size: int, precision: str) -> None:
    """Raise, as `export_bundle` does, what is to be known before a model is fetched or read."""
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
    if not 1 <= batch_size <= LARGEST_BATCH:
        raise InputError(f"batch size is {batch_size}; expected 1 to {LARGEST_BATCH}")
    import_runtime()


def write_graphs(
    tapped: TappedUNet,
    folder: Path,
    batch_size: int,
    resolution: tuple[int, int],
    *,
    gradient: bool = True,
    on_stage: Stage = lambda _: None,
) -> list[Graph]:
    """Write the UNet's graphs beside its weights, which `folder` has already; with those of the gradient if asked."""
    programs = {
        program.name: functools.partial(trace, program)
        for program in blank_feature_programs(tapped, batch_size, resolution)
    }
    for name in (GRADIENT, SEMANTIC_GRADIENT) if gradient else ():
        programs[name] = functools.partial(trace_gradient, tapped, batch_size, resolution, with_noise=name == GRADIENT)
    weights = WeightFile.read(folder, UNET_WEIGHTS)
    graphs = []
    for name, make in programs.items():
        on_stage(f"exporting the {name} graph")
        graphs.append(write_graph(make(), weights))
    return graphs


def check_resolution(tapped: TappedUNet, resolution: tuple[int, int] | None) -> tuple[int, int]:
    """Return the resolution to export at.

    Raises InputError if the UNet cannot take it, ModelError if the UNet's own is none.
    """
    if resolution is None:
        size = tapped.unet.config.sample_size
        if size is None:
            raise InputError("the UNet's configuration has no sample_size: a resolution (--resolution) must be given")
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or any(type(side) is not int or not 1 <= side <= LONGEST_SIDE for side in sides):
            raise ModelError(
                f"the UNet's configuration has sample_size {size!r}; "
                f"expected one or two integers from 1 to {LONGEST_SIDE}"
            )
        resolution = sides[0], sides[1]
    multiple = tapped.resolution_multiple
    if any(not 1 <= side <= LONGEST_SIDE or side % multiple for side in resolution):
        raise InputError(
            f"resolution is {resolution[0]}x{resolution[1]}; "
            f"this UNet takes heights and widths that are multiples of {multiple}, up to {LONGEST_SIDE}"
        )
    return resolution


def _check_finite(tapped: TappedUNet, precision: str) -> None:
    for key, weight in tapped.unet.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"weight {key} is beyond the range of {precision}; use bf16 or fp32")


def _record(reference: Reference, path: Path, on_stage: Stage) -> None:
    """Write what a backend is checked against when it is loaded: a few samples, since that is done often."""
    reference.compute(on_stage)
    rows = range(len(reference.places))[:3]
    record(path, reference.probe.part(rows), {name: result.part(rows) for name, result in reference.expected.items()})


def write_unet(tapped: TappedUNet, folder: Path) -> dict[str, Any]:
    """Write the UNet and its schedule into a bundle's folder, and return what the manifest says of it."""
    files: dict[str, Any] = {UNET_CONFIG: describe_unet(tapped.unet), SCHEDULE: tapped.schedule.to_json()}
    for relative, content in files.items():
        path = folder / relative
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_tensors(tapped.unet.state_dict(), folder / UNET_WEIGHTS)
    return {
        "class": type(tapped.unet).__name__,
        "parameters": sum(parameter.numel() for parameter in tapped.unet.parameters()),
        "sha256": file_sha256(folder / UNET_WEIGHTS),
        "prediction_type": tapped.schedule.prediction_type,
        "timesteps": len(tapped.schedule),
    }
