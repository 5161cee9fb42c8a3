"""Bundles that were altered at random; `run.py` does as many as one likes, and repeats one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_altered_bundles_are_refused_or_right(count: int) -> None:
    script = Path(__file__).with_name("run.py")
    done = subprocess.run([sys.executable, str(script), "--count", str(count)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Both happen: neither is everything refused, nor is nothing looked at.
    assert "refused" in done.stdout
    assert "right" in done.stdout
