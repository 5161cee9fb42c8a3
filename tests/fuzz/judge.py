"""A process that loads bundles that may be anything, one for each line of its input, and says what came of each.

    python tests/fuzz/judge.py REFERENCE.pt

A line is a JSON object: the bundle's folder, and how to load it. The answer is a JSON object, `verdict` and `detail`:

- "refused": an error that is meant for users, of one line;
- "right": loss and gradient are those of REFERENCE.pt, to a tolerance;
- "wrong": they are not;
- "raised": another error;
- "reached outside": a file outside the bundle was opened that no process needs.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from diffloss_engine.errors import DiffLossError
from diffloss_trt import DiffLoss
from diffloss_trt.inputs import Backward

# What loading checks at most is 1e-3 (plain form, fp32); images other than those that it checks on come out alike.
TOLERANCE = 5e-3


def compute(loss: DiffLoss, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the terms and the gradient of a loss on images that depend on its channels and size alone."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, loss.evaluator.channels, *(loss.resolution or (16, 16)))
    target = torch.rand(shape, generator=generator)
    restored = (target + 0.1 * torch.randn(shape, generator=generator)).requires_grad_()
    noise = torch.randn(shape, generator=generator)
    terms = loss.terms(restored, target, timesteps=torch.tensor([30, 400]), noise=noise)
    (gradient,) = torch.autograd.grad(terms.total.sum(), restored)
    return {"naturalness": terms.naturalness, "semantic": terms.semantic, "gradient": gradient}


def load(folder: str, backend: str, backward: Backward) -> DiffLoss:
    """Open a loss in which both terms weigh alike."""
    return DiffLoss.load(folder, backend, "cpu", 1.0, 1.0, backward=backward)


class Openings:
    """Notes the files that Python opens below `/etc` or in the folder above a bundle; libraries' own are not seen."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.watched: tuple[str, ...] = ()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and args[0].startswith(self.watched or "\0"):
            self.seen.append(args[0])


def judge(request: dict[str, Any], expected: dict[str, torch.Tensor], openings: Openings) -> tuple[str, str]:
    """Return verdict and detail."""
    openings.seen, openings.watched = [], ("/etc/passwd", str(Path(request["folder"]).parent / "outside"))
    try:
        found = compute(load(**request))
    except DiffLossError as error:
        message = str(error)
        if "\n" in message or len(message) > 5000:
            return "raised", f"a message of {len(message)} characters: {message[:300]!r}"
        return "refused", f"{type(error).__name__}: {message}"
    except Exception:
        return "raised", traceback.format_exc()
    if openings.seen:
        return "reached outside", ", ".join(openings.seen)
    errors = {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}
    detail = ", ".join(f"{name} is off by {error:.1g}" for name, error in errors.items())
    return "right" if all(error < TOLERANCE for error in errors.values()) else "wrong", detail


def main() -> None:
    """Answer every line."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    expected = torch.load(sys.argv[1], weights_only=True)
    openings = Openings()
    for line in sys.stdin:
        verdict, detail = judge(json.loads(line), expected, openings)
        print(json.dumps({"verdict": verdict, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
