"""Pictures of the results, and whether a picture on disk shows the results that are there now."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure
from PIL import Image
from sections import all_stages, label, title
from targets import OURS, Row

# A picture names in its metadata what it was drawn from: pixels differ between versions of matplotlib.
_DRAWN_FROM: Final = "Source"
# Of Okabe and Ito, which the colour-blind tell apart.
BLUE, GREY, ORANGE = "#0072B2", "#888888", "#D55E00"
STYLE: dict[Any, Any] = {"font.size": 7.5, "axes.linewidth": 0.6, "font.family": "DejaVu Sans"}


def to_png(figure: Figure, content: Any, dpi: int = 160) -> bytes:
    """Return a picture of `content`."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi, metadata={_DRAWN_FROM: _digest(content)})
    return picture.getvalue()


def shows(path: Path, content: Any) -> bool:
    """Whether the picture at `path` was drawn from `content`."""
    if not path.exists():
        return False
    with Image.open(path) as picture:
        return bool(picture.info.get(_DRAWN_FROM) == _digest(content))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def draw_loss_step(rows: list[Row]) -> Figure:
    """Draw each row's speed, and beside it its gradient error at each distance."""
    places = range(len(rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 0.7 + 0.22 * len(rows)), layout="constrained")
        speed, error = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
        colours = [BLUE if row["way"].startswith(OURS) else GREY for row in rows]
        bars = speed.barh(places, [row["images_per_s"] for row in rows], color=colours, height=0.7)
        speed.bar_label(bars, fmt="%.3g", padding=2)
        speed.set(title="images/s", yticks=places, yticklabels=[label(row) for row in rows])
        speed.margins(x=0.12)
        speed.invert_yaxis()
        for place, row, colour in zip(places, rows, colours, strict=True):
            errors = list(row["gradient_error"].values())
            error.plot(errors, [place] * len(errors), color=colour, linewidth=1)
            for value, decibels in zip(errors, row["gradient_error"], strict=True):
                size = {"20": 2.5, "30": 4, "40": 5.5}[decibels]
                error.plot(value, place, "o", color=colour, markersize=size)
        error.set(title=f"error, {' / '.join(rows[0]['gradient_error'])} dB", xscale="log")
        error.axvline(1, color=ORANGE, linewidth=0.8, linestyle="--")
        error.grid(axis="x", linewidth=0.3, color="0.85")
        for axes in (speed, error):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
    return figure


def draw_train_step(rows: list[Row]) -> Figure:
    """Draw what a training step takes with each loss, the time without one apart."""
    run = [row for row in rows if "not_run" not in row]
    places = range(len(run))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 0.6 + 0.22 * len(run)), layout="constrained")
        axes = figure.subplots()
        times = [row["median_ms"] for row in run]
        colours = [BLUE if OURS.strip(", ") in row["loss"] else GREY for row in run]
        bars = axes.barh(places, times, color=colours, height=0.7)
        axes.bar_label(bars, [f"{row['share']:.0%}" for row in run], padding=2)
        axes.axvline(times[0], color=ORANGE, linewidth=0.8, linestyle="--")
        axes.set(title="ms a step, and the loss's share", yticks=places, yticklabels=[row["loss"] for row in run])
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


def draw_scaling(curves: list[dict[str, Any]]) -> Figure:
    """Draw each curve's times over its sizes, one panel for images and one for pixels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 2.4), layout="constrained")
        panels = dict(zip(("images", "pixels"), figure.subplots(1, 2, sharey=True), strict=True))
        run = [curve for curve in curves if "not_run" not in curve]
        for curve in run:
            axes = panels[curve["over"]]
            sizes, times, low, high = zip(
                *((point["size"], point["median_ms"], *point["quartiles_ms"]) for point in curve["points"]), strict=True
            )
            beside = [other for other in run if other["over"] == curve["over"]]
            ticks = sorted({point["size"] for other in beside for point in other["points"]})
            colour = BLUE if curve["way"].startswith(OURS) else GREY
            label = f"{curve['way']}: size$^{{{curve['exponent']:.2f}}}$"
            axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(sizes, times, "o-", color=colour, markersize=3, linewidth=1.2, label=label)
            axes.set(xscale="log", yscale="log", xticks=ticks, xticklabels=ticks)
            axes.minorticks_off()
        panels["images"].set(xlabel="images in a batch", ylabel="ms a step")
        panels["pixels"].set(xlabel="pixels of one image")
        for axes in panels.values():
            axes.grid(linewidth=0.3, color="0.85")
            axes.spines[["top", "right"]].set_visible(False)
            if axes.lines:
                axes.legend(frameon=False)
    return figure


def draw_exports(exports: list[dict[str, Any]]) -> Figure:
    """Draw what each stage of each export takes, seconds and memory side by side."""
    stages = list(dict.fromkeys(stage["stage"] for export in exports for stage in all_stages(export)))
    height = 0.8 / len(exports)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 0.7 + 0.2 * len(stages)), layout="constrained")
        seconds, memory = figure.subplots(1, 2, sharey=True)
        for index, export in enumerate(exports):
            found = all_stages(export)
            places = [stages.index(stage["stage"]) - 0.4 + height * (index + 0.5) for stage in found]
            style = {"height": height, "color": BLUE, "alpha": (index + 1) / len(exports)}
            seconds.barh(places, [stage["seconds"] for stage in found], label=title(export["configuration"]), **style)
            memory.barh(places, [stage["peak_memory_bytes"] / 2**30 for stage in found], **style)
        seconds.set(xlabel="s", xscale="log", yticks=range(len(stages)), yticklabels=stages)
        memory.set(xlabel="peak GiB")
        seconds.invert_yaxis()
        for axes in (seconds, memory):
            axes.grid(axis="x", linewidth=0.3, color="0.85")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=len(exports), frameon=False)
    return figure
