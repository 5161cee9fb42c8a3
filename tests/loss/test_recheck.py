"""An engine that becomes wrong in the middle of a training, and the check that finds it."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import InputError, ParityError
from diffloss_engine.session import open_graph
from diffloss_engine.torch_session import TorchSession
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.contract import UNET_WEIGHTS
from diffloss_trt.objective import Terms
from diffloss_trt.recheck import MARGIN, expect_alike
from diffloss_trt.tolerances import DIFFERENCE
from exports import rehash, shared_evaluator

Exported = tuple[Path, Any, NoiseSchedule]
BOTH, SEMANTIC_ALONE = (1.0, 0.5), (0.0, 1.0)
GRAPHS = {BOTH: "gradient", SEMANTIC_ALONE: "semantic_gradient"}


def load(folder: Path, backend: str, weights: tuple[float, float] = BOTH, **settings: Any) -> DiffLoss:
    return DiffLoss.load(folder, backend, "cpu", *weights, **settings)


def traced(folder: Path, weights: tuple[float, float], **settings: Any) -> DiffLoss:
    return DiffLoss(
        shared_evaluator(folder, "torch"), naturalness_weight=weights[0], semantic_weight=weights[1], **settings
    )


def images(number: int) -> tuple[Tensor, Tensor]:
    """Return restored and target images of batch `number`, at some 26 dB."""
    generator = torch.Generator().manual_seed(number)
    target = torch.rand(3, 3, 16, 16, generator=generator)
    return target + 0.05 * torch.randn(target.shape, generator=generator), target


def said(call: int, backend: str, graph: str, quantity: str = r"[\w -]+") -> str:
    return (
        rf"^call {call} of this loss: {backend} on cpu computes the {graph} graph wrongly: {quantity} of the first "
        r"image is off by [\d.e+-]+ from eager PyTorch in fp32, and [\d.e+-]+ is allowed$"
    )


@pytest.mark.parametrize("weights", [BOTH, SEMANTIC_ALONE])
def test_a_weight_that_is_altered_after_loading(weights: tuple[float, float], exported: Exported) -> None:
    loss = traced(exported[0], weights, check_every=3)
    for number in range(3):
        loss(*images(number))
    program: Any = loss.evaluator.session(GRAPHS[weights])._program  # type: ignore[attr-defined]
    # Of the first convolution, which everything goes through.
    weight = next(buffer for buffer in program.buffers() if buffer.shape[1:] == (3, 3, 3))
    before = weight.clone()
    weight[0] *= 1.05
    # It is the third call that is looked at.
    for number in range(2):
        loss(*images(number))
    with pytest.raises(ParityError, match=said(6, "torch", GRAPHS[weights])):
        loss(*images(2))
    # One error does not end it: the next check is at its time, and if things are as they were there is nothing to say.
    weight.copy_(before)
    for number in range(3):
        loss(*images(number))
    assert loss.calls == 9


def test_a_session_of_another_bundle(exported: Exported, tmp_path: Path) -> None:
    """Its first convolution is off by 5 %: found when it is loaded, and also if it is put in another one's place."""
    loss = load(exported[0], "onnxruntime", check_every=1)
    loss(*images(0))
    folder = Path(shutil.copytree(exported[0], tmp_path / "altered"))
    weights = load_file(folder / UNET_WEIGHTS)
    weights["conv_in.weight"] *= 1.05
    save_file(weights, folder / UNET_WEIGHTS)
    rehash(folder)
    with pytest.raises(ParityError, match="on the images that the bundle carries"):
        load(folder, "onnxruntime")
    evaluator: Any = loss.evaluator
    evaluator.sessions["gradient"] = open_graph(
        Bundle.open(folder), "gradient", backend="onnxruntime", device=torch.device("cpu")
    )
    with pytest.raises(ParityError, match=said(2, "onnxruntime", "gradient")):
        loss(*images(1))


def test_one_reference_is_kept_at_a_time(exported: Exported) -> None:
    """A second UNet in fp32 is what `check_every` costs; and nothing once it is switched off."""
    loss = traced(exported[0], BOTH, check_every=1)
    evaluator: Any = loss.evaluator
    weights = []

    def reference() -> Any:
        (session,) = evaluator.references.values()
        return weakref.ref(session._program)

    for naturalness_weight in (0.0, 1.0):
        loss.naturalness_weight = naturalness_weight
        loss(*images(0))
        weights.append(reference())
    assert evaluator.references.keys() == {"gradient"}
    assert weights[0]() is None
    loss.check_every = 2
    assert reference() == weights[1]
    loss.check_every = None
    assert not evaluator.references
    assert weights[1]() is None
    loss(*images(0))
    loss.check_every = 1
    loss(*images(0))
    assert evaluator.references


class Miscompiled(nn.Module):
    """A program of which one result is off by a factor."""

    def __init__(self, program: Callable[..., tuple[Tensor, ...]], place: int, factor: float) -> None:
        super().__init__()
        self.program = program
        self.place = place
        self.factor = factor

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = list(self.program(*tensors))
        results[self.place] = results[self.place] * self.factor
        return tuple(results)


