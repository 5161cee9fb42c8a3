"""Any model source -> a frozen float32 UNet and its noise schedule.

diffusers re-initialises weights that a checkpoint lacks and only logs it; a loss on such a UNet would be
noise. So the weights are read here, and every name, shape, dtype and value is checked before they are used.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import inspect
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

from diffloss_engine.bundle import MANIFEST
from diffloss_engine.errors import DiffLossError, InputError, IntegrityError, ModelError, first_line
from diffloss_export.adm import convert_adm
from diffloss_export.adm_flags import PAPER_FLAGS, AdmFlags, noise_schedule
from diffloss_export.model_files import (
    PICKLED_WEIGHTS,
    WEIGHTS,
    WEIGHTS_INDEX,
    read_json,
    read_pickle,
    read_weights,
)
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import check_unet
from diffloss_trt.unet_config import build_unet

if TYPE_CHECKING:
    from diffusers import UNet2DModel

BUILTIN = "builtin"

_KINDS = (
    "'builtin', a diffusers folder (a pipeline's or a UNet's), a Hugging Face Hub id such as google/ddpm-cifar10-32, "
    "or a guided-diffusion checkpoint (.pt)"
)
_CHECKPOINTS = (".pt", ".pth")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
_CONFIG = "config.json"
_SCHEDULER_CONFIG = "scheduler_config.json"
_PIPELINE_CONFIG = "model_index.json"

# Of a Hub repository nothing but the UNet and its scheduler: neither other components nor other variants
# of the same weights, which double the download.
_HUB_JSON = tuple(
    prefix + name
    for prefix in ("", "unet/", "scheduler/")
    for name in (_PIPELINE_CONFIG, _CONFIG, _SCHEDULER_CONFIG, WEIGHTS_INDEX)
)
_HUB_WEIGHTS = tuple(
    prefix + name
    for prefix in ("", "unet/")
    for name in (WEIGHTS, "diffusion_pytorch_model-[0-9]*-of-[0-9]*.safetensors")
)
_HUB_PICKLES = (PICKLED_WEIGHTS, "unet/" + PICKLED_WEIGHTS)


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


def load_model(
    source: str,
    *,
    revision: str | None = None,
    adm_flags: Mapping[str, Any] | None = None,
    sha256: str | None = None,
    class_label: int | None = None,
    allow_pickle: bool = False,
) -> LoadedModel:
    """Load an unconditional diffusion model.

    Args:
        source: `builtin` (the prior in this package); a local folder (a diffusers pipeline, its UNet and scheduler in
            subfolders or side by side, or a UNet's own folder); a guided-diffusion checkpoint, `.pt` or `.pth`; or a
            Hub id `organisation/name`. What is there locally wins over a Hub id of the same name; a local folder called
            `builtin` is reached as `./builtin`.
        revision: branch, tag or commit of a Hub repository.
        adm_flags: of a guided-diffusion checkpoint, the flags it was trained with, by their names there; by default
            those of the paper's prior, `256x256_diffusion_uncond`.
        sha256: what the SHA-256 of a checkpoint's file must be, 64 hex digits.
        class_label: of a class-conditional UNet, the one class that it shall know from now on.
        allow_pickle: whether to read a diffusers folder's pickled weights where there are no safetensors.

    Weights are upcast to float32; of pickles nothing but tensors is read. Raises ModelError when the source cannot be
    read, its weights do not fit its configuration or are not finite, or the architecture or the scheduler is not one
    that the loss can use; IntegrityError for a file of another hash; InputError for an argument that cannot be used
    with this source.
    """
    if source.lower().endswith(_CHECKPOINTS) and not os.path.isdir(source):
        _refuse({"revision": revision}, source, "is for Hub ids only")
        flags = PAPER_FLAGS if adm_flags is None else AdmFlags.from_json(adm_flags)
        return _load_checkpoint(source, flags, sha256, class_label)
    _refuse({"adm_flags": adm_flags, "sha256": sha256}, source, "is for guided-diffusion checkpoints only")
    if source == BUILTIN:
        _refuse({"revision": revision}, source, "is for Hub ids only")
        _refuse({"allow_pickle": allow_pickle or None}, source, "is for diffusers folders and Hub ids only")
        with importlib.resources.as_file(importlib.resources.files("diffloss_export").joinpath("builtin")) as folder:
            if not folder.is_dir():
                raise ModelError("this installation has no built-in prior: diffloss_export/builtin is missing")
            return _load_folder(folder, source, class_label, allow_pickle=False)
    if os.path.isdir(source):
        _refuse({"revision": revision}, source, "is for Hub ids only")
        return _load_folder(Path(source), source, class_label, allow_pickle)
    if _HUB_ID.fullmatch(source) and not os.path.lexists(source):
        return _load_folder(_download(source, revision, allow_pickle), source, class_label, allow_pickle)
    problem = "is a file, not a folder" if os.path.lexists(source) else "no such folder"
    raise ModelError(f"{source!r}: {problem}; MODEL can be {_KINDS}")


def _refuse(given: Mapping[str, object], source: str, why: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name} {why}; the model is {source!r}")


def _load_checkpoint(source: str, flags: AdmFlags, sha256: str | None, class_label: int | None) -> LoadedModel:
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InputError(f"sha256 is {sha256!r}, expected 64 hex digits")
    schedule, path = noise_schedule(flags), Path(source)
    try:
        with path.open("rb") as file:
            if sha256 is not None:
                found = hashlib.file_digest(file, "sha256").hexdigest()
                if found != sha256.lower():
                    raise IntegrityError(f"{source}: its SHA-256 is {found}, expected {sha256.lower()}")
                file.seek(0)
            with _quiet():
                unet = convert_adm(read_pickle(file, path), flags, path)
    except (OSError, ValueError) as error:
        if isinstance(error, DiffLossError):
            raise
        raise ModelError(f"{source!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return LoadedModel(_finished(unet, source, class_label), schedule, source, ())


def _load_folder(folder: Path, source: str, class_label: int | None, allow_pickle: bool) -> LoadedModel:
    unet_folder = _find_unet(folder)
    config = _read_unet_config(unet_folder)
    with _quiet():
        schedule, schedule_notes = _load_schedule(folder)  # before gigabytes are read
        unet, unet_notes = _load_unet(unet_folder, config, allow_pickle)
        unet = _finished(unet, str(unet_folder), class_label)
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


def _download(repository: str, revision: str | None, allow_pickle: bool) -> Path:
    """Bring a Hub repository's UNet and scheduler into the local cache; the configuration first, to refuse early."""
    with _quiet():
        folder = _snapshot(repository, revision, _HUB_JSON)
        unet = _find_unet(folder)
        _build_unet(unet, _read_unet_config(unet))
        _load_schedule(folder)
        # The folder is called after the commit: the branch may have moved in between.
        folder = _snapshot(repository, folder.name, _HUB_WEIGHTS)
        unet = _find_unet(folder)
        if allow_pickle and not (unet / WEIGHTS).is_file() and not (unet / WEIGHTS_INDEX).is_file():
            folder = _snapshot(repository, folder.name, _HUB_PICKLES)
        return folder


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
            f"repository ({first_line(error)})"
        ) from error


