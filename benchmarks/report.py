"""README.md's performance section and its pictures, from what benchmarks/results holds.

    python benchmarks/report.py            write them
    python benchmarks/report.py --check    write nothing; exit status 1 unless they are in step

Every figure in the section is read, or computed here, from those files; what is not among them is said to be missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib.figure import Figure

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from pictures import draw_loss_step, shows, to_png  # noqa: E402
from targets import TARGETS, Row, Targets  # noqa: E402

from results import markdown_table, write_whole  # noqa: E402

RESULTS, PAGE, IMAGES = ROOT / "benchmarks/results", ROOT / "README.md", "docs/images"
BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"

Content = dict[str, Any]

TITLES: Final = {
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
# What is to be measured: the benchmark, on which architecture, on which type of device.
PLANNED: Final = (
    ("loss-step", "cifar10", "cpu"),
    ("loss-step", "cifar10", "cuda"),
    ("loss-step", "celebahq256", "cuda"),
    ("loss-step", "adm256", "cuda"),
    ("export", None, "cpu"),
    ("export", None, "cuda"),
)
NAMES: Final = {"loss-step": "a step of the loss", "export": "exports and builds"}


@dataclass(frozen=True)
class Picture:
    """A picture of `content`, at a path in the repository."""

    path: str
    content: Any
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Report:
    """The section's text, and its pictures."""

    text: str
    pictures: list[Picture]


