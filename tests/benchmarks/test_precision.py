"""docs/precision.md says what was measured, and what is measured tells the plain form from the difference form."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from pictures import shows
from precision import (
    BEGIN,
    END,
    FIGURE,
    FOUR_LEVELS,
    PAGE,
    RESULTS,
    failures,
    from_json,
    measure,
    random_model,
    sweep,
    tables,
    to_json,
)
from rich.progress import Progress

from photographs import HELD_OUT


def test_page_and_picture_are_in_step_with_the_results() -> None:
    text = (RESULTS / "precision-cpu.json").read_text()
    head, rows = from_json(text)
    page = PAGE.read_text()
    assert page[page.index(BEGIN) + len(BEGIN) : page.index(END)] == "\n" + tables(rows, head)
    assert shows(FIGURE, json.loads(text))
    assert failures(rows) == []


def test_one_near_image_tells_the_forms_apart() -> None:
    model = random_model("small", FOUR_LEVELS, 32)
    samples = [*sweep(model, [50.0], [500], [*HELD_OUT][:1])]
    (row,) = measure(model, samples, ["plain fp16", "difference fp16"], Progress(disable=True))
    assert row.errors["plain fp16"].gradient > 5 * row.errors["difference fp16"].gradient
    _, (read,) = from_json(to_json([row]))
    assert read.place == row.place
    assert read.errors.keys() == {"plain fp16", "difference fp16"}
    assert math.isclose(read.errors["plain fp16"].angle, row.errors["plain fp16"].angle, rel_tol=1e-2)


def test_what_is_beyond_its_tolerance_is_named() -> None:
    _, rows = from_json((RESULTS / "precision-cpu.json").read_text())
    errors = rows[0].errors
    wrong = replace(rows[0], errors={**errors, "difference bf16": errors["plain bf16"]._replace(gradient=0.1)})
    (line,) = failures([wrong])
    assert line.startswith("difference bf16, ")


def test_a_run_that_takes_the_plain_form_from_another_says_which() -> None:
    head, rows = from_json((RESULTS / "precision-cpu.json").read_text())
    first = {"device": "a machine", "date": "2026-01-01"}
    second, _ = from_json(to_json(rows[:1], head | first | {"plain": first}))
    assert second["plain"] == first
    third, _ = from_json(to_json(rows[:1], second))
    assert third["plain"] == first
