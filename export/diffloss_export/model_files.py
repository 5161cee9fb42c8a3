"""JSON and weights of models that came from somebody else: read without running anything, and checked."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from diffloss_engine.errors import ModelError, first_line
from diffloss_engine.strict_json import read_limited

WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_INDEX = WEIGHTS + ".index.json"
PICKLED_WEIGHTS = "diffusion_pytorch_model.bin"

# Checkpoints from before diffusers 0.15, among them google/ddpm-*, name the attention projections so.
_LEGACY_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_LEGACY_NAME = re.compile(r"(?P<block>.*\.)(?P<layer>query|key|value|proj_attn)(?P<parameter>\.(?:weight|bias))")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError, naming the file, when it cannot be read or is none."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    text = read_limited(path, ModelError)
    try:
        # Not as strictly as a bundle's: diffusers writes -Infinity into some schedulers' configurations.
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: found a JSON {type(content).__name__}, expected an object")
    return content


def read_weights(folder: Path, expected: Mapping[str, Tensor], *, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the weights of a UNet's folder in float32, under exactly the names and with the shapes of `expected`.

    allow_pickle: whether to read pickled weights where there are no safetensors.
    Raises ModelError, naming file and tensor, for anything else than such weights.
    """
    weights: dict[str, Tensor] = {}
    for path, stored, tensor in _stored_tensors(folder, allow_pickle):
        name = _current_name(stored, expected)
        if name not in expected or name in weights:
            raise ModelError(f"{path}: unexpected tensor {stored!r}: the configuration describes another UNet")
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{path}: tensor {stored!r} has shape {tuple(tensor.shape)}, "
                f"the configuration asks for {tuple(expected[name].shape)}"
            )
        weights[name] = to_float32(tensor, f"{path}: tensor {stored!r}")
    missing = [name for name in expected if name not in weights]
    if missing:
        raise ModelError(f"{folder}: no tensor {missing[0]!r} in the weights ({len(missing)} missing in all)")
    return weights


def read_pickle(file: IO[bytes], path: Path) -> dict[str, Tensor]:
    """Return what `torch.save` wrote of a state dict, tensors by name, from an open file at its beginning.

    Only tensors and plain containers are unpickled, so that no code of the file is run. Raises ModelError, naming
    `path`, for anything else than a state dict.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    # What zip files, pickles and torch's own reader raise for damaged content has no common base class.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise ModelError(
                f"{path}: holds other things than tensors, which could run code and are not read; expected a state dict"
            ) from error
        raise ModelError(f"{path}: damaged, or not what torch.save writes of a state dict") from error
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{path}: holds {_named(content)}, expected a state dict: tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ModelError(
                f"{path}: holds {_named(tensor)} under {name!r}, expected a state dict: only tensors, by name"
            )
    return content


def to_float32(tensor: Tensor, what: str) -> Tensor:
    """Return a copy of a floating-point tensor in float32. Raises ModelError, naming `what`, unless it is finite."""
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "meta" if tensor.is_meta else "sparse or nested"
        raise ModelError(f"{what} is a {kind} tensor, expected a dense one")
    if tensor.dtype not in _FLOATS:
        raise ModelError(f"{what} is {str(tensor.dtype).removeprefix('torch.')}, expected a 16, 32 or 64 bit float")
    # A copy even of float32: what safetensors returns is a view of the file, which may change later.
    converted = tensor.to(torch.float32, copy=True)
    if not converted.isfinite().all():
        raise ModelError(f"{what} has NaN or infinite values")
    return converted


def _named(content: object) -> str:
    return "an empty dict" if content == {} else f"a {type(content).__name__}"


def _stored_tensors(folder: Path, allow_pickle: bool) -> Iterator[tuple[Path, str, Tensor]]:
    """Yield file, name and value of each tensor of a folder's weights."""
    from safetensors import SafetensorError, safe_open

    for path in _weight_files(folder, allow_pickle):
        if path.name == PICKLED_WEIGHTS:
            with path.open("rb") as pickled:
                for name, tensor in read_pickle(pickled, path).items():
                    yield path, name, tensor
            continue
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping: it cannot be iterated over)
                    yield path, name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: damaged or not safetensors: {first_line(error)}") from error


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    if (folder / WEIGHTS_INDEX).is_file():
        return _shards(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / PICKLED_WEIGHTS).is_file():
        if allow_pickle:
            return [folder / PICKLED_WEIGHTS]
        raise ModelError(
            f"{folder}: only pickled weights, {PICKLED_WEIGHTS}, which are read if asked for (--allow-pickle); "
            f"expected {WEIGHTS}"
        )
    variants = sorted(path.name for path in folder.glob("diffusion_pytorch_model.*.safetensors"))
    if variants:
        raise ModelError(
            f"{folder}: only variants of the weights, {', '.join(variants)}; one of them is read once it is renamed to "
            f"{WEIGHTS}"
        )
    pickled = "" if allow_pickle else f"; {PICKLED_WEIGHTS}, a pickle, is read if asked for (--allow-pickle)"
    raise ModelError(f"{folder}: no weights: expected {WEIGHTS}{pickled}")


def _shards(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: expected a 'weight_map' from tensor names to files")
    shards = []
    for name in dict.fromkeys(map(str, weight_map.values())):
        if name != os.path.basename(name) or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: {name!r} is not the name of a safetensors file in this folder")
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: no such file, but {WEIGHTS_INDEX} names it")
        shards.append(folder / name)
    return shards


def _current_name(stored: str, expected: Mapping[str, Tensor]) -> str:
    legacy = _LEGACY_NAME.fullmatch(stored)
    if stored in expected or legacy is None:
        return stored
    return legacy["block"] + _LEGACY_ATTENTION[legacy["layer"]] + legacy["parameter"]
