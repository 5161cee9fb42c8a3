"""What is written for readers: links that lead somewhere, and README.md's first training, which runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from layout import ROOT

PAGES = sorted(path for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md"))


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return what a link into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the links of a page, but for those to other sites, that lead to no file or no heading."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.is_file() or (anchor and anchor not in anchors(linked)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# On `paths`, and more\n")
    page = tmp_path / "page.md"
    page.write_text(
        "# Here\n[a](#here) [b](other.md#on-paths-and-more) [c](https://example.org/#x)\n"
        "[d](#there)\n![e](none.png)\n[f](other.md#here)\n```\n# no heading\n[g](none.md)\n```\n[h](#no-heading)\n"
    )
    assert broken_links(page) == ["#there", "none.png", "other.md#here", "#no-heading"]


def test_every_page_is_in_the_index() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    index = readme[readme.index("## Documentation\n") : readme.index("## Citing\n")]
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"\]\((.*?)\)", index))


def test_what_readme_says_of_the_study_is_on_its_page() -> None:
    readme, study = (path.read_text("utf-8") for path in (ROOT / "README.md", ROOT / "docs" / "study.md"))
    numbers = re.findall(r"[+-][\d.]+ ± [\d.]+\d", readme)
    assert numbers
    assert all(f"| {number} |" in study for number in numbers)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the bundle is tried on a CPU here")
def test_first_training_runs(
    builtin_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "bundle").symlink_to(builtin_bundle)
    monkeypatch.chdir(tmp_path)
    shorter = code.replace("range(20)", "range(3)")
    assert shorter != code
    exec(compile(shorter, "README.md", "exec"), {})
    losses = [float(line.split(": ")[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
