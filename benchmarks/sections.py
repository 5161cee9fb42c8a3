"""Results laid out in Markdown, a benchmark at a time."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from targets import TARGETS, Row, Targets

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from results import markdown_table

Content = dict[str, Any]

_TITLES: Final = {
    "cifar10": "google/ddpm-cifar10-32",
    "celebahq256": "google/ddpm-celebahq-256",
    "adm256": "the paper's ADM-256",
}
_RUNTIMES: Final = {
    "torch": "PyTorch",
    "onnxruntime": "ONNX Runtime",
    "onnxruntime-gpu": "ONNX Runtime",
    "tensorrt": "TensorRT",
}
_BUILDER: Final = "tensorrt-rtx-cu13"
# Numbers of ranks for which the measured times are extrapolated.
_RANKS: Final = (1, 2, 4, 8, 16, 64)


def joined(parts: Iterable[str]) -> str:
    """Return paragraphs, lists, tables and headings as one text, its prose wrapped."""
    return "\n\n".join(_wrapped(part.strip()) for part in parts) + "\n"


def _wrapped(part: str) -> str:
    if part.startswith(("#", "|", "!")):
        return part
    indent = "  " if part.startswith("- ") else ""
    return "\n".join(
        textwrap.fill(line, 120, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
        for line in part.splitlines()
    )


def title(configuration: str) -> str:
    """Return the name by which an architecture is known."""
    return _TITLES.get(configuration, configuration)


def _machine(content: Content) -> str:
    versions = [f"{_RUNTIMES[name]} {version}" for name, version in content["versions"].items() if name in _RUNTIMES]
    threads = f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}"
    return ", ".join([content["device"], threads, *versions, content["date"]])


def _mebibytes(row: Row) -> str:
    return f"{row['peak_memory_bytes'] / 2**20:.0f}"


def _time(row: Row) -> str:
    median = f"{row['median_ms']:.4g}"
    if "quartiles_ms" not in row:
        return median
    first, third = row["quartiles_ms"]
    return f"{median} ({first:.4g} to {third:.4g})"


def _picture(text: str, path: str | None) -> list[str]:
    return [f"![{text}]({path})"] if path else []


# A step of the loss


def loss_step(content: Content, picture: str | None = None, *, brief: bool = False) -> list[str]:
    """Lay out the rows of one batch size beside the targets.

    Unless it is to be brief, also speeds over batch sizes, and what was not run.
    """
    rows, name = shown_rows(content), content["configuration"]
    distances = list(rows[0]["gradient_error"])
    errors = f"error, {' / '.join(distances)} dB"
    header = ["", "ms", "images/s", "times eager", "times compile", "of matmul rate", "MiB", errors]
    lines = [
        [
            label(row),
            _time(row),
            f"{row['images_per_s']:.3g}",
            *(f"{row[name]:.2f}x" if row[name] else "" for name in ("times_eager", "times_compile")),
            f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else "",
            _mebibytes(row),
            " / ".join(f"{row['gradient_error'][decibels]:.1e}" for decibels in distances),
        ]
        for row in rows
    ]
    return [
        f"## A step of the loss: {title(name)}{_kind_of_cpu(content)}",
        f"{content['parameters'] / 1e6:.1f} M parameters, batch {rows[0]['batch_size']}; medians and "
        f"quartiles; {_machine(content)}; `python benchmarks/loss_step.py {name}`.",
        markdown_table(header, lines),
        *_picture("Speed and gradient error of each row", picture),
        *([] if brief else _by_batch_size(content)),
        *([] if brief else _not_run(content)),
        *_held_against_targets(content, rows),
    ]


# By what a CPU multiplies with: on that the choice of a precision depends. The first that it has.
_KINDS_OF_CPU: Final = {
    "amx_bf16": ", on a CPU with AMX",
    "avx512_bf16": ", on a CPU with AVX-512 BF16",
    "avx512f": ", on a CPU with AVX-512, without bf16",
    "avx2": ", on a CPU with AVX2, without bf16",
    "": ", on a CPU",
}


def _kind_of_cpu(content: Content) -> str:
    """Return what the heading says of a CPU."""
    if content["device_type"] != "cpu":
        return ""
    return next(kind for feature, kind in _KINDS_OF_CPU.items() if feature in content["device"])


def shown_rows(content: Content) -> list[Row]:
    """Return the rows that were run, of the batch size that the targets are for, or else of the largest."""
    run = [row for row in content["rows"] if "not_run" not in row]
    targets, sizes = _targets(content), {row["batch_size"] for row in run}
    batch_size = targets.batch_size if targets and targets.batch_size in sizes else max(sizes)
    return [row for row in run if row["batch_size"] == batch_size]


def label(row: Row) -> str:
    """Name a row."""
    return f"{'semantic term alone: ' if row['terms'] == 'semantic' else ''}{row['way']}, {row['precision']}"


def _targets(content: Content) -> Targets | None:
    place = (content["configuration"], content["device_type"])
    return next((targets for targets in TARGETS if (targets.configuration, targets.device_type) == place), None)


def _by_batch_size(content: Content) -> list[str]:
    run = [row for row in content["rows"] if "not_run" not in row]
    sizes = sorted({row["batch_size"] for row in run})
    if len(sizes) == 1:
        return []
    speeds = {(label(row), row["batch_size"]): f"{row['images_per_s']:.3g}" for row in run}
    labels = dict.fromkeys(label(row) for row in run)
    lines = [[name, *(speeds.get((name, size), "") for size in sizes)] for name in labels]
    return ["Images/s over the batch size:", markdown_table(["", *(str(size) for size in sizes)], lines)]


def _not_run(content: Content) -> list[str]:
    reasons: dict[str, dict[str, dict[str, None]]] = {}
    for row in content["rows"]:
        if "not_run" in row:
            reasons.setdefault(row["not_run"], {}).setdefault(row["way"], {})[row["precision"]] = None
    lines = []
    for reason, found in reasons.items():
        names = "; ".join(f"{way} ({', '.join(precisions)})" for way, precisions in found.items())
        lines.append(f"- {names}: {reason}.\n")
    return ["Not run:", "".join(lines)] if lines else []


def _held_against_targets(content: Content, rows: list[Row]) -> list[str]:
    targets = _targets(content)
    if targets is None:
        return []
    if rows[0]["batch_size"] != targets.batch_size:
        return [f"The targets are for batch {targets.batch_size}, which was not run."]
    lines = []
    for target in targets.targets:
        value = target.measured(rows)
        bound = f"{'<=' if target.at_most else '>='} {target.bound:g}"
        verdict = "not measured" if value is None else "met" if target.is_met(value) else "**missed**"
        lines.append([target.what, bound, "" if value is None else f"{value:.3g}", verdict])
    return ["Targets:", markdown_table(["", "target", "measured", ""], lines)]


# Where the time goes


def hot_spots(content: Content) -> list[str]:
    """Lay out the convolutions' part in a step."""
    header = ["", "ms", "convolutions' share", "their GFLOP/s", "of matmul rate", "speed-up if the rest were free"]
    lines = []
    for row in content["rows"]:
        speed, share = row["convolution_flops"] / row["convolution_ms"] * 1e3, row["convolution_ms"] / row["ms"]
        of_ceiling = f"{speed / row['ceiling_flops_per_s']:.0%}"
        cells = (f"{row['ms']:.4g}", f"{share:.0%}", f"{speed / 1e9:.0f}", of_ceiling, f"{1 / share:.2f}")
        lines.append([f"{row['way']}, {row['precision']}", *cells])
    return [
        f"## Where the time goes: {title(content['configuration'])}{_kind_of_cpu(content)}",
        f"Profile of a step of the loss; {_machine(content)}; "
        f"`python benchmarks/hot_spots.py {content['configuration']}`.",
        markdown_table(header, lines),
        "The last column is the most a row could gain: the rest is everything but its convolutions.",
    ]


