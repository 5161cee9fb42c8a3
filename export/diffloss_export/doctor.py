"""What this machine has to run the loss with, what `backend="auto"` makes of it, and what would make it faster.

Every library is tried in a process of its own, so that one that is broken, or ends its process, is a line of the
report; the report itself needs nothing but Python's own.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

from diffloss_export.cli import FAILED_CHECK, WRONG_INPUT
from diffloss_export.trials import PRECISIONS

Report = dict[str, Any]

# The order in which "auto" tries them on each type of device (see `DiffLoss.load`).
ORDER = {
    "cuda": ("tensorrt", "tensorrt-rtx", "onnxruntime", "inductor", "torch"),
    "cpu": ("onnxruntime", "inductor", "torch"),
}
_PACKAGES = (
    "diffloss-trt",
    "torch",
    "diffusers",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "pycuda",
    "matplotlib",
    "lightning",
    "accelerate",
)
# A driver that hangs must not hang the report.
_TIMEOUT = 120


def examine(bundle: Path | None, on_stage: Callable[[str], None] = lambda _: None) -> Report:
    """Return what this machine has, as JSON values; `on_stage` is called with what is waited for next.

    python, platform: in words. packages: versions of what is installed. gpus: what NVIDIA's driver knows.
    torch: what PyTorch finds: the CUDA it is built for, GPUs, the processor; null if it cannot be imported.
    device: "cuda" or "cpu", where images are by default.
    backends: by name, the version, the precisions of bundles that "auto" can use it for, and why not for more.
    auto: for each precision, what "auto" chooses; null if nothing runs.
    bundle: what "auto" chose for `bundle`, which is loaded as by a training, and what it said; or an error, and the
        exit status that it calls for: 2 for a folder that is no bundle, or else 1.
    advice: sentences.
    """
    with ExitStack() as running:
        on_stage("trying each backend")
        children = {name: _start(running, name) for name in ORDER["cuda"]}
        found = {name: _result(child, _TIMEOUT) for name, child in children.items()}
        loading = loaded = None
        if bundle is not None:
            # Last, because it may build plans, which takes minutes, the processor and the GPU.
            on_stage(f"loading {bundle}, which takes minutes if its plans have yet to be built")
            loading = _start(running, "bundle", str(bundle))
            loaded = _result(loading, None)
    backends = {
        name: {"version": None, "precisions": [], "reason": result} if isinstance(result, str) else result
        for name, result in found.items()
    }
    torch = backends["torch"].pop("finds", None)
    device = "cuda" if torch and torch["gpus"] else "cpu"
    report: Report = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "gpus": _gpus(),
        "torch": torch,
        "device": device,
        "backends": backends,
        "auto": {
            precision: next((name for name in ORDER[device] if precision in backends[name]["precisions"]), None)
            for precision in PRECISIONS
        },
    }
    if loading is not None:
        if isinstance(loaded, str):
            loaded = {"error": loaded, "status": WRONG_INPUT if loading.returncode == WRONG_INPUT else FAILED_CHECK}
        report["bundle"] = loaded
    return report | {"advice": advise(report)}


def advise(report: Report) -> list[str]:
    """Return what to do to get faster, a sentence each; for the reasons see docs/gpu.md."""
    torch, backends, gpus = report["torch"], report["backends"], report["gpus"]
    if torch is None:
        return ["PyTorch cannot be imported, and nothing runs without it: install it again."]
    advice = []
    names = ", ".join(gpu["name"] for gpu in gpus)
    if gpus and torch["cuda"] is None:
        advice.append(
            f"There is a GPU ({names}), but this PyTorch is built for CPUs: install one that is built for CUDA, "
            "and then '.[gpu]'."
        )
    elif gpus and not torch["gpus"]:
        advice.append(
            f"There is a GPU ({names}, driver {gpus[0]['driver']}), but PyTorch, which is built for CUDA "
            f"{torch['cuda']}, cannot use it: {torch['cuda_error']}"
        )
    if {"onnxruntime", "onnxruntime-gpu"} <= report["packages"].keys():
        advice.append(
            "'onnxruntime' and 'onnxruntime-gpu' are the same module and overwrite each other: uninstall both, and "
            "install one."
        )
    elif not backends["onnxruntime"]["precisions"]:
        extra, wheel = ("gpu", "onnxruntime-gpu") if torch["gpus"] else ("cpu", "onnxruntime")
        other = "onnxruntime" if torch["gpus"] else "onnxruntime-gpu"
        instead = f" in the place of '{other}'" if other in report["packages"] else ""
        advice.append(f"ONNX Runtime does not run here: install '.[{extra}]', which has '{wheel}'{instead}.")
    if torch["gpus"]:
        if not (backends["tensorrt"]["precisions"] or backends["tensorrt-rtx"]["precisions"]):
            advice.append(
                "What auto takes first on a GPU is TensorRT, which does not run here: install '.[gpu]', and its "
                "libraries from NVIDIA's package index; or, for GeForce and RTX GPUs, '.[rtx]'."
            )
    elif torch["bf16"]:
        compiled = "bf16" in backends["inductor"]["precisions"]
        advice.append(
            "This processor multiplies bf16: a bundle exported with --precision bf16 runs fastest here"
            + (", compiled by inductor." if compiled else ", once there is a C++ compiler for inductor.")
        )
    if not advice and "error" not in report.get("bundle", {}):
        advice.append("No backend that auto would prefer is missing.")
    return advice


def print_report(report: Report) -> None:
    """Print the report in words."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    torch, packages = report["torch"], report["packages"]
    console = Console(highlight=False, markup=False)
    console.print(f"Python {report['python']}, {report['platform']}")
    console.print(", ".join(f"{name} {version}" for name, version in packages.items()))
    if torch is not None:
        cuda = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "built for CPUs"
        console.print(f"PyTorch is {cuda}; processor {torch['processor']}, threads: {torch['threads']}")
    if "providers" in report["backends"]["onnxruntime"]:
        console.print(f"ONNX Runtime has {', '.join(report['backends']['onnxruntime']['providers'])}")
    for gpu in report["gpus"]:
        console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in gpu.items()))
    table = Table("backend", "version", "auto can use it for", "why not for more")
    for name, backend in report["backends"].items():
        texts = name, backend["version"] or "-", ", ".join(backend["precisions"]) or "-", backend["reason"] or ""
        table.add_row(*map(Text, texts))
    console.print(table)
    chosen = ", ".join(f"{name or 'nothing'} for {precision}" for precision, name in report["auto"].items())
    console.print(f"On {report['device']} auto takes {chosen}.")
    if "bundle" in report:
        bundle = report["bundle"]
        console.print("This bundle:", *([bundle["error"]] if "error" in bundle else bundle["said"]), sep="\n  ")
    for sentence in report["advice"]:
        console.print(f"-> {sentence}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, str]]:
    """Return what NVIDIA's driver knows of, whether or not PyTorch can use it."""
    fields = {"name": "name", "driver": "driver_version", "compute_capability": "compute_cap", "memory": "memory.total"}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [[cell.strip() for cell in line.split(",")] for line in told.splitlines()]
    return [dict(zip(fields, line, strict=True)) for line in lines if len(line) == len(fields)]


def _start(running: ExitStack, *arguments: str) -> subprocess.Popen[str]:
    """Start a trial, which ends with `running` at the latest: an interrupted report leaves none behind."""
    # -P: not what happens to lie in the current folder, a `random.py` for example.
    command = [sys.executable, "-P", "-m", "diffloss_export.trials", *arguments]
    child = running.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    running.callback(child.wait)
    running.callback(child.kill)
    return child


def _result(child: subprocess.Popen[str], timeout: float | None) -> Report | str:
    """Return what a trial printed, or in words how it ended instead."""
    try:
        out, err = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return f"no answer within {timeout:g} s"
    if child.returncode < 0:
        return f"it ended its process by signal {-child.returncode} ({signal.strsignal(-child.returncode)})"
    lines = out.splitlines()
    if child.returncode > 0 or not lines:
        return next(reversed(err.strip().splitlines()), f"it ended its process with status {child.returncode}")
    result: Report = json.loads(lines[-1])
    return result
