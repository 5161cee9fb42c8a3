"""Time and memory of exports, and of builds, by stage, over the size of the model: `python benchmarks/export.py`.

The bundle of each public architecture, with random weights, is written, replayed and thrown away, in a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import sections
import torch
from configurations import CONFIGURATIONS, make_model
from machine import alone, describe, forget_peak_memory, peak_memory

from diffloss_engine.bundle import Bundle
from diffloss_engine.plan_cache import PlanCache
from diffloss_engine.trt_build import FLAVOURS
from diffloss_export.build import BuiltPlan, build_bundle, compile_bundle
from diffloss_export.pipeline import export_bundle
from diffloss_trt.inputs import choose_device

# How the stages of the export itself begin; the others compare it with float64.
_EXPORT: Final = ("writing", "exporting")


class Stages:
    """Collects duration and peak memory of each stage; `begin` is called as each begins."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._started = time.perf_counter()

    def begin(self, stage: str) -> None:
        # Of one stage a builder tells many times how far it is.
        stage = stage.partition(":")[0]
        if self.rows and self.rows[-1]["stage"] == stage:
            return
        self.end()
        forget_peak_memory()
        self._started = time.perf_counter()
        self.rows.append({"stage": stage})
        print(f"{stage} ...", flush=True)

    def end(self) -> None:
        if self.rows:
            self.rows[-1] |= {
                "seconds": round(time.perf_counter() - self._started, 1),
                "peak_memory_bytes": peak_memory(),
            }


def measure(configuration: str, precision: str, batch_size: int, backend: str | None) -> dict[str, Any]:
    """Export an architecture, build its graphs with `backend` if there is one, and return what each stage took."""
    stages = Stages()
    stages.begin(f"drawing the weights of {configuration}")
    model = make_model(configuration)
    parameters = sum(parameter.numel() for parameter in model.unet.parameters())
    with tempfile.TemporaryDirectory() as folder:
        bundle, report = export_bundle(
            model, Path(folder) / "bundle", batch_size=batch_size, precision=precision, on_stage=stages.begin
        )
        stages.end()
        bundle_bytes = sum(entry.bytes for entry in bundle.files.values())
        whole = stages.rows[1:]
        del model
        plans = _build(backend, bundle, Path(folder) / "plans", stages.begin) if backend else []
        stages.end()
    builds = stages.rows[1 + len(whole) :]
    return {
        "configuration": configuration,
        "parameters": parameters,
        "precision": precision,
        "batch_size": batch_size,
        "bundle_bytes": bundle_bytes,
        "nodes": {name: graph.nodes for name, graph in bundle.graphs.items()},
        "worst": f"{report.worst.check}, {report.worst.quantity}: {report.worst.error:.2g}",
        "stages": whole,
        "export": _total([row for row in whole if row["stage"].startswith(_EXPORT)]),
        "export_and_replay": _total(whole),
        "build": {
            "backend": backend,
            "stages": builds,
            "bytes": {plan.graph: plan.bytes for plan in plans},
            **_total(builds),
        }
        if backend
        else None,
    }


def _build(backend: str, bundle: Bundle, folder: Path, on_stage: Callable[[str], None]) -> list[BuiltPlan]:
    cache = PlanCache(folder)
    if backend == "inductor":
        return compile_bundle(bundle, device=choose_device(None), cache=cache, on_stage=on_stage)
    return build_bundle(bundle, flavour=backend, cache=cache, on_stage=on_stage)


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configurations", nargs="*", default=["cifar10", "celebahq256"], help="also adm256, 10 minutes")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--build", choices=(*FLAVOURS, "inductor"), help="build the graphs too, with this backend")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    args = parser.parse_args()
    if unknown := set(args.configurations) - set(CONFIGURATIONS):
        parser.error(f"there is no {', '.join(unknown)}; there is {', '.join(CONFIGURATIONS)}")
    torch.set_num_threads(args.threads)
    exports = [alone(measure, name, args.precision, args.batch_size, args.build) for name in args.configurations]
    result = {**describe(), "exports": exports}
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(sections.joined([*sections.exports(result), sections.export_stages(result)]))


if __name__ == "__main__":
    main()
