"""docs/study.md and its pictures, from benchmarks/results/study.json.

    python benchmarks/study_page.py --work FOLDER   write them; FOLDER is where study.py has kept the restored images
    python benchmarks/study_page.py --check         write nothing; exit status 1 unless they are in step

What stands outside of the page's markers is written by hand.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import statistics
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
import sections
import study
import torch
from matplotlib.figure import Figure
from pictures import BLUE, GREY, ORANGE, STYLE
from PIL import Image
from report import Picture, Report, complain, write
from study import EVERYWHERE, FORMS, NONE, RESULT, ROOT, SEEDS, SHOWN, TERMS, WEIGHTS, Run, Setting, without

from degradations import DEGRADATIONS
from photographs import HELD_OUT, VALIDATION, load
from results import labelled_grid, markdown_table, write_picture

PAGE: Final = ROOT / "docs/study.md"
GRID: Final = "docs/images/study_grid.png"
# Each measure's heading, decimals, and what of it is less where it is better.
MEASURES: Final[dict[str, tuple[str, int, Callable[[float], float]]]] = {
    "psnr": ("PSNR, dB", 2, operator.neg),
    "ssim": ("SSIM", 4, operator.neg),
    "gmsd": ("GMSD", 4, operator.pos),
    "detail": ("detail, dB", 2, abs),
}
Result = dict[str, Any]
Results = dict[str, Result]


def mean(result: Result, measure: str, photographs: Collection[str]) -> float:
    """Return a measure's mean over photographs."""
    return statistics.fmean(result["quality"][photograph][measure] for photograph in photographs)


def spread(values: Sequence[float], decimals: int, *, signed: bool = False) -> str:
    """Return mean and standard deviation as text."""
    sign = "+" if signed else ""
    deviation = f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{decimals}f}{deviation}"


def changes(results: Results, runs: Sequence[Run], measure: str, photographs: Collection[str]) -> list[float]:
    """Return by how much a measure differs from the run without DiffLoss with the same task and seed."""
    return [
        mean(results[run.name], measure, photographs)
        - mean(results[without(run.task, run.seed).name], measure, photographs)
        for run in runs
    ]


def better(results: Results, runs: Sequence[Run], measure: str) -> int:
    """Return for how many of the runs a measure is better than without DiffLoss."""
    _, _, badness = MEASURES[measure]

    def bad(run: Run) -> float:
        return badness(mean(results[run.name], measure, HELD_OUT))

    return sum(bad(run) < bad(without(run.task, run.seed)) for run in runs)


def change_cells(results: Results, runs: Sequence[Run], photographs: Collection[str]) -> list[str]:
    return [
        spread(changes(results, runs, measure, photographs), decimals, signed=True)
        for measure, (_, decimals, _) in MEASURES.items()
    ]


def headings(first: str) -> list[str]:
    return [first, *(heading for heading, _, _ in MEASURES.values())]


def absolute_cells(results: Results, runs: Sequence[Run], photographs: Collection[str]) -> list[str]:
    return [
        spread([mean(results[run.name], measure, photographs) for run in runs], decimals)
        for measure, (_, decimals, _) in MEASURES.items()
    ]


def block(results: Results, rows: dict[str, Callable[[str, int], Run]]) -> str:
    """Lay out, for each task and over all, the run without DiffLoss and by how much each row differs from it."""
    lines = []
    for task in DEGRADATIONS:
        base = [without(task, seed) for seed in SEEDS]
        lines.append([f"{task}, without DiffLoss", *absolute_cells(results, base, HELD_OUT)])
        for name, run in rows.items():
            lines.append([f"{task}, {name}", *change_cells(results, [run(task, seed) for seed in SEEDS], HELD_OUT)])
    for name, run in rows.items():
        every = [run(task, seed) for task in DEGRADATIONS for seed in SEEDS]
        lines.append([f"all, {name}", *change_cells(results, every, HELD_OUT)])
        counts = [f"{better(results, every, measure)} of {len(every)}" for measure in MEASURES]
        lines.append([f"all, {name}: better in", *counts])
    return markdown_table(headings("task, loss added to the pixel loss"), lines)


def setting_name(weights: tuple[float, float], part: tuple[int, int]) -> str:
    scale = weights[0] / WEIGHTS[0]
    where = "all timesteps" if part == EVERYWHERE else f"timesteps {part[0]} to {part[1] - 1}"
    return f"{scale:g} x the weights, {where}"


def share(results: Results, runs: Sequence[Run]) -> str:
    first, last = (statistics.fmean(results[run.name]["share"][place] for run in runs) for place in (0, 1))
    return f"{first:.2g}, {last:.2g}"


