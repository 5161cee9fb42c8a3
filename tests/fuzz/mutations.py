"""Ways in which a bundle can come to be other than it was written: by accident, and on purpose."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from diffloss_engine.bundle import MANIFEST
from exports import read_graph, rehash

# What somebody might put in the place of a value in JSON.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 0.5, 1e308, 10**400, 2**31, 2**63, "", "x", "fp16", "../../etc/passwd",
    "/etc/passwd", "a\0b", "é", "*/_ORT_MEM_ADDR_/*", "0" * 64, [], [1], [[1]], {}, {"a": 1}, "A" * 100_000,
)  # fmt: skip


def mutate(folder: Path, rng: random.Random) -> str:
    """Alter the bundle in `folder` in one way; return what was done.

    Afterwards the manifest may have been made to fit what the files have become, as somebody would do on purpose.
    """
    kind = rng.choice(_KINDS)
    what = f"{kind.__name__.strip('_')}: {kind(folder, rng)}"
    if rng.random() < 0.7:
        try:
            rehash(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return what  # the manifest itself is broken
        what += ", with hashes that fit"
    return what


def _any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def _bytes(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    how = rng.choice(["flip a bit", "set a byte", "cut", "double", "insert", "remove", "zero", "empty"])
    length = rng.choice([1, 4, 64, 4096])
    match how:
        case "flip a bit":
            content[at] ^= 1 << rng.randrange(8)
        case "set a byte":
            content[at] = rng.randrange(256)
        case "cut":
            del content[at:]
        case "double":
            content += bytes(content)
        case "insert":
            content[at:at] = rng.randbytes(length)
        case "remove":
            del content[at : at + length]
        case "zero":
            content[at : at + length] = bytes(len(content[at : at + length]))
        case "empty":
            content.clear()
    path.write_bytes(content)
    return f"{how} at {at} of {path.relative_to(folder)}"


def _head(folder: Path, rng: random.Random) -> str:
    """The beginning of the weights' file says where each tensor is: few of its bytes are hit by chance."""
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    at = rng.randrange(8 + int.from_bytes(content[:8], "little"))
    content[at] = rng.choice([rng.randrange(256), *b'0129"{}[],:-'])
    path.write_bytes(content)
    return f"byte {at} of the weights' header"


def _json(folder: Path, rng: random.Random) -> str:
    path = rng.choice([folder / MANIFEST, *sorted(folder.rglob("*config.json")), folder / "schedule.json"])
    content = json.loads(path.read_text())
    places = list(_places(content, ()))
    *way, last = rng.choice(places)
    parent = content
    for step in way:
        parent = parent[step]
    how = rng.choice(["replace", "replace", "remove", "add"])
    if how == "remove":
        del parent[last]
    elif how == "add" and isinstance(parent, dict):
        parent["new" if rng.random() < 0.5 else str(last) + " "] = rng.choice(_VALUES)
    else:
        parent[last] = rng.choice(_VALUES)
    path.write_text(json.dumps(content))
    return f"{how} {'.'.join(map(str, (*way, last)))[:80]} of {path.name}"


def _places(content: Any, way: tuple[Any, ...]) -> Any:
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in entries:
        yield (*way, key)
        yield from _places(value, (*way, key))


def _graph(folder: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(folder.glob("*.onnx")))
    model = read_graph(path)
    what = rng.choice(_GRAPH_KINDS)(model.graph, rng)
    path.write_bytes(model.SerializeToString())
    return f"{what} of {path.name}"


def _external(graph: onnx.GraphProto, rng: random.Random) -> str:
    tensor = rng.choice([tensor for tensor in graph.initializer if tensor.external_data])
    entry = rng.choice(tensor.external_data)
    entry.value = rng.choice(
        ["0", "1", "4", "-1", "99999999999", "18446744073709551615", "../../../etc/passwd", "/etc/passwd", "", "x",
         "unet/config.json", "./unet/diffusion_pytorch_model.safetensors", str(rng.randrange(10_000))]
    )  # fmt: skip
    return f"{entry.key} of {tensor.name} is {entry.value!r}"


