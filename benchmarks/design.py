"""What the choices in docs/design.md give: `python benchmarks/design.py --json FILE`.

Each choice is timed, or its error measured, beside its alternative in the same run. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from configurations import make_model
from machine import describe, forget_peak_memory, peak_memory
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from timing import interleaved
from torch import Tensor

from diffloss_engine.ort_session import OrtSession, import_runtime, session_options
from diffloss_export.models import load_model
from diffloss_export.onnx_write import WeightFile, write_graph
from diffloss_trt import DiffLoss
from diffloss_trt.difference import conv2d, upsample_nearest, upsampled_conv2d
from diffloss_trt.gradient import trace_gradient
from diffloss_trt.probe import Probe
from diffloss_trt.tape import Pair, Tape
from diffloss_trt.traced import TracedProgram
from diffloss_trt.unet import TappedUNet

_CPU = torch.device("cpu")
_BATCH = 4
Tensors = dict[str, Tensor]
Function = Callable[[Tensors, Tensors, Tensors], tuple[Tensor, ...]]


def _medians(steps: Mapping[str, Callable[[], object]], rounds: int = 15) -> dict[str, float]:
    """Return each step's median time in seconds."""
    for step in steps.values():
        step()
    return {name: timing.median for name, timing in interleaved(steps, rounds, _CPU).items()}


def _session(folder: Path, name: str, function: Function, inputs: Tensors, weights: Tensors) -> Callable[[], object]:
    """Return a function that runs `function` as a graph in ONNX Runtime."""
    file = f"{name}.safetensors"
    save_file(weights, folder / file)
    count = len(function(inputs, weights, {}))
    program = TracedProgram.trace(name, function, inputs, weights, {}, tuple(f"output_{i}" for i in range(count)))
    graph = write_graph(program, WeightFile.read(folder, file))
    session = OrtSession(folder / graph.file, graph.inputs, graph.outputs, device=_CPU)
    return lambda: session(inputs)


def _pair(channels: int, size: int) -> Tensors:
    return {name: torch.randn(_BATCH, channels, size, size) for name in ("value", "difference")}


def upsampling(folder: Path) -> dict[str, float]:
    """A convolution behind an upsampling, forward and back on pairs: as one on the small image over as two."""
    ratios = {}
    for channels, size in ((256, 4), (256, 8), (256, 16), (512, 16)):
        inputs = _pair(channels, size) | {"cotangent": torch.randn(_BATCH, channels, 2 * size, 2 * size)}
        weights = {"weight": torch.randn(channels, channels, 3, 3)}

        def run(inputs: Tensors, weights: Tensors, _: Tensors, *, joined: bool) -> tuple[Tensor, ...]:
            tape = Tape(None, torch.float32)
            x, weight = Pair(inputs["value"], inputs["difference"]), weights["weight"]
            if joined:
                y = upsampled_conv2d(tape, x, (2, 2), weight, None, (1, 1))
            else:
                y = conv2d(tape, upsample_nearest(tape, x, None, [2.0, 2.0]), weight, None, (1, 1), (1, 1))
            return y.value, y.difference, tape.gradient([(y, inputs["cotangent"])], x)

        steps = {
            name: _session(folder, name, lambda *args, joined=joined: run(*args, joined=joined), inputs, weights)
            for name, joined in (("joined", True), ("apart", False))
        }
        found = _medians(steps)
        ratios[f"{channels} channels, to {2 * size}x{2 * size}"] = found["apart"] / found["joined"]
    return ratios


def stacking(folder: Path) -> dict[str, float]:
    """Value and difference through one convolution of twice the batch over two convolutions."""
    ratios = {}
    for channels, size in ((256, 8), (256, 16), (128, 32)):
        inputs = _pair(channels, size)
        weights = {"weight": torch.randn(channels, channels, 3, 3), "bias": torch.randn(channels)}

        def stacked(inputs: Tensors, weights: Tensors, _: Tensors) -> tuple[Tensor, ...]:
            both = F.conv2d(torch.cat([inputs["value"], inputs["difference"]]), weights["weight"], padding=1)
            return both[:_BATCH] + weights["bias"].view(-1, 1, 1), both[_BATCH:]

        def apart(inputs: Tensors, weights: Tensors, _: Tensors) -> tuple[Tensor, ...]:
            value = F.conv2d(inputs["value"], weights["weight"], weights["bias"], padding=1)
            return value, F.conv2d(inputs["difference"], weights["weight"], padding=1)

        steps = {
            name: _session(folder, name, function, inputs, weights)
            for name, function in (("stacked", stacked), ("apart", apart))
        }
        found = _medians(steps)
        ratios[f"{channels} channels, {size}x{size}"] = found["apart"] / found["stacked"]
    return ratios


def _traced() -> tuple[TappedUNet, TracedProgram]:
    model = make_model("cifar10")
    tapped = TappedUNet(model.unet, model.schedule)
    return tapped, trace_gradient(tapped, _BATCH, (32, 32), with_noise=True)


def translation(folder: Path) -> dict[str, float]:
    """The CIFAR-10 architecture's traced gradient graph to ONNX: our own translation over PyTorch's exporter."""
    tapped, program = _traced()
    state = tapped.unet.state_dict()
    save_file({key: weight.contiguous() for key, weight in state.items()}, folder / "unet.safetensors")
    started = time.perf_counter()
    write_graph(program, WeightFile.read(folder, "unet.safetensors"))
    ours = time.perf_counter() - started
    started = time.perf_counter()
    inputs = tuple(program.inputs.values())
    torch.onnx.export(program.bind(state), inputs, folder / "torch.onnx", dynamo=True, verbose=False)
    return {"times as fast": (time.perf_counter() - started) / ours}


