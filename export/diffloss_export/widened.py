"""A bfloat16 graph in float32: for runtimes that have no bfloat16 kernels, so that the graph can be replayed at all."""

from __future__ import annotations

from pathlib import Path

from diffloss_engine.tensors import TensorSpec


def write_widened(graph_file: Path, destination: Path) -> None:
    """Copy an ONNX file with every bfloat16 tensor, and every cast to bfloat16, in float32; weights go beside it.

    Structure and weights are those of the original, so a replay checks both; its rounding is not.
    """
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir

    model = ir.load(graph_file)
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT

    def widen(value: ir.Value | None) -> None:
        if value is None:
            return
        if value.dtype == narrow:
            value.dtype = wide
        constant = value.const_value
        if constant is not None and constant.dtype == narrow:
            value.const_value = ir.Tensor(constant.numpy().view(ml_dtypes.bfloat16).astype(np.float32), name=value.name)

    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        widen(value)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            widen(value)
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name == "to" and attribute.as_int() == narrow:
                node.attributes[name] = ir.AttrInt64(name, int(wide))
    ir.save(model, destination, external_data=f"{destination.stem}.weights")


def widened_specs(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Return `specs` with float32 for bfloat16."""
    return tuple(TensorSpec(spec.name, "float32", spec.shape) if spec.dtype == "bfloat16" else spec for spec in specs)
