"""`diffloss-export doctor`: what it says of this machine is so, and nothing that is broken breaks it."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch

from diffloss_engine.bundle import MANIFEST
from diffloss_export.doctor import ORDER, advise, print_report
from diffloss_export.trials import try_torch
from diffloss_trt import DiffLoss, opening
from exports import Exported

Report = dict[str, Any]


@pytest.fixture(scope="module")
def examined(exported: Callable[..., Exported]) -> Report:
    """Run the command on this machine, with a bundle; read-only."""
    command = [sys.executable, "-m", "diffloss_export", "doctor", str(exported().bundle.path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=250)
    report: Report = json.loads(done.stdout)
    return report


def test_report_of_this_machine(examined: Report) -> None:
    backends = examined["backends"]
    assert examined["torch"]["cuda"] == torch.version.cuda
    assert len(examined["torch"]["gpus"]) == torch.cuda.device_count()
    assert examined["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert backends["torch"]["version"] == torch.__version__
    assert backends["onnxruntime"]["version"] == onnxruntime.__version__
    assert backends["onnxruntime"]["providers"] == onnxruntime.get_available_providers()
    assert examined["packages"]["diffloss-trt"]
    for backend in backends.values():
        assert backend["reason"] or len(backend["precisions"]) == 3
    assert examined["advice"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_order_is_that_of_auto(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written twice, because the report has to come where torch is broken."""
    monkeypatch.setattr(opening, "has_bfloat16", lambda _: True)
    bundle: Any = SimpleNamespace(precision="bf16")  # for which a CPU compiles too
    assert opening._fastest_first(bundle, torch.device(device), fused=True) == ORDER[device]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow), pytest.param("bf16", marks=pytest.mark.slow)]
)
def test_auto_chooses_what_is_foretold(
    examined: Report,
    exported: Callable[..., Exported],
    precision: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DIFFLOSS_CACHE", str(tmp_path))
    chosen = DiffLoss.load(exported(precision=precision).bundle.path)
    assert chosen.evaluator.backend == examined["auto"][precision]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_reasons_on_a_machine_without_a_gpu(examined: Report) -> None:
    onnx = examined["backends"]["onnxruntime"]
    assert onnx["precisions"] == ["fp32", "fp16"]
    assert onnx["reason"].startswith("bf16: ")
    assert "Could not find an implementation" in onnx["reason"]
    for flavour in ("tensorrt", "tensorrt-rtx"):
        assert examined["backends"][flavour]["precisions"] == []


def test_bundle_is_loaded_as_a_training_does(examined: Report, exported: Callable[..., Exported]) -> None:
    chosen = DiffLoss.load(exported().bundle.path)
    found = examined["bundle"]
    assert (found["backend"], found["backward"]) == (chosen.evaluator.backend, "fused")
    assert found["device"] == str(chosen.device)
    (line,) = found["said"]
    assert line.startswith(f"backend auto: {found['backend']} on ")


def test_report_in_words(examined: Report, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(examined)
    out = " ".join(capsys.readouterr().out.split())
    for word in (
        "tensorrt-rtx",
        torch.__version__,
        examined["bundle"]["said"][0],
        f"for fp32, {examined['auto']['fp16']}",
    ):
        assert word in out
    print_report(examined | {"bundle": {"error": "no [such] bundle", "status": 2}, "torch": None, "gpus": [GPU]})
    out = " ".join(capsys.readouterr().out.split())
    assert "This bundle: no [such] bundle" in out
    assert "name RTX 4090, driver 580.95" in out


def test_a_gpu_that_fails_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert try_torch()["finds"]["cuda_error"] == "RuntimeError"


def stages(stderr: str) -> list[str]:
    """Return what was said to be waited for, without the times."""
    return [line.partition("] ")[2] for line in stderr.splitlines()]


def loading(bundle: Path) -> str:
    return f"loading {bundle}, which takes minutes if its plans have yet to be built"


@pytest.mark.skipif(os.name != "posix", reason="an executable script")
@pytest.mark.parametrize(
    ("end", "reason"),
    [("abort()", "it ended its process by signal 6 ("), ("_exit(0)", "it ended its process with status 0")],
)
def test_broken_libraries_and_a_bundle_that_is_none(tmp_path: Path, end: str, reason: str) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    (tmp_path / "onnxruntime.py").write_text(f"import os; os.{end}")
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'RTX 4090, 580.95, 8.9, 24564 MiB'\n")
    driver.chmod(0o755)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "diffloss_export", "doctor", str(tmp_path / "none"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert done.returncode == 1
    assert stages(done.stderr) == ["trying each backend", loading(tmp_path / "none")]
    report = json.loads(done.stdout)
    assert report["torch"] is None
    assert report["auto"] == dict.fromkeys(("fp32", "fp16", "bf16"))
    missing = "libtorch_cpu.so: cannot open shared object file"
    reasons = {name: backend["reason"] for name, backend in report["backends"].items()}
    assert reasons.pop("onnxruntime").startswith(reason)
    assert set(reasons.values()) == {missing}
    assert report["bundle"] == {"error": missing, "status": 1}
    assert report["gpus"] == [GPU]
    assert report["advice"] == ["PyTorch cannot be imported, and nothing runs without it: install it again."]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_interrupted_report_leaves_no_trial_behind(tmp_path: Path) -> None:
    """And what lies in the current folder is not imported in the place of a library."""
    (tmp_path / "onnxruntime.py").write_text(f"open({str(tmp_path / 'taken')!r}, 'w')")
    hang = f"import os, time\nopen({str(tmp_path / 'pids')!r} + str(os.getpid()), 'w')\ntime.sleep(100)"
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "torch.py").write_text(hang)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "later"), *sys.path])}
    command = [sys.executable, "-P", "-m", "diffloss_export", "doctor"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        while not list(tmp_path.glob("pids*")):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert err.splitlines()[-1] == "diffloss-export: interrupted"
    assert stages(err)[:-1] == ["trying each backend"]
    for path in tmp_path.glob("pids*"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name.removeprefix("pids")), 0)
    assert not (tmp_path / "taken").exists()