def terms_part(results: Results) -> list[str]:
    rows: dict[str, Callable[[str, int], Run]] = {
        name: functools.partial(_with, weights=weights) for name, weights in TERMS.items()
    }
    shares = [
        [name, *(share(results, [run(task, seed) for seed in SEEDS]) for task in DEGRADATIONS)]
        for name, run in rows.items()
    ]
    return [
        "## Each term",
        f"Naturalness with weight {WEIGHTS[0]:g}, semantics with {WEIGHTS[1]:g}, timesteps uniform. Mean and standard "
        f"deviation over {len(SEEDS)} seeds, on the held-out photographs {', '.join(HELD_OUT)}; rows with a sign are "
        "differences from the training run without DiffLoss that has the same seed, and so the same initial weights, "
        "crops and degradations.",
        block(results, rows),
        "![what each term changes](images/study_terms.png)",
        "![restored photographs](images/study_grid.png)",
        "Size of the loss's gradient at the restored images, relative to the pixel loss's, in the first and in the "
        "last tenth of the steps:",
        markdown_table(["gradient, relative to the pixel loss's", *DEGRADATIONS], shares),
    ]


def _with(task: str, seed: int, *, weights: tuple[float, float], part: tuple[int, int] = EVERYWHERE) -> Run:
    return Run(task, seed, *weights, *part)


def precision_part(results: Results, starts: Sequence[Result]) -> list[str]:
    lines = []
    start = spread([mean(result, "psnr", HELD_OUT) for result in starts], 2)
    for form in FORMS:
        runs = _form(form)
        if form == NONE:
            lines.append(["without DiffLoss", "", "", *absolute_cells(results, runs, HELD_OUT)])
        else:
            errors = [results[run.name]["gradient_error"] for run in runs]
            name = {"fp32": "fp32, difference form", "bf16 difference": "bf16, difference form", "fp16": "fp16, plain"}
            row = [name.get(form, f"{form}, plain"), f"{statistics.fmean(errors):.2g}", share(results, runs)]
            lines.append([*row, *change_cells(results, runs, HELD_OUT)])
    return [
        "## Half precision, starting from good networks",
        f"The task is to remove Gaussian noise of 8/255. The networks start from {study.START_STEPS} steps with the "
        f"pixel loss alone, at {start} dB on the held-out photographs, and train for {study.STEPS} more, with both "
        'terms and the weights above. "Plain" runs both images through the UNet and subtracts: bf16 with PyTorch\'s '
        "autocast; fp16 by rounding the weights and the result of each operation, since CPUs are slow in fp16. The "
        "gradient error is against float64 at the end of training: the median over "
        f"{4 * study.BATCH_SIZE} crops, mean over the seeds.",
        markdown_table(["loss computed in", "gradient error", "gradient / pixel loss's", *headings("")[1:]], lines),
        "![half precision](images/study_precision.png)",
    ]


def _form(form: str) -> list[Run]:
    return [run for run in study.precision_runs() if run.form == form]


def settings_part(results: Results, chosen: Setting) -> list[str]:
    lines = []
    for setting in study.settings():
        runs = study.settings_runs([setting], SEEDS[:1])
        mark = " (chosen)" if setting == chosen else ""
        lines.append([setting_name(*setting) + mark, *change_cells(results, runs, VALIDATION)])
    weights, part = chosen
    rows: dict[str, Callable[[str, int], Run]] = {
        setting_name(*chosen): functools.partial(_with, weights=weights, part=part)
    }
    return [
        "## Other settings",
        "Both terms with less weight, or with timesteps from a part of the schedule, with one seed, on the "
        f"photographs {' and '.join(VALIDATION)}, on which nothing was trained either: mean and standard deviation, "
        "over the three tasks, of the difference from the training run without DiffLoss. The setting with the lowest "
        "GMSD is chosen.",
        markdown_table(headings("setting"), lines),
        "The chosen setting on the held-out photographs, with all seeds:",
        block(results, rows),
    ]


def _chosen(content: dict[str, Any]) -> Setting:
    weights, part = content["chosen"]
    return tuple(weights), tuple(part)


def make_report(content: dict[str, Any]) -> Report:
    """Lay the study out."""
    results: Results = {result["name"]: result for result in content["runs"]}
    minutes = sum(result["seconds"] for result in (*content["runs"], *content["starts"])) / 60
    versions = ", ".join(f"{name} {content['versions'][name]}" for name in ("torch", "onnxruntime"))
    parts = [
        f"{len(content['runs'])} training runs of {study.STEPS} steps and {len(content['starts'])} of "
        f"{study.START_STEPS} to start from, each step on {study.BATCH_SIZE} crops of {study.SIDE}x{study.SIDE}; "
        f"{minutes:.0f} minutes of one thread in total; {content['device']}, {versions}, {content['date']}.",
        *terms_part(results),
        *precision_part(results, content["starts"]),
        *settings_part(results, _chosen(content)),
    ]
    terms = {
        name: {
            measure: [
                changes(results, [_with(task, seed, weights=pair) for seed in SEEDS], measure, HELD_OUT)
                for task in DEGRADATIONS
            ]
            for measure in MEASURES
        }
        for name, pair in TERMS.items()
    }
    forms = {
        form: {
            "errors": [results[run.name].get("gradient_error") for run in _form(form)],
            "curves": [results[run.name]["curve"] for run in _form(form)],
        }
        for form in FORMS
    }
    pictures = [
        Picture("docs/images/study_terms.png", terms, functools.partial(draw_terms, terms)),
        Picture("docs/images/study_precision.png", forms, functools.partial(draw_forms, forms)),
    ]
    return Report(sections.joined(parts), pictures)


