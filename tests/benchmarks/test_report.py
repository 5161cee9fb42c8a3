"""README.md and docs/performance.md say what the results say, and a change of either is noticed."""

from __future__ import annotations

import copy
import posixpath
import re
from collections import defaultdict
from pathlib import Path

import pytest
from report import BEGIN, END, PAGE, README, RESULTS, ROOT, Report, differences, load, make_report, make_summary, write
from sections import Content

LOSS_STEP = "loss-step-cifar10-cpu"


@pytest.fixture
def results() -> dict[str, Content]:
    return load(RESULTS)


def table_row(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def shown(report: Report, page: Path) -> set[str]:
    """Return the paths, in the repository, of the pictures that a page shows."""
    folder = page.relative_to(ROOT).parent.as_posix()
    links = re.findall(r"^!\[.*\]\((.*)\)$", report.text, re.MULTILINE)
    return {posixpath.normpath(posixpath.join(folder, link)) for link in links}


def not_measured(report: Report) -> list[str]:
    paragraph = re.search("^Not measured: (.*)[.]$", report.text, re.MULTILINE | re.DOTALL)
    assert paragraph
    return paragraph[1].replace("\n", " ").split("; ")


def test_the_pages_and_their_pictures_are_in_step(results: dict[str, Content]) -> None:
    assert differences(make_report(results), PAGE, ROOT) == []
    assert differences(make_summary(results), README, ROOT) == []


def test_pages_show_pictures_from_where_they_are(results: dict[str, Content]) -> None:
    report, summary = make_report(results), make_summary(results)
    assert shown(report, PAGE) == {each.path for each in report.pictures}
    assert set() < shown(summary, README) < shown(report, PAGE)


def test_the_summary_has_the_steps_their_targets_and_what_is_not_measured(results: dict[str, Content]) -> None:
    report, summary = make_report(results), make_summary(results)
    for start in ("diffloss-trt, inductor, bf16", "ONNX Runtime in fp32", "DiffLoss, eager PyTorch"):
        assert table_row(summary.text, start) == table_row(report.text, start)
    assert not_measured(summary) == not_measured(report)
    # README.md's own heading stands above the section, the page's title above the page's.
    headings = re.findall("^#.*$", report.text, re.MULTILINE)
    assert all(heading.startswith("## ") for heading in headings)
    assert {f"#{heading}" for heading in headings} > set(re.findall("^#.*$", summary.text, re.MULTILINE)) > set()


def test_what_readme_says_to_expect_is_what_was_measured(results: dict[str, Content]) -> None:
    expected = README.read_text().partition("**What to expect.**")[2].partition("**State.**")[0]
    found = re.findall(r"([\d.]+) to ([\d.]+) times the speed of\s+eager", expected)
    default, compiled = ([float(bound) for bound in bounds] for bounds in found)
    measured: dict[str, list[float]] = defaultdict(list)
    for stem, content in results.items():
        if stem.startswith("loss-step"):
            for row in content["rows"]:
                if row["terms"] == "both" and row.get("times_eager"):
                    measured[f"{row['way'].removeprefix('diffloss-trt, ')}, {row['precision']}"].append(
                        row["times_eager"]
                    )
        elif stem.startswith("train-step"):
            ms = {row["loss"]: row["median_ms"] for row in content["rows"]}
            for loss, value in ms.items():
                if loss.startswith("DiffLoss, diffloss-trt "):
                    speed = (ms["DiffLoss, eager PyTorch"] - ms["none"]) / (value - ms["none"])
                    measured[loss.removeprefix("DiffLoss, diffloss-trt ")].append(speed)
    for way, bounds in {"onnxruntime, fp32": default, "inductor, bf16": compiled}.items():
        assert bounds == [round(bound(measured[way]), 1) for bound in (min, max)]


def test_another_result_is_noticed(results: dict[str, Content]) -> None:
    results[LOSS_STEP]["rows"][-1]["times_eager"] += 1
    assert differences(make_summary(results), README, ROOT) == ["README.md, what is measured"]
    found = differences(make_report(results), PAGE, ROOT)
    assert found == ["performance.md, what is measured", f"docs/images/{LOSS_STEP}.png"]


def test_an_edit_of_the_section_is_noticed_and_undone(results: dict[str, Content], tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(README.read_text().replace("**missed**", "met"))
    report = make_summary(results)
    assert differences(report, page, ROOT) == ["README.md, what is measured"]
    write(report, page, ROOT)
    assert page.read_text() == README.read_text()


def test_pictures_that_are_missing_are_drawn(results: dict[str, Content], tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
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
    start = "our fastest in bf16 with an error below"
    wrong["gradient_error"]["30"] = 0.029
    assert table_row(make_report(results).text, start)[-1] == "met"
    wrong["gradient_error"]["30"] = 0.031
    assert table_row(make_report(results).text, start)[-1] == "**missed**"


def test_what_is_absent_is_said_to_be_not_measured(results: dict[str, Content]) -> None:
    before = not_measured(make_report(results))
    assert "a step of the loss with the paper's ADM-256 on a GPU" in before
    for stem in [stem for stem in results if stem.startswith(LOSS_STEP)]:
        del results[stem]
    added = {"a step of the loss with google/ddpm-cifar10-32 on a CPU"}
    assert set(not_measured(make_report(results))) - set(before) == added
    assert set(not_measured(make_summary(results))) - set(before) == added
