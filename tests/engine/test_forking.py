"""Processes forked while another thread is inside of the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffloss_engine.bundle import Graph
from diffloss_engine.exclusive import exclusive
from diffloss_engine.forking import ProcessLock, unforked
from diffloss_engine.ort_session import OrtSession
from diffloss_engine.tensors import TensorSpec
from diffloss_engine.torch_session import TorchSession
from forked import forks, run_forked


@contextmanager
def another_thread(work: Callable[[threading.Event], object]) -> Iterator[None]:
    """Run `work` in a thread, from when it has set the event that it is given."""
    inside = threading.Event()
    thread = threading.Thread(target=work, args=(inside,))
    thread.start()
    assert inside.wait(10)
    yield
    thread.join()


class Busy:
    """What has a lock of its own, as libraries have, and holds it for a while at the first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.in_use: threading.Event | None = None

    def use(self) -> None:
        with self.lock:
            if self.in_use is not None:
                self.in_use.set()
                self.in_use = None
                time.sleep(0.3)

    def use_first(self, call: Callable[[], object]) -> Callable[[threading.Event], None]:
        """Return `call` as a thread's work, which is in the first use when its event is set."""

        def work(inside: threading.Event) -> None:
            self.in_use = inside
            call()

        return work


@forks
@pytest.mark.parametrize("context", [lambda: exclusive, unforked], ids=["exclusive", "unforked"])
def test_a_fork_waits_for_other_threads(context: Callable[[], AbstractContextManager[Any]]) -> None:
    busy = Busy()

    def work() -> None:
        with context():
            busy.use()

    with another_thread(busy.use_first(work)):
        run_forked(work)


@forks
def test_a_thread_that_is_inside_may_fork() -> None:
    """Afterwards other threads may be inside, in either process."""

    def enter(inside: threading.Event) -> None:
        with exclusive, unforked():
            inside.set()

    def enter_in_two_threads() -> None:
        enter(threading.Event())
        with another_thread(enter):
            pass

    with exclusive, unforked():
        run_forked(lambda: enter(threading.Event()))
    run_forked(enter_in_two_threads)
    enter_in_two_threads()


def test_threads_are_unforked_at_once() -> None:
    together = threading.Barrier(2)

    def meet(inside: threading.Event | None = None) -> None:
        if inside is not None:
            inside.set()
        with unforked():
            together.wait(10)

    with another_thread(meet):
        meet()


@forks
def test_a_lock_is_each_process_its_own() -> None:
    own, plain, over = ProcessLock(), threading.Lock(), threading.Event()

    def hold(inside: threading.Event) -> None:
        with own.lock, plain:
            inside.set()
            over.wait()

    def take() -> None:
        assert own.lock.acquire(timeout=0)
        assert not plain.acquire(timeout=0)  # negative control

    with another_thread(hold):
        try:
            run_forked(take)
            assert own.lock.locked()
        finally:
            over.set()


@forks
def test_a_fork_waits_for_runs_in_pytorch() -> None:
    busy, spec = Busy(), TensorSpec("image", "float32", (2,))

    def program(image: Tensor) -> tuple[Tensor, ...]:
        busy.use()
        return (image + 1,)

    session = TorchSession(program, [spec], [TensorSpec("result", "float32", (2,))], torch.device("cpu"))

    def call() -> None:
        assert session({"image": torch.ones(2)})["result"].tolist() == [2, 2]

    with another_thread(busy.use_first(call)):
        run_forked(call)


@forks
def test_a_fork_waits_for_runs_in_onnx_runtime(
    tmp_path: Path, save_conv: Callable[[Path, str], Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, busy = save_conv(tmp_path, "float32"), Busy()
    session = OrtSession(tmp_path / graph.file, graph.inputs, graph.outputs, device=torch.device("cpu"))
    inputs = {spec.name: torch.zeros(spec.shape) for spec in graph.inputs}
    assert session._session is not None
    run = session._session.run_with_iobinding

    def run_and_use(*arguments: Any) -> None:
        run(*arguments)
        busy.use()

    monkeypatch.setattr(session._session, "run_with_iobinding", run_and_use)

    def call() -> None:
        session(inputs)

    with another_thread(busy.use_first(call)):
        run_forked(call)
