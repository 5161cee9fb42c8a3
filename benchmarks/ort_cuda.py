"""What ONNX Runtime's options for CUDA give: `python benchmarks/ort_cuda.py cifar10 --precision fp16 --json FILE`.

Each candidate opens the gradient graph in a process of its own, since memory, and what cuDNN found out, stay with a
process. Loading is opening and the first run, in which kernels are looked for; memory is what the GPU has less
afterwards, the graph's weights included. The gradient's error is the worst sample's against the float64 values that the
bundle carries.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from configurations import CONFIGURATIONS, make_model
from machine import describe
from rich.console import Console
from rich.progress import track
from rich.table import Table

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BackendError, BackendUnavailableError
from diffloss_engine.ort_session import OrtSession
from diffloss_export.pipeline import export_bundle
from diffloss_trt.contract import GRADIENT
from diffloss_trt.inputs import choose_device
from diffloss_trt.probe import CHECK_WEIGHTS, deviations, recorded, run_gradient
from diffloss_trt.tolerances import DIFFERENCE

# Beside what `OrtSession` always gives, or in its place. By default ONNX Runtime 1.31 searches EXHAUSTIVE, with a large
# workspace, in NCHW, and does not fuse.
CANDIDATES: dict[str, dict[str, str]] = {
    "as sessions are opened": {},
    "search HEURISTIC": {"cudnn_conv_algo_search": "HEURISTIC"},
    "search DEFAULT": {"cudnn_conv_algo_search": "DEFAULT"},
    "small workspace": {"cudnn_conv_use_max_workspace": "0"},
    "bias fused": {"fuse_conv_bias": "1"},
    "NHWC": {"prefer_nhwc": "1"},
    "NHWC, search HEURISTIC": {"prefer_nhwc": "1", "cudnn_conv_algo_search": "HEURISTIC"},
    "NHWC, bias fused": {"prefer_nhwc": "1", "fuse_conv_bias": "1"},
    "without TF32": {"use_tf32": "0"},
    "arena in powers of two": {"arena_extend_strategy": "kNextPowerOfTwo"},
}


def _run_candidate(path: Path, name: str, rounds: int) -> dict[str, Any]:
    """Return what one candidate takes, in milliseconds and bytes, or why it cannot run here."""
    bundle, device = Bundle.open(path), choose_device("cuda")
    graph = bundle.graphs[GRADIENT]
    inputs = {spec.name: torch.rand(spec.shape, dtype=spec.torch_dtype, device=device) for spec in graph.inputs}
    torch.cuda.synchronize()
    held, _ = torch.cuda.mem_get_info()
    started = time.perf_counter()
    try:
        session = OrtSession(
            bundle.graph_file(GRADIENT),
            graph.inputs,
            graph.outputs,
            device=device,
            precision=bundle.precision,
            provider_options=CANDIDATES[name],
        )
        session(inputs)
    except (BackendError, BackendUnavailableError) as error:
        return {"name": name, "refused": str(error)}
    torch.cuda.synchronize()
    loading = time.perf_counter() - started
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        session(inputs)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    free, _ = torch.cuda.mem_get_info()
    reference = recorded(bundle)
    assert reference is not None  # an export writes it
    probe, expected = reference
    found = run_gradient(session, probe, CHECK_WEIGHTS[GRADIENT])
    rows = deviations(found, expected[GRADIENT], DIFFERENCE[bundle.precision])
    return {
        "name": name,
        "median_ms": round(statistics.median(times), 3),
        "spread_ms": [round(min(times), 3), round(max(times), 3)],
        "loading_s": round(loading, 1),
        "gradient_error": next(float(f"{row.error:.2g}") for row in rows if row.quantity == GRADIENT),
        "allowed": all(row.error <= row.tolerance for row in rows),
        "memory_bytes": held - free,
    }


def _measure(path: Path, name: str, rounds: int) -> dict[str, Any]:
    command = [sys.executable, __file__, str(path), "--candidate", name, "--rounds", str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # what the others gave is not to be lost
        return {"name": name, "refused": f"its process ended with {done.returncode}"}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", help=f"one of {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--candidate", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        choose_device("cuda")
    except BackendUnavailableError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    if args.candidate:
        print(json.dumps(_run_candidate(Path(args.configuration), args.candidate, args.rounds)))
        return

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        export_bundle(
            make_model(args.configuration),
            path,
            batch_size=args.batch_size,
            precision=args.precision,
            on_stage=print,
        )
        rows = [_measure(path, name, args.rounds) for name in track(CANDIDATES, "measuring")]
    setting = {key: getattr(args, key) for key in ("configuration", "precision", "batch_size")}
    result = {**describe(), **setting, "rows": rows}
    table = Table("options", "ms", "loading, s", "gradient error", "GPU MiB", title=str(result["device"]))
    for row in rows:
        if "refused" in row:
            table.add_row(row["name"], row["refused"])
            continue
        table.add_row(
            row["name"],
            f"{row['median_ms']:.2f}",
            f"{row['loading_s']:.1f}",
            f"{row['gradient_error']:.1e}{'' if row['allowed'] else ', too large'}",
            f"{row['memory_bytes'] / 2**20:.0f}",
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
