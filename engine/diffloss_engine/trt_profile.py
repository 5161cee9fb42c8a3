"""How long a plan takes, and which of its layers: measured with PyCUDA, so that nothing of PyTorch's is in it."""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from diffloss_engine.errors import BackendError, BackendUnavailableError
from diffloss_engine.memory import memory_advice
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.trt_build import import_flavour, make_runtime, recording_logger
from diffloss_engine.trt_session import load_engine

_WARM_UPS = 10
_LAYER_RUNS = 10


@dataclass(frozen=True)
class Profile:
    """What a plan took, in milliseconds: each whole run, on the GPU; and each layer, the mean over runs of their own.

    Layers are timed one by one, which costs time between them: they add up to more than a run.
    """

    runs: tuple[float, ...]
    layers: dict[str, float]

    def percentile(self, percent: float) -> float:
        """Return the latency that so many per cent of the runs did not exceed."""
        ranked = sorted(self.runs)
        return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))]


def import_driver() -> ModuleType:
    """Return PyCUDA's driver module, initialised. Raises BackendUnavailableError without PyCUDA or without a GPU."""
    try:
        driver = importlib.import_module("pycuda.driver")
    # Without a driver of the GPU the library that it wants is missing, which is an ImportError or an OSError.
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"a profile is taken with PyCUDA on a GPU, and PyCUDA cannot be imported ({error}); "
            "docs/gpu.md says how to install it"
        ) from error
    try:
        driver.init()
        count = driver.Device.count()
    # PyCUDA's errors share no base class but this one.
    except Exception as error:
        raise BackendUnavailableError(f"a profile is taken on a GPU, and PyCUDA finds none: {error}") from error
    if not count:
        raise BackendUnavailableError("a profile is taken on a GPU, and PyCUDA finds none")
    return driver


def profile_plan(plan: bytes | memoryview, *, inputs: Sequence[TensorSpec], flavour: str, runs: int) -> Profile:
    """Run a plan, which the caller trusts, on the first GPU, on zeros.

    Inputs go from pinned memory to the GPU before each run, outside of what is timed by events around it. Raises
    BackendUnavailableError if there is no GPU, RefusedPlanError if the plan is not for it, BackendError if it fails.
    """
    driver = import_driver()
    # The one that everything in this process shares, torch too if it is there.
    primary = driver.Device(0).retain_primary_context()
    primary.push()
    try:
        return _measure(driver, flavour, plan, inputs, runs)
    finally:
        primary.pop()


def _measure(
    driver: ModuleType, flavour: str, plan: bytes | memoryview, specs: Sequence[TensorSpec], runs: int
) -> Profile:
    trt = import_flavour(flavour)
    logger = recording_logger(trt)
    runtime = make_runtime(trt, logger)
    engine = load_engine(flavour, runtime, logger, plan, specs)
    # A plan of TensorRT-RTX, built to allocate no memory when it runs, allows no other strategy.
    context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is None:
        raise BackendError(f"{trt.__name__} could not make an execution context: {logger.take()}")
    stream = driver.Stream()
    try:
        inputs, _held = _bind(driver, trt, engine, context)
    except driver.MemoryError as error:
        raise BackendError(f"{trt.__name__} cannot run the plan: {error}{memory_advice(error, specs)}") from error

    def run() -> float:
        for pinned, memory in inputs:
            driver.memcpy_htod_async(memory, pinned, stream)
        start, end = driver.Event(), driver.Event()
        start.record(stream)
        if not context.execute_async_v3(stream.handle):
            raise BackendError(f"{trt.__name__} could not run the plan: {logger.take()}")
        end.record(stream)
        end.synchronize()
        return float(end.time_since(start))

    for _ in range(_WARM_UPS):
        run()
    times = tuple(run() for _ in range(runs))
    profiler = _profiler(trt)
    context.profiler = profiler
    for _ in range(_LAYER_RUNS):
        run()
    stream.synchronize()
    layers = sorted(profiler.totals.items(), key=lambda entry: -entry[1])
    return Profile(times, {name: total / _LAYER_RUNS for name, total in layers})


def _bind(driver: ModuleType, trt: ModuleType, engine: Any, context: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
    """Give each tensor memory, and the plan scratch memory.

    Return the inputs' (pinned, on the GPU), and everything that must live as long.
    """
    import numpy as np

    scratch_bytes = int(engine.device_memory_size_v2)
    scratch = driver.mem_alloc(max(1, scratch_bytes))
    context.set_device_memory(int(scratch), scratch_bytes)
    inputs, held = [], [scratch]
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        # By bytes: NumPy has no bfloat16.
        size = trt.volume(engine.get_tensor_shape(name)) * engine.get_tensor_dtype(name).itemsize
        memory = driver.mem_alloc(size)
        held.append(memory)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            inputs.append((driver.pagelocked_zeros(size, np.uint8), memory))
        if not context.set_tensor_address(name, int(memory)):
            raise BackendError(f"{trt.__name__} could not take the address of {name!r}")
    return inputs, held


def _profiler(trt: ModuleType) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        """Adds up what is reported of each layer."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.totals: dict[str, float] = defaultdict(float)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.totals[layer_name] += ms

    return Profiler()


def largest(layers: dict[str, float], count: int) -> Sequence[tuple[str, float]]:
    """Return the slowest layers, and what the others take together, if there are more."""
    named = list(layers.items())[:count]
    rest = len(layers) - len(named)
    return [*named, (f"{rest} others", sum(list(layers.values())[count:]))] if rest else named
