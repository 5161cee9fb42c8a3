"""PyTorch programs compiled ahead of time by inductor, kept in the plan cache, and loaded without a compiler."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from diffloss_engine.errors import BackendUnavailableError
from diffloss_engine.exclusive import exclusive
from diffloss_engine.fp32_precision import fp32_settings, settings_for_export
from diffloss_engine.hashed_files import file_sha256
from diffloss_engine.plan_cache import PlanCache, gpu_identity
from diffloss_engine.progress import long_wait
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.torch_session import TorchSession


def compile_program(program: nn.Module, inputs: Sequence[Tensor]) -> bytes:
    """Compile a program whose weights are its buffers, for `inputs` like these and the device that they are on.

    The weights become part of the result, in the layout that the device's kernels like. Takes minutes for a large
    UNet. Raises BackendUnavailableError if inductor cannot compile it here, for want of a C++ compiler for example.
    """
    options = {"freezing": True, "max_autotune": inputs[0].is_cuda, "cpp.dynamic_threads": True}
    try:
        # Only this backend needs the compiler's machinery, whose import takes seconds, and makes a folder.
        from torch._inductor import aoti_compile_and_package
        from torch._inductor.utils import fresh_cache

        # What inductor leaves in its own cache is as large as the result, and nobody would look for it again.
        with (
            exclusive,
            _loops_split_evenly(),
            TemporaryDirectory() as scratch,
            fresh_cache(dir=scratch),
            torch.no_grad(),
            warnings.catch_warnings(action="ignore"),
        ):
            with settings_for_export():
                exported = torch.export.export(program, tuple(inputs), strict=False)
            if not inputs[0].is_cuda:
                _keep_sums_out_of_place(exported.graph)
            path = Path(scratch) / "program.pt2"
            aoti_compile_and_package(exported, package_path=str(path), inductor_configs=options)
            return path.read_bytes()
    # Whatever the compiler's passes raise: they have dozens of classes.
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BackendUnavailableError(f"inductor cannot compile the program here: {first}") from error


def _keep_sums_out_of_place(graph: torch.fx.Graph) -> None:
    """Write each sum of a convolution and another tensor as a difference, which has the same value to the last bit.

    On a CPU inductor (torch 2.13) lets such a convolution add to the other tensor in place, also where something that
    was computed from that tensor, and is computed again where it is used, is still to be used: it then reads the sum.
    """
    aten = torch.ops.aten
    convolutions = {*graph.find_nodes(op="call_function", target=aten.convolution.default)}
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if node.kwargs or not all(isinstance(term, torch.fx.Node) for term in node.args):
            continue
        first, second = node.args
        if first in convolutions:
            first, second = second, first
        if second in convolutions:
            with graph.inserting_before(node):
                node.args = (first, graph.call_function(aten.neg.default, (second,)))
            node.target = aten.sub.Tensor


@contextmanager
def _loops_split_evenly() -> Iterator[None]:
    """Have inductor split a loop into rows only where it has as many steps as whole rows.

    On a CPU inductor (torch 2.13) splits the loop over channels at the size of a group, to read one value per group,
    and leaves out the last steps where the loop is over the first 64 of 96 channels, say, and a group has 12.
    """
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.ir import ComputedBuffer
    from torch.utils._sympy.functions import FloorDiv

    split = CppScheduling.try_loop_split

    def split_evenly(scheduling: CppScheduling, nodes: list[Any]) -> list[Any]:
        for node in (node for node in nodes if isinstance(node.node, ComputedBuffer)):
            (sizes, _), body, (variables, _) = node.node.get_default_sizes_body()
            steps = dict(zip(variables, sizes, strict=True))
            indices = [index for index in body.indexing_exprs.values() if hasattr(index, "find")]  # not a plain number
            divisions = {division.args for index in indices for division in index.find(FloorDiv)}
            if any(steps[variable] % divisor for variable, divisor in divisions if variable in steps):
                return nodes
        whole: list[Any] = split(scheduling, nodes)
        return whole

    with mock.patch.object(CppScheduling, "try_loop_split", split_evenly):
        yield


def open_compiled(
    key: Mapping[str, Any],
    build: Callable[[], bytes],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    device: torch.device,
) -> TorchSession:
    """Return a session on a compiled program: the one in the user's cache, or what `build` makes now.

    Raises as `compile_program` and `PlanCache.get` do, and BackendUnavailableError if it cannot be loaded.
    """

    def tell_and_build() -> bytes:
        with long_wait("compiling a program with inductor"):
            return build()

    package = PlanCache().get(key, tell_and_build)
    try:
        from torch._inductor import aoti_load_package

        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "program.pt2"
            path.write_bytes(package)
            del package  # as large as the weights, twice
            # Otherwise each call asks, and waits, whether the one before has finished, which no CUDA graph can capture.
            single = device.type == "cuda"
            index = -1 if device.index is None else device.index
            run = aoti_load_package(str(path), run_single_threaded=single, device_index=index)
    # Also inductor wants a place for temporary files, when it is imported.
    except (RuntimeError, OSError) as error:
        raise BackendUnavailableError(f"a program compiled by inductor cannot be loaded: {error}") from error
    return TorchSession(_one_at_a_time(run) if single else run, inputs, outputs, device, backend="inductor")


def _one_at_a_time(run: Callable[..., Any]) -> Callable[..., Any]:
    enqueuing = threading.Lock()

    def locked(*inputs: Tensor) -> Any:
        with enqueuing:
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
        "compiler": file_sha256(Path(__file__)),
        "gpu": gpu_identity(device) if device.type == "cuda" else None,
        "cpu": {"name": name, "features": sorted(key for key, value in capabilities.items() if value is True)},
        "precision": precision,
        "inputs": [spec.to_json() for spec in inputs],
        # Some of a GPU's kernels are compiled with them; the others look at them when they run.
        "options": {"fp32": fp32_settings("cuda")} if device.type == "cuda" else {},
    }


def has_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than those of float32 on `device`."""
    if device.type == "cuda":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