def memory_plan(folder: Path) -> dict[str, float]:
    """The CIFAR-10 architecture's gradient graph in ONNX Runtime, as we open it over with its memory plan.

    Written by `translation`.
    """
    found = {}
    for setting in ("ours", "planned"):
        command = [sys.executable, __file__, "--run-graph", str(folder), "--setting", setting]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        found[setting] = json.loads(lines[-1])
    return {
        "times as fast": found["planned"]["seconds"] / found["ours"]["seconds"],
        "of the memory": found["ours"]["bytes"] / found["planned"]["bytes"],
    }


class _PlannedOptions(import_runtime().SessionOptions):  # type: ignore[misc]
    """Options whose memory plan cannot be switched off."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, True if name == "enable_mem_pattern" else value)


def sleeping_threads(folder: Path) -> dict[str, float]:
    """The same graph with threads that sleep while they wait, as we open it, over threads that spin until its end.

    Alone, and beside as many busy processes as there are threads, such as a trainer's data loaders.
    """
    opened, inputs = _gradient_graph(folder)
    sessions = {"asleep": opened()}
    with mock.patch("diffloss_engine.ort_session.session_options", _spinning_options):
        sessions["spinning"] = opened()
    steps = {name: functools.partial(session, inputs) for name, session in sessions.items()}
    ratios = {}
    for where, count in (("alone", 0), ("beside busy processes", torch.get_num_threads())):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            found = _medians(steps)
        finally:
            for process in busy:
                process.kill()
                process.wait()
        ratios[f"{where}, times as fast"] = found["spinning"] / found["asleep"]
    return ratios


def _spinning_options(runtime: ModuleType) -> Any:
    options = session_options(runtime)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between two runs none spin
    return options


def _gradient_graph(folder: Path) -> tuple[Callable[[], OrtSession], Tensors]:
    """Return what opens the graph that `translation` has written the weights of, and inputs for it."""
    _, program = _traced()
    inputs = {name: torch.randn(tensor.shape) for name, tensor in program.inputs.items()}
    inputs["timesteps"] = torch.full((_BATCH,), 100.0)
    graph = write_graph(program, WeightFile.read(folder, "unet.safetensors"))
    return functools.partial(OrtSession, folder / graph.file, graph.inputs, graph.outputs, device=_CPU), inputs


def _run_graph(folder: Path, setting: str) -> None:
    opened, inputs = _gradient_graph(folder)
    held = forget_peak_memory()
    if setting == "ours":
        session = opened()
    else:
        with (
            mock.patch("onnxruntime.SessionOptions", _PlannedOptions),
            mock.patch("diffloss_engine.ort_session._trim_heap"),
        ):
            session = opened()
    seconds = _medians({"run": lambda: session(inputs)}, rounds=7)["run"]
    print(json.dumps({"seconds": seconds, "bytes": peak_memory() - held}))


def first_convolution(_: Path) -> dict[str, float]:
    """The built-in prior at small timesteps: the gradient's error with the first convolution in fp32, over without."""
    timesteps = torch.tensor([0, 1, 2, 4, 8, 16])
    probe = Probe.make(3, (32, 32), timesteps, [35.0] * len(timesteps))
    ratios = {}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        model = load_model("builtin")
        tapped = TappedUNet(model.unet, model.schedule).to(dtype)
        programs = {}
        for place, channels in (("fp32", 4), ("half", 0)):
            with mock.patch("diffloss_trt.difference.IMAGE_CHANNELS", channels):
                program = trace_gradient(tapped, len(timesteps), (32, 32), with_noise=True)
            programs[place] = program.bind(tapped.unet.state_dict())
        ones = torch.ones(len(timesteps))
        images = (probe.restored.float(), probe.target.float(), probe.noise.float())
        with torch.no_grad():
            found = {place: run(*images, timesteps.float(), ones, ones)[-1] for place, run in programs.items()}
        loss = DiffLoss.from_unet(
            tapped.unet.double(), model.schedule, naturalness_weight=1, semantic_weight=1, value_range=(-1, 1)
        )
        leaf = probe.restored.requires_grad_()
        total = loss.terms(leaf, probe.target, timesteps=timesteps, noise=probe.noise).total
        (expected,) = torch.autograd.grad(total.sum(), leaf)
        errors = {place: float((gradient - expected).norm() / expected.norm()) for place, gradient in found.items()}
        ratios[f"{name}, of the error"] = errors["fp32"] / errors["half"]
    return ratios


CHOICES: dict[str, Callable[[Path], dict[str, float]]] = {
    "a convolution behind an upsampling as one on the small image": upsampling,
    "value and difference through one convolution of twice the batch": stacking,
    "own translation to ONNX instead of torch.onnx.export": translation,
    "ONNX Runtime without its memory plan, freed memory given back": memory_plan,
    "ONNX Runtime's threads asleep while they wait": sleeping_threads,
    "the first convolution in fp32": first_convolution,
}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    parser.add_argument("--run-graph", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.run_graph:
        _run_graph(args.run_graph, args.setting)
        return
    with tempfile.TemporaryDirectory() as folder:
        choices = {name: measure(Path(folder)) for name, measure in track(CHOICES.items(), "measuring")}
    result = {**describe(), "choices": choices}
    table = Table("choice", "", "ratio", title=str(result["device"]))
    for name, ratios in choices.items():
        for what, ratio in ratios.items():
            table.add_row(name, what, f"{ratio:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
