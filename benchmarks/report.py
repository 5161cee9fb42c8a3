"""docs/performance.md with its pictures, and README.md's summary of it, from what benchmarks/results holds.

    python benchmarks/report.py            write them
    python benchmarks/report.py --check    write nothing; exit status 1 unless they are in step

Every figure between the pages' markers is read, or computed, from those files; planned results that are not there are
listed as not measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import posixpath
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

import sections
from matplotlib.figure import Figure
from pictures import draw_exports, draw_loss_step, draw_scaling, draw_train_step, shows, to_png
from sections import Content

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from results import write_whole  # noqa: E402

RESULTS: Final = ROOT / "benchmarks/results"
README, PAGE = ROOT / "README.md", ROOT / "docs/performance.md"
IMAGES: Final = "docs/images"
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


@dataclass(frozen=True)
class Drawing:
    """The picture of a result: what of it is drawn, and how."""

    drawn: Callable[[Content], Any]
    draw: Callable[[Any], Figure]


@dataclass(frozen=True)
class Benchmark:
    """How results of one benchmark are shown.

    holds: What to call it in the list of what was not measured.
    lay_out: Takes a result and, if one is drawn, the path of its picture.
    summarize: The same for README.md, if it is shown there.
    """

    holds: str
    lay_out: Callable[..., list[str]]
    picture: Drawing | None = None
    summarize: Callable[..., list[str]] | None = None


# By how the names of their files begin, in the page's order.
BENCHMARKS: Final = {
    "loss-step": Benchmark(
        "a step of the loss",
        sections.loss_step,
        Drawing(sections.shown_rows, draw_loss_step),
        functools.partial(sections.loss_step, brief=True),
    ),
    "hot-spots": Benchmark("a profile of a step", sections.hot_spots),
    "plan-traffic": Benchmark("a plan's traffic", sections.plan_traffic),
    "train-step": Benchmark(
        "a training step",
        sections.train_step,
        Drawing(itemgetter("rows"), draw_train_step),
        sections.train_step,
    ),
    "scaling": Benchmark("scaling", sections.scaling, Drawing(itemgetter("curves"), draw_scaling)),
    "export": Benchmark("exports and builds", sections.exports, Drawing(itemgetter("exports"), draw_exports)),
}
# Of which architecture and type of device there should be a result.
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
    """What stands between a page's markers, and the pictures that are drawn for it."""

    text: str
    pictures: list[Picture]


def load(folder: Path) -> dict[str, Content]:
    """Return every result that the page has a place for, by the file's stem, in the page's order."""
    paths = [path for name in BENCHMARKS for path in sorted(folder.glob(f"{name}-*.json"))]
    return {path.stem: json.loads(path.read_text()) for path in paths}


def make_report(results: dict[str, Content]) -> Report:
    """Lay all results out, for docs/performance.md."""
    parts: list[str] = []
    pictures: list[Picture] = []
    for stem, content in results.items():
        benchmark, drawn = _benchmark(stem), _pictures(stem, content)
        parts += benchmark.lay_out(content, *(posixpath.relpath(each.path, "docs") for each in drawn))
        pictures += drawn
    return Report(sections.joined([*parts, _missing(results)]), pictures)


def make_summary(results: dict[str, Content]) -> Report:
    """Lay out what README.md shows of them. Its pictures are those of docs/performance.md.

    Of each type of device one machine: the files of others have more behind the type in their names.
    """
    parts: list[str] = []
    for stem, content in results.items():
        if (summarize := _benchmark(stem).summarize) and stem.endswith(content["device_type"]):
            parts += summarize(content, *(each.path for each in _pictures(stem, content)))
    # A level further down than on a page of their own.
    parts = [f"#{part}" if part.startswith("#") else part for part in parts]
    return Report(sections.joined([*parts, _missing(results)]), [])


def _benchmark(stem: str) -> Benchmark:
    return next(benchmark for name, benchmark in BENCHMARKS.items() if stem.startswith(name))


def _pictures(stem: str, content: Content) -> list[Picture]:
    """Return the picture of a result, if one is drawn of its benchmark's."""
    if not (picture := _benchmark(stem).picture):
        return []
    drawn = picture.drawn(content)
    return [Picture(f"{IMAGES}/{stem}.png", drawn, functools.partial(picture.draw, drawn))]


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
            on = "" if name is None else f" with {sections.title(name)}"
            missing.append(f"{BENCHMARKS[benchmark].holds}{on} on a {'GPU' if device_type == 'cuda' else 'CPU'}")
    return f"Not measured: {'; '.join(missing)}." if missing else "Everything that was planned has been measured."


def differences(report: Report, page: Path, root: Path) -> list[str]:
    """Say what of the page and of the pictures below `root` is not as in `report`."""
    start, end = _place(text := page.read_text())
    found = [] if text[start:end] == report.text else [f"{page.name}, what is measured"]
    return found + [each.path for each in report.pictures if not shows(root / each.path, each.content)]


def complain(report: Report, page: Path, source: str, script: str) -> int:
    """Print what is out of step with `source`, and which script mends that; return the exit status."""
    found = differences(report, page, ROOT)
    for what in found:
        print(f"{what}: out of step with {source}; run python {script}", file=sys.stderr)
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
    parser.add_argument("--check", action="store_true", help="only report what is out of step")
    args = parser.parse_args()
    results = load(RESULTS)
    reports = {PAGE: make_report(results), README: make_summary(results)}
    if args.check:
        return max(
            complain(report, page, "benchmarks/results", "benchmarks/report.py") for page, report in reports.items()
        )
    for page, report in reports.items():
        write(report, page, ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