def test_a_bundle_is_loaded_when_the_trials_are_done(tmp_path: Path) -> None:
    """Not beside them: it may keep processor and GPU busy for minutes."""
    stub = (
        "import sys, time\nfrom pathlib import Path\n"
        f"running, name = Path({str(tmp_path)!r}) / 'running', sys.argv[1]\n"
        "if name == 'bundle':\n"
        "    running.with_name('beside').write_text(' '.join(path.name for path in running.iterdir()))\n"
        "else:\n"
        "    (running / name).touch()\n    time.sleep(2)\n    (running / name).unlink()\n"
        "raise ImportError('no torch')"
    )
    (tmp_path / "running").mkdir()
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "torch.py").write_text(stub)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "stub"), *sys.path])}
    command = [sys.executable, "-m", "diffloss_export", "doctor", str(tmp_path / "none")]
    subprocess.run(command, capture_output=True, check=False, env=environment, timeout=120)
    assert (tmp_path / "beside").read_text() == ""


def forget_a_file(folder: Path) -> str:
    (folder / "schedule.json").unlink()
    return "'schedule.json' is missing"


def forget_the_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return "is not a bundle: it has no manifest.json"


@pytest.mark.parametrize(("damage", "status"), [(forget_a_file, 1), (forget_the_manifest, 2)])
def test_trial_of_a_bundle_that_cannot_be_loaded(
    copied: Callable[..., Path], damage: Callable[[Path], str], status: int
) -> None:
    folder = copied()
    said = damage(folder)
    command = [sys.executable, "-m", "diffloss_export.trials", "bundle", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr


@pytest.mark.slow
def test_a_bundle_that_is_none_is_wrong_input(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffloss_export", "doctor", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 2
    assert stages(done.stderr) == ["trying each backend", loading(tmp_path / "none")]
    out = " ".join(done.stdout.split())
    assert f"This bundle: {tmp_path / 'none'} does not exist" in out
    assert "No backend that auto would prefer is missing." not in out


GPU = {"name": "RTX 4090", "driver": "580.95", "compute_capability": "8.9", "memory": "24564 MiB"}
ALL: Report = {"precisions": ["fp32", "fp16", "bf16"]}
NONE: Report = {"precisions": []}
BEST: Report = {
    "packages": {"onnxruntime-gpu": "1.31.0"},
    "gpus": [GPU],
    "torch": {"cuda": "13.0", "cuda_error": None, "gpus": [{"name": "RTX 4090"}], "bf16": True},
    "backends": {"tensorrt": ALL, "tensorrt-rtx": NONE, "onnxruntime": ALL, "inductor": ALL, "torch": ALL},
}
CPU: Report = {
    "packages": {"onnxruntime": "1.32.0"},
    "gpus": [],
    "torch": {"cuda": None, "cuda_error": None, "gpus": [], "bf16": False},
    "backends": {"tensorrt": NONE, "tensorrt-rtx": NONE, "onnxruntime": ALL, "inductor": NONE, "torch": ALL},
}


@pytest.mark.parametrize(
    ("report", "changes", "parts"),
    [
        (BEST, {}, ["No backend that auto would prefer is missing."]),
        (BEST, {"backends.tensorrt": NONE, "backends.tensorrt-rtx": ALL}, ["No backend that auto would prefer"]),
        (BEST, {"backends.tensorrt": NONE}, ["TensorRT, which does not run here: install '.[gpu]'"]),
        (
            BEST,
            {"packages": {"onnxruntime": "1.32.0"}, "backends.onnxruntime": NONE},
            ["install '.[gpu]', which has 'onnxruntime-gpu' in the place of 'onnxruntime'."],
        ),
        (BEST, {"packages": {"onnxruntime": "1", "onnxruntime-gpu": "1"}}, ["uninstall both"]),
        (CPU, {}, ["No backend that auto would prefer"]),
        (CPU, {"bundle": {"backend": "onnxruntime"}}, ["No backend that auto would prefer"]),
        (CPU, {"bundle": {"error": "no bundle", "status": 2}}, []),
        (CPU, {"gpus": [GPU]}, ["There is a GPU (RTX 4090), but this PyTorch is built for CPUs"]),
        (
            CPU,
            {"gpus": [GPU], "torch.cuda": "13.0", "torch.cuda_error": "the driver is too old"},
            ["(RTX 4090, driver 580.95), but PyTorch, which is built for CUDA 13.0, cannot use it: the driver is too"],
        ),
        (CPU, {"packages": {}, "backends.onnxruntime": NONE}, ["install '.[cpu]', which has 'onnxruntime'."]),
        (CPU, {"torch.bf16": True, "backends.inductor": {"precisions": ["bf16"]}}, [", compiled by inductor."]),
        (CPU, {"torch.bf16": True}, ["once there is a C++ compiler"]),
        (CPU, {"torch.bf16": True, "gpus": [GPU]}, ["There is a GPU", "once there is a C++ compiler"]),
    ],
)
def test_advice(report: Report, changes: dict[str, Any], parts: list[str]) -> None:
    changed = copy.deepcopy(report)
    for path, value in changes.items():
        *folders, name = path.split(".")
        place = changed
        for folder in folders:
            place = place[folder]
        place[name] = value
    advice = advise(changed)
    assert len(advice) == len(parts)
    for sentence, part in zip(advice, parts, strict=True):
        assert part in sentence


@pytest.mark.skipif(torch.cuda.is_available(), reason="is of CPUs")
def test_a_bf16_bundle_on_a_cpu_says_why(
    exported: Callable[..., Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DIFFLOSS_CACHE", str(tmp_path))
    monkeypatch.setattr("diffloss_trt.opening.has_bfloat16", lambda _: False)
    with caplog.at_level("WARNING"):
        DiffLoss.load(exported(precision="bf16").bundle.path, device="cpu")
    (record,) = caplog.records
    message = record.getMessage()
    assert "not inductor, because this processor does not multiply bf16" in message
    assert message.endswith("not onnxruntime, because: ONNX Runtime has no bf16 kernels for CPUs")