def plan_traffic(content: Content) -> list[str]:
    """Lay out what the kernels of each plan move, relative to a forward pass."""
    moved = {graph["graph"]: sum(graph["bytes"].values()) for graph in content["graphs"]}
    forward = moved["encoder"] + moved["noise_head"]
    header = ["graph", "kernels", "convolutions", "products", "others", "GB in total", "times forward", "scratch"]
    lines = []
    for graph in content["graphs"]:
        total = moved[graph["graph"]]
        kinds = (f"{graph['bytes'][kind] / 1e9:.2f}" for kind in ("convolutions", "products", "others"))
        cells = [*kinds, f"{total / 1e9:.2f}", f"{total / forward:.2f}x", f"{graph['scratch_bytes'] / 2**20:.0f}"]
        lines.append([graph["graph"], str(graph["kernels"]), *cells])
    return [
        f"## Memory traffic of a plan: {title(content['configuration'])}",
        "What the kernels of TensorRT-RTX's plans read and write in GB, "
        f"{content['precision']}, batch {content['batch_size']}, as its builder {content['versions'][_BUILDER]} lists "
        f"them, and scratch memory in MiB; no plan is run, and no GPU is needed; {_machine(content)}; "
        f"`python benchmarks/plan_traffic.py {content['configuration']}`. A forward pass is the encoder and the noise "
        "head; the gradient's arithmetic is that of three forward passes.",
        markdown_table(header, lines),
    ]


