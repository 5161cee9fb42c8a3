"""Real builds with TensorRT-RTX, which needs no GPU for them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from onnx import helper

from diffloss_engine import BackendError, BackendUnavailableError, Graph, InputError
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.trt_build import BuildOptions, build_plan, import_flavour, keep_timings, recording_logger

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

RTX = "tensorrt-rtx"
FP16, FP32 = "float16", "float32"

SaveGraph = Callable[..., Graph]
OnInterrupt = Callable[[Callable[[], object]], object]


@pytest.fixture
def conv(tmp_path: Path, save_conv: Callable[[Path, str], Graph]) -> Path:
    return tmp_path / save_conv(tmp_path, FP32).file


def is_plan(plan: memoryview) -> bool:
    return len(plan) > 1000 and bytes(plan[1:4]) == b"trt"


def test_builds_a_plan(conv: Path) -> None:
    assert is_plan(build_plan(conv, flavour=RTX, precision="fp32"))


def test_options_reach_the_builder(conv: Path) -> None:
    plain = build_plan(conv, flavour=RTX, precision="fp32")
    one = BuildOptions(workspace_bytes=2**28, optimization_level=1, compute_capabilities=("8.9",))
    assert is_plan(build_plan(conv, flavour=RTX, precision="fp32", options=one))
    assert is_plan(build_plan(conv, flavour=RTX, precision="fp32", options=BuildOptions(compute_capabilities=("7.5",))))
    assert bytes(plain) != bytes(build_plan(conv, flavour=RTX, precision="fp32", options=one))


def test_what_the_builder_says_is_passed_on(conv: Path) -> None:
    with pytest.raises(BackendError, match=r"could not build a plan of conv\.onnx: .*workspace"):
        build_plan(conv, flavour=RTX, precision="fp32", options=BuildOptions(workspace_bytes=2**10))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"workspace_bytes": 0}, "workspace is 0 bytes"),
        ({"optimization_level": 6}, "level is 6; expected 0 to 5"),
        ({"hardware_compatibility": "all"}, "'all'; expected one of ampere-plus, same-compute-capability"),
    ],
)
def test_options_that_no_builder_knows(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        BuildOptions(**changes)


def test_unknown_compute_capability_names_the_known_ones(conv: Path) -> None:
    with pytest.raises(BackendUnavailableError, match=r"capability '9.9', but for 7.5, 8.0.*12.0"):
        build_plan(conv, flavour=RTX, precision="fp32", options=BuildOptions(compute_capabilities=("9.9",)))


def test_every_node_that_is_refused_is_named(tmp_path: Path, save_graph: SaveGraph) -> None:
    x, y = TensorSpec("x", FP32, (2, 3)), TensorSpec("y", FP32, (2, 3))
    nodes = [
        helper.make_node("Mystery", ["x"], ["a"], name="first", domain=""),
        helper.make_node("Enigma", ["a"], ["y"], name="second", domain=""),
    ]
    save_graph(tmp_path / "strange.onnx", nodes, [x], [y])
    with pytest.raises(BackendUnavailableError, match=r"strange.onnx: .*Mystery.*first") as caught:
        build_plan(tmp_path / "strange.onnx", flavour=RTX, precision="fp32")
    assert "Enigma" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a graph", bytes(1000)])
def test_a_file_that_is_no_graph(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises((BackendUnavailableError, BackendError), match=r"bad\.onnx|build"):
        build_plan(tmp_path / "bad.onnx", flavour=RTX, precision="fp32")


def test_missing_weights(conv: Path) -> None:
    (conv.parent / "conv.weights").unlink()
    with pytest.raises(BackendUnavailableError, match=r"conv\.onnx: .*initializer: weight"):
        build_plan(conv, flavour=RTX, precision="fp32")


# Progress and interruption


def test_progress_is_told(conv: Path) -> None:
    told: list[tuple[str, float]] = []
    build_plan(conv, flavour=RTX, precision="fp32", on_progress=lambda phase, done: told.append((phase, done)))
    assert told
    assert all(phase and 0 <= done <= 1 for phase, done in told)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_what_is_raised_while_progress_is_told_ends_the_build(kind: type[BaseException], conv: Path) -> None:
    def stop(*_: object) -> None:
        raise kind("enough")

    with pytest.raises(kind, match="enough"):
        build_plan(conv, flavour=RTX, precision="fp32", on_progress=stop)


@pytest.fixture
def handle_interrupt() -> Iterator[OnInterrupt]:
    """(act): calls `act` at Ctrl-C from now on."""
    # A shell starts jobs in the background with SIGINT ignored, and children inherit that.
    before = signal.getsignal(signal.SIGINT)
    yield lambda act: signal.signal(signal.SIGINT, lambda *_: act())
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def ctrl_c(begun: threading.Event) -> Iterator[None]:
    """Press Ctrl-C while the builder is at work: after `begun`, as soon as no Python runs in the main thread."""

    def press() -> None:
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_ends_a_build(kind: type[BaseException], conv: Path, handle_interrupt: OnInterrupt) -> None:
    """Python calls the handler within the builder's next call of the monitor, where what it raises would be lost."""

    def stop() -> None:
        raise kind("enough")

    handle_interrupt(stop)
    handler, begun = signal.getsignal(signal.SIGINT), threading.Event()
    with pytest.raises(kind, match="enough"), ctrl_c(begun):
        build_plan(conv, flavour=RTX, precision="fp32", on_progress=lambda *_: begun.set())
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_handler_that_raises_nothing_ends_no_build(conv: Path, handle_interrupt: OnInterrupt) -> None:
    """And what it puts in its own place stays there, to end the program when Ctrl-C is pressed again."""
    handle_interrupt(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    begun = threading.Event()
    with ctrl_c(begun):
        assert is_plan(build_plan(conv, flavour=RTX, precision="fp32", on_progress=lambda *_: begun.set()))
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_builds_in_two_threads(conv: Path) -> None:
    plans: list[memoryview] = []
    threads = [
        threading.Thread(target=lambda: plans.append(build_plan(conv, flavour=RTX, precision="fp32"))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [is_plan(plan) for plan in plans] == [True, True]


def in_another_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_there_is_one_logger_and_it_forgets() -> None:
    """The library keeps the first logger that it is given, and goes on calling that one."""
    trt = import_flavour(RTX)
    logger = recording_logger(trt)
    assert recording_logger(trt) is logger
    logger.log(trt.ILogger.ERROR, "an error,\nin two lines")
    logger.log(trt.ILogger.WARNING, "no error")
    assert logger.failed
    assert logger.take() == "an error, in two lines"
    assert not logger.failed
    logger.log(trt.ILogger.ERROR, "old")
    assert not recording_logger(trt).failed
    assert logger.take() == "it gave no reason"


def test_errors_of_threads_are_kept_apart() -> None:
    trt = import_flavour(RTX)
    logger = recording_logger(trt)
    seen: list[object] = []

    def ours() -> None:
        recording_logger(trt).log(trt.ILogger.ERROR, "ours")
        seen.append(logger.failed)
        in_another_thread(lambda: seen.append(logger.take()))
        seen.append(logger.take())

    in_another_thread(ours)
    assert seen == [True, "it gave no reason", "ours"]
    in_another_thread(lambda: logger.log(trt.ILogger.INTERNAL_ERROR, "the library's"))
    assert not logger.failed
    assert logger.take() == "the library's"


def test_timings_are_not_taken_where_there_are_none(conv: Path) -> None:
    with pytest.raises(BackendUnavailableError, match="tensorrt-rtx times no kernels"):
        build_plan(conv, flavour=RTX, precision="fp32", timing_cache=conv.parent / "timings")
    assert not (conv.parent / "timings").exists()


def test_timings_take_the_place_of_older_ones(tmp_path: Path) -> None:
    for timings in (b"old", memoryview(b"new")):
        keep_timings(timings, tmp_path / "timings")
    assert [path.name for path in tmp_path.iterdir()] == ["timings"]
    assert (tmp_path / "timings").read_bytes() == b"new"


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_timings_that_cannot_be_written_leave_nothing_behind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A limit on the size of files stops a write in its midst, as a full disk does."""
    import resource

    (tmp_path / "timings").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        keep_timings(bytes(10_000), tmp_path / "timings")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the timings of kernels could not be kept" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["timings"]
    assert (tmp_path / "timings").read_bytes() == b"old"


# Flavours


def test_flavours_that_are_not_there() -> None:
    with pytest.raises(BackendUnavailableError, match=r"no flavour 'openvino'.*tensorrt, tensorrt-rtx"):
        import_flavour("openvino")
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(BackendUnavailableError, match=r"tensorrt cannot be imported .*docs/gpu.md"):
            import_flavour("tensorrt")


@pytest.mark.parametrize("version", ["0.9.1", "2.0.0"])
def test_versions_that_were_never_tried(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: ModuleType = import_flavour(RTX)
    monkeypatch.setattr(module, "__version__", version)
    with pytest.raises(
        BackendUnavailableError, match=re.escape(f"{version}; expected at least 1.0, and less than 2.0")
    ):
        import_flavour(RTX)
