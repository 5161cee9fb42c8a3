"""What a result was measured on: device and versions, its limit, and the memory of a process."""

from __future__ import annotations

import datetime
import importlib.metadata
import multiprocessing
import platform
import textwrap
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from timing import wait
from torch import Tensor

from diffloss_engine.errors import DiffLossError
from diffloss_engine.fp32_precision import rounds_convolutions

_Step = TypeVar("_Step", bound=Callable[..., Any])
_PACKAGES = (
    "torch",
    "diffusers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "torch-tensorrt",
)
# Side of the square matrices whose product is the limit: large enough that nothing but arithmetic counts.
_SIDES: Final = {"cpu": 2048, "cuda": 8192}


def describe() -> dict[str, Any]:
    """Return device, its type, threads, date and versions, as JSON values."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    has_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if has_gpu else _cpu(),
        "device_type": "cuda" if has_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    features = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(features)})"


def allow_tf32(allowed: bool) -> None:
    """Let PyTorch, and what it compiles from now on, round the factors of fp32 products to TF32, or forbid it."""
    # Not `torch.backends.fp32_precision`, behind which torch.export cannot read these any more (torch 2.13).
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def eager_fp32(name: str, device: torch.device) -> str:
    """Return `name`, of eager PyTorch in fp32, with what a GPU makes of its convolutions unless it is told not to."""
    return f"{name}, convolutions in TF32" if rounds_convolutions(device) else name


def large_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """Return a function that multiplies two large matrices, as fast as the machine can do arithmetic, and its FLOP."""
    side = _SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * side**3


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, called in a process of its own, with as many threads as this one has."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()


def build(make: Callable[[], _Step], device: torch.device) -> tuple[_Step, int]:
    """Return the step that `make` returns, warmed up, and how many bytes it takes, weights included, while it runs.

    What only warming up needs is given back and not counted. On a GPU it is the GPU's memory, whoever took it: nobody
    else may be using it. On a CPU it is that of a process of its own beyond PyTorch, and `make` has to be picklable.
    """
    if device.type != "cuda":
        step = make()
        _run(step, 2)
        return step, alone(_resident, make)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0]
    step = make()
    _run(step, 2)
    wait(device)
    torch.cuda.empty_cache()
    _run(step, 1)
    wait(device)
    return step, int(free - torch.cuda.mem_get_info(device)[0])


def _resident(make: Callable[[], Callable[..., Any]]) -> int:
    held = forget_peak_memory()
    step = make()
    _run(step, 2)
    forget_peak_memory()
    _run(step, 1)
    return peak_memory() - held


def _run(step: Callable[..., Any], times: int) -> None:
    for _ in range(times):
        step()


def reason(error: Exception, folder: Path) -> str:
    """Return in a line why something could not be run, without the path of `folder`."""
    first = next(iter(str(error).strip().splitlines()), "").replace(f"{folder}/", "")
    if not isinstance(error, DiffLossError):
        first = f"{type(error).__name__}: {first}"
    return textwrap.shorten(first, 200)


def peak_memory() -> int:
    """Return the most bytes that this process ever had resident, where Linux tells."""
    return _status_bytes("VmHWM")


def forget_peak_memory() -> int:
    """Set the peak back to what is resident now, and return that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
