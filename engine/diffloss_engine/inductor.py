"""PyTorch programs compiled ahead of time by inductor, kept in the plan cache, and loaded without a compiler."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from diffloss_engine import inductor_cpu, inductor_cuda
from diffloss_engine.errors import BackendUnavailableError, first_line
from diffloss_engine.exclusive import exclusive
from diffloss_engine.forking import ProcessLock, unforked
from diffloss_engine.fp32_precision import fp32_settings, settings_for_export
from diffloss_engine.hashed_files import file_sha256
from diffloss_engine.memory import memory_advice
from diffloss_engine.plan_cache import PlanCache, gpu_identity
from diffloss_engine.progress import long_wait
from diffloss_engine.tensors import TensorSpec, on_device
from diffloss_engine.torch_session import TorchSession


def check_compiler(device: torch.device) -> None:
    """Raise BackendUnavailableError if inductor finds no C++ compiler, or cannot compile for a GPU what it links.

    For a GPU a small program is compiled, the first time: what is missing there, such as a header or a library, would
    otherwise show after all of a large program's kernels have been compiled. Takes seconds.
    """
    with unforked():
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise BackendUnavailableError(f"inductor cannot compile here: {first_line(error)}") from error
    if device.type == "cuda":
        _compile_addition(device)


@functools.cache
def _compile_addition(device: torch.device) -> None:
    compile_program(_Addition(), [torch.zeros(2, device=device)])


class _Addition(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x + 1,)


def compile_program(program: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """Compile a program whose weights are its buffers, for `inputs` like these and the device that they are on.

    The weights become part of the result, in the layout that the device's kernels like. Takes minutes for a large
    UNet. Raises BackendUnavailableError if inductor cannot compile it here, for want of a C++ compiler for example.
    """
    on_gpu = inputs[0].is_cuda
    options = {"freezing": True, "max_autotune": on_gpu, "cpp.dynamic_threads": True}
    try:
        # Only this backend needs the compiler's machinery, whose import takes seconds, and makes a folder.
        with unforked():
            from torch._inductor import aoti_compile_and_package
            from torch._inductor.utils import fresh_cache

        # What inductor leaves in its own cache is as large as the result, and nobody would look for it again.
        with (
            exclusive,
            inductor_cpu.loops_split_evenly(),
            TemporaryDirectory() as scratch,
            fresh_cache(dir=scratch),
            inductor_cuda.toolkit(Path(scratch) / "cuda") if on_gpu else contextlib.nullcontext(),
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
        ):
            with settings_for_export():
                exported = torch.export.export(program, tuple(inputs), strict=False)
            if not on_gpu:
                inductor_cpu.prepare(exported.graph)
            path = Path(scratch) / "program.pt2"
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
            return path.read_bytes()
    # Whatever the compiler's passes raise: they have dozens of classes.
    except Exception as error:
        raise BackendUnavailableError(f"inductor cannot compile the program here: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the first line of an error, and of a compiler's that is in it the line that says what is wrong."""
    found = re.search(r"^.*\berror: .*$|^.*\bcannot find -l.*$", str(error), re.MULTILINE)
    return f"{first_line(error)}: {found[0].strip()}" if found else first_line(error)


def open_compiled(
    key: Mapping[str, Any],
    build: Callable[[], bytes],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    device: torch.device,
) -> TorchSession:
    """Return a session on a compiled program: the one in the user's cache, or what `build` makes now.

    One from the cache that cannot be loaded is set aside. Raises as `compile_program` and `PlanCache.get` do, and
    BackendUnavailableError if what was made now cannot be loaded either.
    """
    cache, built = PlanCache(), False

    def tell_and_build() -> bytes:
        nonlocal built
        built = True
        with long_wait("compiling a program with inductor"):
            return build()

    def load() -> Callable[..., Any] | None:
        """Return the program, or None if it was set aside."""
        package = cache.get(key, tell_and_build)
        try:
            with TemporaryDirectory() as scratch:
                path = Path(scratch) / "program.pt2"
                path.write_bytes(package)
                del package  # as large as the weights, twice
                try:
                    return _load(path, device)
                except RuntimeError as error:
                    if built or memory_advice(error, inputs):
                        raise
                    # What it depends on beyond its key is the system: another C library, for example.
                    cache.reject(key, path.read_bytes(), f"it cannot be loaded: {first_line(error)}")
                    return None
        # Also inductor wants a place for temporary files, when it is imported.
        except (RuntimeError, OSError) as error:
            raise BackendUnavailableError(f"a program compiled by inductor cannot be loaded: {error}") from error

    while (run := load()) is None:
        pass
    if device.type == "cuda":
        run = _one_at_a_time(run)
    return TorchSession(run, inputs, outputs, device, backend="inductor")


def _load(path: Path, device: torch.device) -> Callable[..., Any]:
    """Load a compiled program. Raises RuntimeError, or OSError, if that fails."""
    with unforked():
        from torch._inductor import aoti_load_package

    # Otherwise each call asks, and waits, whether the one before has finished, which no CUDA graph can capture.
    single = device.type == "cuda"
    index = -1 if device.index is None else device.index
    with on_device(device):  # loading makes it the current one
        return aoti_load_package(str(path), run_single_threaded=single, device_index=index)


def _one_at_a_time(run: Callable[..., Any]) -> Callable[..., Any]:
    enqueuing = ProcessLock()

    def locked(*inputs: Tensor) -> Any:
        with enqueuing.lock:
            return run(*inputs)

    return locked


def package_key(
    digest: str, program: str, precision: str, inputs: Sequence[TensorSpec], device: torch.device
) -> dict[str, Any]:
    """Return everything that a compiled program depends on, as a key of `PlanCache`.

    digest: of the graph and its weights; program: of the code that makes the program.
    """
    # The code beside the kernels is compiled for this very processor, also where the kernels are a GPU's.
    capabilities = dict(torch.cpu.get_capabilities())
    name = capabilities.pop("cpu_name", "CPU")
    return {
        "graph": digest,
        "program": program,
        "flavour": "inductor",
        "version": torch.__version__,
        "compiler": compiler_version(),
        "gpu": gpu_identity(device) if device.type == "cuda" else None,
        "cpu": {"name": name, "features": sorted(key for key, value in capabilities.items() if value is True)},
        "precision": precision,
        "inputs": [spec.to_json() for spec in inputs],
        # Some of a GPU's kernels are compiled with them; the others look at them when they run.
        "options": {"fp32": fp32_settings("cuda")} if device.type == "cuda" else {},
    }


def compiler_version() -> list[str]:
    """Return what identifies the code here that calls inductor, which a compiled program is kept under."""
    return [file_sha256(Path(file)) for file in (__file__, inductor_cpu.__file__, inductor_cuda.__file__)]


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than those of float32 on `device`."""
    if device.type == "cuda":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
