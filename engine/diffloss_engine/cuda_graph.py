"""A session whose work on the GPU is recorded once, as a CUDA graph, and then launched as one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from diffloss_engine.errors import BackendError, CaptureError
from diffloss_engine.forking import ProcessLock
from diffloss_engine.session import Session
from diffloss_engine.tensors import check_tensors


class GraphedSession:
    """Another session on a CUDA device, recorded; see `Session` for the contract.

    It takes the place of thousands of launches by the CPU, at the price of memory that is its own and of a copy of
    inputs and outputs. Calls from several streams run one after the other. In a call that is itself being captured the
    other session runs. Raises CaptureError if the other session cannot be captured. Closing it closes the other one.
    """

    def __init__(self, session: Session) -> None:
        self.backend = session.backend
        self.inputs = session.inputs
        self.outputs = session.outputs
        self.device = session.device
        self._session = session
        # There is one set of inputs and outputs, which one call at a time may use.
        self._enqueuing = ProcessLock()
        with torch.cuda.device(self.device):
            self._given = {
                spec.name: torch.zeros(spec.shape, dtype=spec.torch_dtype, device=self.device) for spec in self.inputs
            }
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # What is done but once must not be recorded. ONNX Runtime's second run still allocates memory.
                for _ in range(3):
                    session(self._given)
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on using the GPU meanwhile. After a capture that fails PyTorch leaves its stream
                # the current one, which the outer block puts right.
                with (
                    torch.cuda.stream(torch.cuda.current_stream()),
                    torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
                ):
                    self._made = session(self._given)
            except RuntimeError as error:
                raise CaptureError(
                    f"{self.backend} cannot be recorded as a CUDA graph: {error}; start again in a new process, "
                    "without cuda_graph=True: in this one PyTorch may still believe that it is recording"
                ) from error
            self._graph: torch.cuda.CUDAGraph | None = graph
            self._done = torch.cuda.Event()
            self._done.record()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_tensors(self.inputs, inputs, self.device)
        with torch.cuda.device(self.device), torch.no_grad():
            if torch.cuda.is_current_stream_capturing():
                return self._session(inputs)
            with self._enqueuing.lock:
                graph = self._graph
                if graph is None:
                    raise BackendError("the session was closed")
                stream = torch.cuda.current_stream()
                stream.wait_event(self._done)
                for name, tensor in self._given.items():
                    tensor.copy_(inputs[name])
                graph.replay()
                results = {name: tensor.clone() for name, tensor in self._made.items()}
                self._done.record(stream)
        return results

    def close(self) -> None:
        with self._enqueuing.lock:
            self._graph = None
            self._given, self._made = {}, {}
        self._session.close()