def _swapped_weights(graph: onnx.GraphProto, rng: random.Random) -> str:
    tensors = [tensor for tensor in graph.initializer if tensor.external_data]
    one, other = rng.choice(tensors), rng.choice(tensors)
    del one.external_data[:]
    one.external_data.extend(other.external_data)
    return f"{one.name} reads the data of {other.name}"


def _dimension(graph: onnx.GraphProto, rng: random.Random) -> str:
    tensor = rng.choice([tensor for tensor in graph.initializer if len(tensor.dims)])
    at = rng.randrange(len(tensor.dims))
    tensor.dims[at] = rng.choice([0, 1, -1, 2**40, tensor.dims[at] + 1])
    return f"axis {at} of {tensor.name} is {tensor.dims[at]}"


def _constant(graph: onnx.GraphProto, rng: random.Random) -> str:
    tensor = rng.choice([tensor for tensor in graph.initializer if tensor.raw_data])
    content = bytearray(tensor.raw_data)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    tensor.raw_data = bytes(content)
    return f"a bit of {tensor.name}"


def _operation(graph: onnx.GraphProto, rng: random.Random) -> str:
    node = rng.choice(graph.node)
    was, node.op_type = (
        node.op_type,
        rng.choice(["Add", "Sub", "Mul", "Conv", "Identity", "Neg", "Loop", "NoSuchThing"]),
    )
    return f"{was} {node.name} is {node.op_type}"


def _domain(graph: onnx.GraphProto, rng: random.Random) -> str:
    node = rng.choice(graph.node)
    node.domain = rng.choice(["ai.onnx", "com.microsoft", "ai.onnx.ml", "no.such.domain"])
    if rng.random() < 0.5:
        node.op_type = "EPContext"  # which would bring machine code
    return f"{node.name} is {node.op_type} of {node.domain}"


def _input(graph: onnx.GraphProto, rng: random.Random) -> str:
    node = rng.choice([node for node in graph.node if node.input])
    at = rng.randrange(len(node.input))
    node.input[at] = rng.choice([*rng.choice(graph.node).output, ""])
    return f"input {at} of {node.name} is {node.input[at]!r}"


def _attribute(graph: onnx.GraphProto, rng: random.Random) -> str:
    attribute = rng.choice(rng.choice([node for node in graph.node if node.attribute]).attribute)
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice([0, -1, 3, 2**40])
    else:
        attribute.i = rng.choice([0, -1, 3, 2**40])
    return f"attribute {attribute.name}"


def _removed_node(graph: onnx.GraphProto, rng: random.Random) -> str:
    at = rng.randrange(len(graph.node))
    name = graph.node[at].name
    del graph.node[at]
    return f"without {name}"


def _files(folder: Path, rng: random.Random) -> str:
    path = _any_file(folder, rng)
    how = rng.choice(["remove", "link away", "link inside", "folder", "extra", "exchange"])
    match how:
        case "remove":
            path.unlink()
        case "link away":
            path.unlink()
            path.symlink_to("/etc/passwd")
        case "link inside":
            kept = path.with_name("kept")
            path.rename(kept)
            path.symlink_to(kept.name)
        case "folder":
            path.unlink()
            path.mkdir()
        case "extra":
            path.with_name("extra.onnx").write_bytes(b"")
        case "exchange":
            other = _any_file(folder, rng)
            content = path.read_bytes()
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
    return f"{how} {path.relative_to(folder)}"


_KINDS: tuple[Callable[[Path, random.Random], str], ...] = (_bytes, _head, _json, _json, _graph, _graph, _files)
_GRAPH_KINDS: tuple[Callable[[onnx.GraphProto, random.Random], str], ...] = (
    _external, _swapped_weights, _dimension, _constant, _operation, _domain, _input, _attribute, _removed_node,
)  # fmt: skip
