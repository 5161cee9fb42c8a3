"""Which backend computes a bundle's loss: the one that was asked for, or the first that works here."""

from __future__ import annotations

import logging
from os import PathLike
from typing import NamedTuple, get_args

import torch

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BackendError, BackendUnavailableError, CaptureError, InputError, ParityError
from diffloss_engine.inductor import has_bfloat16
from diffloss_trt.contract import GRADIENT, SEMANTIC_GRADIENT
from diffloss_trt.evaluators import Evaluator, FusedEvaluator, RecomputeEvaluator, gradient_graph
from diffloss_trt.inputs import Backward, check_choice, choose_device

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "inductor", "onnxruntime", "onnxruntime-tensorrt", "tensorrt", "tensorrt-rtx", "torch")


def open_evaluator(
    bundle: str | PathLike[str],
    backend: str,
    device: str | torch.device | None,
    backward: Backward | None,
    *,
    cuda_graph: bool,
    weights: tuple[float, float],
) -> Evaluator:
    """Return what computes the loss of a bundle; for the arguments, and what is raised, see `DiffLoss.load`.

    weights: those of naturalness and semantic, for which it shall be ready.
    """
    check_choice("backend", backend, BACKENDS)
    if backward is not None:
        check_choice("backward", backward, get_args(Backward))
    place = choose_device(device)
    opened = Bundle.open(bundle)
    fused = _has_gradient(opened, backward) and backward != "recompute"
    if cuda_graph and not (fused and place.type == "cuda"):
        raise InputError("cuda_graph needs a CUDA device and backward='fused'")
    return _open(opened, backend, place, _Wanted(fused, cuda_graph, weights))


def _has_gradient(bundle: Bundle, backward: Backward | None) -> bool:
    """Whether the bundle has gradient graphs; an error if not, and `backward` asks for them."""
    if {GRADIENT, SEMANTIC_GRADIENT} <= bundle.graphs.keys():
        return True
    how = f"{bundle.path} has no gradient graph: 'diffloss-export onnx' writes one unless given --no-gradient"
    if backward == "fused":
        raise BackendUnavailableError(f"{how}; or load the bundle with backward='recompute'")
    if backward is None:
        logger.warning("using backward='recompute': %s", how)
    return False


class _Wanted(NamedTuple):
    fused: bool
    cuda_graph: bool
    weights: tuple[float, float]


def _open(bundle: Bundle, backend: str, device: torch.device, wanted: _Wanted) -> Evaluator:
    if backend == "auto":
        return _open_fastest(bundle, device, wanted)
    check_bf16(bundle, backend, device)
    if wanted.fused:
        evaluator = FusedEvaluator(bundle, backend, device, cuda_graph=wanted.cuda_graph)
        if any(wanted.weights):
            evaluator.session(gradient_graph(wanted.weights))  # what cannot run is to be known before training starts
        return evaluator
    if backend == "inductor":
        raise BackendUnavailableError("inductor compiles gradient graphs only: load with backward='fused'")
    recomputing = RecomputeEvaluator(bundle, backend, device)
    recomputing.open()
    return recomputing


def check_bf16(bundle: Bundle, backend: str, device: torch.device) -> None:
    """Raise BackendUnavailableError for a bf16 bundle in ONNX Runtime on a CPU, whose words are about some node."""
    if backend == "onnxruntime" and bundle.precision == "bf16" and device.type == "cpu":
        raise BackendUnavailableError("ONNX Runtime has no bf16 kernels for CPUs")


def _fastest_first(bundle: Bundle, device: torch.device, fused: bool) -> tuple[str, ...]:
    if device.type == "cuda":
        return ("tensorrt", "tensorrt-rtx", "onnxruntime", *(["inductor"] if fused else []), "torch")
    # In fp32 a CPU gains little (docs/performance.md): nothing to spend minutes of compiling on unasked.
    compiles = fused and bundle.precision == "bf16" and has_bfloat16(device)
    return ("onnxruntime", *(["inductor"] if compiles else []), "torch")


def _open_fastest(bundle: Bundle, device: torch.device, wanted: _Wanted) -> Evaluator:
    """Open the first backend that runs here and computes rightly, and say which, and why not those before it."""
    if not any(wanted.weights):
        # They may be given later; what works is found out on the smaller graph.
        wanted = wanted._replace(weights=(0.0, 1.0))
    *candidates, last = _fastest_first(bundle, device, wanted.fused)
    reasons, level = "", logging.INFO
    if device.type == "cpu" and bundle.precision == "bf16" and not has_bfloat16(device):
        reasons = "; not inductor, because this processor does not multiply bf16"
    for backend in candidates:
        try:
            evaluator = _open(bundle, backend, device, wanted)
        except CaptureError:
            raise  # nothing could be relied on that is tried next
        except (BackendUnavailableError, BackendError, ParityError) as error:
            reasons += f"; not {backend}, because: {error}"
            if not isinstance(error, BackendUnavailableError):
                level = logging.WARNING
        else:
            logger.log(level, "backend auto: %s on %s%s", backend, device, reasons)
            return evaluator
    logger.warning("backend auto: %s on %s%s", last, device, reasons)
    return _open(bundle, last, device, wanted)
