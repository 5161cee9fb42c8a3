"""Alters bundles at random, loads each in another process, and says what came of it.

    python tests/fuzz/run.py --seed 0 --count 1000

Exit status 1 if one crashed, hung, gave another loss, raised an error that is not meant for users, or reached outside
its folder. Each case depends on seed and number alone: `--first N --count 1` repeats one.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from rich.progress import track  # noqa: E402

from diffloss_export.pipeline import export_bundle  # noqa: E402
from exports import make_model  # noqa: E402
from fuzz.judge import compute, load  # noqa: E402
from fuzz.mutations import mutate  # noqa: E402

GOOD = ("refused", "right")
WAYS = (("onnxruntime", "fused"), ("onnxruntime", "recompute"), ("torch", "fused"), ("torch", "recompute"))


class Case(NamedTuple):
    """One altered bundle: what was done to it, how it was loaded, and what came of it."""

    number: int
    change: str
    way: tuple[str, str]
    verdict: str
    detail: str


class Judge:
    """The process that loads the bundles; started again when it has crashed or hung. `errors` is its stderr's file."""

    def __init__(self, command: Sequence[str], errors: Path, seconds: float) -> None:
        self._command = command
        self._errors = errors
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, str]) -> tuple[str, str]:
        """Return verdict and detail."""
        if self._process is None:
            # Not a pipe, which nobody would empty: diffusers warns at length of settings that it does not know.
            with self._errors.open("w") as errors:
                self._process = subprocess.Popen(
                    self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], self._seconds)
        line = process.stdout.readline() if ready else ""
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer["verdict"], answer["detail"]
        if ready:
            process.wait()
            verdict = "crashed", f"exit status {process.returncode}: {self._errors.read_text()[-2000:]}"
        else:
            verdict = "hung", f"no answer in {self._seconds:.0f} s"
        self.close()
        return verdict

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def fuzz(bundle: Path, scratch: Path, seed: int, numbers: range, seconds: float = 60) -> list[Case]:
    """Alter copies of a bundle, load each in one way, and return what came of them."""
    reference = scratch / "reference.pt"
    torch.save(compute(load(str(bundle), "onnxruntime", "fused")), reference)
    command = [sys.executable, str(Path(__file__).with_name("judge.py")), str(reference)]
    judge, cases = Judge(command, scratch / "errors.txt", seconds), []
    try:
        for number in track(numbers, "altering bundles", disable=not sys.stderr.isatty()):
            rng = random.Random(f"{seed} {number}")
            folder = Path(shutil.copytree(bundle, scratch / "altered"))
            change, way = mutate(folder, rng), rng.choice(WAYS)
            verdict, detail = judge.ask({"folder": str(folder), "backend": way[0], "backward": way[1]})
            cases.append(Case(number, change, way, verdict, detail))
            shutil.rmtree(folder)
    finally:
        judge.close()
    return cases


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--show", action="store_true", help="print every case")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        export_bundle(make_model(), bundle, batch_size=2)
        cases = fuzz(bundle, Path(scratch), args.seed, range(args.first, args.first + args.count))
    for case in cases:
        if args.show or case.verdict not in GOOD:
            print(f"{case.number}: {case.change}; {'/'.join(case.way)}: {case.verdict}: {case.detail}")
    print(", ".join(f"{count} {verdict}" for verdict, count in Counter(case.verdict for case in cases).most_common()))
    return 0 if all(case.verdict in GOOD for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
