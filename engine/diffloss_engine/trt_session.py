"""Plans of TensorRT and TensorRT-RTX, run on torch's current stream and in torch's own memory."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffloss_engine import trt_build
from diffloss_engine.errors import BackendError, BackendUnavailableError
from diffloss_engine.forking import ProcessLock
from diffloss_engine.hashed_files import file_sha256
from diffloss_engine.memory import memory_advice
from diffloss_engine.plan_cache import Key, Plan, PlanCache, gpu_identity
from diffloss_engine.progress import long_wait
from diffloss_engine.tensors import TensorSpec, addressable, check_tensors, concrete_device
from diffloss_engine.trt_build import BuildOptions, build_plan, import_flavour, make_runtime, recording_logger
from diffloss_engine.trt_precision import check_engine

logger = logging.getLogger(__name__)

T = TypeVar("T")

# In TensorRT's names.
_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


class RefusedPlanError(BackendUnavailableError):
    """A plan is for another GPU, version or graph; building it anew may help."""


class TrtSession:
    """One plan; see `Session` for the contract.

    Inputs are read and outputs written where torch keeps them, without a copy, except that an input that is not
    contiguous, or begins at an odd address, is first copied. Scratch memory comes from torch's allocator at each call:
    so sessions that run one after the other share it, with each other and with the training around them, and a CUDA
    graph that captures a call owns what the call needs. Calls from several streams run one after the other.

    It is run once when it is opened. Raises RefusedPlanError if the plan is not for this GPU or this version, or is not
    of these tensors; BackendUnavailableError if TensorRT does not work here; BackendError if the plan does not compute
    in `precision`, as far as `check_engine` can tell.
    """

    def __init__(
        self,
        plan: bytes | memoryview,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        *,
        flavour: str,
        device: torch.device,
        precision: str,
    ) -> None:
        trt = import_flavour(flavour)
        self.backend = flavour
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self.device = concrete_device(device)
        self._logger = recording_logger(trt)
        # An execution context has one set of addresses, which one thread at a time may set and use.
        self._enqueuing = ProcessLock()
        # An engine belongs to the GPU that is current when it is made.
        with torch.cuda.device(self.device):
            self._stream = torch.cuda.Stream()
            self._runtime = make_runtime(trt, self._logger)
            engine = load_engine(flavour, self._runtime, self._logger, plan, self.inputs)
            _compare(trt, engine, self.inputs, self.outputs)
            inspector = engine.create_engine_inspector()
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if inspector is None or context is None:
                reason = self._logger.take()
                raise BackendError(
                    f"{flavour} could not make an inspector or an execution context: {reason}"
                    f"{memory_advice(reason, self.inputs)}"
                )
            information = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            if not check_engine(information, precision, self.inputs[0].shape[0]):
                logger.info("%s does not tell in which precision the plan computes", flavour)
        self._engine = engine
        self._context: Any | None = context
        self._scratch_bytes = int(engine.device_memory_size_v2)
        # TensorRT-RTX compiles kernels at the first run, which must not be one that a CUDA graph captures; and what
        # cannot run is to be known before training starts.
        self({spec.name: torch.zeros(spec.shape, dtype=spec.torch_dtype, device=self.device) for spec in self.inputs})
        torch.cuda.synchronize(self.device)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_tensors(self.inputs, inputs, self.device)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            given = {spec.name: addressable(inputs[spec.name].detach()) for spec in self.inputs}
            made = {
                spec.name: torch.empty(spec.shape, dtype=spec.torch_dtype, device=self.device) for spec in self.outputs
            }
            # Freed when this returns, which in torch's allocator means: for later work on this stream.
            scratch = torch.empty(max(1, self._scratch_bytes), dtype=torch.uint8, device=self.device)
            # A context may run on one stream at a time, and on the default one TensorRT would wait for the GPU. All
            # tensors belong to torch's current stream, which waits for the other one: what it does with their memory
            # afterwards comes after.
            running = stream if torch.cuda.is_current_stream_capturing() else self._stream
            with self._enqueuing.lock:
                context = self._context
                if context is None:
                    raise BackendError("the session was closed")
                context.set_device_memory(scratch.data_ptr(), self._scratch_bytes)
                for name, tensor in (given | made).items():
                    self._check(context.set_tensor_address(name, tensor.data_ptr()), f"take the address of {name!r}")
                if running is not stream:
                    running.wait_stream(stream)
                try:
                    self._check(context.execute_async_v3(running.cuda_stream), "run")
                finally:
                    if running is not stream:
                        stream.wait_stream(running)
        return made

    def close(self) -> None:
        with self._enqueuing.lock:
            self._context = self._engine = None

    def _check(self, success: bool, what: str) -> None:
        if not success:
            raise BackendError(f"{self.backend} could not {what}: {self._logger.take()}")


def open_plan(
    graph_file: Path,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    flavour: str,
    device: torch.device,
    digest: str,
    precision: str,
) -> TrtSession:
    """Return a session on the plan of an ONNX file: the one in the user's cache, or one that is built now.

    digest: identifies the file and its weights, whose integrity the caller has verified; for `precision` see
    `build_plan`. Raises BackendUnavailableError if `device` is no GPU, and as `build_plan` and `TrtSession` do.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BackendUnavailableError(f"{flavour} needs a GPU that torch can use; on device {device} there is none")
    device = concrete_device(device)
    cache = PlanCache()
    key = plan_key(flavour, digest, precision, inputs, BuildOptions(), device)
    capability = gpu_identity(device)["compute_capability"]

    def build() -> memoryview:
        torch.cuda.empty_cache()  # the builder leaves out what does not fit into what is free
        with long_wait(f"building a plan of {graph_file} with {flavour}"):
            return build_plan(graph_file, flavour=flavour, precision=precision)

    def load(plan: Plan) -> TrtSession:
        return TrtSession(plan, inputs, outputs, flavour=flavour, device=device, precision=precision)

    with torch.cuda.device(device):
        check_gpu(flavour)  # before minutes are spent, or a plan is set aside that other machines' GPUs run
        return open_kept_or_built(cache, key, build, load, capability=capability)


