"""ONNX graphs in ONNX Runtime, on the CPU, on a CUDA device, or by its own TensorRT there, in torch's memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor

from diffloss_engine.errors import BackendError, BackendUnavailableError, BundleError, InputError
from diffloss_engine.forking import ProcessLock, unforked
from diffloss_engine.memory import memory_advice
from diffloss_engine.tensors import DTYPES, TensorSpec, addressable, check_tensors, concrete_device, on_device
from diffloss_engine.trt_build import import_flavour

if TYPE_CHECKING:
    import onnxruntime

_CUDA, _TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
# Each backend's provider on each type of device.
_PROVIDERS = {
    "onnxruntime": {"cpu": "CPUExecutionProvider", "cuda": _CUDA},
    "onnxruntime-tensorrt": {"cuda": _TENSORRT},
}
ORT_BACKENDS = tuple(_PROVIDERS)
# ONNX Runtime's names for element types, where they are not ours.
_ELEMENT_NAMES = {"float32": "float", "float64": "double"}


class OrtSession:
    """One ONNX graph in ONNX Runtime; see `Session` for the contract and `open_session` for the arguments.

    Inputs are read and outputs written where torch keeps them, without a copy, except that an input that is not
    contiguous, or begins at an odd address, is first copied. On CUDA the graph runs on a stream of the session's own,
    which waits for torch's current stream and is waited for by it.

    In a forked process, such as a data loader's, a session on the CPU goes on, on the calling thread alone.

    backend: "onnxruntime", or "onnxruntime-tensorrt": its TensorRT provider, which builds engines when the session is
        opened, and keeps none; what TensorRT cannot take runs on the CUDA provider.
    precision: of the graph's convolutions and matrix products: "fp16" or "bf16" lets CUDA compute those that are in
        fp32 all the same in TF32, because without it none would use tensor cores.
    provider_options: more of ONNX Runtime's options for the provider, on CUDA, or others in the place of ours.
    """

    def __init__(
        self,
        graph_file: Path,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        device: torch.device,
        backend: str = "onnxruntime",
        precision: str | None = None,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        self._session: onnxruntime.InferenceSession | None = None
        if provider_options and device.type != "cuda":
            raise InputError(f"on device {device} ONNX Runtime would silently ignore provider_options")
        runtime = import_runtime()
        provider = _usable_provider(runtime, backend, device)
        self.backend = backend
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.device = concrete_device(device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        # Runs on one CUDA stream share its cuBLAS and cuDNN handles, which only one thread may use at a time.
        self._enqueuing = ProcessLock()
        self._run_options = runtime.RunOptions()
        if self._stream is not None:
            # Without this, each run would end by waiting for the GPU; torch's stream waits instead.
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        if provider == _TENSORRT:
            # A wheel's libraries are found where it has loaded them. There may be others, that the system has.
            with contextlib.suppress(BackendUnavailableError):
                import_flavour("tensorrt")
        options = session_options(runtime)
        if self._stream is not None:
            # A buffer that another tensor will take over is not freed meanwhile: of each size as many are held as are
            # ever needed at once, but the sizes are not needed at the same time (docs/design.md).
            options.enable_mem_reuse = False
        with on_device(self.device):  # the provider makes its device the current one
            providers = self._providers(provider, precision, provider_options or {})
            session = _create(runtime, graph_file, options, providers)
        if provider not in session.get_providers():
            raise BackendUnavailableError(
                f"ONNX Runtime opened {graph_file} with {session.get_providers()}, without the {provider} asked for; "
                "on a GPU it needs a PyTorch that was built for the same major version of CUDA (docs/gpu.md)"
            )
        _compare(graph_file, "inputs", session.get_inputs(), self.inputs)
        _compare(graph_file, "outputs", session.get_outputs(), self.outputs)
        self._session = session
        _opened.add(self)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = self._session
        if session is None:
            raise BackendError("the session was closed")
        check_tensors(self.inputs, inputs, self.device)
        # Copies, where they are made, live in this list until the run has been enqueued.
        given = [addressable(inputs[spec.name].detach()) for spec in self.inputs]
        made = [torch.empty(spec.shape, dtype=spec.torch_dtype, device=self.device) for spec in self.outputs]
        # A forked process would wait for ever for the locks that a run has in ONNX Runtime.
        with unforked():
            if self._stream is None:
                self._run(session, given, made)
            else:
                self._run_on_stream(session, self._stream, given, made)
        return {spec.name: tensor for spec, tensor in zip(self.outputs, made, strict=True)}

    def close(self) -> None:
        # A run in another thread holds its own reference, so that the memory goes when that run is over.
        with on_device(self.device):  # the provider makes its device the current one when it goes, too
            self._session = None

    def __del__(self) -> None:
        if self._session is not None and not sys.is_finalizing():
            with contextlib.suppress(RuntimeError):  # a forked process cannot use a GPU
                self.close()

    def _providers(
        self, provider: str, precision: str | None, more: Mapping[str, str]
    ) -> list[tuple[str, dict[str, str]]]:
        """Return the providers to open a graph with, the preferred one first, and their options."""
        if self._stream is None:
            return [(provider, {})]
        place = {"device_id": str(self.device.index), "user_compute_stream": str(self._stream.cuda_stream)}
        cuda = {
            **place,
            # TF32 has the mantissa of fp16, in a graph that asks for fp32. But where it is off, convolutions of every
            # type are kept off the tensor cores (ONNX Runtime 1.31).
            "use_tf32": "1" if precision in ("fp16", "bf16") else "0",
            # The default doubles the arena whenever it grows, at the expense of the training it runs beside.
            "arena_extend_strategy": "kSameAsRequested",
        }
        if provider != _TENSORRT:
            return [(provider, {**cuda, **more})]
        # Engines are code. What is read back from a folder would be run without the checks of `PlanCache`.
        tensorrt = {**place, "trt_engine_cache_enable": "False", "trt_timing_cache_enable": "False"}
        return [(provider, {**tensorrt, **more}), (_CUDA, cuda)]

    def _run_on_stream(
        self,
        session: onnxruntime.InferenceSession,
        stream: torch.cuda.Stream,
        given: Sequence[Tensor],
        made: Sequence[Tensor],
    ) -> None:
        current = torch.cuda.current_stream(self.device)
        with self._enqueuing.lock, torch.cuda.device(self.device):
            for tensor in (*given, *made):
                tensor.record_stream(stream)
            if any(memory.name != "Cuda" for memory in session.get_input_memory_infos()):
                # An input that a CPU kernel consumes is copied to the host when it is bound, not in stream order.
                current.synchronize()
            stream.wait_stream(current)
            try:
                self._run(session, given, made)
            finally:
                # Also after a failure: what had been enqueued by then may still be running.
                current.wait_stream(stream)

    def _run(self, session: onnxruntime.InferenceSession, given: Sequence[Tensor], made: Sequence[Tensor]) -> None:
        place = (self.device.type, self.device.index or 0)
        try:
            binding = session.io_binding()
            for spec, tensor in zip(self.inputs, given, strict=True):
                binding.bind_input(spec.name, *place, DTYPES[spec.dtype].onnx, spec.shape, tensor.data_ptr())
            for spec, tensor in zip(self.outputs, made, strict=True):
                binding.bind_output(spec.name, *place, DTYPES[spec.dtype].onnx, spec.shape, tensor.data_ptr())
            session.run_with_iobinding(binding, self._run_options)
        # ONNX Runtime's exceptions share no base class but this one.
        except Exception as error:
            raise BackendError(f"ONNX Runtime failed: {error}{memory_advice(error, self.inputs)}") from error


_opened: WeakSet[OrtSession] = WeakSet()


def _keep_inherited() -> None:
    """Never free, in a process that was forked, what was opened before: that would wait for threads left behind."""
    for opened in _opened:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(opened._session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)


def import_runtime() -> ModuleType:
    """Return the module `onnxruntime`, with its telemetry off, unless the environment has ORT_DISABLE_TELEMETRY set.

    Raises BackendUnavailableError if it cannot be imported.
    """
    # From 1.29 on the official builds report to Microsoft which models are run, and how. That is a thread, three open
    # files in the user's cache, and an identifier of the machine kept there. The variable is read once, when the
    # library is loaded. The call is for one that was loaded before: it ends most reports, but not thread and files.
    undecided = "ORT_DISABLE_TELEMETRY" not in os.environ
    if undecided:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    try:
        with unforked():
            import onnxruntime
    except ImportError as error:
        raise BackendUnavailableError(
            f"ONNX Runtime cannot be imported ({error}): install 'onnxruntime', or 'onnxruntime-gpu' for CUDA"
        ) from error
    module: ModuleType = onnxruntime
    if undecided:
        module.disable_telemetry_events()
    return module


def _usable_provider(runtime: ModuleType, backend: str, device: torch.device) -> str:
    provider = _PROVIDERS[backend].get(device.type)
    if provider is None:
        raise BackendUnavailableError(f"{backend} is not used on device {device}; it is on {list(_PROVIDERS[backend])}")
    missing = []
    if device.type == "cuda" and not torch.cuda.is_available():
        missing.append("a GPU that torch can use (torch.cuda.is_available() is False)")
    if provider not in runtime.get_available_providers():
        missing.append(f"ONNX Runtime's {provider} (install 'onnxruntime-gpu' instead of 'onnxruntime')")
    if provider == _TENSORRT and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        missing.append("NVIDIA_TF32_OVERRIDE=0 in the environment (this provider has no option that turns TF32 off)")
    if missing:
        raise BackendUnavailableError(f"{backend} cannot run on {device}; missing: {'; '.join(missing)}")
    return provider


def session_options(runtime: ModuleType) -> onnxruntime.SessionOptions:
    """Return the options that graphs are opened with; a call takes as many CPU threads as torch has now."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Spinning threads would steal cores from data loaders (docs/design.md).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A file called *.ort would be read as another format than the one in which it was looked through.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    # One block planned for all activations of a gradient graph was half as large again as the arena that hands them out
    # one by one, and no faster (benchmarks/design.py; ONNX Runtime 1.32, CPU).
    options.enable_mem_pattern = False
    # Errors come as exceptions; warnings about single nodes are not for the user of a loss.
    options.log_severity_level = 3
    return options


