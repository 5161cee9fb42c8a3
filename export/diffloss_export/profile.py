"""Where the time of a bundle's plans goes, as numbers, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import BackendUnavailableError, InputError, MissingPackageError, first_line
from diffloss_engine.plan_cache import Plan, PlanCache
from diffloss_engine.trt_build import BuildOptions, build_plan, import_flavour
from diffloss_engine.trt_profile import Profile, import_driver, largest, profile_plan
from diffloss_engine.trt_session import open_kept_or_built, plan_key
from diffloss_export.pictures import check_place, write_picture

PERCENTILES = (50, 90, 99)
SHOWN = 20


def profile_bundle(
    bundle: Bundle, *, flavour: str, runs: int, on_stage: Callable[[str], None] = lambda _: None
) -> dict[str, Profile]:
    """Run the plan of each graph, building it if it is not in the user's cache; by the graph's name.

    A plan that is kept and refused is set aside, and built anew. Raises BackendUnavailableError where there is no GPU,
    PyCUDA or TensorRT, or no PyTorch that can use the GPU, which TensorRT-RTX does without; InputError if `runs` is
    below 1; and as `build_plan` and `profile_plan` do.
    """
    if runs < 1:
        raise InputError(f"the number of runs is {runs}; expected at least 1")
    driver = import_driver()
    import_flavour(flavour)
    gpu = _first_gpu() if flavour == "tensorrt" else None
    capability = ".".join(map(str, driver.Device(0).compute_capability()))
    cache = PlanCache()

    def profile(name: str) -> Profile:
        on_stage(f"building the {name} graph, unless that has been done")
        file, inputs = bundle.graph_file(name), bundle.graphs[name].inputs
        key = plan_key(flavour, bundle.graph_digest(name), bundle.precision, inputs, BuildOptions(), gpu)

        def run(plan: Plan) -> Profile:
            on_stage(f"running the {name} graph")
            return profile_plan(plan, inputs=inputs, flavour=flavour, runs=runs)

        build = partial(build_plan, file, flavour=flavour, precision=bundle.precision)
        return open_kept_or_built(cache, key, build, run, capability=capability)

    return {name: profile(name) for name in bundle.graphs}


def _first_gpu() -> torch.device:
    """Return the GPU that PyCUDA uses, by whose name TensorRT's plans are kept: PyTorch is asked for that.

    Raises BackendUnavailableError if PyTorch cannot use it.
    """
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch is built for CPUs
        raise BackendUnavailableError(
            f"a profile of tensorrt needs a PyTorch that can use the GPU, and PyTorch {torch.__version__} cannot: "
            f"{first_line(error)}; docs/gpu.md says what to install"
        ) from error
    return torch.device("cuda", 0)


def to_json(profiles: dict[str, Profile]) -> dict[str, Any]:
    """Return the profiles as JSON values, in milliseconds."""
    return {
        name: {
            "runs": len(profile.runs),
            "latency_ms": {f"p{percent}": profile.percentile(percent) for percent in PERCENTILES},
            "layers_ms": profile.layers,
        }
        for name, profile in profiles.items()
    }


def draw(profiles: dict[str, Profile], picture: Path) -> None:
    """Draw a bar for each of the slowest layers of each graph.

    Raises MissingPackageError without matplotlib, and as `write_picture` does.
    """
    figure_class = import_figure()
    figure = figure_class(figsize=(10, 4.5 * len(profiles)), layout="constrained")
    rows = figure.subplots(len(profiles), squeeze=False)[:, 0]
    for axes, (name, profile) in zip(rows, profiles.items(), strict=True):
        bars = largest(profile.layers, SHOWN)
        axes.barh([_shortened(layer) for layer, _ in bars], [ms for _, ms in bars])
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        axes.set_title(f"{name}: {profile.percentile(50):.2f} ms a run (median)")
    write_picture(picture, figure.savefig)


def check_output(path: Path, bundle: Bundle) -> None:
    """Raise InputError if no picture can be drawn to `path`, and as `import_figure` does."""
    if path.suffix[1:].lower() not in import_figure()().canvas.get_supported_filetypes():
        raise InputError(f"{path} does not end like a picture, such as .png")
    check_place(path, bundle)


def import_figure() -> Any:
    """Return matplotlib's class of figures. Raises MissingPackageError if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"a picture is drawn with matplotlib, which cannot be imported ({error}): install '.[profile]'"
        ) from error
    return Figure


def _shortened(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}"