@pytest.mark.parametrize("weights", [BOTH, SEMANTIC_ALONE])
def test_one_percent_of_each_quantity_is_found(
    weights: tuple[float, float], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = traced(exported[0], weights, check_every=1)
    evaluator, graph = loss.evaluator, GRAPHS[weights]
    session: Any = evaluator.session(graph)  # type: ignore[attr-defined]
    for place, spec in enumerate(session.outputs):
        for factor in (1.0, 1.01):
            program = Miscompiled(session._program, place, factor)
            altered = TorchSession(program, session.inputs, session.outputs, session.device)
            monkeypatch.setitem(evaluator.sessions, graph, altered)  # type: ignore[attr-defined]
            if factor == 1.0:
                loss(*images(0))
        with pytest.raises(ParityError, match=said(2 * place + 2, "torch", graph, spec.name)):
            loss(*images(1))


def results() -> dict[str, Tensor]:
    """Return terms and gradient of one image, as an engine has computed them."""
    generator = torch.Generator().manual_seed(0)
    naturalness, semantic = torch.rand(2, 1, generator=generator)
    gradient = torch.randn(1, 3, 8, 8, generator=generator)
    return {"naturalness": naturalness, "semantic": semantic, "gradient": gradient}


def compare(found: dict[str, Tensor], precision: str) -> None:
    first, second = (
        (Terms(part["naturalness"] + part["semantic"], part["naturalness"], part["semantic"]), part["gradient"])
        for part in (found, results())
    )
    expect_alike("the engine computes", first, second, precision)


def rotated(gradient: Tensor, angle: float) -> Tensor:
    """Return a tensor of the same norm in another direction."""
    other = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1))
    other -= gradient * (gradient * other).sum() / gradient.square().sum()
    other *= gradient.norm() / other.norm()
    return gradient * math.cos(angle) + other * math.sin(angle)


@pytest.mark.parametrize("precision", DIFFERENCE)
@pytest.mark.parametrize("quantity", ["naturalness", "semantic", "gradient"])
def test_each_quantity_has_its_bound(quantity: str, precision: str) -> None:
    strict = DIFFERENCE[precision]
    allowed = MARGIN * (strict.gradient if quantity == "gradient" else strict.term)
    for sign in (-1, 1):
        found = results()
        found[quantity] = found[quantity] * (1 + sign * 0.9 * allowed)
        compare(found, precision)
        found[quantity] = results()[quantity] * (1 + sign * 1.1 * allowed)
        with pytest.raises(ParityError, match=f"the engine computes wrongly: {quantity} of the first image is off by"):
            compare(found, precision)
    found[quantity] = torch.full_like(found[quantity], torch.nan)
    with pytest.raises(ParityError, match=f"wrongly: {quantity} of the first image is off by inf"):
        compare(found, precision)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_direction_has_a_bound_of_its_own(precision: str) -> None:
    """In half precision a gradient may be further off than it may be turned."""
    found, allowed = results(), MARGIN * (1 - DIFFERENCE[precision].cosine)
    right = found["gradient"]
    found["gradient"] = rotated(right, (2 * 0.9 * allowed) ** 0.5)
    compare(found, precision)
    found["gradient"] = rotated(right, (2 * 1.1 * allowed) ** 0.5)
    with pytest.raises(ParityError, match="wrongly: 1 - cosine of gradient of the first image is off by"):
        compare(found, precision)


@pytest.mark.parametrize("settings", [{"backward": "recompute"}, {"check_every": 0}, {"check_every": -1}])
def test_what_cannot_be_checked(settings: dict[str, Any], exported: Exported) -> None:
    with pytest.raises(InputError, match="check_every"):
        load(exported[0], "onnxruntime", **{"check_every": 1} | settings)


# Loads a loss beside a trainer who has set something, and has it check every call.
TRAINER = """
import multiprocessing, sys
import torch
from diffloss_trt import DiffLoss
torch.set_num_threads(1)
backends, bundle, backend = torch.backends, *sys.argv[1:3]

def state():
    return [
        backends.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
    ]

def train(trainer):
    exec(trainer)
    before = state()
    loss = DiffLoss.load(bundle, backend, "cpu", 0.0, 1.0, check_every=1)
    for _ in range(2):
        loss(*torch.rand(2, 1, 3, 16, 16))
        assert state() == before
    # By the older names, too, where they could be asked before.
    if "backends.fp32_precision" not in trainer:
        torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
    return loss.calls

with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
    for trainer in sys.argv[3:]:
        print(pool.apply(train, (trainer,)))
"""
TRAINERS = [
    "pass",
    "torch.set_float32_matmul_precision('high'); backends.cudnn.allow_tf32 = False",
    "backends.cudnn.allow_tf32 = False; backends.fp32_precision = 'tf32'",
    "backends.fp32_precision = 'ieee'",
]


@pytest.mark.slow
def test_beside_what_trainers_set(exported: Exported) -> None:
    """Both engine and reference are traced in PyTorch, and neither minds the settings, nor leaves others."""
    command = [sys.executable, "-c", TRAINER, str(exported[0]), "torch", *TRAINERS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * len(TRAINERS)
