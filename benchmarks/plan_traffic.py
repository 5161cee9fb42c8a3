"""How much memory the kernels of TensorRT-RTX's plans read and write: `python benchmarks/plan_traffic.py adm256`.

Needs no GPU: the builder lists the kernels with their tensors. Each is counted as read or written once, whole.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Final

import sections
import torch
from bundles import make_bundle
from configurations import CONFIGURATIONS
from machine import alone, describe

from diffloss_engine.trt_build import import_flavour
from diffloss_trt.contract import ENCODER, GRADIENT, NOISE_HEAD, PRECISIONS, SEMANTIC_GRADIENT

_LAYER = re.compile(
    r"Name: (.*), LayerType: (\w+), Inputs: \[(.*?)\](?:, Constants: \[(.*?)\])?, Outputs: \[(.*?)\], TacticName: "
)
_TENSOR = re.compile(r"\{ Name: (\S+), Dimensions: (\[[\d,]*\]),.*? Datatype: (\w+),")
_SCRATCH = re.compile(r"Total Activation Memory: (\d+) bytes")
_BYTES: Final = {"Bool": 1, "Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8}
# Not kernels, but one stream that waits for another.
_EVENTS: Final = ("signal", "wait")
# What the builder calls a kernel that is a convolution, and one with matrix products.
_KINDS: Final = {"correlation": "convolutions", "gemm": "products", "runtime_fusion": "products"}


def kernels(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Build a plan of an ONNX file, and return what the builder says of its kernels, and its bytes of scratch memory.

    The former in the words of TensorRT's inspector; that itself needs a loaded engine, and so a GPU.
    """
    trt = import_flavour("tensorrt-rtx")

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.told: list[str] = []

        def log(self, _: Any, message: str) -> None:
            if "LayerType: " in message or _SCRATCH.search(message):
                self.told.append(message)

    listener = Listener()
    builder = trt.Builder(listener)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, listener).parse_from_file(str(file))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert builder.build_serialized_network(network, config)
    told = "\n".join(listener.told)
    found = []
    for name, kind, *parts in _LAYER.findall(told):
        if kind in _EVENTS:
            continue
        inputs, constants, outputs = (
            [
                {"Name": of, "Dimensions": json.loads(shape), "Datatype": dtype}
                for of, shape, dtype in _TENSOR.findall(part)
            ]
            for part in parts
        )
        found.append({"Name": name, "LayerType": kind, "Inputs": inputs, "Constants": constants, "Outputs": outputs})
    return found, max(int(scratch) for scratch in _SCRATCH.findall(told))


def traffic(kernel: dict[str, Any]) -> int:
    """Return the bytes of all tensors of a kernel."""
    tensors = [tensor for part in ("Inputs", "Constants", "Outputs") for tensor in kernel[part]]
    return sum(math.prod(tensor["Dimensions"]) * _BYTES[tensor["Datatype"]] for tensor in tensors)


def measure(file: Path) -> dict[str, Any]:
    """Return how many kernels the plan of an ONNX file has, what they move by kind, and its scratch memory."""
    found, scratch = kernels(file)
    moved = dict.fromkeys((*_KINDS.values(), "others"), 0)
    for kernel in found:
        moved[_KINDS.get(kernel["LayerType"], "others")] += traffic(kernel)
    return {"graph": file.stem, "kernels": len(found), "bytes": moved, "scratch_bytes": scratch}


def _write_graphs(configuration: str, precision: str, batch_size: int, folder: Path) -> list[Path]:
    bundle = make_bundle(folder, configuration, precision, batch_size)
    return [bundle.graph_file(name) for name in (ENCODER, NOISE_HEAD, GRADIENT, SEMANTIC_GRADIENT)]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configuration", choices=CONFIGURATIONS)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    asked = {"configuration": args.configuration, "precision": args.precision, "batch_size": args.batch_size}
    with tempfile.TemporaryDirectory() as folder:
        files = alone(_write_graphs, *asked.values(), Path(folder))
        graphs = []
        for file in files:
            print(f"building {file.stem} ...", flush=True)
            graphs.append(alone(measure, file))
    result = {**describe(), **asked, "graphs": graphs}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(sections.joined(sections.plan_traffic(result)))


if __name__ == "__main__":
    main()
