"""The command line: parses, calls one function, prints. Heavy libraries are imported when a command runs."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from diffloss_engine.trt_profile import Profile
    from diffloss_export.verify import Report

FAILED_CHECK, WRONG_INPUT = 1, 2
_ENDED_BY = 128  # and the number of a signal, as shells say it
_MOST_WORKSPACE = (2**63 - 1) // 2**20  # in MiB: TensorRT takes bytes, in 64 bits


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Return 0 when done, 1 when a check failed, 2 for wrong usage or input.

    Where a signal ended it, that is 128 plus the signal's number: 130 for Ctrl-C.
    """
    _open_closed_streams()
    _print_any_text()
    try:
        status = _run(_parser().parse_args(argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read the output has had enough.
        _drop_output()
        return _ENDED_BY + signal.SIGPIPE
    except OSError as error:
        _drop_output()
        print(f"diffloss-export: {error}", file=sys.stderr)
        return WRONG_INPUT


def _run(args: argparse.Namespace) -> int:
    try:
        # It must say what is wrong where nothing can be imported.
        return _doctor(args) if args.run is _doctor else _run_with_torch(args)
    except KeyboardInterrupt as interrupt:
        # What `build` had finished before stays in the cache.
        written = ", no bundle was written" if args.run is _onnx and not os.path.lexists(args.output) else ""
        print(f"diffloss-export: interrupted{written}", file=sys.stderr)
        return _ENDED_BY + next(iter(interrupt.args), signal.SIGINT)


def _run_with_torch(args: argparse.Namespace) -> int:
    # Brings torch with it, which takes a second or two that no help text and no wrong option should wait for.
    from diffloss_engine.errors import DiffLossError, IntegrityError, ParityError

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except DiffLossError as error:
        print(f"diffloss-export: {error}", file=sys.stderr)
        return FAILED_CHECK if isinstance(error, ParityError | IntegrityError) else WRONG_INPUT
    except (MemoryError, RuntimeError) as error:
        # PyTorch has a class for this, OutOfMemoryError, on a GPU alone.
        if "MemoryError" not in type(error).__name__ and "can't allocate memory" not in str(error):
            raise
        print(f"diffloss-export: there is not enough memory: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT


def _open_closed_streams() -> None:
    """Open the standard streams that the process was started without (`2>&-`), to nowhere.

    Python has None in their places, for which `print` takes stdout, and their numbers go to the files opened next: of a
    bundle, into which a library would then write its messages. The lowest number that is free is the stream's own.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (it stays open)


def _print_any_text() -> None:
    """Let stdout write what its encoding does not have, such as a letter of a path, as Python's stderr does: escaped.

    What handles it already, as surrogateescape does in the C locale, is left alone.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Write what is left of the output nowhere, if it cannot be written: Python tries it once more when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Version(argparse.Action):
    """Print the version; looked up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from diffloss_trt import __version__

        print(parser.prog, __version__)
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit, after what was printed has been written: when Python ends, nobody could say that it was not."""
        sys.stdout.flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        """Exit with one line, as every other error of the command does."""
        self.exit(WRONG_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="diffloss-export", description="Turn diffusion UNets into training losses that run on inference engines."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, does: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")

    onnx = add_command("onnx", "export a diffusion UNet to a bundle and check it against eager PyTorch")
    onnx.add_argument(
        "model",
        metavar="MODEL",
        help="'builtin', a diffusers folder, a Hugging Face Hub id, or a guided-diffusion checkpoint (.pt)",
    )
    onnx.add_argument(
        "-o",
        "--output",
        type=_path,
        required=True,
        metavar="BUNDLE",
        help="folder to write; it must not exist yet (see --overwrite)",
    )
    onnx.add_argument(
        "--resolution", type=_resolution, metavar="N|HxW", help="image size in pixels (default: the UNet's own)"
    )
    onnx.add_argument(
        "--batch-size", type=int, default=8, metavar="B", help="images per call of the graphs (default: 8)"
    )
    onnx.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default="fp32",
        help="precision of weights and activations (default: fp32)",
    )
    onnx.add_argument(
        "--no-gradient",
        dest="gradient",
        action="store_false",
        help="leave out the gradient graphs; PyTorch's backward pass then computes the gradient",
    )
    onnx.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    onnx.add_argument(
        "--adm-flags",
        type=_path,
        metavar="FLAGS.json",
        help="JSON file of the guided-diffusion flags of a .pt (default: those of 256x256_diffusion_uncond)",
    )
    onnx.add_argument("--sha256", metavar="HEX", help="SHA-256 that the .pt must have")
    onnx.add_argument("--class-label", type=int, metavar="N", help="class to use for a class-conditional UNet")
    onnx.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read the pickled .bin weights of a diffusers folder without safetensors",
    )
    onnx.add_argument("--overwrite", action="store_true", help="replace the bundle that is already there")
    onnx.set_defaults(run=_onnx)

    build = add_command(
        "build", "compile a bundle's graphs ahead of time, with TensorRT or PyTorch's compiler, into the plan cache"
    )
    build.add_argument(
        "--backend",
        choices=("tensorrt", "tensorrt-rtx", "inductor"),
        default="tensorrt",
        help="which backend to build for (default: tensorrt)",
    )
    build.add_argument("--device", help="for inductor: cpu, cuda or cuda:N (default: the GPU if there is one)")
    build.add_argument("--workspace", type=int, metavar="MIB", help="limit on the scratch memory of a plan, in MiB")
    build.add_argument(
        "--optimization-level", type=int, metavar="N", help="0 to 5; higher levels search longer for fast kernels"
    )
    build.add_argument(
        "--timing-cache", type=_path, metavar="FILE", help="file of kernel timings to reuse and update, with tensorrt"
    )
    build.add_argument(
        "--hardware-compatibility",
        choices=("ampere-plus", "same-compute-capability"),
        help="build plans that also run on other GPUs, at some cost in speed",
    )
    build.add_argument(
        "--version-compatible", action="store_true", help="build plans that also run in later versions of TensorRT"
    )
    build.add_argument(
        "--compute-capability",
        action="append",
        default=[],
        metavar="N.N",
        help="compute capability to build for, with tensorrt-rtx; may be repeated (default: all from 8.0 on)",
    )
    build.set_defaults(run=_build)
    verify = add_command("verify", "check a bundle's loss and gradient against eager PyTorch in float64")
    verify.add_argument("--json", action="store_true", help="print one JSON object")
    verify.set_defaults(run=_verify)
    bench = add_command("bench", "time a step on this machine: the bundle beside eager and compiled PyTorch")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.set_defaults(run=_bench)
    profile = add_command("profile", "time each TensorRT plan on a GPU, as a whole and layer by layer")
    profile.add_argument(
        "--backend",
        choices=("tensorrt", "tensorrt-rtx"),
        default="tensorrt",
        help="whose plans to time (default: tensorrt)",
    )
    profile.add_argument(
        "--runs", type=int, default=100, metavar="N", help="how many times to run each plan (default: 100)"
    )
    profile.add_argument(
        "-o",
        "--output",
        type=_path,
        metavar="PICTURE",
        help="also draw where the time goes, to a file such as time.png",
    )
    profile.add_argument("--json", action="store_true", help="print one JSON object")
    profile.set_defaults(run=_profile)
    explain = add_command("explain", "draw where in a restored image the loss pushes, and how much")
    explain.add_argument("--restored", type=_path, required=True, metavar="IMAGE", help="image that a network restored")
    explain.add_argument("--target", type=_path, required=True, metavar="IMAGE", help="ground truth of the same size")
    explain.add_argument(
        "-o", "--output", type=_path, required=True, metavar="PICTURE", help="file to draw to, such as out.png"
    )
    explain.add_argument(
        "--bundle",
        type=_path,
        metavar="BUNDLE",
        help="whose loss to use (default: the built-in prior's, in eager PyTorch)",
    )
    explain.add_argument(
        "--naturalness-weight", type=float, metavar="W", help="weight of the naturalness term (default: 1e-3)"
    )
    explain.add_argument(
        "--semantic-weight", type=float, metavar="W", help="weight of the semantic term (default: 1e-6)"
    )
    explain.add_argument(
        "--draws", type=int, default=8, metavar="N", help="number of (timestep, noise) draws (default: 8)"
    )
    explain.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    explain.add_argument("--json", action="store_true", help="print the terms as one JSON object")
    explain.set_defaults(run=_explain)
    inspect = add_command("inspect", "print what a bundle holds")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=_inspect)
    doctor = add_command(
        "doctor",
        "report what this machine has, which backend 'auto' chooses and why, and what to install for more speed",
    )
    doctor.add_argument(
        "bundle",
        nargs="?",
        type=_path,
        metavar="BUNDLE",
        help="also load this bundle, which builds whatever its backend needs",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.set_defaults(run=_doctor)
    for command in (build, verify, bench, profile, inspect):
        command.add_argument("bundle", type=_path, metavar="BUNDLE", help="folder that 'diffloss-export onnx' wrote")
    automatic = {
        verify: "ONNX Runtime, or PyTorch for a bf16 bundle on a CPU",
        bench: "the first that works here",
        explain: "the first that works here",
    }
    for command, chosen in automatic.items():
        command.add_argument(
            "--backend",
            choices=("auto", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-tensorrt", "inductor", "torch"),
            default="auto",
            help=f"what runs the bundle (default: auto, which is {chosen})",
        )
        command.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    return parser


def _path(text: str) -> Path:
    """Take a path; an empty one, as of a shell's variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a resolution such as 256 or 192x256")
    return int(match[1]), int(match[2] or match[1])


def _onnx(args: argparse.Namespace) -> int:
    from diffloss_engine.bundle_writer import BundleWriter
    from diffloss_export.model_files import read_json
    from diffloss_export.models import load_model
    from diffloss_export.pipeline import check_request, export_bundle

    # What is refused shall be so before the model is loaded.
    BundleWriter(args.output, overwrite=args.overwrite)
    check_request(args.batch_size, args.precision)
    with _stages() as on_stage:
        on_stage(f"loading {args.model}")
        model = load_model(
            args.model,
            revision=args.revision,
            adm_flags=None if args.adm_flags is None else read_json(args.adm_flags),
            sha256=args.sha256,
            class_label=args.class_label,
            allow_pickle=args.allow_pickle,
        )
        bundle, report = export_bundle(
            model,
            args.output,
            resolution=args.resolution,
            batch_size=args.batch_size,
            precision=args.precision,
            gradient=args.gradient,
            overwrite=args.overwrite,
            on_stage=on_stage,
        )
    for note in (*model.notes, *report.notes):
        print(f"note: {note}")
    worst = report.worst
    print(
        f"{bundle.path}: {len(bundle.graphs)} graphs, {bundle.precision}, "
        f"{bundle.resolution[0]}x{bundle.resolution[1]}, batch {bundle.batch_size}; "
        f"replayed on {report.backend}, worst difference from float64 eager PyTorch: "
        f"{worst.error:.2g} ({worst.check}, {worst.quantity}; allowed {worst.tolerance:.2g})"
    )
    return 0


def _build(args: argparse.Namespace) -> int:
    from diffloss_engine.bundle import Bundle
    from diffloss_engine.errors import InputError
    from diffloss_engine.plan_cache import PlanCache
    from diffloss_engine.trt_build import BuildOptions
    from diffloss_export.build import build_bundle, compile_bundle
    from diffloss_trt.inputs import choose_device

    if args.workspace is not None and not 1 <= args.workspace <= _MOST_WORKSPACE:
        raise InputError(f"--workspace is {args.workspace} MiB; expected 1 to {_MOST_WORKSPACE}")
    options = BuildOptions(
        workspace_bytes=None if args.workspace is None else args.workspace * 2**20,
        optimization_level=args.optimization_level,
        hardware_compatibility=args.hardware_compatibility,
        version_compatible=args.version_compatible,
        compute_capabilities=tuple(args.compute_capability),
    )
    inductor = args.backend == "inductor"
    if inductor and (options != BuildOptions() or args.timing_cache):
        raise InputError("inductor takes none of the options of TensorRT's builder")
    if not inductor and args.device:
        raise InputError("--device is for inductor; TensorRT builds for the current GPU")
    bundle, cache = Bundle.open(args.bundle), PlanCache()
    with _stages() as on_stage:
        plans = (
            compile_bundle(bundle, device=choose_device(args.device), cache=cache, on_stage=on_stage)
            if inductor
            else build_bundle(
                bundle,
                flavour=args.backend,
                options=options,
                timing_cache=args.timing_cache,
                cache=cache,
                on_stage=on_stage,
            )
        )
    for plan in plans:
        how = "in the cache" if plan.seconds is None else f"built in {plan.seconds:.1f} s"
        print(f"{plan.graph}: {plan.bytes / 2**20:.1f} MiB, {how}")
    print(f"the plans are in {cache.folder}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from diffloss_engine.bundle import Bundle
    from diffloss_export.verify import verify_bundle
    from diffloss_trt.inputs import choose_device

    bundle = Bundle.open(args.bundle)
    with _stages() as on_stage:
        report = verify_bundle(bundle, backend=args.backend, device=choose_device(args.device), on_stage=on_stage)
    if args.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        _print_report(report)
    report.raise_for_failure()
    return 0


def _print_report(report: Report) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    # On a narrow terminal rich would cut the exponents off.
    words = [Column(name, overflow="fold") for name in ("check", "quantity")]
    numbers = [Column(name, no_wrap=True) for name in ("error", "allowed", "")]
    table = Table(*words, *numbers, title=f"{report.backend} against float64 eager PyTorch")
    for row in report.rows:
        table.add_row(
            row.check, row.quantity, f"{row.error:.2g}", f"{row.tolerance:.2g}", "ok" if row.passed else "FAILED"
        )
    Console().print(table)
    for note in report.notes:
        print(f"note: {note}")


def _inspect(args: argparse.Namespace) -> int:
    from diffloss_engine.bundle import Bundle
    from diffloss_export.build import kept_plans

    bundle = Bundle.open(args.bundle)
    bundle.verify_hashes()
    description = bundle.description() | {"plans": kept_plans(bundle)}
    if args.json:
        print(json.dumps(description, indent=2, sort_keys=True))
        return 0
    unet = bundle.unet
    print(f"{bundle.path}: format {bundle.format_version}, all hashes match")
    print(f"  {unet['class']}, {unet['parameters']:,} parameters, sha256 {unet['sha256'][:16]}...")
    print(f"  {bundle.resolution[0]}x{bundle.resolution[1]}, batch {bundle.batch_size}, {bundle.precision}")
    for graph in bundle.graphs.values():
        print(f"  graph {graph.name}: {graph.nodes} nodes")
        for kind, specs in (("in", graph.inputs), ("out", graph.outputs)):
            for spec in specs:
                print(f"    {kind:3} {spec.name} {spec.dtype} {list(spec.shape)}")
        for plan in description["plans"].get(graph.name, []):
            what = f"{plan['flavour']} {plan['version']} for {_processor(plan)}, {plan['bytes'] / 2**20:.1f} MiB"
            unused = ", made by another version of this package and not used" if plan["outdated"] else ""
            print(f"    plan of {what}{unused}: {plan['path']}")
    return 0


def _processor(plan: dict[str, Any]) -> str:
    """Return what a plan runs on, in words."""
    if plan["gpu"]:
        return str(plan["gpu"]["name"])
    if plan["cpu"]:
        return str(plan["cpu"]["name"])
    return f"compute capability {', '.join(plan['options']['compute_capabilities']) or '8.0 and more'}"


def _bench(args: argparse.Namespace) -> int:
    from diffloss_engine.bundle import Bundle
    from diffloss_export.bench import bench_bundle
    from diffloss_trt.inputs import choose_device

    bundle = Bundle.open(args.bundle)
    device = choose_device(args.device)
    with _stages() as on_stage:
        result = bench_bundle(bundle, backend=args.backend, device=device, on_stage=on_stage)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{result['device']}, torch {result['torch']}, batch {bundle.batch_size}, value and gradient of one step:")
    for row in result["rows"]:
        memory = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**20:8.0f} MiB"
        speedup = "" if row["speedup_vs_eager"] is None else f"{row['speedup_vs_eager']:5.2f}x"
        print(f"  {row['name']:48} {row['median_ms']:9.1f} ms  {speedup:6} {memory}")
    for note in result["notes"]:
        print(f"note: {note}")
    return 0


def _profile(args: argparse.Namespace) -> int:
    from diffloss_engine.bundle import Bundle
    from diffloss_export.profile import check_output, draw, profile_bundle, to_json

    bundle = Bundle.open(args.bundle)
    if args.output:
        check_output(args.output, bundle)  # what is missing is to be known before the plans are run
    with _stages() as on_stage:
        profiles = profile_bundle(bundle, flavour=args.backend, runs=args.runs, on_stage=on_stage)
    if args.json:
        print(json.dumps(to_json(profiles), indent=2))
    else:
        _print_profiles(profiles)
    if args.output:  # last: what was measured is not lost with it
        draw(profiles, args.output)
    return 0


def _print_profiles(profiles: dict[str, Profile]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from diffloss_engine.trt_profile import largest
    from diffloss_export.profile import PERCENTILES, SHOWN

    for name, found in profiles.items():
        percentiles = ", ".join(f"p{percent} {found.percentile(percent):.3f}" for percent in PERCENTILES)
        table = Table("layer", "ms", title=f"{name}, ms a run: {percentiles}")
        for layer, ms in largest(found.layers, SHOWN):
            table.add_row(Text(layer), f"{ms:.3f}")
        Console().print(table)


def _doctor(args: argparse.Namespace) -> int:
    from diffloss_export.doctor import examine, print_report

    with _lasting_interrupt() as check_interrupt:
        report = examine(args.bundle, _stage_lines(check_interrupt))
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    status: int = report.get("bundle", {}).get("status", 0)
    return status


def _explain(args: argparse.Namespace) -> int:
    from diffloss_engine.bundle import Bundle
    from diffloss_export.explain import (
        check_draws,
        check_output,
        draw,
        explain,
        load_loss,
        read_images,
        to_json,
    )
    from diffloss_export.pictures import write_picture
    from diffloss_trt.contract import read_channels
    from diffloss_trt.inputs import choose_device

    bundle = None if args.bundle is None else Bundle.open(args.bundle)
    check_output(args.output, args.restored, args.target, bundle=bundle)
    check_draws(args.draws, args.seed)
    restored, target = read_images(args.restored, args.target, 3 if bundle is None else read_channels(bundle))
    with _stages() as on_stage:
        on_stage("loading")
        weights = {"naturalness_weight": args.naturalness_weight, "semantic_weight": args.semantic_weight}
        given = {name: weight for name, weight in weights.items() if weight is not None}
        loss, tile = load_loss(bundle, backend=args.backend, device=choose_device(args.device), **given)
        explanation = explain(loss, restored, target, tile=tile, draws=args.draws, seed=args.seed, on_stage=on_stage)
    if args.json:
        print(json.dumps(to_json(explanation), indent=2))
    else:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in explanation.terms.items())
        print(f"{args.output}: {terms}, means over {args.draws} timesteps, tiles of {tile[0]}x{tile[1]}")
    write_picture(args.output, draw(explanation, restored).save)  # last: what was computed is not lost with it
    return 0


@contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """Show on stderr the step that runs and for how long; on a terminal in a line that goes away."""
    from diffloss_engine.progress import line, spinner, stderr_console, waits_shown_by

    # What libraries warn about their own insides is not for the user of a command.
    with warnings.catch_warnings(), _lasting_interrupt() as check_interrupt:
        warnings.simplefilter("ignore")
        if not stderr_console().is_terminal:
            tell = _stage_lines(check_interrupt)

            @contextmanager
            def tell_wait(what: str) -> Iterator[None]:
                tell(what)
                yield

            with waits_shown_by(tell_wait):
                yield tell
            return
        with spinner() as progress, waits_shown_by(line):
            task = progress.add_task("starting", total=None)

            def show(stage: str) -> None:
                check_interrupt()
                progress.update(task, description=stage)

            yield show


def _stage_lines(check_interrupt: Callable[[], None]) -> Callable[[str], None]:
    """Return what prints a line on stderr for each step that begins, with the seconds since now."""
    started = time.monotonic()

    def tell(stage: str) -> None:
        check_interrupt()
        print(f"[{time.monotonic() - started:6.1f} s] {stage}", file=sys.stderr, flush=True)

    return tell


@contextmanager
def _lasting_interrupt() -> Iterator[Callable[[], None]]:
    """Give a function that raises KeyboardInterrupt if Ctrl-C was pressed and the exception got lost.

    Python drops an exception that is raised in a weak reference's callback or a finaliser, and between two graphs
    torch spends its time in thousands of those. An error behind it counts as KeyboardInterrupt too. SIGTERM and SIGHUP
    do as Ctrl-C does. What is ignored stays ignored, as Ctrl-C is in what a script starts in the background.
    """
    pressed: list[int] = []

    def press(number: int, _: object) -> NoReturn:
        pressed.append(number)
        raise KeyboardInterrupt(number)

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt(pressed[0])

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, press)
    try:
        yield check
    except Exception as error:
        if pressed:  # a library may take it for its own failure
            raise KeyboardInterrupt(pressed[0]) from error
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
