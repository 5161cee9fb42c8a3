"""Time and memory of an export, and of a build, by stage: `python benchmarks/export.py adm256 --precision fp16`.

The bundle of a public architecture with random weights is written, replayed and thrown away.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from configurations import CONFIGURATIONS, make_model
from machine import describe, forget_peak_memory, peak_memory
from rich.console import Console
from rich.table import Table

from diffloss_engine.bundle import Bundle
from diffloss_engine.plan_cache import PlanCache
from diffloss_engine.trt_build import FLAVOURS
from diffloss_export.build import BuiltPlan, build_bundle, compile_bundle
from diffloss_export.pipeline import export_bundle
from diffloss_trt.loss import choose_device

# How the stages of the export itself begin; the others compare it with float64.
_EXPORT = ("writing", "exporting")


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


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configuration", choices=CONFIGURATIONS)
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--build", choices=(*FLAVOURS, "inductor"), help="build the graphs too, with this backend")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the result")
    args = parser.parse_args()

    stages = Stages()
    stages.begin("drawing weights")
    model = make_model(args.configuration)
    parameters = sum(parameter.numel() for parameter in model.unet.parameters())
    with tempfile.TemporaryDirectory() as folder:
        bundle, report = export_bundle(
            model,
            Path(folder) / "bundle",
            batch_size=args.batch_size,
            precision=args.precision,
            on_stage=stages.begin,
        )
        stages.end()
        bundle_bytes = sum(entry.bytes for entry in bundle.files.values())
        whole = stages.rows[1:]
        del model
        plans = _build(args.build, bundle, Path(folder) / "plans", stages.begin) if args.build else []
        stages.end()
    builds = stages.rows[1 + len(whole) :]
    export = [row for row in whole if row["stage"].startswith(_EXPORT)]
    result = {
        **describe(),
        "configuration": args.configuration,
        "parameters": parameters,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "bundle_bytes": bundle_bytes,
        "nodes": {name: graph.nodes for name, graph in bundle.graphs.items()},
        "worst": f"{report.worst.check}, {report.worst.quantity}: {report.worst.error:.2g}",
        "stages": whole,
        "export": _total(export),
        "export_and_replay": _total(whole),
        "build": {"backend": args.build, "stages": builds, "bytes": {plan.graph: plan.bytes for plan in plans}},
    }
    table = Table(
        "stage", "s", "peak GiB", title=f"{args.configuration}, {args.precision}, {torch.get_num_threads()} threads"
    )
    totals = [{"stage": "export"} | _total(export), {"stage": "export and replay"} | _total(whole)]
    for row in [*whole, *totals, *builds]:
        table.add_row(row["stage"], f"{row['seconds']:.1f}", f"{row['peak_memory_bytes'] / 2**30:.2f}")
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


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


if __name__ == "__main__":
    main()
