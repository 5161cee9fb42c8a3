"""Pictures keep their pixels, tables are Markdown, and files are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from results import (
    GAP,
    LABEL,
    labelled_grid,
    markdown_table,
    to_picture,
    write_figure,
    write_json,
    write_picture,
    write_whole,
)


def test_images_are_rounded_and_clamped() -> None:
    image = torch.tensor([-0.5, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 3.0]).view(1, 1, 6).expand(3, 1, 6)
    assert np.array(to_picture(image))[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255]


def test_a_grid_holds_every_image_pixel_for_pixel() -> None:
    rows = [[torch.rand(3, 8, 40) for _ in range(3)] for _ in range(2)]
    grid = np.array(labelled_grid(rows, ["a", "b", "c"], [["x"] * 3] * 2))
    assert grid.shape == (LABEL + GAP + 2 * (8 + LABEL + GAP), GAP + 3 * (40 + GAP), 3)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            top, left = LABEL + GAP + row * (8 + LABEL + GAP), GAP + column * (40 + GAP)
            assert np.array_equal(grid[top : top + 8, left : left + 40], np.array(to_picture(image)))
    assert grid[:LABEL].min() < 128  # the columns' names


def test_a_grid_needs_a_caption_for_each_image() -> None:
    with pytest.raises(ValueError, match="shorter"):
        labelled_grid([[torch.rand(3, 8, 8)] * 2], ["a", "b"], [["only one"]])


def test_markdown_tables_are_aligned() -> None:
    assert markdown_table(["name", "PSNR"], [["a long name", "9.5"], ["b", "10.25"]]) == (
        "| name        |  PSNR |\n| ----------- | ----: |\n| a long name |   9.5 |\n| b           | 10.25 |\n"
    )


def test_files_are_whole_and_replaced(tmp_path: Path) -> None:
    image = torch.rand(3, 5, 7)
    write_picture(to_picture(image), tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as read:
        assert np.array_equal(np.array(read), np.array(to_picture(image)))
    write_figure(Figure(figsize=(2, 1)), tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as read:
        assert read.size == (240, 120)
    for content in ({"a": [1, 2.5]}, ["b"]):
        write_json(content, tmp_path / "table.json")
        assert json.loads((tmp_path / "table.json").read_text()) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.png", "picture.png", "table.json"]


def test_a_failed_write_leaves_the_former_file_and_no_other(tmp_path: Path) -> None:
    former = tmp_path / "table.md"
    former.write_bytes(b"former")
    with pytest.raises(TypeError):
        write_json(object(), former)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(b"new", tmp_path / "folder")
    assert former.read_bytes() == b"former"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "table.md"]
