"""The ONNX files: every weight is in the safetensors file and nowhere else, and nothing of the machine is in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import ModelError
from diffloss_engine.session import open_session
from diffloss_export.aten_onnx import OPSET
from diffloss_export.onnx_write import WeightFile
from diffloss_export.programs import Program, feature_programs, trace
from diffloss_trt.contract import (
    ENCODER,
    GRADIENT,
    NOISE_HEAD,
    PRECISIONS,
    SCHEDULE,
    SEMANTIC_GRADIENT,
    UNET_WEIGHTS,
)
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import TappedUNet, reload_unet
from exports import Exported, external_entries, read_graph, rehash

SHARED = [
    pytest.param("two_levels", "fp32", marks=pytest.mark.slow),
    ("one_level", "fp16"),
    pytest.param("two_levels", "bf16", marks=pytest.mark.slow),
    pytest.param("adm", "fp32", marks=pytest.mark.slow),
]
GRAPHS = (ENCODER, NOISE_HEAD, GRADIENT, SEMANTIC_GRADIENT)


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def inline_bytes(tensor: TensorProto) -> bytes:
    return tensor.raw_data or numpy_helper.to_array(tensor).tobytes()


@pytest.mark.parametrize(("kind", "precision"), SHARED)
def test_weights_are_stored_once(exported: Callable[..., Exported], kind: str, precision: str) -> None:
    bundle = exported(kind, precision).bundle
    weights = load_file(bundle.path / UNET_WEIGHTS)
    forms = {as_bytes(weight) for weight in weights.values()}
    forms |= {as_bytes(weight.T) for weight in weights.values() if weight.ndim == 2}
    sizes = [entry.bytes for path, entry in bundle.files.items() if path.endswith(".onnx")]
    assert len(sizes) == 4
    assert sum(sizes) < 1_200_000
    used: set[int] = set()
    for name in GRAPHS:
        assert bundle.graphs[name].weights == (UNET_WEIGHTS,)
        graph = read_graph(bundle.path / bundle.graphs[name].file).graph
        constants = [attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t")]
        for tensor in [*graph.initializer, *constants]:
            if tensor.data_location == TensorProto.EXTERNAL:
                entries = external_entries(tensor)
                assert entries["location"] == UNET_WEIGHTS
                used.add(int(entries["offset"]))
            else:
                content = inline_bytes(tensor)
                assert len(content) <= 4000  # the schedule's tables
                assert len(content) <= 64 or content not in forms, tensor.name
    # Every weight of the UNet is read by one graph or the other: none was folded into something else.
    assert len(used) == len(weights)


def test_external_data_lies_where_the_weight_of_that_name_lies(exported: Callable[..., Exported]) -> None:
    bundle = exported().bundle
    weights = load_file(bundle.path / UNET_WEIGHTS)
    content = (bundle.path / UNET_WEIGHTS).read_bytes()
    for name in GRAPHS:
        for tensor in read_graph(bundle.path / bundle.graphs[name].file).graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                weight = weights[tensor.name]
                entries = external_entries(tensor)
                start, length = int(entries["offset"]), int(entries["length"])
                assert tuple(tensor.dims) == tuple(weight.shape)
                assert content[start : start + length] == as_bytes(weight)


@pytest.mark.parametrize(
    ("graph", "key"),
    [
        (ENCODER, "conv_in.weight"),
        (ENCODER, "time_embedding.linear_1.weight"),
        (ENCODER, "mid_block.attentions.0.to_q.weight"),
        (NOISE_HEAD, "up_blocks.0.resnets.0.norm1.weight"),
        (NOISE_HEAD, "up_blocks.0.resnets.1.time_emb_proj.weight"),
    ],
)
def test_weights_are_read_from_the_safetensors_file(copied: Callable[..., Path], graph: str, key: str) -> None:
    folder = copied()

    def run() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the graph's outputs, and what the UNet in the bundle gives."""
        bundle = Bundle.open(folder)
        schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
        tapped = TappedUNet(reload_unet(bundle, torch.float32, torch.device("cpu")), schedule)
        noisy = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        program = next(p for p in feature_programs(tapped, noisy, torch.tensor([3.0, 700.0])) if p.name == graph)
        entry = bundle.graphs[graph]
        session = open_session(
            bundle.graph_file(graph), entry.inputs, entry.outputs, backend="onnxruntime", device=torch.device("cpu")
        )
        with torch.no_grad():
            expected = dict(zip(program.outputs, program.module(*program.inputs.values()), strict=True))
        return session(program.inputs), expected

    before, _ = run()
    weights = load_file(folder / UNET_WEIGHTS)
    weights[key] = weights[key].flip(0) * 1.5
    save_file(weights, folder / UNET_WEIGHTS)
    rehash(folder)
    after, expected = run()
    output = next(iter(expected)) if graph == NOISE_HEAD or "time" not in key else "time_embedding"
    assert not torch.allclose(before[output], after[output], rtol=1e-2, atol=1e-2)
    for name, value in expected.items():
        assert torch.allclose(after[name], value, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize(("kind", "precision"), SHARED)
def test_files_hold_no_annotations(exported: Callable[..., Exported], kind: str, precision: str) -> None:
    bundle = exported(kind, precision).bundle
    for graph in bundle.graphs.values():
        model = read_graph(bundle.path / graph.file)
        values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
        annotated = [model, model.graph, *model.graph.node, *model.graph.initializer, *values]
        assert not any(item.metadata_props for item in annotated)
        assert not any(item.doc_string for item in annotated)
        assert model.graph.name == "main"
        assert {opset.domain: opset.version for opset in model.opset_import}[""] == OPSET
        assert graph.nodes == len(model.graph.node)
        assert [value.name for value in model.graph.input] == [spec.name for spec in graph.inputs]
        assert [value.name for value in model.graph.output] == [spec.name for spec in graph.outputs]


@pytest.mark.parametrize(("kind", "precision"), SHARED)
def test_nothing_that_onnx_runtime_does_badly_on_a_gpu(
    exported: Callable[..., Exported], kind: str, precision: str
) -> None:
    """In 1.31 its CUDA provider has no such norm at this opset, no bfloat16 resize, and leaks in unequal splits."""
    bundle = exported(kind, precision).bundle
    for graph in bundle.graphs.values():
        kinds = {node.op_type for node in read_graph(bundle.path / graph.file).graph.node}
        assert "Conv" in kinds
        assert not kinds & {"InstanceNormalization", "Resize", "Split"}


@pytest.mark.parametrize(("kind", "precision"), SHARED)
def test_files_are_valid_onnx(exported: Callable[..., Exported], kind: str, precision: str) -> None:
    bundle = exported(kind, precision).bundle
    for name in GRAPHS:
        onnx.checker.check_model(bundle.graph_file(name), full_check=True)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_convolutions_compute_in_the_bundles_precision(exported: Callable[..., Exported], precision: str) -> None:
    """An export that silently widened everything would pass every comparison with float64."""
    bundle = exported(precision=precision).bundle
    wanted = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    for name in GRAPHS:
        graph = read_graph(bundle.path / bundle.graphs[name].file).graph
        types = {tensor.name: tensor.data_type for tensor in graph.initializer}
        makers = {output: node for node in graph.node for output in node.output}

        def dtype(kernel: str, makers: dict[str, NodeProto] = makers, types: dict[str, int] = types) -> int:
            """Follow what flips, doubles or sums a kernel, to the weight or to the last conversion."""
            while kernel in makers:
                node = makers[kernel]
                if node.op_type == "Cast":
                    return int(node.attribute[0].i)
                assert node.op_type in ("Concat", "Reshape", "Transpose", "Slice", "Pad")
                kernel = node.input[0]
            return types[kernel]

        kernels = [node.input[1] for node in graph.node if node.op_type == "Conv"]
        # The first convolution, of value and difference, is in float32 in the gradient graphs.
        first = [kernel for kernel in kernels if kernel in makers and list(makers[kernel].input) == ["conv_in.weight"]]
        assert len([kernel for kernel in first if dtype(kernel) == TensorProto.FLOAT]) == 2 * (
            name in (GRADIENT, SEMANTIC_GRADIENT)
        )
        kernels = [kernel for kernel in kernels if kernel not in first]
        assert kernels
        assert {dtype(kernel) for kernel in kernels} == {wanted}


def test_what_has_fewer_operations_before_it_comes_first(exported: Callable[..., Exported]) -> None:
    """What the backward pass computes once more of the forward pass lies before all that it waits for."""
    bundle = exported().bundle
    for name in bundle.graphs:
        graph = read_graph(bundle.graph_file(name)).graph
        depth = {"": 0} | {value.name: 0 for value in (*graph.input, *graph.initializer)}
        found = []
        for node in graph.node:
            found.append(1 + max((depth[value] for value in node.input), default=0))  # each is there already
            depth |= dict.fromkeys(node.output, found[-1])
        assert found == sorted(found)
        assert max(found) > 50


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=str)
def test_weight_file_knows_where_each_tensor_lies(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b": torch.randn(3, 5).to(dtype),
        "a.weight": torch.randn(7, 2, 1).to(dtype),
        "a.bias": torch.randn(1).to(dtype),
        "scalar": torch.tensor(2.5, dtype=torch.float32),
    }
    (tmp_path / "unet").mkdir()
    save_file(tensors, tmp_path / "unet" / "w.safetensors")
    weights = WeightFile.read(tmp_path, "unet/w.safetensors")
    content = (tmp_path / "unet" / "w.safetensors").read_bytes()
    assert weights.spans.keys() == tensors.keys()
    for key, (offset, length) in weights.spans.items():
        assert content[offset : offset + length] == as_bytes(tensors[key].reshape(-1))
        assert (weights.tensors[key].shape, weights.tensors[key].dtype) == (tensors[key].shape, tensors[key].dtype)
    assert sum(length for _, length in weights.spans.values()) == len(content) - min(
        offset for offset, _ in weights.spans.values()
    )


def test_program_that_depends_on_values_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x + 1 if x.sum() > 0 else x - 1,)

    program = Program("branches", Branches(), {"x": torch.ones(2)}, ("y",))
    with pytest.raises(ModelError, match=r"^the branches graph cannot be traced: \S.*$") as raised:
        trace(program)
    assert "\n" not in str(raised.value)
