"""Losses in several threads and processes at once compute what they compute alone, to the last bit."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from diffloss_trt import DiffLoss, draws
from diffloss_trt import loss as loss_module
from diffloss_trt.contract import GRADIENT
from diffloss_trt.evaluators import FusedEvaluator
from forked import forks, run_forked
from load.jobs import JOBS, OWN, THREADS, WEIGHTS, Done, Job, compute, load

# PyTorch's own convolutions round otherwise while another thread traces (torch 2.13); 6e-7 was seen.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def one_thread_each() -> Iterator[None]:
    """Let an engine run on the calling thread alone, and Python change threads a hundred times as often."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(threads)


def all_at_once(work: Callable[[], object], threads: int = THREADS) -> None:
    """Run `work` in each of several threads, begun together; raises what one of them raises."""
    together = threading.Barrier(threads)

    def begin(_: int) -> None:
        together.wait()
        work()

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(begin, range(threads)))


def alone(bundle: str) -> dict[tuple[bool, Job], tuple[Tensor, ...]]:
    """Return what each job gives in one thread, by whether PyTorch computes the gradient."""
    expected: dict[tuple[bool, Job], tuple[Tensor, ...]] = {}
    for recomputed in (False, True):
        losses = {
            weights: load(bundle, weights, backward="recompute" if recomputed else "fused") for weights in WEIGHTS
        }
        expected |= {(recomputed, job): compute(losses[job.weights], job) for job in JOBS}
    return expected


def is_recomputed(done: Done) -> bool:
    return done.owner != "shared" and OWN[int(done.owner.removeprefix("thread "))].get("backward") == "recompute"


def differing(found: Sequence[Done], expected: dict[tuple[bool, Job], tuple[Tensor, ...]]) -> list[Done]:
    """Return those that have another result: another bit, where the engine has computed it all."""
    return [
        done
        for done in found
        for pair in [zip(done.results, expected[is_recomputed(done), done.job], strict=True)]
        if not all(
            float((a - b).norm()) <= ROUNDING * float(b.norm()) if is_recomputed(done) else torch.equal(a, b)
            for a, b in pair
        )
    ]


def overlapping(spans: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> int:
    """Return how many of `spans` have a moment in common with one of `others`."""
    return sum(any(begun < end and start < over for start, end in others) for begun, over in spans)


@pytest.mark.slow
def test_two_processes_of_four_threads(bundle: str, tmp_path: Path) -> None:
    files = [tmp_path / f"results{number}.pt" for number in range(2)]
    script = Path(__file__).with_name("jobs.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), bundle, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for file in files
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    expected = alone(bundle)
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    each = [[Done(Job(*job), *rest) for job, *rest in torch.load(file, weights_only=True)] for file in files]
    for found in each:
        assert len(found) == THREADS * len(JOBS) * 2
        assert {done.job for done in found} == set(JOBS)
        assert differing(found, expected) == []
    # They were at it together, threads and processes both.
    spans = [[(done.begun, done.over) for done in found] for found in each]
    assert overlapping(*spans) > len(spans[0]) / 2
    first_thread, *_ = (spans[0][start : start + 2 * len(JOBS)] for start in range(0, len(spans[0]), 2 * len(JOBS)))
    assert overlapping(first_thread, spans[0][2 * len(JOBS) :]) > len(first_thread) / 2
    assert overlapping(first_thread[:1], first_thread[1:]) == 0
    # Another job's results, and the last bit of a right one, are found.
    done = each[0][0]
    other = next(job for job in JOBS if job.size == done.job.size and job != done.job)
    assert differing([done._replace(job=other)], expected) != []
    nudged = torch.nextafter(done.results[-1], torch.tensor(1.0))
    assert differing([done._replace(results=(*done.results[:-1], nudged))], expected) != []


def fp32_settings() -> list[str]:
    """Return how PyTorch multiplies fp32 on a CPU."""
    mkldnn: Any = torch.backends.mkldnn
    return [mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision]


@pytest.mark.slow
def test_loading_beside_losses_in_use(bundle: str) -> None:
    """Two threads load losses, which traces, while two others go on, and both find what one thread does."""
    losses = {weights: load(bundle, weights) for weights in WEIGHTS}
    expected = alone(bundle)
    eager = compute(DiffLoss.load(bundle, "torch", "cpu", *JOBS[0].weights), JOBS[0])
    before = fp32_settings()
    loading, together, wrong = threading.Event(), threading.Barrier(THREADS), []
    loading.set()

    def use() -> int:
        together.wait()
        turn = 0
        while loading.is_set() or turn < len(JOBS):
            job = JOBS[turn % len(JOBS)]
            found = compute(losses[job.weights], job)
            wrong.extend(differing([Done(job, "shared", found, 0, 0)], expected))
            turn += 1
        return turn

    def open_new(backend: str, **settings: Any) -> tuple[Tensor, ...]:
        together.wait()
        return compute(DiffLoss.load(bundle, backend, "cpu", *JOBS[0].weights, **settings), JOBS[0])

    with ThreadPoolExecutor(THREADS) as pool:
        users = [pool.submit(use) for _ in range(2)]
        traced, checked = pool.submit(open_new, "torch"), pool.submit(open_new, "onnxruntime", check_every=1)
        try:
            for found, right in zip(traced.result(), eager, strict=True):
                assert float((found - right).norm()) <= ROUNDING * float(right.norm())
            assert differing([Done(JOBS[0], "shared", checked.result(), 0, 0)], expected) == []
        finally:
            loading.clear()
        turns = sum(user.result() for user in users)
    assert turns > 2 * len(JOBS)
    assert wrong == []
    assert fp32_settings() == before


def test_each_call_has_a_number_of_its_own(bundle: str) -> None:
    """Of two with one number, `check_every` would pass over the one before."""
    loss, image, numbers = DiffLoss.load(bundle, "onnxruntime", "cpu", 0, 0), torch.zeros(1, 3, 16, 16), []

    def call() -> None:
        numbers.extend(
            [loss.prepare(image, image, torch.zeros(1, dtype=torch.long), image).number for _ in range(2000)]
        )

    all_at_once(call)
    assert sorted(numbers) == list(range(1, 2000 * THREADS + 1))


def live_sessions() -> int:
    gc.collect()
    return sum(type(found) is onnxruntime.InferenceSession for found in gc.get_objects())


def test_threads_that_ask_first_open_one_session(bundle: str) -> None:
    evaluator, before, opened = load(bundle, (0.0, 0.0)).evaluator, live_sessions(), []
    assert isinstance(evaluator, FusedEvaluator)
    all_at_once(lambda: opened.append(evaluator.session(GRADIENT)))
    assert len(opened) == THREADS
    assert len({id(session) for session in opened}) == 1
    assert live_sessions() == before + 1


@forks
def test_a_process_forked_beside_threads_in_a_loss(bundle: str) -> None:
    """It counts, draws and opens a session, for each of which another thread of its parent holds the lock."""
    loss, image = load(bundle, (0.0, 1.0), seed=0), torch.zeros(2, 3, 16, 16)
    loss.semantic_weight = loss.naturalness_weight = 1.0  # another graph than the one that is open
    evaluator = loss.evaluator
    assert isinstance(evaluator, FusedEvaluator)
    inside, over = threading.Event(), threading.Event()

    def hold() -> None:
        with loss_module._counting.lock, draws._numbering.lock, evaluator._opening.lock:
            inside.set()
            over.wait()

    def use() -> None:
        assert float(loss(image, image)) == 0
        DiffLoss.load(bundle, "torch", "cpu")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        inside.wait()
        try:
            run_forked(use)
        finally:
            over.set()