def load(folder: Path) -> dict[str, Content]:
    """Return every result of a benchmark that the section has a place for, by the file's stem."""
    paths = sorted(path for name in NAMES for path in folder.glob(f"{name}-*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def make_report(results: dict[str, Content]) -> Report:
    """Lay the results out."""
    parts: list[str] = []
    pictures: list[Picture] = []
    for stem, content in _of(results, "loss-step"):
        rows = _shown(content)
        path = f"{IMAGES}/{stem}.png"
        pictures.append(Picture(path, rows, functools.partial(draw_loss_step, rows, [_label(row) for row in rows])))
        parts += _loss_step(content, rows, path)
    parts += _exports([content for _, content in _of(results, "export")])
    parts.append(_missing(results))
    return Report("\n\n".join(_wrapped(part.strip()) for part in parts) + "\n", pictures)


def _wrapped(part: str) -> str:
    if part.startswith(("#", "|", "!")):
        return part
    return textwrap.fill(part, 120, break_on_hyphens=False, break_long_words=False)


def _of(results: dict[str, Content], benchmark: str) -> Iterator[tuple[str, Content]]:
    return ((stem, content) for stem, content in results.items() if stem.startswith(benchmark))


def _machine(content: Content) -> str:
    versions = [f"{_RUNTIMES[name]} {version}" for name, version in content["versions"].items() if name in _RUNTIMES]
    return ", ".join([content["device"], f"{content['threads']} threads", *versions, content["date"]])


# A step of the loss


def _targets(content: Content) -> Targets | None:
    place = (content["configuration"], content["device_type"])
    return next((targets for targets in TARGETS if (targets.configuration, targets.device_type) == place), None)


def _shown(content: Content) -> list[Row]:
    """Return the rows that were run, of the batch size that the targets are for, or the largest."""
    run = [row for row in content["rows"] if "not_run" not in row]
    targets = _targets(content)
    batch_size = targets.batch_size if targets else max(row["batch_size"] for row in run)
    return [row for row in run if row["batch_size"] == batch_size]


def _label(row: Row) -> str:
    return f"{'semantic term alone: ' if row['terms'] == 'semantic' else ''}{row['way']}, {row['precision']}"


def _loss_step(content: Content, rows: list[Row], picture: str) -> list[str]:
    name, batch_size = content["configuration"], rows[0]["batch_size"]
    distances = list(rows[0]["gradient_error"])
    header = ["", "times eager", "times compile", "images/s", "of ceiling", "MiB", f"error, {' / '.join(distances)} dB"]
    lines = [
        [
            _label(row),
            f"{row['times_eager']:.2f}x",
            f"{row['times_compile']:.2f}x",
            f"{row['images_per_s']:.3g}",
            f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else "",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
            " / ".join(f"{row['gradient_error'][decibels]:.1e}" for decibels in distances),
        ]
        for row in rows
    ]
    parts = [
        f"### A step of the loss: {TITLES[name]}",
        f"{content['parameters'] / 1e6:.1f} M parameters, batch {batch_size}; {_machine(content)}; "
        f"`python benchmarks/loss_step.py {name}`.",
        markdown_table(header, lines),
        f"![Speed and gradient error of each row]({picture})",
    ]
    return [*parts, *_by_batch_size(content), *_not_run(content), *_held_against_targets(content, rows)]


def _by_batch_size(content: Content) -> list[str]:
    run = [row for row in content["rows"] if "not_run" not in row]
    sizes = sorted({row["batch_size"] for row in run})
    if len(sizes) == 1:
        return []
    speeds = {(_label(row), row["batch_size"]): f"{row['images_per_s']:.3g}" for row in run}
    labels = dict.fromkeys(_label(row) for row in run)
    lines = [[label, *(speeds.get((label, size), "") for size in sizes)] for label in labels]
    return ["Images/s over the batch size:", markdown_table(["", *(str(size) for size in sizes)], lines)]


def _not_run(content: Content) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for row in content["rows"]:
        if "not_run" in row:
            label = f"{_label(row)}, batch {row['batch_size']}"
            reasons.setdefault(row["not_run"], []).append(label)
    return [f"Not run: {'; '.join(labels)} ({reason})." for reason, labels in reasons.items()]


def _held_against_targets(content: Content, rows: list[Row]) -> list[str]:
    targets = _targets(content)
    if targets is None:
        return []
    lines = []
    for target in targets.targets:
        value = target.measured(rows)
        bound = f"{'<=' if target.at_most else '>='} {target.bound:g}"
        verdict = "not measured" if value is None else "met" if target.is_met(value) else "**missed**"
        lines.append([target.what, bound, "" if value is None else f"{value:.3g}", verdict])
    return ["What was aimed at:", markdown_table(["", "aim", "measured", ""], lines)]


# Exports and builds


def _exports(contents: list[Content]) -> list[str]:
    if not contents:
        return []
    parts = ["### Export"]
    header = ["", "parameters", "precision", "batch", "export", "with replay against float64"]
    for content in contents:
        lines = [
            [
                TITLES[export["configuration"]],
                f"{export['parameters'] / 1e6:.1f} M",
                export["precision"],
                str(export["batch_size"]),
                *(_cost(export[part]) for part in ("export", "export_and_replay")),
            ]
            for export in content["exports"]
        ]
        parts += [
            f"Time and peak memory of all four graphs; {_machine(content)}; `python benchmarks/export.py`.",
            markdown_table(header, lines),
        ]
    return parts


def _cost(total: dict[str, Any]) -> str:
    seconds = total["seconds"]
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
    return f"{time}, {total['peak_memory_bytes'] / 2**30:.1f} GiB"


# What is missing


def _missing(results: dict[str, Content]) -> str:
    there = set()
    for benchmark in NAMES:
        for _, content in _of(results, benchmark):
            there |= {(benchmark, name, content["device_type"]) for name in (content.get("configuration"), None)}
    missing = []
    for benchmark, name, device in PLANNED:
        if (benchmark, name, device) not in there:
            of = "" if name is None else f" of {TITLES[name]}"
            missing.append(f"{NAMES[benchmark]}{of} on a {'GPU' if device == 'cuda' else 'CPU'}")
    return f"Not measured: {'; '.join(missing)}." if missing else "Nothing that was planned is left to be measured."


# What is written


def differences(report: Report, page: Path, root: Path) -> list[str]:
    """Say what of the page and of the pictures below `root` is not as in `report`."""
    start, end = _place(text := page.read_text())
    found = [] if text[start:end] == report.text else [f"{page.name}, its performance section"]
    return found + [each.path for each in report.pictures if not shows(root / each.path, each.content)]


def write(report: Report, page: Path, root: Path) -> None:
    """Write the section into the page, and draw the pictures below `root`."""
    start, end = _place(text := page.read_text())
    write_whole((text[:start] + report.text + text[end:]).encode(), page)
    for each in report.pictures:
        write_whole(to_png(each.draw(), each.content), root / each.path)


def _place(text: str) -> tuple[int, int]:
    return text.index(BEGIN) + len(BEGIN) + 1, text.index(END)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say what is out of step")
    args = parser.parse_args()
    report = make_report(load(RESULTS))
    if not args.check:
        write(report, PAGE, ROOT)
        return 0
    found = differences(report, PAGE, ROOT)
    for what in found:
        print(f"{what}: not what benchmarks/results says; run python benchmarks/report.py", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
