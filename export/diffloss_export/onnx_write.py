"""A traced program as an ONNX file whose weights stay in the UNet's own safetensors file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffloss_engine.bundle import Graph, file_sha256
from diffloss_engine.errors import ModelError
from diffloss_engine.tensors import TensorSpec
from diffloss_export.programs import Program

# The first opset in which convolutions take bfloat16.
OPSET = 22

# Constants smaller than this are not worth an attempt to find them among the weights.
_LEAST_SHARED_BYTES = 1024


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file of a bundle: where in it each of the UNet's tensors lies."""

    folder: Path
    relative: str
    tensors: Mapping[str, Tensor]
    spans: Mapping[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: Path, relative: str) -> WeightFile:
        """Index `folder / relative`."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        path = folder / relative
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        with safe_open(path, "pt") as file:
            offsets = file.offset_keys()
        tensors = load_file(path)
        spans, place = {}, start
        for key in offsets:  # in the order of the file, which has no gaps
            spans[key] = (place, tensors[key].nbytes)
            place += tensors[key].nbytes
        return cls(folder, relative, tensors, spans)


def write_graph(program: Program, weights: WeightFile) -> Graph:
    """Export `program` to `<name>.onnx` in the bundle's folder; return its entry for the manifest.

    Every weight of the UNet is referred to in the safetensors file. Raises `ModelError` if the exporter
    cannot express the program in ONNX.
    """
    import onnx_ir as ir

    path = weights.folder / f"{program.name}.onnx"
    with _quiet_exporter():
        try:
            exported = torch.onnx.export(
                program.module,
                tuple(program.inputs.values()),
                dynamo=True,
                input_names=list(program.inputs),
                output_names=list(program.outputs),
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ModelError(f"the {program.name} graph cannot be expressed in ONNX: {_root_cause(error)}") from error
    if exported is None:
        raise ModelError(f"the {program.name} graph cannot be expressed in ONNX: the exporter returned nothing")
    model = exported.model
    _share_weights(model, weights)
    _drop_annotations(model)
    ir.save(model, path)
    with torch.no_grad():
        outputs = program.module(*program.inputs.values())
    return Graph(
        name=program.name,
        file=path.name,
        sha256=file_sha256(path),
        nodes=sum(1 for _ in model.graph),
        inputs=tuple(TensorSpec.of(name, tensor) for name, tensor in program.inputs.items()),
        outputs=tuple(TensorSpec.of(name, tensor) for name, tensor in zip(program.outputs, outputs, strict=True)),
        weights=(weights.relative,),
    )


def _share_weights(model: Any, weights: WeightFile) -> None:
    """Point initializers into the safetensors file: those that are weights, and those that are transposed weights."""
    import onnx_ir as ir

    prefix = "tapped.unet."
    transposed: dict[tuple[int, ...], list[str]] = {}
    for key, tensor in weights.tensors.items():
        if tensor.ndim == 2:
            transposed.setdefault(tuple(reversed(tensor.shape)), []).append(key)

    def point_at(value: Any, key: str) -> None:
        offset, length = weights.spans[key]
        value.const_value = ir.ExternalTensor(
            weights.relative,
            offset,
            length,
            value.dtype,
            shape=ir.Shape(weights.tensors[key].shape),
            name=value.name,
            base_dir=weights.folder,
        )

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name.startswith(prefix) and name.removeprefix(prefix) in weights.spans:
            point_at(value, name.removeprefix(prefix))
            continue
        constant = value.const_value
        if constant.nbytes < _LEAST_SHARED_BYTES:
            continue
        content = torch.from_dlpack(constant) if constant.dtype != ir.DataType.BFLOAT16 else _bfloat16(constant)
        for key in transposed.get(tuple(content.shape), ()):
            if torch.equal(weights.tensors[key].T, content):
                # The exporter folded the transposition of a linear layer. Written out again it costs nothing: runtimes
                # fold it when they load the graph, and the bundle holds the weight once.
                weight = graph.initializers.get(prefix + key)
                if weight is None:
                    weight = ir.Value(name=prefix + key, type=value.type, shape=ir.Shape(weights.tensors[key].shape))
                    weight.const_value = constant
                    point_at(weight, key)
                    graph.register_initializer(weight)
                node = ir.node("Transpose", [weight], {"perm": [1, 0]})
                node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
                first = next(node for node in graph if value in node.inputs)
                ir.convenience.replace_all_uses_with(value, node.outputs[0])
                del graph.initializers[name]
                graph.insert_before(first, node)
                break


def _bfloat16(constant: Any) -> Tensor:
    return torch.frombuffer(bytearray(constant.tobytes()), dtype=torch.bfloat16).view(tuple(constant.shape))


def _drop_annotations(model: Any) -> None:
    """Remove the exporter's notes (stack traces with local paths among them): equal inputs give equal bytes."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.name = "main"
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's own warnings and log lines, which are about its insides, from the user."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
