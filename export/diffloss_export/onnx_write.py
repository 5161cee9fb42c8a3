"""A traced program as an ONNX file whose weights stay in the UNet's own safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffloss_engine.bundle import Graph, file_sha256
from diffloss_engine.tensors import DTYPES, TensorSpec
from diffloss_export.aten_onnx import to_onnx
from diffloss_trt.traced import TracedProgram


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file of a bundle: what each of the UNet's tensors looks like, and the bytes where it lies."""

    folder: Path
    relative: str
    tensors: Mapping[str, Tensor]
    spans: Mapping[str, tuple[int, int]]

    @classmethod
    def read(cls, folder: Path, relative: str) -> WeightFile:
        """Index `folder / relative`."""
        from safetensors import safe_open

        path = folder / relative
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
        with safe_open(path, "pt") as file:
            offsets = file.offset_keys()
            tensors = {key: file.get_tensor(key).to("meta") for key in offsets}
        spans, place = {}, start
        for key in offsets:  # in the order of the file, which has no gaps
            spans[key] = (place, tensors[key].nbytes)
            place += tensors[key].nbytes
        return cls(folder, relative, tensors, spans)

    def initializer(self, key: str) -> Any:
        """Return the tensor `key` as an `onnx_ir.Value` that refers to this file."""
        import onnx_ir as ir

        tensor = self.tensors[key]
        dtype = ir.DataType(next(entry.onnx for entry in DTYPES.values() if entry.torch == tensor.dtype))
        shape = ir.Shape(list(tensor.shape))
        value = ir.Value(name=key, type=ir.TensorType(dtype), shape=shape)
        offset, length = self.spans[key]
        value.const_value = ir.ExternalTensor(
            self.relative, offset, length, dtype, shape=shape, name=key, base_dir=self.folder
        )
        return value


def write_graph(program: TracedProgram, weights: WeightFile) -> Graph:
    """Write `program` as `<name>.onnx` into the bundle's folder; return its entry for the manifest.

    Every weight of the UNet is referred to in the safetensors file. Raises `ModelError`, naming it, for an operation
    that has no translation to ONNX.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

    model = to_onnx(program, {key: weights.initializer(key) for key in program.weights})
    CommonSubexpressionEliminationPass()(model)
    RemoveUnusedNodesPass()(model)
    _sort_by_depth(model.graph)
    path = weights.folder / f"{program.name}.onnx"
    ir.save(model, path)
    return Graph(
        name=program.name,
        file=path.name,
        sha256=file_sha256(path),
        nodes=sum(1 for _ in model.graph),
        inputs=tuple(TensorSpec.of(name, tensor) for name, tensor in program.inputs.items()),
        outputs=tuple(TensorSpec.of(name, tensor) for name, tensor in program.results.items()),
        weights=(weights.relative,),
    )


def _sort_by_depth(graph: Any) -> None:
    """Put each node behind those of fewer predecessors one after the other, as far as the longest chain of them goes.

    ONNX Runtime (1.31) computes of a node's operands the one that stands last in the file first. So the gradient that
    comes back from the later layers is computed before what is computed once more of the forward pass, which needs not
    be kept meanwhile: that takes up to half of the memory.
    """
    depths: dict[Any, int] = {}
    for node in graph:
        depths[node] = 1 + max((depths[before] for before in node.predecessors()), default=0)
    nodes = sorted(graph, key=depths.__getitem__)
    graph.remove(nodes)
    graph.extend(nodes)