# A training step


def train_step(content: Content, picture: str | None = None) -> list[str]:
    """Lay out what each loss adds to a training step."""
    lines = []
    for row in content["rows"]:
        if "not_run" in row:
            lines.append([row["loss"], f"not run: {row['not_run']}", "", "", ""])
            continue
        cells = [f"{row['images_per_s']:.3g}", f"{row['share']:.0%}", _mebibytes(row)]
        lines.append([row["loss"], _time(row), *cells])
    side = content["side"]
    return [
        f"## A training step{_kind_of_cpu(content)}",
        "A whole training step of a restoration network with the layout of NAFNet at width 32 "
        f"({content['network_parameters'] / 1e6:.1f} M parameters), batch {content['batch_size']} of {side}x{side} "
        f"pixels, with the UNet of {title(content['configuration'])}; medians and quartiles; {_machine(content)}; "
        "`python benchmarks/train_step.py`.",
        markdown_table(["loss added to the pixel loss", "ms", "images/s", "the loss's share", "MiB"], lines),
        *_picture("Time of a training step with each loss", picture),
    ]


# Scaling


def scaling(content: Content, picture: str | None = None) -> list[str]:
    """Lay out how the cost grows with images, pixels and ranks, and what more ranks would give."""
    lines, left_out = [], []
    for curve in content["curves"]:
        name = f"{curve['way']}, over {curve['over']}"
        if "not_run" in curve:
            lines.append([name, f"not run: {curve['not_run']}", "", "", ""])
            continue
        left_out += [f"Left out of {name}: {size} ({why})." for size, why in curve.get("left_out", {}).items()]
        smallest, largest = curve["points"][0], curve["points"][-1]
        fixed, each = (curve["memory"][part] / 2**20 for part in ("fixed_bytes", "bytes_each"))
        lines.append(
            [
                name,
                f"{smallest['size']} to {largest['size']}",
                f"{smallest['median_ms']:.4g} to {largest['median_ms']:.4g}",
                f"{curve['exponent']:.2f}",
                f"{fixed:.0f} + {each:.3g} each",
            ]
        )
    return [
        "## Scaling",
        f"A step of the loss with {title(content['configuration'])}; {_machine(content)}; "
        "`python benchmarks/scaling.py`. Time grows as size^exponent.",
        markdown_table(["", "size", "ms", "exponent", "MiB"], lines),
        *left_out,
        *_picture("Time of a step over batch and image size", picture),
        *_processes(content["processes"]),
    ]


