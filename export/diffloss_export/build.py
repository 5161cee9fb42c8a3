"""Every graph of a bundle to a plan in the user's cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffloss_engine.bundle import Bundle
from diffloss_engine.plan_cache import PlanCache
from diffloss_engine.trt_build import BuildOptions, build_plan, import_flavour
from diffloss_engine.trt_session import plan_key

# Of a phase of the builder, how often to tell where it is.
_SECONDS_BETWEEN = 5.0


@dataclass(frozen=True)
class BuiltPlan:
    """What became of one graph; `seconds` is None if its plan was there already."""

    graph: str
    bytes: int
    seconds: float | None


def build_bundle(
    bundle: Bundle,
    *,
    flavour: str,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    cache: PlanCache | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> list[BuiltPlan]:
    """Build, and keep, a plan of each graph, unless it is in the cache (by default the user's).

    TensorRT builds for the GPU that is torch's current one; TensorRT-RTX needs none. Raises as `build_plan` and
    `Bundle.graph_file` do, and InputError if the cache cannot be used.
    """
    options, cache = options or BuildOptions(), cache or PlanCache()
    import_flavour(flavour)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    def build(name: str) -> BuiltPlan:
        on_stage(f"checking the {name} graph")
        file, graph = bundle.graph_file(name), bundle.graphs[name]
        key = plan_key(flavour, bundle.graph_digest(name), bundle.precision, graph.inputs, options, device)
        seconds = None

        def make() -> memoryview:
            nonlocal seconds
            started = time.perf_counter()
            plan = build_plan(
                file,
                flavour=flavour,
                precision=bundle.precision,
                options=options,
                timing_cache=timing_cache,
                on_progress=_teller(f"building the {name} graph", on_stage),
            )
            seconds = time.perf_counter() - started
            return plan

        plan = cache.get(key, make)
        return BuiltPlan(name, len(plan), seconds)

    return [build(name) for name in bundle.graphs]


def _teller(what: str, on_stage: Callable[[str], None]) -> Callable[[str, float], None]:
    """Return a function that tells of the builder's thousands of steps every few seconds."""
    on_stage(what)
    told = time.monotonic()

    def tell(phase: str, done: float) -> None:
        nonlocal told
        if time.monotonic() - told >= _SECONDS_BETWEEN:
            told = time.monotonic()
            on_stage(f"{what}: {phase}, {done:.0%}")

    return tell
