"""Bundles that were altered at random; `run.py` does as many as one likes, and repeats one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.run import Judge


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [6, 2000])
def test_altered_bundles_are_refused_or_right(count: int) -> None:
    script = Path(__file__).with_name("run.py")
    done = subprocess.run([sys.executable, str(script), "--count", str(count)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Both happen: neither is everything refused, nor is nothing looked at.
    assert "refused" in done.stdout
    assert "right" in done.stdout


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("""print('{"verdict": "right", "detail": "near"}')""", ("right", "near")),
        ("sys.exit(3)", ("crashed", "exit status 3: " + "x" * 2000)),
    ],
)
def test_judge_may_say_much_on_stderr(end: str, expected: tuple[str, str], tmp_path: Path) -> None:
    code = f"import sys; sys.stderr.write('x' * 10**6); sys.stderr.flush(); {end}"
    with contextlib.closing(Judge([sys.executable, "-c", code], tmp_path / "errors.txt", 60)) as judge:
        assert judge.ask({}) == expected
