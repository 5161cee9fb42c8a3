"""README.md's performance section and its pictures, from what benchmarks/results holds.

    python benchmarks/report.py            write them
    python benchmarks/report.py --check    write nothing; exit status 1 unless they are in step

Every figure in the section is read, or computed, from those files; what is not among them is said to be missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sections
from matplotlib.figure import Figure
from pictures import draw_exports, draw_loss_step, draw_scaling, draw_train_step, shows, to_png
from sections import Content

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from results import write_whole  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "README.md"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"

# How the names of files begin and what they hold; of which architecture and type of device there should be one.
BENCHMARKS: Final = {
    "loss-step": "a step of the loss",
    "hot-spots": "a profile of a step",
    "plan-traffic": "a plan's traffic",
    "train-step": "a training step",
    "scaling": "scaling",
    "export": "exports and builds",
}
PLANNED: Final = (
    ("loss-step", "cifar10", "cpu"),
    ("loss-step", "cifar10", "cuda"),
    ("loss-step", "celebahq256", "cuda"),
    ("loss-step", "adm256", "cuda"),
    ("hot-spots", "cifar10", "cpu"),
    ("plan-traffic", "adm256", "cpu"),
    ("train-step", None, "cpu"),
    ("train-step", None, "cuda"),
    ("scaling", None, "cpu"),
    ("scaling", None, "cuda"),
    ("export", None, "cpu"),
    ("export", None, "cuda"),
)


@dataclass(frozen=True)
class Picture:
    """What is drawn of `content`, for a path in the repository."""

    path: str
    content: Any
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Report:
    """The section's text, and its pictures."""

    text: str
    pictures: list[Picture]


def load(folder: Path) -> dict[str, Content]:
    """Return every result that the section has a place for, by the file's stem, in the section's order."""
    paths = [path for name in BENCHMARKS for path in sorted(folder.glob(f"{name}-*.json"))]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def make_report(results: dict[str, Content]) -> Report:
    """Lay the results out."""
    parts: list[str] = []
    pictures: list[Picture] = []

    def picture(stem: str, content: Any, draw: Callable[[Any], Figure]) -> str:
        path = f"docs/images/{stem}.png"
        pictures.append(Picture(path, content, functools.partial(draw, content)))
        return path

    for stem, content in results.items():
        if stem.startswith("loss-step"):
            parts += sections.loss_step(content, picture(stem, sections.shown_rows(content), draw_loss_step))
        elif stem.startswith("hot-spots"):
            parts += sections.hot_spots(content)
        elif stem.startswith("plan-traffic"):
            parts += sections.plan_traffic(content)
        elif stem.startswith("train-step"):
            parts += sections.train_step(content, picture(stem, content["rows"], draw_train_step))
        elif stem.startswith("scaling"):
            parts += sections.scaling(content, picture(stem, content["curves"], draw_scaling))
        else:
            parts += sections.exports(content, picture(stem, content["exports"], draw_exports))
    parts.append(_missing(results))
    return Report(sections.joined(parts), pictures)


def _missing(results: dict[str, Content]) -> str:
    def is_there(benchmark: str, name: str | None, device_type: str) -> bool:
        return any(
            stem.startswith(benchmark)
            and content["device_type"] == device_type
            and name in (None, content.get("configuration"))
            for stem, content in results.items()
        )

    missing = []
    for benchmark, name, device_type in PLANNED:
        if not is_there(benchmark, name, device_type):
            of = "" if name is None else f" of {sections.title(name)}"
            missing.append(f"{BENCHMARKS[benchmark]}{of} on a {'GPU' if device_type == 'cuda' else 'CPU'}")
    return f"Not measured: {'; '.join(missing)}." if missing else "Nothing that was planned is left to be measured."


def differences(report: Report, page: Path, root: Path) -> list[str]:
    """Say what of the page and of the pictures below `root` is not as in `report`."""
    start, end = _place(text := page.read_text())
    found = [] if text[start:end] == report.text else [f"{page.name}, what is measured"]
    return found + [each.path for each in report.pictures if not shows(root / each.path, each.content)]


def complain(report: Report, page: Path, source: str, script: str) -> int:
    """Print what is out of step with `source`, and by which script that is mended; return the exit status."""
    found = differences(report, page, ROOT)
    for what in found:
        print(f"{what}: not what {source} says; run python {script}", file=sys.stderr)
    return 1 if found else 0


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
    if args.check:
        return complain(report, PAGE, "benchmarks/results", "benchmarks/report.py")
    write(report, PAGE, ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
