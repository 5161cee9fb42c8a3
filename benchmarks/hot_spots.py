"""Where the time of a step goes on a CPU: `python benchmarks/hot_spots.py cifar10 --json FILE`.

The convolutions' share of it and the FLOP/s that they reach, by the profilers of PyTorch and of ONNX Runtime. A way
that did nothing but these convolutions, as fast, would take that share of the time: no engine that computes them with
the same kernels can be faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import sections
import torch
from bundles import make_bundle, workplace
from configurations import CONFIGURATIONS
from loss_step import TIMED_AT
from machine import describe, large_product
from targets import EAGER, OURS
from timing import interleaved
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from ways import AUTOCAST, PRODUCTS, Images, Setting, make_images, ways

from diffloss_engine.bundle import Bundle
from diffloss_engine.inductor import has_bfloat16
from diffloss_engine.ort_session import import_runtime, session_options
from diffloss_trt.contract import GRADIENT

_CPU: Final = torch.device("cpu")
_RUNS: Final = 5


def _of_pytorch(setting: Setting, images: Images, way: str, precision: str) -> dict[str, Any]:
    chosen = next(w for w in ways(setting, ("bf16",)) if (w.way, w.precision) == (way, precision))
    step = chosen.step(setting)
    with FlopCounterMode(display=False) as counter:
        step(images)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(_RUNS):
            step(images)
    flops, events = counter.get_flop_counts()["Global"], found.key_averages()
    return {
        "way": way,
        "precision": precision,
        "convolution_flops": sum(count for operation, count in flops.items() if "convolution" in str(operation)),
        "ms": sum(event.self_cpu_time_total for event in events) / _RUNS / 1e3,
        "convolution_ms": sum(e.self_cpu_time_total for e in events if "convolution" in e.key) / _RUNS / 1e3,
    }


def _of_onnxruntime(bundle: Bundle) -> dict[str, Any]:
    """Profile the gradient graph as `OrtSession` runs it."""
    onnxruntime = import_runtime()
    options = session_options(onnxruntime)
    options.enable_profiling = True
    inputs = {spec.name: torch.rand(spec.shape).numpy() for spec in bundle.graphs[GRADIENT].inputs}
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = onnxruntime.InferenceSession(bundle.graph_file(GRADIENT), options, ["CPUExecutionProvider"])
        for _ in range(1 + _RUNS):
            session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    nodes = nodes[len(nodes) // (1 + _RUNS) :]  # behind the first run, which warms up
    convolutions = [node for node in nodes if "Conv" in node["args"]["op_name"]]
    return {
        "way": f"{OURS}onnxruntime",
        "precision": "fp32",
        "convolution_flops": sum(_flops(node["args"]) for node in convolutions) // _RUNS,
        "ms": sum(node["dur"] for node in nodes) / _RUNS / 1e3,
        "convolution_ms": sum(node["dur"] for node in convolutions) / _RUNS / 1e3,
    }


def _flops(arguments: dict[str, Any]) -> int:
    """Return the FLOP of a convolution node, from the shapes of its kernel and of its output."""
    (kernel,) = arguments["input_type_shape"][1].values()
    (output,) = arguments["output_type_shape"][0].values()
    return int(2 * math.prod(output) * math.prod(kernel[1:]))


def _ceiling(dtype: torch.dtype) -> float:
    product, flops = large_product(dtype, _CPU)
    product()
    return float(f"{flops / interleaved({'product': product}, 9, _CPU)['product'].median:.4g}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configuration", choices=CONFIGURATIONS)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep bundles and what is compiled there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with workplace(args.work) as folder:
        setting = Setting(folder, args.configuration, args.batch_size, _CPU)
        images = make_images(setting, args.batch_size, TIMED_AT)
        # Where the processor does not multiply bf16, autocast is no choice, and takes minutes even of a tiny UNet.
        precisions = ("fp32", AUTOCAST) if has_bfloat16(_CPU) else ("fp32",)
        rows = [_of_pytorch(setting, images, EAGER, precision) for precision in precisions]
        rows.append(_of_onnxruntime(make_bundle(folder, args.configuration, "fp32", args.batch_size)))
        for row in rows:
            row["ceiling_flops_per_s"] = _ceiling(PRODUCTS[row["precision"]])
    result = {**describe(), "configuration": args.configuration, "batch_size": args.batch_size, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(sections.joined(sections.hot_spots(result)))


if __name__ == "__main__":
    main()