_COLOURS: Final = dict(zip(TERMS, (BLUE, GREY, ORANGE), strict=True))


def draw_terms(terms: dict[str, dict[str, list[list[float]]]]) -> Figure:
    """Draw each measure's changes: a dot for each seed, a line at their mean."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 2.2), layout="constrained")
        panels = figure.subplots(1, len(MEASURES))
        for panel, (measure, (heading, _, _)) in zip(panels, MEASURES.items(), strict=True):
            panel.axhline(0, color="black", linewidth=0.6)
            for place, (name, changed) in enumerate(terms.items()):
                for task, values in enumerate(changed[measure]):
                    x = task + 0.25 * (place - 1)
                    panel.plot([x] * len(values), values, "o", color=_COLOURS[name], markersize=2.5)
                    panel.plot(
                        [x - 0.1, x + 0.1],
                        [statistics.fmean(values)] * 2,
                        color=_COLOURS[name],
                        linewidth=1.5,
                        label=name if task == 0 else None,
                    )
            panel.set(title=f"change in {heading}", xticks=range(len(DEGRADATIONS)), xticklabels=list(DEGRADATIONS))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(terms))
    return figure


def draw_forms(forms: dict[str, dict[str, Any]]) -> Figure:
    """Draw the gradient's error in each form, and PSNR during training relative to the run without DiffLoss."""
    colours = dict(zip(FORMS[1:], ("black", BLUE, ORANGE, GREY), strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 2.4), layout="constrained")
        error, curve = figure.subplots(1, 2)
        for place, (form, colour) in enumerate(colours.items()):
            errors = forms[form]["errors"]
            error.plot(errors, [place] * len(errors), "o", color=colour, markersize=4)
            ours, base = ([[p["psnr"] for p in c] for c in forms[name]["curves"]] for name in (form, NONE))
            steps = [point["step"] for point in forms[form]["curves"][0]]
            gains = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(ours, base, strict=True)]
            curve.plot(steps, [statistics.fmean(at) for at in zip(*gains, strict=True)], color=colour, label=form)
        error.set(
            xscale="log", title="gradient error against float64", yticks=range(len(colours)), yticklabels=list(colours)
        )
        error.invert_yaxis()
        curve.axhline(0, color="black", linewidth=0.6)
        curve.set(title="change in PSNR due to DiffLoss, dB", xlabel="step")
        curve.legend()
    return figure


def write_grid(content: dict[str, Any], folder: Path) -> None:
    """Tile a crop as it was degraded, as each network of the first seed restores it, and as it is."""
    weights, part = _chosen(content)
    columns: dict[str, Callable[[str], Run]] = {
        "without": lambda task: without(task, SEEDS[0]),
        **{name: functools.partial(_with, seed=SEEDS[0], weights=pair) for name, pair in TERMS.items()},
    }
    if (weights, part) != (WEIGHTS, EVERYWHERE):
        columns["chosen setting"] = functools.partial(_with, seed=SEEDS[0], weights=weights, part=part)
    rows = []
    photograph, place = SHOWN
    for task in DEGRADATIONS:
        restored = [_read(folder / f"{run(task).name}.png") for run in columns.values()]
        shown = [study.cut(image, place) for image in (study.degraded(task, photograph), load(photograph))]
        rows.append([shown[0], *restored, shown[1]])
    names = ["degraded", *columns, "ground truth"]
    captions = [[task, *[""] * (len(names) - 1)] for task in DEGRADATIONS]
    write_picture(labelled_grid(rows, names, captions), ROOT / GRID)


def _read(path: Path) -> torch.Tensor:
    """Return a picture as float32 [3, H, W] in [0, 1]."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--work", type=Path, help="the folder that study.py was given")
    what.add_argument("--check", action="store_true", help="only report what is out of step")
    args = parser.parse_args()
    content = json.loads(RESULT.read_text())
    report = make_report(content)
    if args.check:
        return complain(report, PAGE, RESULT.name, "benchmarks/study_page.py")
    write(report, PAGE, ROOT)
    write_grid(content, args.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
