"""A bfloat16 graph in float32: the same structure and the same, rounded, weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from onnx import TensorProto

from diffloss_engine.bundle import Bundle
from diffloss_engine.session import open_session
from diffloss_engine.tensors import TensorSpec
from diffloss_export.programs import feature_programs
from diffloss_export.widened import widened_specs, write_widened
from diffloss_trt.contract import ENCODER, GRADIENT, NOISE_HEAD, SCHEDULE, SEMANTIC_GRADIENT
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import TappedUNet
from exports import Exported, read_graph
from unets import make_unet

CPU = torch.device("cpu")


def worst_error(bundle: Bundle, unet: UNet2DModel, scratch: Path) -> float:
    """Return max |a - b| / max |b| over the outputs of both widened graphs, b being those of `unet`."""
    schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
    noisy = torch.randn(2, 3, *bundle.resolution)
    errors = []
    for program in feature_programs(TappedUNet(unet, schedule), noisy, torch.tensor([7.0, 650.0])):
        graph = bundle.graphs[program.name]
        write_widened(bundle.graph_file(program.name), scratch / graph.file)
        session = open_session(
            scratch / graph.file,
            widened_specs(graph.inputs),
            widened_specs(graph.outputs),
            backend="onnxruntime",
            device=CPU,
        )
        found = session(program.inputs)
        with torch.no_grad():
            expected = program.module(*program.inputs.values())
        for name, value in zip(program.outputs, expected, strict=True):
            errors.append(float((found[name] - value).abs().max() / value.abs().max()))
    return max(errors)


def rounded(unet: UNet2DModel) -> UNet2DModel:
    for parameter in unet.parameters():
        parameter.data = parameter.bfloat16().float()
    return unet


@pytest.mark.parametrize("kind", ["one_level", pytest.param("four_levels", marks=pytest.mark.slow)])
def test_widened_graphs_are_the_float32_unet_with_rounded_weights(
    exported: Callable[..., Exported], tmp_path: Path, kind: str
) -> None:
    """Not the scale of attention: PyTorch multiplies by 1 / sqrt(d) in float32, and bfloat16 has three digits of it."""
    bundle = exported(kind, "bf16").bundle
    assert worst_error(bundle, rounded(make_unet(kind, dtype=torch.float32)), tmp_path) < 1e-5
    # What rounding the weights makes, and the comparison must see.
    assert worst_error(bundle, make_unet(kind, dtype=torch.float32), tmp_path) > 1e-3


@pytest.mark.parametrize("name", [ENCODER, NOISE_HEAD, GRADIENT, SEMANTIC_GRADIENT])
def test_nothing_stays_narrow_and_the_original_stays_as_it_was(
    exported: Callable[..., Exported], tmp_path: Path, name: str
) -> None:
    bundle = exported(precision="bf16").bundle
    source = bundle.path / f"{name}.onnx"
    before = source.read_bytes()
    write_widened(source, tmp_path / f"{name}.onnx")
    assert source.read_bytes() == before
    narrow, wide = read_graph(source).graph, read_graph(tmp_path / f"{name}.onnx").graph
    assert [node.op_type for node in wide.node] == [node.op_type for node in narrow.node]
    values = [*wide.input, *wide.output, *wide.value_info]
    types = {value.type.tensor_type.elem_type for value in values} | {t.data_type for t in wide.initializer}
    types |= {a.i for node in wide.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"}
    assert TensorProto.BFLOAT16 not in types
    assert TensorProto.BFLOAT16 in {tensor.data_type for tensor in narrow.initializer}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.onnx", f"{name}.weights"}


def test_specs_are_widened_where_they_are_narrow() -> None:
    narrow = TensorSpec("a", "bfloat16", (2, 3))
    others = (TensorSpec("b", "float32", (1,)), TensorSpec("c", "float16", (4,)), TensorSpec("d", "int64", ()))
    assert widened_specs((narrow, *others)) == (TensorSpec("a", "float32", (2, 3)), *others)
