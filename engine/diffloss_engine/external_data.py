"""Where an ONNX graph keeps its weights outside its own file, read off the graph and not trusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffloss_engine.errors import BundleError

if TYPE_CHECKING:
    from onnx import AttributeProto, GraphProto, NodeProto, TensorProto

_KEYS = frozenset({"location", "offset", "length", "checksum"})
# The two names of ONNX's own operations.
_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class ExternalData:
    """One tensor's bytes: `length` of them (None: all that follow) from `offset` in the file at `location`.

    `location` is as the graph has it: relative to the folder of the graph's file, and not checked in any way.
    """

    tensor: str
    location: str
    offset: int
    length: int | None


def read_external_data(graph_file: Path) -> list[ExternalData]:
    """List every reference of an ONNX file to external data, subgraphs included.

    The data itself is not read. Raises BundleError if the file is not ONNX, has a reference that cannot be read, or
    asks for anything but ONNX's own operations: those of a runtime do more than compute.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(graph_file, format="protobuf", load_external_data=False)
    except (DecodeError, OSError) as error:
        raise BundleError(f"{graph_file} cannot be read as an ONNX file: {error}") from error
    # An empty file is a valid, empty message.
    if not model.HasField("graph"):
        raise BundleError(f"{graph_file} cannot be read as an ONNX file: it has no graph")
    try:
        # No export writes any, and ONNX Runtime's TensorRT provider knows its own operation by the name alone.
        if model.functions:
            raise BundleError(f"it defines the function {model.functions[0].name!r}; expected no functions")
        external = onnx.TensorProto.EXTERNAL
        return [_external_data(tensor) for tensor in _graph_tensors(model.graph) if tensor.data_location == external]
    except BundleError as error:
        raise BundleError(f"{graph_file}: {error}") from error


def _graph_tensors(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        # For example EPContext, of com.microsoft: it brings an engine of TensorRT with it, which is machine code.
        if node.domain not in _DOMAINS:
            raise BundleError(
                f"node {node.name!r} is the operation {node.op_type!r} of {node.domain!r}; expected ONNX's own alone"
            )
        yield from _attribute_tensors(node.attribute)


def _attribute_tensors(attributes: Iterable[AttributeProto]) -> Iterator[TensorProto]:
    # An unset field of a protobuf message reads as an empty message, which holds no tensor of note.
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(graph)


def _external_data(tensor: TensorProto) -> ExternalData:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    # Readers differ on which of two equal keys counts, so one that was checked might not be the one that is used.
    if len(entries) != len(tensor.external_data):
        raise BundleError(f"tensor {tensor.name!r} repeats a key of its external data")
    # ONNX Runtime knows keys that name more parts of a file, which nothing here would check.
    if unknown := sorted(entries.keys() - _KEYS):
        raise BundleError(f"tensor {tensor.name!r} has external data with the key {unknown[0]!r}")
    if "location" not in entries:
        raise BundleError(f"tensor {tensor.name!r} has external data without a location")
    return ExternalData(
        tensor=tensor.name,
        location=entries["location"],
        offset=_byte_count(entries.get("offset", "0"), tensor.name),
        length=_byte_count(entries["length"], tensor.name) if "length" in entries else None,
    )


def _byte_count(text: str, tensor: str) -> int:
    # int() alone also takes signs, spaces, underscores and the digits of other scripts; 2**63 has 19 digits.
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise BundleError(f"tensor {tensor!r} has external data at {text!r}, expected a number of bytes")
    return int(text)
