"""Small ONNX graphs with their weights in a file of their own, and bundles made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from diffloss_engine.bundle import Bundle, Graph, file_sha256
from diffloss_engine.bundle_writer import BundleWriter
from diffloss_engine.tensors import DTYPES, TensorSpec

SHAPE = (2, 3, 8, 8)


def external(name: str, dtype: str, shape: tuple[int, ...], location: str, **entries: int | str) -> TensorProto:
    """An initializer whose bytes lie elsewhere; `entries` are offset and length."""
    tensor = TensorProto(name=name, data_type=DTYPES[dtype].onnx, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[TensorSpec],
    outputs: list[TensorSpec],
    initializers: list[TensorProto] | None = None,
    weights: tuple[str, ...] = (),
) -> Graph:
    """Write an ONNX file and describe it."""

    def values(specs: list[TensorSpec]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype].onnx, spec.shape) for spec in specs]

    graph = helper.make_graph(nodes, path.stem, values(inputs), values(outputs), initializers or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return Graph(path.stem, path.name, file_sha256(path), len(nodes), tuple(inputs), tuple(outputs), weights)


@pytest.fixture(scope="session")
def save_graph() -> Callable[..., Graph]:
    """`save`: path, nodes, inputs, outputs, initializers=None, weights=() -> Graph."""
    return save


@pytest.fixture(scope="session")
def external_tensor() -> Callable[..., TensorProto]:
    """`external`: name, dtype, shape, location, **entries -> TensorProto."""
    return external


@pytest.fixture
def kernel(seed: int) -> tuple[Tensor, Tensor]:
    """Weight [3, 3, 3, 3] and bias [3] of the graph that `save_conv` writes, in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 3, 3, generator=generator) / 5, torch.randn(3, generator=generator)


@pytest.fixture
def save_conv(kernel: tuple[Tensor, Tensor]) -> Callable[[Path, str], Graph]:
    """(folder, dtype) -> Graph "conv": features = convolution of image [2, 3, 8, 8]; scaled = features * gain [1]."""

    def save_conv(folder: Path, dtype: str) -> Graph:
        content = b""
        initializers = []
        for name, tensor in zip(("weight", "bias"), kernel, strict=True):
            data = tensor.to(DTYPES[dtype].torch).view(torch.uint8).numpy().tobytes()
            initializers.append(
                external(name, dtype, tuple(tensor.shape), "conv.weights", offset=len(content), length=len(data))
            )
            content += data
        (folder / "conv.weights").write_bytes(content)
        return save(
            folder / "conv.onnx",
            [
                helper.make_node("Conv", ["image", "weight", "bias"], ["features"], pads=[1, 1, 1, 1]),
                helper.make_node("Mul", ["features", "gain"], ["scaled"]),
            ],
            [TensorSpec("image", dtype, SHAPE), TensorSpec("gain", dtype, (1,))],
            [TensorSpec("features", dtype, SHAPE), TensorSpec("scaled", dtype, SHAPE)],
            initializers,
            weights=("conv.weights",),
        )

    return save_conv


@pytest.fixture
def write_bundle(save_conv: Callable[[Path, str], Graph]) -> Callable[..., Bundle]:
    """(destination, overwrite=False) -> Bundle with the convolution and a nested configuration file."""

    def write_bundle(destination: Path, *, overwrite: bool = False) -> Bundle:
        with BundleWriter(destination, overwrite=overwrite) as writer:
            graph = save_conv(writer.path, "float32")
            (writer.path / "unet").mkdir()
            (writer.path / "unet" / "config.json").write_text('{"layers": 2}')
            return writer.commit(
                unet={"class": "UNet2DModel", "parameters": 84, "sha256": "0" * 64, "config": {"layers": 2}},
                resolution=(8, 8),
                batch_size=2,
                precision="fp32",
                graphs=[graph],
            )

    return write_bundle


@pytest.fixture
def bundle(tmp_path: Path, write_bundle: Callable[..., Bundle]) -> Bundle:
    return write_bundle(tmp_path / "bundle")
