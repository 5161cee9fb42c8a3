"""The small contract that every runtime meets, and the one place that chooses a runtime by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BackendUnavailableError, InputError
from diffloss_engine.ort_session import ORT_BACKENDS, OrtSession
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.trt_build import FLAVOURS


class Session(Protocol):
    """One loaded graph: named tensors in, freshly allocated named tensors out, on one device.

    A call may come from any thread. On CUDA it is ordered like any other operation on torch's current stream, and
    does not wait for its results. No gradient flows through it. It raises InputError or InputTypeError for inputs
    that are not those of `inputs` on `device`, and BackendError if the runtime fails or was closed.
    """

    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    device: torch.device

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]: ...

    def close(self) -> None:
        """Give back the runtime's memory; calls after this raise BackendError. Closing twice is allowed."""


def open_graph(bundle: Bundle, name: str, *, backend: str, device: torch.device) -> Session:
    """Load a graph of a bundle into a runtime; raises as `Bundle.graph_file` and `open_session` do."""
    file = bundle.graph_file(name)
    graph = bundle.graphs[name]
    return open_session(
        file,
        graph.inputs,
        graph.outputs,
        backend=backend,
        device=device,
        digest=bundle.graph_digest(name),
        precision=bundle.precision,
    )


def open_session(
    graph_file: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    backend: str,
    device: torch.device,
    digest: str | None = None,
    precision: str | None = None,
) -> Session:
    """Load an ONNX file, whose integrity the caller has verified, into the runtime called `backend`.

    digest: of the file and its weights, for TensorRT, which keeps plans: see `open_plan`.
    precision: of the graph, which TensorRT checks: see `build_plan`; and ONNX Runtime on a GPU: see `OrtSession`.

    Raises BackendUnavailableError if the backend is unknown, not installed, or cannot run this graph on `device`;
    BundleError if the file is not a graph with these inputs and outputs; InputError if TensorRT is not told digest and
    precision.
    """
    if backend in ORT_BACKENDS:
        return OrtSession(graph_file, inputs, outputs, device=device, backend=backend, precision=precision)
    if backend in FLAVOURS:
        from diffloss_engine.trt_session import open_plan

        if digest is None or precision is None:
            raise InputError(f"{backend} wants the digest and the precision of a graph")
        return open_plan(
            graph_file, inputs, outputs, flavour=backend, device=device, digest=digest, precision=precision
        )
    raise BackendUnavailableError(
        f"there is no backend {backend!r} for ONNX graphs; there is {', '.join((*ORT_BACKENDS, *FLAVOURS))}"
    )