def _create(
    runtime: ModuleType,
    graph_file: Path,
    options: onnxruntime.SessionOptions,
    providers: list[tuple[str, dict[str, str]]],
) -> onnxruntime.InferenceSession:
    states = runtime.capi.onnxruntime_pybind11_state
    try:
        with unforked():
            session = runtime.InferenceSession(
                graph_file,
                sess_options=options,
                providers=providers,
                # Otherwise a provider that fails is replaced by another, with a line on stdout.
                enable_fallback=0,
            )
        _trim_heap()
        return session
    except (states.NoSuchFile, states.InvalidProtobuf) as error:
        raise BundleError(f"{graph_file} cannot be read by ONNX Runtime: {error}") from error
    # ONNX Runtime's exceptions share no base class but this one.
    except Exception as error:
        raise BackendUnavailableError(f"ONNX Runtime cannot run {graph_file} on {providers[0][0]}: {error}") from error


def _trim_heap() -> None:
    """Give freed memory back to the system, where that is Linux with glibc.

    While it loads a graph, ONNX Runtime makes copies of the weights in the layouts that its kernels like and frees the
    others; glibc would keep those, up to twice the weights, for allocations that never come.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _compare(graph_file: Path, kind: str, found: Sequence[onnxruntime.NodeArg], specs: Sequence[TensorSpec]) -> None:
    """Raise BundleError unless the graph has exactly these inputs or outputs, in whatever order."""
    in_graph = {arg.name: (arg.type, arg.shape) for arg in found}
    expected = {
        spec.name: (f"tensor({_ELEMENT_NAMES.get(spec.dtype, spec.dtype)})", list(spec.shape)) for spec in specs
    }
    if in_graph != expected:
        raise BundleError(f"{graph_file} has the {kind} {in_graph}, expected {expected}")