def _processes(found: dict[str, Any]) -> list[str]:
    if "not_run" in found:
        return [f"Training in several processes was not measured: {found['not_run']}."]
    one, together, exchanging, exchange = (
        found[name]["median_ms"] for name in ("one", "all", "all_exchanging", "exchange")
    )
    lines = []
    for ranks in _RANKS:
        # A ring sends 2 (N - 1) / N of the gradients through each rank's link: as much as all of them with two ranks.
        step = one + exchange * 2 * (ranks - 1) / ranks
        images_per_s = ranks * found["batch_size"] / step * 1e3
        lines.append([str(ranks), f"{step:.0f}", f"{images_per_s:.3g}", f"{one / step:.0%}"])
    return [
        f"The training step under DistributedDataParallel, batch {found['batch_size']} on each rank: {one:.0f} ms on "
        f"one rank, {together:.0f} ms on {found['ranks']} side by side, {exchanging:.0f} ms with the exchange of "
        f"{found['exchanged_bytes'] / 2**20:.0f} MiB of gradients, which by itself takes {exchange:.0f} ms. These "
        "gradients are the restoration network's: the frozen UNet's weights are not parameters, and nothing of the "
        "loss is exchanged.",
        "Extrapolated from these times, if each rank has its own processor and link, and none of the exchange overlaps "
        "with the backward pass:",
        markdown_table(["ranks", "ms", "images/s", "efficiency"], lines),
        f"By this estimate, efficiency stays above {one / (one + 2 * exchange):.0%} however many ranks there are. The "
        f"{found['ranks']} that were measured, which share a machine, reached {one / exchanging:.0%}. Other limits: "
        "each rank holds the UNet and its activations, and a batch cannot be shared by more ranks than it has images.",
    ]


# Exports and builds


def exports(content: Content, picture: str | None = None) -> list[str]:
    """Lay out what exports take over the size of the model."""
    header = ["", "parameters", "precision", "batch", "export", "with replay against float64", "build"]
    lines = []
    for export in content["exports"]:
        build = export.get("build")
        lines.append(
            [
                title(export["configuration"]),
                f"{export['parameters'] / 1e6:.1f} M",
                export["precision"],
                str(export["batch_size"]),
                *(_cost(export[part]) for part in ("export", "export_and_replay")),
                f"{build['backend']}: {_cost(build)}" if build else "",
            ]
        )
    names = [export["configuration"] for export in content["exports"]]
    backends = {export["build"]["backend"] for export in content["exports"] if export.get("build")}
    command = " ".join(["python benchmarks/export.py", *names, *(f"--build {backend}" for backend in backends)])
    return [
        "## Export",
        f"Time and peak memory of all four graphs; {_machine(content)}; `{command}`.",
        markdown_table(header, lines),
        *_picture("Time of each stage of an export", picture),
    ]


def export_stages(content: Content) -> str:
    """Lay out what each stage takes, a column for each model."""
    costs = {
        stage["stage"]: [""] * len(content["exports"]) for export in content["exports"] for stage in all_stages(export)
    }
    for column, export in enumerate(content["exports"]):
        for stage in all_stages(export):
            costs[stage["stage"]][column] = _cost(stage)
    header = ["", *(title(export["configuration"]) for export in content["exports"])]
    return markdown_table(header, [[stage, *cells] for stage, cells in costs.items()])


def all_stages(export: Content) -> list[dict[str, Any]]:
    """Return the stages of an export, and of the build if there was one."""
    build = export.get("build")
    return [*export["stages"], *(build["stages"] if build else [])]


def _cost(total: dict[str, Any]) -> str:
    seconds = total["seconds"]
    time = f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    return f"{time}, {total['peak_memory_bytes'] / 2**30:.1f} GiB"
