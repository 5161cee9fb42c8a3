"""What one step of the loss costs on this machine: ours beside eager and compiled PyTorch."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import first_line
from diffloss_engine.fp32_precision import rounds_convolutions
from diffloss_engine.inductor import has_bfloat16
from diffloss_trt import DiffLoss
from diffloss_trt.contract import PRECISIONS, read_channels, read_schedule
from diffloss_trt.evaluators import EagerEvaluator
from diffloss_trt.probe import Probe
from diffloss_trt.tolerances import PLAIN_DB
from diffloss_trt.unet import TappedUNet, reload_unet

_ROUNDS = 7
_WARM_UPS = 2
EAGER = "eager PyTorch fp32"

Step = Callable[[], Tensor]


class _OnTape(EagerEvaluator):
    # In half precision too: what its gradient loses there takes no time, and a forward pass more would.
    on_tape = True


@dataclass(frozen=True)
class BenchRow:
    """One way to compute value and gradient of one batch.

    `speedup_vs_eager` is None where eager PyTorch was left out. `peak_memory_bytes` is what it takes beyond weights;
    None where that is not known, as of ONNX Runtime's own memory on a GPU.
    """

    name: str
    median_ms: float
    speedup_vs_eager: float | None
    peak_memory_bytes: int | None


def bench_bundle(
    bundle: Bundle,
    *,
    backend: str = "auto",
    device: torch.device,
    on_stage: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return {device, torch, rows, notes}: medians over interleaved rounds, at the bundle's batch size and resolution.

    A step is the loss's value and its gradient with respect to the restored images, both terms, paper weights. A row of
    PyTorch's that fails, for want of memory or of a C++ compiler for example, is left out, and a note says so.
    """
    on_stage("checking hashes")
    bundle.verify_hashes()
    on_stage("loading the bundle")
    ways = _ways(bundle, backend, device)
    *peers, ours = ways
    steps, notes = {ours: ways[ours]()}, []

    @contextmanager
    def unless_it_fails(name: str) -> Iterator[None]:
        gc.collect()  # a compiled UNet is part of a reference cycle, also one that was left out
        try:
            yield
        except RuntimeError as error:
            if name == ours:
                raise
            steps.pop(name, None)
            notes.append(f"{name} is left out: {first_line(error)}")

    # Ours is first, so that where memory is short it is a peer that goes without. All are warmed up with the weights of
    # all in place, as they are in the rounds.
    for name in peers:
        with unless_it_fails(name):
            on_stage(f"loading {name}")
            steps[name] = ways[name]()
    for name in list(steps):
        with unless_it_fails(name):
            on_stage(f"warming up {name}")
            for _ in range(_WARM_UPS):
                steps[name]()
    steps = {name: steps[name] for name in ways if name in steps}
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {name: _peak_memory(step, device) if _tells(name, device) else None for name, step in steps.items()}
    for round_number in range(_ROUNDS):
        on_stage(f"round {round_number + 1} of {_ROUNDS}")
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    eager = medians.get(eager_name(device))
    rows = [
        BenchRow(name, median, None if eager is None else eager / median, peaks[name])
        for name, median in medians.items()
    ]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "rows": [asdict(row) for row in rows], "notes": notes}


def _ways(bundle: Bundle, backend: str, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Return what loads each way to compute a step, by name; ours, which is loaded already, is the last."""
    ours = DiffLoss.load(bundle.path, backend=backend, device=device, value_range=(-1.0, 1.0))
    schedule = read_schedule(bundle)
    timesteps = torch.linspace(0, len(schedule) - 1, bundle.batch_size).round().long()
    probe = Probe.make(read_channels(bundle), bundle.resolution, timesteps, [PLAIN_DB] * bundle.batch_size)
    target, restored, noise = (
        tensor.to(device, torch.float32) for tensor in (probe.target, probe.restored, probe.noise)
    )
    timesteps = timesteps.to(device)

    def step(loss: DiffLoss) -> Step:
        def run() -> Tensor:
            leaf = restored.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(leaf, target, timesteps=timesteps, noise=noise), leaf)
            return gradient

        return run

    def peer(dtype: torch.dtype, *, compiled: bool) -> Step:
        unet = TappedUNet(reload_unet(bundle, dtype, device), schedule)
        nn.utils.convert_conv2d_weight_memory_format(unet.unet, torch.channels_last)
        if compiled:
            unet.features = torch.compile(unet.features)  # type: ignore[method-assign]
        return step(DiffLoss(_OnTape(unet), value_range=(-1.0, 1.0)))

    # In fp16, and where a CPU does not multiply bf16, it would be slower there than in fp32.
    as_stored = device.type == "cuda" or (bundle.precision == "bf16" and has_bfloat16(device))
    dtype = PRECISIONS[bundle.precision] if as_stored else torch.float32
    return {
        eager_name(device): partial(peer, torch.float32, compiled=False),
        f"torch.compile {str(dtype).removeprefix('torch.')}": partial(peer, dtype, compiled=True),
        f"diffloss-trt {ours.backend}, {ours.backward}, {bundle.precision}": partial(step, ours),
    }


def eager_name(device: torch.device) -> str:
    """Return what the row of eager PyTorch is called: on a GPU its fp32 is not what it says (see docs/gpu.md)."""
    return f"{EAGER}, convolutions in TF32" if rounds_convolutions(device) else EAGER


def _tells(name: str, device: torch.device) -> bool:
    """Whether PyTorch knows what a way's step takes; on a GPU ONNX Runtime allocates for itself, and keeps it."""
    return device.type != "cuda" or "onnxruntime" not in name


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(step: Step, device: torch.device) -> int | None:
    """Return the memory that one step needs beyond what is held already; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - held
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the peak back to what is resident now
    except OSError:
        return None
    held = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - held)


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