def _find_unet(folder: Path) -> Path:
    """Return the folder with the UNet's configuration and weights, `folder` itself or its subfolder `unet`."""
    if (_parent_pipeline(folder) / MANIFEST).is_file():
        # Its UNet would be read, and its schedule, which is no diffusers scheduler, would not.
        raise ModelError(f"{folder}: this is a bundle already; export the model that it was made of")
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
    components = read_json(index)
    for name in ("vae", "vqvae"):
        component = components.get(name)
        if isinstance(component, list) and any(component):
            raise ModelError(f"{index}: a latent diffusion pipeline (it has a {name}); the UNet must work on images")


def _read_unet_config(unet_folder: Path) -> dict[str, Any]:
    path = unet_folder / _CONFIG
    config = read_json(path)
    name = config.get("_class_name")
    if name == "UNet2DConditionModel":
        raise ModelError(
            f"{path}: text-conditional UNets (UNet2DConditionModel) are not supported yet, only UNet2DModel"
        )
    if name != "UNet2DModel":
        found = "no _class_name" if name is None else f"_class_name {name!r}"
        raise ModelError(f"{path}: found {found}, expected 'UNet2DModel'")
    if config.get("quantization_config"):
        raise ModelError(f"{path}: quantized UNets are not supported")
    return config


