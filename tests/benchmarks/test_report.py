"""README.md's performance section says what the results say, and a change of either is noticed."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from report import BEGIN, END, PAGE, RESULTS, ROOT, differences, load, make_report, write
from sections import Content

LOSS_STEP = "loss-step-cifar10-cpu"


@pytest.fixture
def results() -> dict[str, Content]:
    return load(RESULTS)


def table_row(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_and_its_pictures_are_in_step(results: dict[str, Content]) -> None:
    report = make_report(results)
    assert differences(report, PAGE, ROOT) == []
    assert all(f"]({each.path})" in report.text for each in report.pictures)


def test_another_result_is_noticed(results: dict[str, Content]) -> None:
    results[LOSS_STEP]["rows"][-1]["times_eager"] += 1
    found = differences(make_report(results), PAGE, ROOT)
    assert found == ["README.md, what is measured", f"docs/images/{LOSS_STEP}.png"]


def test_an_edit_of_the_section_is_noticed_and_undone(results: dict[str, Content], tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE.read_text().replace("**missed**", "met"))
    report = make_report(results)
    assert differences(report, page, ROOT) == ["README.md, what is measured"]
    write(report, page, ROOT)
    assert page.read_text() == PAGE.read_text()


def test_pictures_that_are_missing_are_drawn(results: dict[str, Content], tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nbehind\n")
    report = make_report({LOSS_STEP: results[LOSS_STEP]})
    (tmp_path / report.pictures[0].path).parent.mkdir(parents=True)
    write(report, page, tmp_path)
    assert differences(report, page, tmp_path) == []
    assert page.read_text() == f"before\n{BEGIN}\n{report.text}{END}\nbehind\n"


def test_a_target_is_met_from_its_bound_on(results: dict[str, Content]) -> None:
    eager, *_ = (row for row in results[LOSS_STEP]["rows"] if row["way"] == "eager PyTorch")
    ours, *_ = (row for row in results[LOSS_STEP]["rows"] if row["way"] == "diffloss-trt, onnxruntime")
    for speed, verdict in ((1.36, "met"), (1.34, "**missed**")):
        ours["median_ms"] = eager["median_ms"] / speed
        assert table_row(make_report(results).text, "ONNX Runtime in fp32")[1:] == [">= 1.35", f"{speed}", verdict]


def test_a_fast_row_with_a_wrong_gradient_meets_no_target(results: dict[str, Content]) -> None:
    rows = [row for row in results[LOSS_STEP]["rows"] if row["way"] == "diffloss-trt, inductor"]
    measured = [row for row in rows if "gradient_error" in row]
    wrong = copy.deepcopy(measured[0])
    for row in measured:  # which may meet it by themselves
        row["median_ms"] = 1e6
    results[LOSS_STEP]["rows"].append(wrong)
    wrong["median_ms"] = 1.0
    start = "our fastest with an error below"
    wrong["gradient_error"]["30"] = 0.029
    assert table_row(make_report(results).text, start)[-1] == "met"
    wrong["gradient_error"]["30"] = 0.031
    assert table_row(make_report(results).text, start)[-1] == "**missed**"


def test_what_is_absent_is_said_to_be_not_measured(results: dict[str, Content]) -> None:
    def missing() -> list[str]:
        paragraph = re.search("^Not measured: (.*)[.]$", make_report(results).text, re.MULTILINE | re.DOTALL)
        assert paragraph
        return paragraph[1].replace("\n", " ").split("; ")

    before = missing()
    assert "a step of the loss of the paper's ADM-256 on a GPU" in before
    del results[LOSS_STEP]
    assert set(missing()) - set(before) == {"a step of the loss of google/ddpm-cifar10-32 on a CPU"}
