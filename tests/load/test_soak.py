"""Thousands of calls leave nothing behind: no memory, no thread, no open or temporary file, no session."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, as Linux has it"),
    pytest.mark.slow,
]

COUNTED = ("threads", "files", "temporary", "sessions")


def soak(bundle: str, folder: Path, steps: int, *options: str) -> dict[str, Any]:
    script, temporary = Path(__file__).with_name("soak.py"), folder / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, str(script), bundle, str(steps), *options],
        env=os.environ | {"TMPDIR": str(temporary)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def growth(measured: list[dict[str, int]]) -> float:
    """Return by how many bytes memory grows over all steps measured.

    By the median of the slopes between any two measurements (Theil and Sen): pages that the allocator takes or gives
    back once move it little.
    """
    slopes = [
        (after["memory"] - before["memory"]) / (after["step"] - before["step"])
        for before, after in combinations(measured, 2)
    ]
    return statistics.median(slopes) * (measured[-1]["step"] - measured[0]["step"])


# What a few hundred steps move it by, to and fro, is a tenth of that.
ALLOWED = 2**20


@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.timeout(3600))])
def test_nothing_is_left_behind(bundle: str, tmp_path: Path, steps: int) -> None:
    found = soak(bundle, tmp_path, steps)
    measured = found["measured"]
    assert len(measured) == 16
    assert growth(measured) < ALLOWED
    # A step's gradient is 9 kB, on the average, and would be found.
    assert growth([held | {"memory": held["memory"] + 9_000 * held["step"]} for held in measured]) > ALLOWED
    for name in COUNTED:
        assert {held[name] for held in measured} == {measured[0][name]}, name
    assert measured[0]["sessions"] == 1
    assert found["same"]


def test_what_is_left_behind_is_found(bundle: str, tmp_path: Path) -> None:
    found = soak(bundle, tmp_path, 100, "--leak")
    measured = found["measured"]
    assert growth(measured) > ALLOWED
    for name in COUNTED:
        assert measured[-1][name] >= measured[0][name] + len(measured) - 1, name
