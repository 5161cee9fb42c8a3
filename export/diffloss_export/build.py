"""Every graph of a bundle to a plan in the user's cache, by TensorRT or by inductor, and what is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BackendUnavailableError
from diffloss_engine.inductor import compiler_version
from diffloss_engine.plan_cache import Key, Plan, PlanCache
from diffloss_engine.trt_build import BuildOptions, build_plan, import_flavour
from diffloss_engine.trt_session import builder_version, plan_key
from diffloss_trt.contract import GRADIENT, SEMANTIC_GRADIENT
from diffloss_trt.evaluators import FusedEvaluator
from diffloss_trt.gradient import program_version

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
    `Bundle.graph_file` do, and InputError if the cache cannot be used, or a plan not be kept in it.
    """
    options, cache = options or BuildOptions(), cache or PlanCache()
    import_flavour(flavour)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None

    def build(name: str) -> BuiltPlan:
        on_stage(f"checking the {name} graph")
        file, graph = bundle.graph_file(name), bundle.graphs[name]
        key = plan_key(flavour, bundle.graph_digest(name), bundle.precision, graph.inputs, options, device)

        def make() -> Plan:
            return build_plan(
                file,
                flavour=flavour,
                precision=bundle.precision,
                options=options,
                timing_cache=timing_cache,
                on_progress=_teller(f"building the {name} graph", on_stage),
            )

        return _timed(name, cache, key, make)

    return [build(name) for name in bundle.graphs]


def compile_bundle(
    bundle: Bundle,
    *,
    device: torch.device,
    cache: PlanCache | None = None,
    on_stage: Callable[[str], None] = lambda _: None,
) -> list[BuiltPlan]:
    """Compile, and keep, each gradient graph with inductor for `device`, unless it is in the cache.

    Raises BackendUnavailableError if the bundle has none or they cannot be compiled here; InputError if the cache
    cannot be used, or a program not be kept in it.
    """
    names = compiled_graphs(bundle)
    cache, evaluator = cache or PlanCache(), FusedEvaluator(bundle, "inductor", device)

    def build(name: str) -> BuiltPlan:
        key, compile_graph = evaluator.package(name)

        def make() -> Plan:
            on_stage(f"compiling the {name} graph")
            return compile_graph()

        return _timed(name, cache, key, make)

    return [build(name) for name in names]


def compiled_graphs(bundle: Bundle) -> Sequence[str]:
    """Return the names of the graphs that inductor compiles. Raises BackendUnavailableError if there are none."""
    names = [name for name in (GRADIENT, SEMANTIC_GRADIENT) if name in bundle.graphs]
    if not names:
        raise BackendUnavailableError(f"{bundle.path} has no gradient graph, and inductor compiles only those")
    return names


def kept_plans(bundle: Bundle) -> dict[str, list[dict[str, Any]]]:
    """Return what the user's cache has for each graph of a bundle, the latest first, as JSON values.

    What is "outdated" was made by other code than this, and no load uses it.
    """
    plans, shown = PlanCache().list_plans(), ("flavour", "version", "gpu", "cpu", "options")
    found = {
        name: [
            {field: plan.key.get(field) for field in shown}
            | {"path": str(plan.path), "bytes": plan.bytes, "outdated": _is_outdated(plan.key)}
            for plan in plans
            if plan.key.get("graph") == bundle.graph_digest(name)
        ]
        for name in bundle.graphs
    }
    return {name: of_graph for name, of_graph in found.items() if of_graph}


def _is_outdated(key: Key) -> bool:
    if key.get("flavour") == "inductor":
        return (key.get("compiler"), key.get("program")) != (compiler_version(), program_version())
    return key.get("builder") != builder_version()


def _timed(name: str, cache: PlanCache, key: Key, make: Callable[[], Plan]) -> BuiltPlan:
    """Have the plan of a graph made unless it is in the cache, and say how long that took."""
    seconds = None

    def build() -> Plan:
        nonlocal seconds
        started = time.perf_counter()
        plan = make()
        seconds = time.perf_counter() - started
        return plan

    # Kept is what it is built for.
    plan = cache.get(key, build, must_keep=True)
    return BuiltPlan(name, len(plan), seconds)


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