def load_engine(flavour: str, runtime: Any, log: Any, plan: Plan, inputs: Sequence[TensorSpec]) -> Any:
    """Return the engine of a plan. Raises RefusedPlanError if it is refused, BackendError if memory ran out."""
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = log.take()
        if advice := memory_advice(reason, inputs):  # with a plan built anew there would be no more of it
            raise BackendError(f"{flavour} could not load the plan: {reason}{advice}")
        raise RefusedPlanError(f"{flavour} {import_flavour(flavour).__version__} refuses the plan: {reason}")
    return engine


def check_gpu(flavour: str) -> None:
    """Raise BackendUnavailableError if plans of a flavour do not run on torch's current GPU.

    TensorRT builds for that GPU. Of TensorRT-RTX a plan of one addition is tried where its builder does not name it.
    """
    trt = import_flavour(flavour)
    major, minor = torch.cuda.get_device_capability()
    if flavour != "tensorrt-rtx" or f"SM{major}{minor}" in trt.ComputeCapability.__members__:
        return
    log = recording_logger(trt)
    runtime = make_runtime(trt, log)
    engine = runtime.deserialize_cuda_engine(trt_build.build_addition(trt))
    if engine is None or engine.create_execution_context() is None:
        raise BackendUnavailableError(
            f"plans of {flavour} {trt.__version__} do not run on {torch.cuda.get_device_name()} "
            f"(compute capability {major}.{minor}): {log.take()}"
        )


