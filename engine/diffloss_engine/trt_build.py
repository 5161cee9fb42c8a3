"""ONNX files to plans, by TensorRT or TensorRT-RTX: the same builder under two module names."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from diffloss_engine.errors import BackendError, BackendUnavailableError, InputError
from diffloss_engine.hashed_files import flush_to_disk
from diffloss_engine.trt_precision import check_network

# A flavour is a backend's name: its module, the first version that will do and the first that may not.
_MODULES = {"tensorrt": ("tensorrt", (10, 12), (12, 0)), "tensorrt-rtx": ("tensorrt_rtx", (1, 0), (2, 0))}
FLAVOURS = tuple(_MODULES)

_COMPATIBILITY = {"ampere-plus": "AMPERE_PLUS", "same-compute-capability": "SAME_COMPUTE_CAPABILITY"}
# Of how many nodes that the parser refuses a message speaks.
_NAMED = 10

# Called with what the builder is at, and how much of that is done, from 0 to 1.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BuildOptions:
    """What can be chosen about a build; None leaves it to the builder. Raises InputError for what no builder knows.

    workspace_bytes: the most scratch memory that the plan may want.
    optimization_level: 0 to 5; the higher, the longer the search for fast kernels.
    hardware_compatibility: "ampere-plus" or "same-compute-capability": runs on other GPUs too, for some of the speed.
    version_compatible: runs in later versions of the runtime too.
    compute_capabilities: such as "8.9": the GPUs to build for. By default the one that is here. TensorRT-RTX alone.
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise InputError(f"the workspace is {self.workspace_bytes} bytes; expected at least 1")
        if self.optimization_level is not None and self.optimization_level not in range(6):
            raise InputError(f"the optimisation level is {self.optimization_level}; expected 0 to 5")
        if self.hardware_compatibility not in (None, *_COMPATIBILITY):
            raise InputError(
                f"the hardware compatibility is {self.hardware_compatibility!r}; "
                f"expected one of {', '.join(_COMPATIBILITY)}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {**asdict(self), "compute_capabilities": list(self.compute_capabilities)}


def import_flavour(flavour: str) -> ModuleType:
    """Return the module of a flavour. Raises BackendUnavailableError if it is missing, broken, too old or too new."""
    if flavour not in _MODULES:
        raise BackendUnavailableError(f"there is no flavour {flavour!r} of TensorRT; there is {', '.join(FLAVOURS)}")
    name, first, beyond = _MODULES[flavour]
    try:
        module = importlib.import_module(name)
        version = tuple(int(part) for part in module.__version__.split(".")[:2])
    # A missing shared library is an OSError or a RuntimeError; a wheel that is but a shell lacks the version.
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise BackendUnavailableError(
            f"{flavour} cannot be imported ({error}); docs/gpu.md says how to install it"
        ) from error
    if not first <= version < beyond:
        bounds = [".".join(map(str, bound)) for bound in (first, beyond)]
        raise BackendUnavailableError(
            f"{flavour} has version {module.__version__}; expected at least {bounds[0]}, and less than {bounds[1]}"
        )
    return module


def recording_logger(trt: ModuleType) -> Any:
    """Return the library's logger, which prints nothing, for this thread, whose earlier errors it forgets.

    `take()` returns the errors logged since the last call, as one line.
    """
    recorder = _recorder(trt)
    recorder.forget()
    return recorder


@functools.cache
def _recorder(trt: ModuleType) -> Any:
    """Return the one logger of a library: it keeps the first that it is given, and uses it for what is made later."""

    class Recorder(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            # Not super(): the bindings want the base class itself to be initialised.
            trt.ILogger.__init__(self)
            # Two threads of ours may load or build at the same time, and the library has threads of its own.
            self._ours = threading.local()
            self._others: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                getattr(self._ours, "errors", self._others).append(" ".join(message.split()))

        @property
        def failed(self) -> bool:
            """Whether an error was logged in this thread that was not taken."""
            return bool(getattr(self._ours, "errors", []))

        def forget(self) -> None:
            self._ours.errors = []

        def take(self) -> str:
            errors = getattr(self._ours, "errors", []) or self._others
            line = "; ".join(dict.fromkeys(errors)) or "it gave no reason"
            errors.clear()
            return line

    return Recorder()


def make_runtime(trt: ModuleType, logger: Any) -> Any:
    """Return TensorRT's runtime. Raises BackendUnavailableError if the GPU's driver is missing or too old for it."""
    runtime = _working(trt, trt.Runtime, logger)
    # A plan that runs in later versions brings a runtime of its own. That is code, but so is every plan.
    runtime.engine_host_code_allowed = True
    return runtime


def _working(trt: ModuleType, kind: Callable[[Any], Any], logger: Any) -> Any:
    """Return a new runtime or builder. Raises BackendUnavailableError if it cannot be made."""
    try:
        made = kind(logger)
        if not logger.failed:
            return made
        # From TensorRT 10.15 to 11.4 the binding returns an object all the same, and a call of that ends the process;
        # so does its destructor, which therefore must never run.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
    except TypeError:
        pass  # In TensorRT 10.14: "factory function returned nullptr". The reason is in the log.
    raise BackendUnavailableError(f"{trt.__name__} {trt.__version__} does not work here: {logger.take()}")


def build_plan(
    graph_file: Path,
    *,
    flavour: str,
    precision: str,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    on_progress: Progress = lambda _, __: None,
) -> memoryview:
    """Build a plan of an ONNX file, whose integrity the caller has verified.

    It is strongly typed: each tensor has the dtype that the ONNX graph gives it.

    precision: "fp32", "fp16" or "bf16", which all convolutions and matrix products of images must have.
    timing_cache: a file of kernels' timings, the user's own: what it has is not measured again, what is new is added.

    Raises BackendUnavailableError if the flavour is not installed, refuses a node of the graph (all of these are
    named), or lacks an option; BackendError if precision is not as expected or the build fails.
    """
    trt = import_flavour(flavour)
    logger = recording_logger(trt)
    builder = _working(trt, trt.Builder, logger)
    network = _parse(trt, builder, logger, graph_file)
    check_network(trt, network, precision)
    config = _made(builder.create_builder_config(), logger, "make a configuration")
    _configure(trt, flavour, config, options or BuildOptions())
    timings = None if timing_cache is None else _set_timings(flavour, config, logger, timing_cache)
    monitor = _monitor(trt, on_progress)
    config.progress_monitor = monitor
    with _interrupts_kept(monitor):
        plan = builder.build_serialized_network(network, config)
    if monitor.raised is not None:
        raise monitor.raised
    plan = memoryview(_made(plan, logger, f"build a plan of {graph_file.name}"))
    if timing_cache is not None and timings is not None:
        keep_timings(_made(timings.serialize(), logger, "serialise its timings"), timing_cache)
    return plan


def build_addition(trt: ModuleType) -> memoryview:
    """Build a plan that adds a number to itself: the least there is to try a GPU with."""
    logger = recording_logger(trt)
    builder = _working(trt, trt.Builder, logger)
    network = _make_network(trt, builder, logger)
    number = network.add_input("number", trt.DataType.FLOAT, (1,))
    network.mark_output(network.add_elementwise(number, number, trt.ElementWiseOperation.SUM).get_output(0))
    config = _made(builder.create_builder_config(), logger, "make a configuration")
    plan = builder.build_serialized_network(network, config)
    return memoryview(_made(plan, logger, "build a plan of one addition"))


def _set_timings(flavour: str, config: Any, logger: Any, file: Path) -> Any:
    if flavour == "tensorrt-rtx":
        raise BackendUnavailableError("tensorrt-rtx times no kernels when it builds, so it cannot use a timing cache")
    if not file.parent.is_dir():
        raise InputError(f"the timing cache {file} cannot be written: there is no folder {file.parent}")
    timings = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        raise InputError(f"the timing cache {file} is not one of this GPU and version: {logger.take()}")
    return timings


def keep_timings(timings: bytes | memoryview, file: Path) -> None:
    """Put `timings` in the place of what the file has; if they cannot be written, it stays, with a line in the log."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_bytes(timings)
        flush_to_disk(partial)
        partial.replace(file)
    except OSError as error:
        # The plan is there, though the next one will take as long.
        logging.getLogger(__name__).warning("the timings of kernels could not be kept in %s: %s", file, error.strerror)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _make_network(trt: ModuleType, builder: Any, logger: Any) -> Any:
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return _made(builder.create_network(flags), logger, "make a network")


def _parse(trt: ModuleType, builder: Any, logger: Any, graph_file: Path) -> Any:
    network = _make_network(trt, builder, logger)
    parser = _made(trt.OnnxParser(network, logger), logger, "make a parser")
    # By path, since external data is looked for beside the file.
    # Of an empty file the parser makes an empty network.
    if parser.parse_from_file(str(graph_file)) and network.num_inputs and not parser.num_errors:
        return network
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = dict.fromkeys(
        f"{error.node_operator()} {error.node_name()}: {error.desc()}" if error.node_operator() else error.desc()
        for error in errors
    )
    named = "; ".join(list(lines)[:_NAMED]) or logger.take()
    more = f"; and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
    raise BackendUnavailableError(f"{trt.__name__} {trt.__version__} cannot take {graph_file}: {named}{more}")


def _configure(trt: ModuleType, flavour: str, config: Any, options: BuildOptions) -> None:
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility is not None:
        level = getattr(trt.HardwareCompatibilityLevel, _COMPATIBILITY[options.hardware_compatibility])
        config.hardware_compatibility_level = level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.compute_capabilities:
        _set_compute_capabilities(trt, flavour, config, options.compute_capabilities)
    # TensorRT-RTX's plans may otherwise allocate memory when they run, which a CUDA graph cannot capture.
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    # TF32 has fp16's mantissa, in a graph that asks for fp32.
    config.clear_flag(trt.BuilderFlag.TF32)
    # For the layers' names and types in profiles and in the check of an engine.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _set_compute_capabilities(trt: ModuleType, flavour: str, config: Any, wanted: tuple[str, ...]) -> None:
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise BackendUnavailableError(
            f"{flavour} builds only for the GPU in this machine; compute capabilities are for tensorrt-rtx"
        )
    names = {name: value for name, value in known.__members__.items() if name.startswith("SM")}
    keys = [f"SM{capability.replace('.', '')}" for capability in wanted]
    for capability, key in zip(wanted, keys, strict=True):
        if key not in names:
            dotted = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in names)
            raise BackendUnavailableError(
                f"{flavour} {trt.__version__} does not build for compute capability {capability!r}, but for {dotted}"
            )
    config.num_compute_capabilities = len(keys)
    for index, key in enumerate(keys):
        config.set_compute_capability(names[key], index)


def _monitor(trt: ModuleType, on_progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Passes on how far each phase is; `raised` is what was raised meanwhile, which ends the build."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.raised: BaseException | None = None
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return self.raised is None

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _tell(self, phase: str, done: int) -> None:
            # An exception, Ctrl-C for one, must not enter the builder, whose code is not Python's.
            try:
                on_progress(phase, done / max(1, self._steps.get(phase, 1)))
            except BaseException as error:
                self.raised = error

    return Monitor()


@contextlib.contextmanager
def _interrupts_kept(monitor: Any) -> Iterator[None]:
    """Let `monitor` keep what the handler of Ctrl-C raises, which ends the build.

    Python calls that handler in the main thread as soon as it runs Python there: when the builder calls the monitor,
    and before the first line of that. What it raises there is lost in the builder, whose code is not Python's.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return

    def keep(number: int, frame: FrameType | None) -> None:
        try:
            handler(number, frame)
        except BaseException as error:
            monitor.raised = error

    signal.signal(signal.SIGINT, keep)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is keep:  # and not what the handler may have put there
            signal.signal(signal.SIGINT, handler)


def _made(thing: Any, logger: Any, what: str) -> Any:
    """Return `thing` unless it is None, which is how these libraries fail."""
    if thing is None:
        raise BackendError(f"TensorRT could not {what}: {logger.take()}")
    return thing
