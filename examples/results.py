"""What the examples write: labelled pictures, Markdown tables, and files that are whole or absent."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 6  # pixels between the pictures of a grid
LABEL = 22  # height of a line of text, in pixels
TEXT_SIZE = 14  # in pixels


def to_picture(image: Tensor) -> Image.Image:
    """Round an image, floating point [3, H, W] in [0, 1] (clamped), to 8 bits a channel."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy())


def labelled_grid(
    rows: Sequence[Sequence[Tensor]], columns: Sequence[str], captions: Sequence[Sequence[str]]
) -> Image.Image:
    """Tile images, [3, H, W] in [0, 1] and all of one size, pixel for pixel.

    The names of the columns stand on top; `captions[row][column]` stands below each image.
    """
    height, width = rows[0][0].shape[1:]
    across, down = width + GAP, height + LABEL + GAP
    grid = Image.new("RGB", (GAP + across * len(columns), LABEL + GAP + down * len(rows)), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(TEXT_SIZE)
    for column, name in enumerate(columns):
        draw.text((GAP + across * column + width / 2, GAP + LABEL / 2), name, "black", font, anchor="mm")
    for row, (images, texts) in enumerate(zip(rows, captions, strict=True)):
        for column, (image, text) in enumerate(zip(images, texts, strict=True)):
            left, top = GAP + across * column, LABEL + GAP + down * row
            grid.paste(to_picture(image), (left, top))
            draw.text((left + width / 2, top + height + LABEL / 2), text, "black", font, anchor="mm")
    return grid


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table with aligned columns; the first is flush left, the others right."""
    lines = [header, *rows]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    texts = []
    for line in (header, rule, *rows):
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        texts.append("| " + " | ".join(cells) + " |\n")
    return "".join(texts)


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write `picture` as PNG to `path`."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_whole(buffer.getvalue(), path)


def write_figure(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG to `path`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_whole(buffer.getvalue(), path)


def write_json(content: Any, path: Path) -> None:
    """Write `content` as indented JSON to `path`."""
    write_whole((json.dumps(content, indent=2) + "\n").encode(), path)


def write_whole(content: bytes, path: Path) -> None:
    """Write `content` to `path`, replacing a former file only once the new one is complete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