def plan_key(
    flavour: str,
    digest: str,
    precision: str,
    inputs: Sequence[TensorSpec],
    options: BuildOptions,
    device: torch.device | None,
) -> dict[str, Any]:
    """Return everything that a plan depends on, as a key of `PlanCache`.

    device: the GPU that the plan is for. TensorRT-RTX makes plans for compute capabilities, not for one GPU, so that
    there the plan of a machine without a GPU is that of one with it.
    """
    trt = import_flavour(flavour)
    gpu = None
    if flavour == "tensorrt":
        if device is None:
            raise BackendUnavailableError("tensorrt builds for the GPU that is here, and there is none")
        gpu = gpu_identity(device)
    return {
        "graph": digest,
        "flavour": flavour,
        "version": trt.__version__,
        "builder": builder_version(),
        "gpu": gpu,
        "precision": precision,
        "inputs": [spec.to_json() for spec in inputs],
        "options": options.to_json(),
    }


def builder_version() -> str:
    """Return what identifies the code here that calls TensorRT's builder, which a plan is kept under."""
    return file_sha256(Path(trt_build.__file__))


def open_kept_or_built(
    cache: PlanCache, key: Key, build: Callable[[], Plan], load: Callable[[Plan], T], *, capability: str
) -> T:
    """Return what `load` makes of the plan that `kept_or_built` gives; one that it refuses is set aside for the next.

    Raises RefusedPlanError if `load` refuses the plan that was built now.
    """
    built = False

    def build_now() -> Plan:
        nonlocal built
        built = True
        return build()

    while True:
        used, plan = kept_or_built(cache, key, build_now, capability=capability)
        try:
            return load(plan)
        except RefusedPlanError as error:
            if built:
                raise
            # What a plan can come to depend on beyond its key is the driver; then all that are kept are refused.
            cache.reject(used, plan, str(error))


def kept_or_built(cache: PlanCache, key: Key, build: Callable[[], Plan], *, capability: str) -> tuple[Key, Plan]:
    """Return the plan that is used for `key`, and its own key: the latest that serves, whatever its options.

    If there is none, or it is damaged, the plan of `key` itself, which `build` makes if it has to be made.

    capability: the compute capability of the GPU that the plan shall run on, such as "8.9".
    """
    # One that was built with other options was built on purpose.
    latest = next((kept for kept in cache.list_keys() if _serves(kept, key, capability)), None)
    if latest is not None and (plan := cache.find(latest)) is not None:
        return latest, plan
    return key, cache.get(key, build)


def _serves(kept: Key, wanted: Key, capability: str) -> bool:
    """Whether a plan can be tried where another one is wanted: options aside, and what its own make it portable to."""
    differing = {name for name in kept.keys() | wanted.keys() if kept.get(name) != wanted.get(name)} - {"options"}
    if not differing <= {"version", "gpu"}:  # another flavour's keys say other things
        return False
    options = kept["options"]
    # One for other GPUs is right there: several machines may share the cache.
    if (built_for := options.get("compute_capabilities")) and capability not in built_for:
        return False
    if "version" in differing and options.get("version_compatible"):
        (major, *rest), (wanted_major, *wanted_rest) = (_numbers(key["version"]) for key in (kept, wanted))
        if major == wanted_major and rest <= wanted_rest:
            differing.remove("version")
    if "gpu" in differing and options.get("hardware_compatibility"):
        here, there = (_numbers(key["gpu"]["compute_capability"]) for key in (wanted, kept))
        if here == there or (options["hardware_compatibility"] == "ampere-plus" and here >= [8, 0]):
            differing.remove("gpu")
    return not differing


def _numbers(dotted: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", dotted)]


def _compare(trt: ModuleType, engine: Any, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Raise RefusedPlanError unless the engine has exactly these tensors."""
    found = {}
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        found[name] = (
            engine.get_tensor_mode(name).name,
            engine.get_tensor_dtype(name).name,
            tuple(engine.get_tensor_shape(name)),
        )
    expected = {
        spec.name: (mode, _DTYPES[spec.dtype], spec.shape)
        for mode, specs in (("INPUT", inputs), ("OUTPUT", outputs))
        for spec in specs
    }
    if found != expected:
        raise RefusedPlanError(f"{trt.__name__}: the plan has the tensors {found}, expected {expected}")
