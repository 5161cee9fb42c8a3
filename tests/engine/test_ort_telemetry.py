"""What ONNX Runtime would report to its makers is off once this project has imported it, unless it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc, and where Linux keeps caches")

# Prints the lines of code's own, then how many threads ONNX Runtime has started, and which files it holds open.
LOOK = """
import os, sys
def look():
    opened = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return len(os.listdir("/proc/self/task")), {os.path.realpath(path) for path in opened if os.path.exists(path)}
import numpy, torch
threads, files = look()
CODE
threads_after, files_after = look()
print(threads_after - threads, len(files_after - files))
"""
OURS = """
from diffloss_engine.ort_session import import_runtime
runtime = import_runtime()
"""
THEIRS = "import onnxruntime\n"


def run(code: str, home: Path, **environment: str) -> tuple[list[str], list[str]]:
    """Return what a new process prints, and the names of the files that it leaves in its user's folder."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    # Without certificates and through a proxy that is not there nothing is sent, whatever is on.
    nothing_sent = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "SSL_CERT_FILE": "/none"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK.replace("CODE", code)],
        env=kept | nothing_sent | {"HOME": str(home)} | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines(), sorted(path.name for path in home.rglob("*") if path.is_file())


def test_it_is_off(tmp_path: Path) -> None:
    assert run(OURS, tmp_path) == (["0 0"], [])


def test_where_it_is_on_there_would_be_more(tmp_path: Path) -> None:
    """When this fails, ONNX Runtime no longer reports by itself, and what turns it off can go."""
    said, left = run(THEIRS, tmp_path)
    threads, files = map(int, said[0].split())
    assert threads >= 1
    assert files >= 1
    assert "deviceid" in left


def test_who_asks_for_it_has_it(tmp_path: Path) -> None:
    code = OURS + "print(os.environ['ORT_DISABLE_TELEMETRY'])\n"
    said, left = run(code, tmp_path, ORT_DISABLE_TELEMETRY="0")
    assert said[0] == "0"
    assert said[1] != "0 0"
    assert "deviceid" in left


def test_it_is_off_in_processes_that_are_started_later(tmp_path: Path) -> None:
    code = OURS + "import subprocess; subprocess.run([sys.executable, '-c', 'import onnxruntime'], check=True)\n"
    assert run(code, tmp_path) == (["0 0"], [])


def test_the_doctor_reports_nothing_either(tmp_path: Path) -> None:
    said, left = run("from diffloss_export.trials import try_onnxruntime\nprint(try_onnxruntime()['reason'])", tmp_path)
    assert "fp32" not in said[0]
    assert left == []
