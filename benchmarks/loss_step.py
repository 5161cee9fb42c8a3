"""What a step of the loss costs, beside its accuracy: `python benchmarks/loss_step.py cifar10 --json FILE`.

A step is the value and the gradient with respect to the restored images. On a CPU every row runs in turn in each round,
and so do products of large matrices, the ceiling; on a GPU, which does not hold all rows, each row and its product. The
gradient's error is that of the worst of four timesteps, against float64, for restored images at 20, 30 and 40 dB.
Arithmetic is what a step has to do, as PyTorch counts it: two passes forward and one back to the images. Each batch
size has a process of its own; where a row ends it, as a GPU's can, another one goes on. For memory see `machine.build`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Final

import sections
import torch
from bundles import workplace
from configurations import CONFIGURATIONS
from machine import alone, build, describe, large_product, reason
from targets import COMPILE, EAGER, Row
from timing import interleaved
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from ways import PRODUCTS, TERMS, Images, Setting, Step, Way, is_aimed_at, make_images, of_loss, ways

from diffloss_engine.inductor import has_bfloat16
from diffloss_trt import DiffLoss
from diffloss_trt.inputs import choose_device
from diffloss_trt.probe import worst_ratio

DISTANCES: Final = (20, 30, 40)  # dB
TIMED_AT: Final = 30
_PLACES: Final = 4  # timesteps at which errors are taken
ROUNDS: Final = {"cpu": 9, "cuda": 10}
# How often a way is begun that ends the process.
_ATTEMPTS: Final = 2


def choose_precisions(device: torch.device) -> tuple[str, ...]:
    """Return the precisions that a user of the device may want, in the order in which the targets name them."""
    if device.type == "cuda":
        return ("fp16", "bf16", "fp32")
    return ("fp32", "bf16") if has_bfloat16(device) else ("fp32",)


def _part(images: Images, rows: Sequence[int]) -> Images:
    index = torch.tensor(rows, device=images.timesteps.device)
    return Images(*(tensor[index] for tensor in (images.restored, images.target, images.noise, images.timesteps)))


def _gradients(step: Step, images: Images, batch_size: int) -> Tensor:
    """Return the gradient at all images in float64, [N, 3, H, W], taken so many at a time; the last are repeated."""
    count = len(images.timesteps)
    rows = [row % count for row in range(-(-count // batch_size) * batch_size)]
    parts = [step(_part(images, rows[at : at + batch_size])).double() for at in range(0, len(rows), batch_size)]
    return torch.cat(parts)[:count]


def expected_gradients(setting: Setting, terms: str) -> dict[int, Tensor]:
    """Return the gradient in float64 at each distance."""
    tapped = setting.tapped(torch.float64)
    naturalness_weight, semantic_weight = TERMS[terms]
    loss = DiffLoss.from_unet(
        tapped.unet,
        tapped.schedule,
        naturalness_weight=naturalness_weight,
        semantic_weight=semantic_weight,
        reduction="none",
        value_range=(-1.0, 1.0),
    )
    step = of_loss(loss)

    def exact(images: Images) -> Tensor:
        tensors = (images.restored.double(), images.target.double(), images.noise.double())
        return step(Images(*tensors, images.timesteps))

    # The activations of several large images may not fit on a GPU; a CPU gives each of its threads an image.
    at_once = 1 if setting.device.type == "cuda" else _PLACES
    return {decibels: _gradients(exact, make_images(setting, _PLACES, decibels), at_once) for decibels in DISTANCES}


def _errors(setting: Setting, step: Step, expected: Mapping[int, Tensor]) -> dict[str, float]:
    """Return the worst sample's ||a - b|| / ||b|| at each distance."""
    errors = {}
    for decibels, b in expected.items():
        a = _gradients(step, make_images(setting, _PLACES, decibels), setting.batch_size)
        error = worst_ratio((a - b).flatten(1).norm(dim=1), b.flatten(1).norm(dim=1))
        errors[str(decibels)] = float(f"{error:.2g}")
    return errors


def _make(setting: Setting, way: Way) -> Callable[..., Tensor]:
    """Return the step of a way, by default on the images that are timed."""
    step, timed = way.step(setting), make_images(setting, setting.batch_size, TIMED_AT)

    def run(images: Images = timed) -> Tensor:
        return step(images)

    return run


def describe_work(setting: Setting) -> dict[str, Any]:
    """Return the UNet's size, and the FLOP of a step of one image by terms."""
    images = make_images(setting, 1, TIMED_AT)
    counted = {}
    for terms in TERMS:
        step = next(way for way in ways(setting, ()) if way.way == EAGER and way.terms == terms).step(setting)
        # Attention in one kernel is another operation on each device; in parts it is plain products.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step(images)
        counted[terms] = counter.get_total_flops()
    parameters = sum(parameter.numel() for parameter in setting.tapped(torch.float32).parameters())
    return {"parameters": parameters, "flops_an_image": counted}


def measure(setting: Setting, precisions: Sequence[str], rounds: int, only: Sequence[str]) -> list[Row]:
    """Return a row for each way: what it takes and how wrong it is, or why it was not run.

    only: parts of the names of the ways that are to be run; all if there are none.
    """
    expected = {terms: expected_gradients(setting, terms) for terms in TERMS}
    every = [way for way in ways(setting, precisions) if not only or any(part in way.name for part in only)]
    if setting.device.type != "cuda":
        rows = _measure_in_turn(setting, every, expected, rounds)
    else:
        # One GPU does not hold them all. Each takes turns with the matrix product alone, which shows a slower minute.
        # What the targets are about comes first: the time may not be enough for all.
        measured = {
            way.name: _measure_alone(setting, way, expected, rounds)
            for way in sorted(every, key=lambda way: not is_aimed_at(way, precisions))
        }
        rows = [measured[way.name] for way in every]
    _add_ratios(rows)
    return rows