def _load_unet(folder: Path, config: dict[str, Any], allow_pickle: bool) -> tuple[UNet2DModel, tuple[str, ...]]:
    from diffusers import UNet2DModel

    unet = _build_unet(folder, config)
    weights = read_weights(folder, unet.state_dict(), allow_pickle=allow_pickle)
    unet.load_state_dict(weights, assign=True)
    known = inspect.signature(UNet2DModel.__init__).parameters
    unknown = sorted(key for key in config if not key.startswith("_") and key not in known)
    notes = (f"{_CONFIG} has settings that the installed diffusers ignores: {', '.join(unknown)}",) if unknown else ()
    return unet, notes


def _build_unet(folder: Path, config: dict[str, Any]) -> UNet2DModel:
    """Return the UNet of a configuration, without weights."""
    try:
        return build_unet(config)
    # A constructor fed with wrong values raises anything.
    except Exception as error:
        raise ModelError(f"{folder / _CONFIG}: no UNet2DModel can be built from it: {first_line(error)}") from error


def _finished(unet: UNet2DModel, where: str, class_label: int | None) -> UNet2DModel:
    """Return a UNet that the loss can use, frozen; ModelError, naming `where`, if it cannot be."""
    try:
        if class_label is not None:
            _fix_class(unet, class_label)
        check_unet(unet)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error
    return unet.eval().requires_grad_(False)


def _fix_class(unet: UNet2DModel, label: int) -> None:
    """Let a class-conditional UNet know one class alone; it is an unconditional UNet then.

    A class is an embedding added to the timestep's. For one class that is a constant, and belongs into the bias of the
    layer that makes the timestep's: the result is the same, and nothing is left to compute.
    """
    embedding, kind = unet.class_embedding, unet.config.class_embed_type
    if embedding is None:
        raise InputError(f"class_label is {label}, but the UNet is not class-conditional")
    if kind == "identity":
        raise ModelError("the UNet takes embeddings of classes (class_embed_type 'identity'), which a label is not")
    count = unet.config.num_class_embeds if kind is None else unet.config.num_train_timesteps
    if label < 0 or (count is not None and label >= count):
        raise InputError(f"class_label is {label}, expected 0 to {'...' if count is None else count - 1}")
    with torch.no_grad():
        labels = torch.tensor([label])
        of_class = embedding(unet.time_proj(labels) if kind == "timestep" else labels)[0]
        unet.time_embedding.linear_2.bias += of_class
    unet.class_embedding = None
    unet.register_to_config(class_embed_type=None, num_class_embeds=None)


def _load_schedule(folder: Path) -> tuple[NoiseSchedule, tuple[str, ...]]:
    import diffusers

    path = _find_scheduler(folder)
    if path is None:
        scheduler = diffusers.DDPMScheduler(1000, beta_schedule="linear", prediction_type="epsilon")
        return NoiseSchedule.from_scheduler(scheduler), (
            "no scheduler beside the UNet: the paper's linear schedule of 1000 steps and noise prediction are assumed",
        )
    config = read_json(path)
    name = config.get("_class_name")
    if name is None:
        raise ModelError(f"{path}: found no _class_name, expected a diffusers scheduler's")
    if config.get("predict_epsilon") is False:
        config.setdefault("prediction_type", "sample")  # diffusers' older word for it, which it does not know any more
    if not isinstance(name, str) or not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise ModelError(f"{path}: {name!r} is not a scheduler of the installed diffusers {diffusers.__version__}")
    try:
        scheduler = getattr(diffusers, name).from_config(config)
    # A missing optional package, or a constructor fed with wrong values: anything may be raised.
    except Exception as error:
        raise ModelError(f"{path}: no {name} can be built from it: {first_line(error)}") from error
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
