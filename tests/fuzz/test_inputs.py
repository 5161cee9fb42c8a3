"""Flags, files and arguments that may be anything: refused with one line, or taken."""

from __future__ import annotations

import io
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffloss_engine.errors import DiffLossError, InputError
from diffloss_engine.plan_cache import PlanCache
from diffloss_export.adm import slots
from diffloss_export.adm_flags import AdmFlags, kept_steps, noise_schedule
from diffloss_export.cli import main
from diffloss_export.model_files import read_json, read_pickle
from diffloss_export.models import load_model
from unets import make_unet

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 300),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["1,2", "16,8", "32, 16", "True", "ddim25", "10,10", "linear", "cosine", "-1", "1e3", "1e308", 10**400]
    ),
)
VALUES = st.recursive(SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=3))
FLAGS = [*AdmFlags.__dataclass_fields__, "dropout", "use_fp16", "no_such_flag"]


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(FLAGS), VALUES, max_size=6))
def test_adm_flags(flags: dict[str, Any]) -> None:
    try:
        read = AdmFlags.from_json(flags)
        schedule = noise_schedule(read)
    except InputError:
        return
    names = [slot.stored for slot in slots(read)]
    assert len(set(names)) == len(names) < 20_000
    assert len(schedule) <= read.diffusion_steps


@given(st.integers(1, 2000), st.text("0123456789,dim- ", max_size=8) | SCALARS.map(str))
def test_respacings(steps: int, respacing: str) -> None:
    try:
        kept = kept_steps(steps, respacing)
    except InputError:
        return
    assert kept == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < steps


def altered(content: bytes, rng: random.Random) -> bytes:
    """Change, cut or add a few bytes."""
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(changed) or 1)
        match rng.randrange(5):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                del changed[at : at + rng.choice([1, 8, 500])]
            case 2:
                changed[at:at] = rng.randbytes(rng.choice([1, 8, 100]))
            case 3:
                del changed[at:]
            case 4:
                changed[at:at] = changed[:at][-50:]
    return bytes(changed)


def checkpoint(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.arange(30.0), "b": torch.ones(2, 2)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.booleans())
def test_pickles(seed: int, zipped: bool) -> None:
    content = altered(checkpoint(zipped), random.Random(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `load_model` does so too
        try:
            state = read_pickle(io.BytesIO(content), Path("model.pt"))
        except DiffLossError:
            return
    assert all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items())


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_json(content: bytes) -> None:
    path = Path(make_scratch()) / "flags.json"
    path.write_bytes(content)
    try:
        found: object = read_json(path)
    except DiffLossError:
        return
    assert isinstance(found, dict)


_scratch: list[str] = []


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path) -> None:
    _scratch[:] = [str(tmp_path)]


def make_scratch() -> str:
    """Return a folder; hypothesis runs a test many times in the one that pytest gave it."""
    return _scratch[0]


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_diffusers_folders(seed: int) -> None:
    rng, folder = random.Random(seed), Path(make_scratch()) / "unet"
    if not folder.exists():
        make_unet("one_level", dtype=torch.float32).save_pretrained(folder)
    path = rng.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    # Most of the weights' file is numbers, of which any will do: its header is what can be wrong.
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    path.write_bytes(altered(content[:header], rng) + content[header:])
    try:
        model = load_model(str(folder))
    except DiffLossError:
        return
    finally:
        path.write_bytes(content)
    assert all(bool(weight.isfinite().all()) for weight in model.unet.state_dict().values())


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_plans(seed: int) -> None:
    cache, key = PlanCache(Path(make_scratch()) / "plans"), {"graph": "g", "flavour": "f"}
    plan = bytes(range(256)) * 8
    assert bytes(cache.get(key, lambda: plan)) == plan
    (path,) = cache.folder.glob("*.plan")
    path.write_bytes(altered(path.read_bytes(), random.Random(seed)))
    cache.list_keys()
    # Either it is still what was written, or it is built anew; it is never something else.
    assert bytes(cache.get(key, lambda: plan)) == plan
    path.unlink()


WORDS = st.one_of(
    st.sampled_from(
        ["onnx", "build", "verify", "inspect", "bench", "profile", "-o", "--output", "--resolution", "--batch-size",
         "--precision", "fp16", "--no-gradient", "--revision", "--adm-flags", "--sha256", "--class-label", "--backend",
         "tensorrt", "torch", "--device", "cuda:99", "cpu", "--json", "--workspace", "-1", "0", "64x", "1x1", "/", ".",
         "--help", "no/such", "model.pt", "--overwrite", "", "--", "-", "0" * 64, "a\0b", "é"]
    ),
    st.text(max_size=5),
)  # fmt: skip


@settings(max_examples=200)
@given(st.lists(WORDS, max_size=7))
def test_command_lines(words: list[str]) -> None:
    if "builtin" in words:
        return
    try:
        status = main(words)
    except SystemExit as end:  # argparse's way
        status = int(end.code or 0)
    assert status in (0, 1, 2)
