"""Any model source -> a frozen float32 UNet and its noise schedule.

diffusers re-initialises weights that a checkpoint lacks and only logs it; a loss on such a UNet would be
noise. So the weights are read here, and every name, shape, dtype and value is checked before they are used.
"""

from __future__ import annotations

import importlib.resources
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffloss_engine.errors import InputError, ModelError
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import check_unet

if TYPE_CHECKING:
    from diffusers import UNet2DModel

BUILTIN = "builtin"

_KINDS = (
    "'builtin', a diffusers folder (a pipeline's or a UNet's) or a Hugging Face Hub id such as google/ddpm-cifar10-32"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
_CONFIG = "config.json"
_SCHEDULER_CONFIG = "scheduler_config.json"
_PIPELINE_CONFIG = "model_index.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_WEIGHTS_INDEX = _WEIGHTS + ".index.json"
_MAX_JSON_BYTES = 16 * 2**20

# Of a Hub repository nothing but the UNet and its scheduler: neither other components nor other variants
# of the same weights, which double the download.
_HUB_JSON = tuple(
    prefix + name
    for prefix in ("", "unet/", "scheduler/")
    for name in (_PIPELINE_CONFIG, _CONFIG, _SCHEDULER_CONFIG, _WEIGHTS_INDEX)
)
_HUB_WEIGHTS = tuple(
    prefix + name
    for prefix in ("", "unet/")
    for name in (_WEIGHTS, "diffusion_pytorch_model-[0-9]*-of-[0-9]*.safetensors")
)

# Checkpoints from before diffusers 0.15, among them google/ddpm-*, name the attention projections so.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_NAME = re.compile(r"(?P<block>.*\.)(?P<layer>query|key|value|proj_attn)(?P<parameter>\.(?:weight|bias))")

_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LoadedModel:
    """A diffusion model ready for export.

    unet: in float32, in evaluation mode, no parameter requiring a gradient, on the CPU.
    schedule: the noise schedule it was trained with.
    source: what `load_model` was given.
    notes: what the user should be told about how the source was understood, one sentence each.
    """

    unet: UNet2DModel
    schedule: NoiseSchedule
    source: str
    notes: tuple[str, ...]


def load_model(source: str, *, revision: str | None = None) -> LoadedModel:
    """Load an unconditional diffusion model.

    source: `builtin` (the prior in this package), a local folder (a diffusers pipeline, its UNet and scheduler
        in subfolders or side by side, or a UNet's own folder), or a Hub id `organisation/name`. A local folder
        wins over a Hub id of the same name; a local folder called `builtin` is reached as `./builtin`.
    revision: branch, tag or commit of a Hub repository.

    Weights are read from safetensors only and upcast to float32. Raises ModelError when the source cannot be
    read, its weights do not fit its configuration or are not finite, or the architecture or the scheduler
    is not one that the loss can use; InputError for a revision of something that is not on the Hub.
    """
    if source == BUILTIN:
        _refuse_revision(source, revision)
        with importlib.resources.as_file(importlib.resources.files("diffloss_export").joinpath("builtin")) as folder:
            if not folder.is_dir():
                raise ModelError("this installation has no built-in prior: diffloss_export/builtin is missing")
            return _load_folder(folder, source)
    if os.path.isdir(source):
        _refuse_revision(source, revision)
        return _load_folder(Path(source), source)
    if source.lower().endswith((".pt", ".pth")):
        raise ModelError(
            f"{source}: guided-diffusion checkpoints (.pt, .pth) are not supported yet in this version; "
            f"MODEL can be {_KINDS}"
        )
    if _HUB_ID.fullmatch(source) and not os.path.lexists(source):
        return _load_folder(_download(source, revision), source)
    problem = "is a file, not a folder" if os.path.lexists(source) else "no such folder"
    raise ModelError(f"{source!r}: {problem}; MODEL can be {_KINDS}")


def _refuse_revision(source: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(f"a revision ({revision!r}) is for Hub ids only, and {source!r} is not read from the Hub")


def _load_folder(folder: Path, source: str) -> LoadedModel:
    unet_folder = _find_unet(folder)
    config = _read_unet_config(unet_folder)
    with _quiet():
        unet, unet_notes = _load_unet(unet_folder, config)
        schedule, schedule_notes = _load_schedule(folder)
    return LoadedModel(unet, schedule, source, unet_notes + schedule_notes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries' own logs, warnings and progress bars off the terminal: what matters is raised or noted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.utils import logging as diffusers_logging
        from huggingface_hub import utils as hub

        loggers = (diffusers_logging, hub.logging)
        levels = [logger.get_verbosity() for logger in loggers]
        shows_progress = not hub.are_progress_bars_disabled()
        for logger in loggers:
            logger.set_verbosity(CRITICAL)
        hub.disable_progress_bars()
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.set_verbosity(level)
            if shows_progress:
                hub.enable_progress_bars()


def _download(repository: str, revision: str | None) -> Path:
    """Bring a Hub repository's UNet and scheduler into the local cache; the configuration first, to refuse early."""
    with _quiet():
        folder = _snapshot(repository, revision, _HUB_JSON)
        _read_unet_config(_find_unet(folder))
        # The folder is called after the commit: the branch may have moved in between.
        return _snapshot(repository, folder.name, _HUB_WEIGHTS)


def _snapshot(repository: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except RevisionNotFoundError as error:
        raise ModelError(f"{repository}: the Hugging Face Hub has no revision {revision!r} of it") from error
    except GatedRepoError as error:
        raise ModelError(f"{repository}: access to it must be granted on the Hugging Face Hub first") from error
    # Whatever the HTTP stack raises: its classes differ between major versions of huggingface_hub.
    except Exception as error:
        raise ModelError(
            f"{repository!r}: no such local folder, and the Hugging Face Hub could not be reached or has no such "
            f"repository ({_first_line(error)})"
        ) from error


def _find_unet(folder: Path) -> Path:
    """Return the folder with the UNet's configuration and weights, `folder` itself or its subfolder `unet`."""
    for pipeline in dict.fromkeys((folder, _parent_pipeline(folder))):
        index = pipeline / _PIPELINE_CONFIG
        if index.is_file():
            _refuse_latent_pipeline(index)
    if (folder / "unet").is_dir():
        return folder / "unet"
    if (folder / _CONFIG).is_file():
        return folder
    raise ModelError(f"{folder}: neither a diffusers pipeline's nor a UNet's folder: no unet/ and no {_CONFIG} in it")


def _parent_pipeline(folder: Path) -> Path:
    """Return the pipeline's folder when `folder` is its `unet` subfolder, else `folder`."""
    absolute = Path(os.path.abspath(folder))
    return absolute.parent if absolute.name == "unet" else folder


def _refuse_latent_pipeline(index: Path) -> None:
    # Such a UNet may well have three channels (CompVis/ldm-celebahq-256): nothing else would tell.
    components = _read_json(index)
    for name in ("vae", "vqvae"):
        component = components.get(name)
        if isinstance(component, list) and any(component):
            raise ModelError(f"{index}: a latent diffusion pipeline (it has a {name}); the UNet must work on images")


def _read_unet_config(unet_folder: Path) -> dict[str, Any]:
    path = unet_folder / _CONFIG
    config = _read_json(path)
    name = config.get("_class_name")
    if name == "UNet2DConditionModel":
        raise ModelError(f"{path}: text-conditional UNets (UNet2DConditionModel) are not supported, only UNet2DModel")
    if name != "UNet2DModel":
        found = "no _class_name" if name is None else f"_class_name {name!r}"
        raise ModelError(f"{path}: found {found}, expected 'UNet2DModel'")
    if config.get("quantization_config"):
        raise ModelError(f"{path}: quantized UNets are not supported")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > _MAX_JSON_BYTES:
        raise ModelError(f"{path}: larger than the {_MAX_JSON_BYTES} bytes expected at most")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content


def _load_unet(folder: Path, config: dict[str, Any]) -> tuple[UNet2DModel, tuple[str, ...]]:
    from diffusers import UNet2DModel

    try:
        # On the meta device nothing is initialised, neither time nor the caller's random state is spent.
        with torch.device("meta"):
            built, unused = UNet2DModel.from_config(config, return_unused_kwargs=True)
    # A constructor fed with wrong values raises anything.
    except Exception as error:
        raise ModelError(f"{folder / _CONFIG}: no UNet2DModel can be built from it: {_first_line(error)}") from error
    unet: UNet2DModel = built
    weights = _read_weights(folder, unet.state_dict())
    unet.load_state_dict(weights, assign=True)
    for name, buffer in unet.named_buffers():
        if buffer.is_meta:
            raise ModelError(f"{folder}: the buffer {name!r} is not part of a checkpoint; such UNets are not supported")
    try:
        check_unet(unet)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    unet.eval().requires_grad_(False)
    unknown = sorted(key for key in unused if not key.startswith("_"))
    notes = (f"{_CONFIG} has settings that the installed diffusers ignores: {', '.join(unknown)}",) if unknown else ()
    return unet, notes


def _read_weights(folder: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a UNet's folder in float32, under exactly the names and with the shapes of `expected`."""
    from safetensors import SafetensorError, safe_open

    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for stored in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated over)
                    name = _current_name(stored, expected)
                    if name not in expected or name in weights:
                        raise ModelError(f"{path}: unexpected tensor {stored!r}: {_CONFIG} describes another UNet")
                    found, wanted = tuple(file.get_slice(stored).get_shape()), tuple(expected[name].shape)
                    if found != wanted:
                        raise ModelError(f"{path}: tensor {stored!r} has shape {found}, {_CONFIG} asks for {wanted}")
                    weights[name] = _to_float32(file.get_tensor(stored), f"{path}: tensor {stored!r}")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: damaged or not safetensors: {_first_line(error)}") from error
    missing = [name for name in expected if name not in weights]
    if missing:
        raise ModelError(f"{folder}: no tensor {missing[0]!r} in the weights ({len(missing)} missing in all)")
    return weights


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS_INDEX).is_file():
        return _shards(folder)
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder}: only pickled .bin weights, which are not read because they can run code; "
            f"expected {_WEIGHTS} (diffusers' save_pretrained writes it)"
        )
    raise ModelError(f"{folder}: no weights: expected {_WEIGHTS}")


def _shards(folder: Path) -> list[Path]:
    index = folder / _WEIGHTS_INDEX
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected a 'weight_map' from tensor names to files")
    shards = []
    for name in dict.fromkeys(map(str, weight_map.values())):
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: no such file, but {_WEIGHTS_INDEX} names it")
        shards.append(folder / name)
    return shards


def _current_name(stored: str, expected: Mapping[str, Tensor]) -> str:
    legacy = _LEGACY_NAME.fullmatch(stored)
    if stored in expected or legacy is None:
        return stored
    return legacy["block"] + _LEGACY_ATTENTION[legacy["layer"]] + legacy["parameter"]


def _to_float32(tensor: Tensor, what: str) -> Tensor:
    if tensor.dtype not in _WEIGHT_DTYPES:
        raise ModelError(f"{what} is {str(tensor.dtype).removeprefix('torch.')}, expected a 16, 32 or 64 bit float")
    # A copy even of float32: what safetensors returns is a view of the file, which may change later.
    converted = tensor.to(torch.float32, copy=True)
    if not converted.isfinite().all():
        raise ModelError(f"{what} has NaN or infinite values")
    return converted


def _load_schedule(folder: Path) -> tuple[NoiseSchedule, tuple[str, ...]]:
    import diffusers

    path = _find_scheduler(folder)
    if path is None:
        scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear", prediction_type="epsilon")
        return NoiseSchedule.from_scheduler(scheduler), (
            "no scheduler beside the UNet: the paper's linear schedule of 1000 steps and noise prediction are assumed",
        )
    config = _read_json(path)
    name = config.get("_class_name")
    if name is None:
        raise ModelError(f"{path}: found no _class_name, expected a diffusers scheduler's")
    if not isinstance(name, str) or not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ModelError(f"{path}: {name!r} is not a scheduler of the installed diffusers {diffusers.__version__}")
    try:
        scheduler = getattr(diffusers, name).from_config(config)
    # A missing optional package, or a constructor fed with wrong values: anything may be raised.
    except Exception as error:
        raise ModelError(f"{path}: no {name} can be built from it: {_first_line(error)}") from error
    try:
        return NoiseSchedule.from_scheduler(scheduler), ()
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _find_scheduler(folder: Path) -> Path | None:
    candidates = (
        folder / "scheduler" / _SCHEDULER_CONFIG,
        folder / _SCHEDULER_CONFIG,
        _parent_pipeline(folder) / "scheduler" / _SCHEDULER_CONFIG,
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate
        if candidate.parent != folder and candidate.parent.is_dir():
            raise ModelError(f"{candidate}: no such file")
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
