"""One library tried for real: `python -m diffloss_export.trials NAME` prints what came of it, as a line of JSON.

For `diffloss_export.doctor`, which runs each in a process of its own: what a broken library does to it ends there.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffloss_export.cli import FAILED_CHECK, WRONG_INPUT

PRECISIONS = ("fp32", "fp16", "bf16")
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def try_torch() -> dict[str, Any]:
    """Look for GPUs, and at the processor; `cuda_error` says why a PyTorch that is built for CUDA finds no GPU."""
    import torch

    from diffloss_engine.errors import first_line
    from diffloss_engine.inductor import has_bfloat16

    cuda_error = None
    if torch.version.cuda and not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            cuda_error = first_line(error)
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    finds = {
        "cuda": torch.version.cuda,
        "cuda_error": cuda_error,
        "gpus": [
            {"name": gpu.name, "compute_capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory}
            for gpu in gpus
        ],
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "threads": torch.get_num_threads(),
        "bf16": has_bfloat16(torch.device("cpu")),
    }
    return {"version": torch.__version__, "precisions": PRECISIONS, "reason": None, "finds": finds}


def try_onnxruntime() -> dict[str, Any]:
    """Run a convolution in each precision."""
    # As `import_runtime` does it, which cannot be imported where torch is broken.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    runtime = importlib.import_module("onnxruntime")

    from diffloss_engine.errors import DiffLossError
    from diffloss_engine.ort_session import OrtSession
    from diffloss_engine.tensors import TensorSpec
    from diffloss_trt.inputs import choose_device

    device = choose_device(None)
    works, reasons = [], []
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            graph = Path(folder) / "convolution.onnx"
            specs = [TensorSpec(name, _DTYPES[precision], (1, 1, 4, 4)) for name in ("x", "y")]
            _write_convolution(graph, precision)
            try:
                _run(OrtSession(graph, specs[:1], specs[1:], device=device))
            except DiffLossError as error:
                reasons.append(f"{precision}: {' '.join(str(error).replace(folder + os.sep, '').split())}")
            else:
                works.append(precision)
    return {
        "version": runtime.__version__,
        "providers": runtime.get_available_providers(),
        "precisions": works,
        "reason": "; ".join(reasons) or None,
    }


def _run(session: Any) -> None:
    import torch

    session(
        {spec.name: torch.zeros(spec.shape, dtype=spec.torch_dtype, device=session.device) for spec in session.inputs}
    )


def _write_convolution(path: Path, precision: str) -> None:
    from onnx import TensorProto, helper, save

    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    image = [helper.make_tensor_value_info(name, kind, [1, 1, 4, 4]) for name in ("x", "y")]
    weight = helper.make_tensor("w", kind, [1, 1, 1, 1], [1.0])
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "trial", image[:1], image[1:], [weight])
    # Of this version on, convolutions take bfloat16.
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), path)


def try_tensorrt(flavour: str) -> dict[str, Any]:
    """Start its runtime, which asks for the GPU's driver and, if that is not known to do, try a plan on the GPU."""
    import torch

    from diffloss_engine.errors import DiffLossError
    from diffloss_engine.trt_build import import_flavour, make_runtime, recording_logger
    from diffloss_engine.trt_session import check_gpu

    trt, reason = import_flavour(flavour), None
    if not torch.cuda.is_available():
        reason = "it needs a GPU that PyTorch can use"
    else:
        try:
            make_runtime(trt, recording_logger(trt))
            check_gpu(flavour)
        except DiffLossError as error:
            reason = str(error)
    return {"version": trt.__version__, "precisions": [] if reason else list(PRECISIONS), "reason": reason}


def try_inductor() -> dict[str, Any]:
    """Look for the compiler that it needs; for a GPU, compile a program of one addition."""
    import torch

    from diffloss_engine.errors import BackendUnavailableError
    from diffloss_engine.inductor import check_compiler, has_bfloat16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    works, reason = list(PRECISIONS), None
    if device.type == "cpu":
        works = ["bf16"] if has_bfloat16(device) else []
        reason = "on a CPU auto compiles for bf16 alone, and where the processor multiplies it"
    try:
        check_compiler(device)
    except BackendUnavailableError as error:
        works, reason = [], str(error)
    return {"version": torch.__version__, "precisions": works, "reason": reason}


def try_bundle(bundle: str) -> dict[str, Any]:
    """Load a bundle as a training does: what "auto" chooses, and what it says of it."""
    from diffloss_trt import DiffLoss

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("diffloss_trt").addHandler(handler)
    logging.getLogger("diffloss_trt").setLevel(logging.INFO)
    loss = DiffLoss.load(bundle)
    return {
        "backend": loss.backend,
        "backward": loss.backward,
        "device": str(loss.device),
        "said": said,
    }


TRIALS: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": try_torch,
    "onnxruntime": try_onnxruntime,
    "tensorrt": lambda: try_tensorrt("tensorrt"),
    "tensorrt-rtx": lambda: try_tensorrt("tensorrt-rtx"),
    "inductor": try_inductor,
    "bundle": try_bundle,
}


def main() -> int:
    name, *arguments = sys.argv[1:]
    try:
        print(json.dumps(TRIALS[name](*arguments)))
    # Whatever a broken library raises is the answer, in one line.
    except Exception as error:
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        # By its name, because where torch is broken the class cannot be imported. A damaged bundle is another error.
        return WRONG_INPUT if type(error).__name__ == "BundleError" else FAILED_CHECK
    return 0


if __name__ == "__main__":
    sys.exit(main())
