"""A process in which threads use losses at once, on images that follow from numbers.

    python tests/load/jobs.py BUNDLE RESULTS.pt

When its threads have loaded their losses it says "ready", waits for a line, and leaves what each computed, and when.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffloss_trt import DiffLoss

THREADS = 4
# How each thread loads a loss of its own: one has PyTorch run the UNet, and one is compared with PyTorch in between.
OWN: tuple[dict[str, Any], ...] = ({}, {}, {"backward": "recompute"}, {"check_every": 4})
# Weights of naturalness and semantic: each gradient graph.
WEIGHTS = ((1.0, 0.5), (0.0, 1.0))


class Job(NamedTuple):
    """A call of a loss: on which graph, on how many images, and on which; the bundle is for batches of 2."""

    weights: tuple[float, float]
    size: int
    number: int


JOBS = [Job(WEIGHTS[number % 2], 1 + number % 5, number) for number in range(10)]


class Done(NamedTuple):
    """A job's terms and gradient, from whose loss, and when it was begun and over, by the machine's clock."""

    job: Job
    owner: str
    results: tuple[Tensor, ...]
    begun: float
    over: float


def load(bundle: str, weights: tuple[float, float], **settings: Any) -> DiffLoss:
    """Return a loss on ONNX Runtime."""
    return DiffLoss.load(bundle, "onnxruntime", "cpu", *weights, **settings)


def compute(loss: DiffLoss, job: Job) -> tuple[Tensor, ...]:
    """Return terms and gradient."""
    generator = torch.Generator().manual_seed(job.number)
    target = torch.rand(job.size, 3, 16, 16, generator=generator)
    restored = target + 0.1 * torch.randn(target.shape, generator=generator)
    noise = torch.randn(target.shape, generator=generator)
    timesteps = torch.randint(1000, (job.size,), generator=generator)
    restored = restored.clamp(0, 1).requires_grad_()
    terms = loss.terms(restored, target, timesteps=timesteps, noise=noise)
    (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
    return (*(term.detach() for term in terms), gradient)


def run_threads(bundle: str, when_loaded: Callable[[], None]) -> list[Done]:
    """Let each thread do every job twice, with losses that all share and with losses that it loads for itself."""
    shared = {weights: load(bundle, weights) for weights in WEIGHTS}
    together, loaded = threading.Barrier(THREADS), threading.Barrier(THREADS, when_loaded)

    def work(thread: int) -> list[Done]:
        together.wait()
        own = {weights: load(bundle, weights, **OWN[thread]) for weights in WEIGHTS}
        loaded.wait()
        done = []
        for turn in range(len(JOBS)):
            # At any moment the threads are at different jobs, of different batch sizes.
            job = JOBS[(turn + 3 * thread) % len(JOBS)]
            for owner, losses in (("shared", shared), (f"thread {thread}", own)):
                together.wait()
                begun = time.monotonic()
                done.append(Done(job, owner, compute(losses[job.weights], job), begun, time.monotonic()))
        return done

    with ThreadPoolExecutor(THREADS) as pool:
        return [done for of_thread in pool.map(work, range(THREADS)) for done in of_thread]


def main() -> None:
    """Run the command."""
    bundle, results = sys.argv[1:]
    torch.set_num_threads(1)

    def meet() -> None:
        print("ready", flush=True)
        sys.stdin.readline()

    torch.save([(tuple(done.job), *done[1:]) for done in run_threads(bundle, meet)], results)


if __name__ == "__main__":
    main()