def _measure_alone(
    setting: Setting, way: Way, expected: Mapping[str, Mapping[int, Tensor]], rounds: int
) -> dict[str, Any]:
    """Return the row of a way on a GPU: the one that is kept, or one that is measured now.

    Ends the process if that leaves the GPU of no use to it, with the row kept.
    """
    file, attempts = setting.folder / "rows" / f"{setting.configuration}, {setting.batch_size}, {way.name}.json", 0
    if file.exists():
        row: Row = json.loads(file.read_text())
        attempts = row.pop("attempts", _ATTEMPTS)
        if attempts >= _ATTEMPTS:
            return row
    # What is cut off, by a limit on the command's time for one, or ends the process, is not to stand in the way of the
    # others for ever.
    file.parent.mkdir(exist_ok=True)
    row = _blank(setting, way) | {"not_run": "The command ended while it was measured."}
    file.write_text(json.dumps(row | {"attempts": attempts + 1}))
    try:
        (row,) = _measure_in_turn(setting, [way], expected, rounds)
    except Exception as error:
        row["not_run"] = reason(error, setting.folder)
    if "not_run" not in row:
        file.write_text(json.dumps(row))
    elif _is_usable(setting.device):
        file.unlink()
    else:
        file.write_text(json.dumps(row))
        os._exit(1)
    gc.collect()
    torch.compiler.reset()
    return row


def _is_usable(device: torch.device) -> bool:
    """Whether PyTorch can still draw on a GPU: after some errors, and captures that failed, it cannot."""
    try:
        torch.randn(1, device=device)
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def measure_in_processes(setting: Setting, *arguments: Any) -> list[Row]:
    """Return what `measure` does, in a process of its own, and in another one from where that has ended."""
    before = 0
    while True:
        try:
            rows: list[Row] = alone(measure, setting, *arguments)
        except BrokenProcessPool:
            files = (setting.folder / "rows").glob("*.json")
            attempts = sum(json.loads(file.read_text()).get("attempts", _ATTEMPTS) for file in files)
            if attempts <= before:  # it was not a row that ended it
                raise
            before = attempts
        else:
            return rows


def _measure_in_turn(
    setting: Setting, every: Sequence[Way], expected: Mapping[str, Mapping[int, Tensor]], rounds: int
) -> list[Row]:
    steps: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    products: dict[str, int] = {}
    for way in every:
        print(f"batch {setting.batch_size}: building {way.name} ...", flush=True)
        row = rows[way.name] = _blank(setting, way)
        try:
            step, row["peak_memory_bytes"] = build(functools.partial(_make, setting, way), setting.device)
            row["gradient_error"] = _errors(setting, step, expected[way.terms])
            steps[way.product], products[way.product] = large_product(PRODUCTS[way.precision], setting.device)
        # Whatever it is, it must not lose the other rows.
        except Exception as error:
            row["not_run"] = reason(error, setting.folder)
            continue
        steps[way.name] = step
    timings = interleaved(steps, rounds, setting.device)
    for way in every:
        row = rows[way.name]
        if "not_run" not in row:
            row |= timings[way.name].to_json()
            row["images_per_s"] = float(f"{setting.batch_size / timings[way.name].median:.4g}")
            row["ceiling_flops_per_s"] = float(f"{products[way.product] / timings[way.product].median:.4g}")
    return list(rows.values())


def _blank(setting: Setting, way: Way) -> Row:
    return {"way": way.way, "precision": way.precision, "terms": way.terms, "batch_size": setting.batch_size}


def _add_ratios(rows: Sequence[Row]) -> None:
    run = [row for row in rows if "not_run" not in row]
    eager = [row["median_ms"] for row in run if (row["way"], row["precision"], row["terms"]) == (EAGER, "fp32", "both")]
    compiled = [row["median_ms"] for row in run if row["way"] == COMPILE]
    for row in run:
        for name, baseline in (("times_eager", eager), ("times_compile", compiled)):
            row[name] = round(min(baseline) / row["median_ms"], 3) if baseline else None


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    device = choose_device(None)
    parser.add_argument("configuration", choices=CONFIGURATIONS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16", "bf16"), default=choose_precisions(device))
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="ways with one of these in their names")
    parser.add_argument("--rounds", type=int, default=ROUNDS[device.type])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="keep bundles, what is compiled, and a GPU's rows there"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with workplace(args.work) as folder:
        work = alone(describe_work, Setting(folder, args.configuration, 1, device))
        rows: list[Row] = []
        for batch_size in args.batch_sizes:
            setting = Setting(folder, args.configuration, batch_size, device)
            rows += measure_in_processes(setting, args.precisions, args.rounds, args.only)
    for row in rows:
        if "not_run" not in row:
            achieved = work["flops_an_image"][row["terms"]] * row["images_per_s"]
            row["of_ceiling"] = round(achieved / row["ceiling_flops_per_s"], 4)
    result = {**describe(), "configuration": args.configuration, **work, "rows": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(sections.joined(sections.loss_step(result)))


if __name__ == "__main__":
    main()
