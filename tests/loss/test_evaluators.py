"""What is run, and when; and a bundle's loss against the eager one in float64."""

from __future__ import annotations

import copy
import pickle
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffloss_engine.bundle import Bundle, file_sha256
from diffloss_engine.errors import (
    BackendError,
    BackendUnavailableError,
    BundleError,
    InputError,
    IntegrityError,
    ParityError,
)
from diffloss_engine.tensor_files import load_tensors, save_tensors
from diffloss_export.verify import verify_bundle
from diffloss_trt import DiffLoss, NoiseSchedule
from diffloss_trt.contract import GRADIENT, SEMANTIC_GRADIENT
from diffloss_trt.evaluators import EagerEvaluator, FusedEvaluator, RecomputeEvaluator
from diffloss_trt.inputs import Backward
from diffloss_trt.tolerances import DIFFERENCE, PLAIN
from exports import edit_json, shared_evaluator, without_gradient
from unets import make_unet

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
Exported = tuple[Path, Any, NoiseSchedule]


def count_calls(unet: Any) -> Counter[str]:
    """Count how often the parts of a UNet are called from now on."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    for name in ("conv_in", "mid_block", "up_blocks.0", "conv_out"):
        unet.get_submodule(name).register_forward_hook(counting(name))
    return calls


ENCODER_ONLY = {"conv_in": 1, "mid_block": 1}
WHOLE = {"conv_in": 1, "mid_block": 1, "up_blocks.0": 1, "conv_out": 1}


@pytest.mark.parametrize(
    ("weights", "each"), [((1e-3, 1e-6), WHOLE), ((1.0, 0.0), WHOLE), ((0.0, 1.0), ENCODER_ONLY), ((0.0, 0.0), {})]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weight_of_zero_removes_the_work(
    weights: tuple[float, float], each: dict[str, int], dtype: torch.dtype, make_batch: Callable[..., Batch]
) -> None:
    unet = make_unet(dtype=dtype)
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64))
    loss = DiffLoss.from_unet(
        unet, schedule, naturalness_weight=weights[0], semantic_weight=weights[1], value_range=(-1, 1)
    )
    restored, target, noise, timesteps = make_batch(dtype=torch.float32)
    calls = count_calls(unet)
    with torch.no_grad():
        silent = loss.terms(restored, target, noise=noise, timesteps=timesteps)
    assert calls == {name: 2 * count for name, count in each.items()}
    calls.clear()
    restored.requires_grad_()
    terms = loss.terms(restored, target, noise=noise, timesteps=timesteps)
    terms.total.sum().backward()
    # A half-precision UNet is run once more for its gradient.
    runs = 2 if dtype == torch.float64 else 3
    assert calls == {name: runs * count for name, count in each.items()}
    assert restored.grad is not None
    assert bool(restored.grad.any()) == bool(each)
    for weight, term in zip(weights, terms[1:], strict=True):
        assert not term.requires_grad
        assert bool(term.all()) == bool(weight)
    for with_tape, without in zip(terms, silent, strict=True):
        assert torch.equal(with_tape.detach(), without)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the worst sample's ||a - b|| / ||b||."""
    a, b = (tensor.double().reshape(len(tensor), -1) for tensor in (found, expected))
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


def losses(exported: Exported, backend: str, **settings: Any) -> tuple[DiffLoss, DiffLoss]:
    """Return the bundle's loss and the reference."""
    folder, unet, schedule = exported
    settings = {"value_range": (-1, 1), "reduction": "none", **settings}
    loss = DiffLoss(shared_evaluator(folder, backend, settings.pop("backward", "fused")), **settings)
    return loss, DiffLoss.from_unet(unet, schedule, **settings)


def value_and_gradient(loss: DiffLoss, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    restored, target, noise = (tensor.to(dtype) for tensor in batch[:3])
    restored.requires_grad_()
    total = loss(restored, target, noise=noise, timesteps=batch[3])
    (gradient,) = torch.autograd.grad(total.sum(), restored)
    return total.detach(), gradient


@pytest.mark.parametrize("backward", ["fused", "recompute"])
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
@pytest.mark.parametrize("weights", [(1e-3, 1e-6), (1.0, 0.0), (0.0, 1.0)])
def test_bundle_is_the_reference(
    exported: Exported,
    backend: str,
    weights: tuple[float, float],
    backward: str,
    make_batch: Callable[..., Batch],
) -> None:
    batch = make_batch(count=5)
    tolerance = (DIFFERENCE if backward == "fused" else PLAIN)["fp32"]
    loss, reference = losses(
        exported, backend, naturalness_weight=weights[0], semantic_weight=weights[1], backward=backward
    )
    value, gradient = value_and_gradient(loss, batch, torch.float32)
    expected, expected_gradient = value_and_gradient(reference, batch, torch.float64)
    assert relative(value, expected) < tolerance.term
    assert relative(gradient, expected_gradient) < tolerance.gradient
    # Negative control: of 177,000 weights one is changed.
    _, unet, schedule = exported
    unet = copy.deepcopy(unet)
    unet.mid_block.resnets[0].conv1.weight[5, 5, 1, 1] += 0.2
    altered, _ = value_and_gradient(
        DiffLoss.from_unet(
            unet,
            schedule,
            naturalness_weight=weights[0],
            semantic_weight=weights[1],
            value_range=(-1, 1),
            reduction="none",
        ),
        batch,
        torch.float64,
    )
    assert relative(value, altered) > tolerance.term


def test_fused_gradient_needs_no_unet_in_pytorch(exported: Exported, batch: Batch) -> None:
    loss, reference = losses(exported, "onnxruntime")
    assert isinstance(loss.evaluator, FusedEvaluator)
    assert not [value for value in vars(loss.evaluator).values() if isinstance(value, torch.nn.Module)]
    calls = count_calls(reference.evaluator.unet.unet)  # type: ignore[attr-defined]
    value_and_gradient(loss, batch, torch.float32)
    assert not calls


def test_values_without_a_tape_are_the_same(exported: Exported, batch: Batch) -> None:
    loss, _ = losses(exported, "onnxruntime")
    value, _ = value_and_gradient(loss, batch, torch.float32)
    restored, target, noise = (tensor.float() for tensor in batch[:3])
    with torch.no_grad():
        silent = loss.terms(restored.requires_grad_(), target, noise=noise, timesteps=batch[3])
    assert torch.equal(silent.total, value)
    assert not silent.total.requires_grad


def test_each_graph_is_opened_when_a_weight_needs_it(exported: Exported, batch: Batch) -> None:
    loss = DiffLoss.load(exported[0], "onnxruntime", "cpu", 0.0, 1.0, value_range=(-1, 1))
    assert isinstance(loss.evaluator, FusedEvaluator)
    assert set(loss.evaluator.sessions) == {SEMANTIC_GRADIENT}
    value_and_gradient(loss, batch, torch.float32)
    assert set(loss.evaluator.sessions) == {SEMANTIC_GRADIENT}
    loss.naturalness_weight = 1.0
    value_and_gradient(loss, batch, torch.float32)
    assert set(loss.evaluator.sessions) == {SEMANTIC_GRADIENT, GRADIENT}


def test_double_backward_is_refused(exported: Exported, batch: Batch) -> None:
    loss, _ = losses(exported, "onnxruntime")
    restored, target, noise = (tensor.float() for tensor in batch[:3])
    restored.requires_grad_()
    total = loss(restored, target, noise=noise, timesteps=batch[3]).sum()
    (gradient,) = torch.autograd.grad(total, restored, create_graph=True)
    with pytest.raises(BackendError, match="cannot be differentiated again"):
        gradient.square().sum().backward()


def test_several_losses_are_alive_at_once(exported: Exported, make_batch: Callable[..., Batch]) -> None:
    """Two calls before either backward, from one module: each keeps its own gradient."""
    loss, _ = losses(exported, "onnxruntime")
    first, second = make_batch(count=5)[:3], make_batch(count=5)[:3]
    batches = [
        tuple(tensor[part].float() for tensor in images) for images, part in ((first, slice(3)), (second, slice(2, 5)))
    ]
    timesteps = torch.tensor([10, 400, 900])
    leaves = [images[0].clone().requires_grad_() for images in batches]
    totals = [
        loss(leaf, images[1], noise=images[2], timesteps=timesteps).sum()
        for leaf, images in zip(leaves, batches, strict=True)
    ]
    (totals[0] + 3 * totals[1]).backward()
    for leaf, images, factor in zip(leaves, batches, (1, 3), strict=True):
        alone = images[0].clone().requires_grad_()
        loss(alone, images[1], noise=images[2], timesteps=timesteps).sum().backward()
        assert leaf.grad is not None
        assert alone.grad is not None
        torch.testing.assert_close(leaf.grad, factor * alone.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_has_the_dtype_of_the_image(exported: Exported, batch: Batch, dtype: torch.dtype) -> None:
    loss, _ = losses(exported, "onnxruntime", naturalness_weight=1e3, semantic_weight=1e3)
    _, gradient = value_and_gradient(loss, batch, dtype)
    assert gradient.dtype == dtype
    assert gradient.flatten(1).any(1).all()


def test_checkpointed_step_is_the_same(exported: Exported, batch: Batch) -> None:
    loss, _ = losses(exported, "onnxruntime")
    restored, target, noise = (tensor.float() for tensor in batch[:3])

    def step(image: Tensor) -> Tensor:
        return loss(torch.tanh(image), target, noise=noise, timesteps=batch[3]).sum()

    gradients = []
    for run in (step, lambda image: checkpoint(step, image, use_reentrant=False)):
        leaf = restored.clone().requires_grad_()
        run(leaf).backward()
        gradients.append(leaf.grad)
    assert gradients[0] is not None
    assert gradients[1] is not None
    assert torch.equal(gradients[0], gradients[1])


def test_bundle_without_a_gradient_graph(
    exported: Exported, batch: Batch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = without_gradient(exported[0], tmp_path / "bundle")
    with pytest.raises(BackendUnavailableError, match=r"has no gradient graph: 'diffloss-export onnx' writes one"):
        DiffLoss.load(folder, backward="fused", device="cpu")
    loss = DiffLoss.load(folder, "onnxruntime", "cpu", reduction="none", value_range=(-1, 1))
    assert isinstance(loss.evaluator, RecomputeEvaluator)
    assert "using backward='recompute'" in caplog.text
    value_and_gradient(loss, batch, torch.float32)
    caplog.clear()
    DiffLoss.load(folder, "onnxruntime", "cpu", backward="recompute")
    assert not caplog.text


@pytest.mark.parametrize("graph", ["encoder", "noise_head", "gradient", "semantic_gradient"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_names_that_were_not_agreed_on(exported: Exported, tmp_path: Path, graph: str, side: str) -> None:
    """The graph itself may have them too: nobody would know what to give it, or where its results are."""

    def rename(manifest: Any) -> None:
        manifest["graphs"][graph][side][0]["name"] = "else"

    folder = shutil.copytree(exported[0], tmp_path / "bundle")
    edit_json(folder / "manifest.json", rename)
    said = rf"the {graph} graph should take .* but in this bundle it takes (else|.* returns else)"
    ways: list[tuple[str, Backward]] = [("torch", "fused"), ("onnxruntime", "fused"), ("onnxruntime", "recompute")]
    for backend, backward in ways:
        with pytest.raises(BundleError, match=said):
            DiffLoss.load(folder, backend, "cpu", backward=backward)
    with pytest.raises(BundleError, match=said):
        verify_bundle(Bundle.open(folder), device="cpu")


@pytest.mark.parametrize("graph", ["encoder", "noise_head", "gradient", "semantic_gradient"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_tensor_that_is_missing(exported: Exported, tmp_path: Path, graph: str, side: str) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "bundle")
    edit_json(folder / "manifest.json", lambda manifest: manifest["graphs"][graph][side].pop())
    # What the encoder does not return, the noise head cannot take.
    at_fault = "noise_head" if (graph, side) == ("encoder", "outputs") else graph
    with pytest.raises(BundleError, match=f"the {at_fault} graph should take"):
        DiffLoss.load(folder, "torch", "cpu")


@pytest.mark.parametrize(
    ("graph", "side", "index", "shape", "expected"),
    [
        ("gradient", "inputs", 0, [], "restored of the gradient graph has shape []; expected [4, 3, 16, 16] for"),
        ("gradient", "inputs", 3, [4, 1], "timesteps of the gradient graph has shape [4, 1]; expected [4] for"),
        ("gradient", "outputs", 2, [4, 3, 16, 8], "gradient of the gradient graph has shape [4, 3, 16, 8]; expected"),
        ("semantic_gradient", "inputs", 2, [4, 1, 16, 16], "noise of the semantic_gradient graph has shape"),
        ("encoder", "outputs", 0, [], "bottleneck of the encoder graph has shape []; expected"),
        ("noise_head", "outputs", 0, [2, 3, 16, 16], "of the noise_head graph has shape [2, 3, 16, 16]; expected"),
    ],
)
def test_shapes_that_were_not_agreed_on(
    exported: Exported, tmp_path: Path, graph: str, side: str, index: int, shape: list[int], expected: str
) -> None:
    def reshape(manifest: Any) -> None:
        manifest["graphs"][graph][side][index]["shape"] = shape

    folder = shutil.copytree(exported[0], tmp_path / "bundle")
    edit_json(folder / "manifest.json", reshape)
    ways: list[tuple[str, Backward]] = [("torch", "fused"), ("onnxruntime", "recompute")]
    for backend, backward in ways:
        with pytest.raises(BundleError, match=re.escape(expected)):
            DiffLoss.load(folder, backend, "cpu", backward=backward)


@pytest.mark.parametrize(("name", "value"), [("timesteps", 999), ("prediction_type", "epsilon")])
def test_a_schedule_that_the_manifest_does_not_tell_of(
    exported: Exported, tmp_path: Path, name: str, value: object
) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "bundle")
    edit_json(folder / "manifest.json", lambda manifest: manifest["unet"].update({name: value}))
    with pytest.raises(BundleError, match=rf"{name} is .* in schedule.json, but {value!r} in the manifest"):
        DiffLoss.load(folder, "onnxruntime", "cpu")


def test_every_batch_size_from_one_to_nine(exported: Exported, make_batch: Callable[..., Batch]) -> None:
    """The bundle takes four images at a time: fewer are filled up, more are cut."""
    loss, _ = losses(exported, "onnxruntime")
    nine = tuple(torch.cat([tensor, tensor[:4] if tensor.ndim == 1 else -tensor[:4]]) for tensor in make_batch(count=5))
    restored, target, noise, timesteps = nine
    restored, target, noise = restored.float(), target.float(), noise.float()
    whole = loss(restored, target, noise=noise, timesteps=timesteps)
    assert whole.unique().numel() == 9
    for count in range(1, 9):
        part = loss(restored[:count], target[:count], noise=noise[:count], timesteps=timesteps[:count])
        torch.testing.assert_close(part, whole[:count], rtol=2e-5, atol=0)
        rest = loss(restored[count:], target[count:], noise=noise[count:], timesteps=timesteps[count:])
        torch.testing.assert_close(rest, whole[count:], rtol=2e-5, atol=0)


def test_semantic_term_alone_does_not_run_the_noise_head(exported: Exported, batch: Batch) -> None:
    loss = DiffLoss.load(exported[0], "onnxruntime", "cpu", 0.0, 1.0, backward="recompute", value_range=(-1, 1))
    assert isinstance(loss.evaluator, RecomputeEvaluator)
    engines = loss.evaluator.open()
    assert not isinstance(engines, EagerEvaluator)
    calls = count_calls(engines.unet.unet)
    engines.sessions["noise_head"].close()  # a call would raise BackendError
    value_and_gradient(loss, batch, torch.float32)
    assert calls == ENCODER_ONLY


@pytest.mark.parametrize(
    ("backend", "backward"), [("onnxruntime", "fused"), ("onnxruntime", "recompute"), ("torch", "recompute")]
)
def test_copies_share_sessions_and_pickles_open_their_own(
    exported: Exported, batch: Batch, backend: str, backward: str
) -> None:
    loss, _ = losses(exported, backend, semantic_weight=0.5, backward=backward)
    copied = copy.deepcopy(loss)
    pickled = pickle.dumps(loss)
    assert len(pickled) < 20_000  # the bundle's address, not its weights
    with torch.inference_mode():  # in which it does not stay
        again = pickle.loads(pickled)
    assert copied.evaluator is loss.evaluator
    assert again.evaluator is not loss.evaluator
    value, gradient = value_and_gradient(loss, batch, torch.float32)
    for other in (copied, again):
        other_value, other_gradient = value_and_gradient(other, batch, torch.float32)
        assert torch.equal(other_value, value)
        assert torch.equal(other_gradient, gradient)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_what_is_pickled_or_moved_keeps_its_settings(exported: Exported, cuda_graph: bool) -> None:
    cpu, elsewhere = torch.device("cpu"), torch.device("cuda", 1)
    evaluator = FusedEvaluator(Bundle.open(exported[0]), "onnxruntime", cpu, cuda_graph=cuda_graph)
    for other, device in ((pickle.loads(pickle.dumps(evaluator)), cpu), (evaluator.to(elsewhere), elsewhere)):
        assert (other.backend, other.device, other.cuda_graph) == ("onnxruntime", device, cuda_graph)
        assert other.bundle.path == evaluator.bundle.path


def test_what_a_pickle_finds_is_checked_anew(exported: Exported, tmp_path: Path) -> None:
    folder = shutil.copytree(exported[0], tmp_path / "bundle")
    pickled = pickle.dumps(DiffLoss.load(folder, "onnxruntime", "cpu", backward="recompute"))
    pickle.loads(pickled)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    before = load_tensors(weights)
    save_tensors({name: tensor * 1.01 for name, tensor in before.items()}, weights)

    def rehash(manifest: dict[str, Any]) -> None:
        manifest["files"]["unet/diffusion_pytorch_model.safetensors"]["sha256"] = file_sha256(weights)

    with pytest.raises(IntegrityError, match="was altered"):
        pickle.loads(pickled).evaluator.open()
    edit_json(folder / "manifest.json", rehash)  # as an export of other weights to the same place would leave it
    with pytest.raises(IntegrityError, match="another bundle than when this was pickled"):
        pickle.loads(pickled)


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_a_recompute_loss_is_checked_wherever_it_is_opened(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    loss = DiffLoss.load(exported[0], backend, "cpu", backward="recompute")
    pickled = pickle.dumps(loss)
    unpickled: DiffLoss = pickle.loads(pickled)
    strict = replace(PLAIN["fp32"], gradient=1e-12)
    monkeypatch.setitem(PLAIN, "fp32", strict)
    for evaluator in (unpickled.evaluator, loss.evaluator.to(torch.device("cpu"))):
        assert isinstance(evaluator, RecomputeEvaluator)
        with pytest.raises(ParityError, match="gradient is off by"):
            evaluator.open()


@pytest.mark.parametrize("kind", [FusedEvaluator, RecomputeEvaluator])
def test_a_loss_may_be_moved_to_where_its_backend_cannot_run(exported: Exported, batch: Batch, kind: Any) -> None:
    """As a trainer moves what it has trained to the CPU; it is an error to compute there."""
    cpu = torch.device("cpu")
    evaluator = kind(Bundle.open(exported[0]), "tensorrt", cpu).to(cpu)
    with pytest.raises(BackendUnavailableError, match="tensorrt needs a GPU"):
        evaluator.evaluate(*batch, (1.0, 1.0))


@pytest.mark.parametrize("kind", [FusedEvaluator, RecomputeEvaluator])
def test_a_loss_that_was_pickled_beside_a_gpu_that_is_not_here(exported: Exported, batch: Batch, kind: Any) -> None:
    """It is read all the same, and can be moved."""
    elsewhere = torch.device("cuda", 99)
    pickled = pickle.dumps(DiffLoss(kind(Bundle.open(exported[0]), "onnxruntime", elsewhere), value_range=(-1, 1)))
    loss: DiffLoss = pickle.loads(pickled)
    assert loss.device == elsewhere
    loss.to("cpu")
    assert loss.device == torch.device("cpu")
    value, _ = value_and_gradient(loss, batch, torch.float32)
    assert value.isfinite()


@pytest.mark.parametrize("backward", ["fused", "recompute"])
def test_images_have_the_size_of_the_bundle_in_pytorch_too(exported: Exported, backward: Backward) -> None:
    loss, _ = losses(exported, "torch", backward=backward)
    height, width = loss.resolution or (0, 0)
    with pytest.raises(InputError, match="the bundle's size"):
        loss(torch.rand(1, 3, 2 * height, width), torch.rand(1, 3, 2 * height, width))


@pytest.mark.parametrize(
    ("backend", "backward"), [("onnxruntime", "fused"), ("torch", "fused"), ("onnxruntime", "recompute")]
)
def test_autocast_around_the_whole_step_changes_nothing(
    exported: Exported, batch: Batch, backend: str, backward: str
) -> None:
    """backward() too: autocast would otherwise reach into the matrix products of PyTorch's backward."""
    loss, _ = losses(exported, backend, backward=backward)
    value, gradient = value_and_gradient(loss, batch, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        under, gradient_under = value_and_gradient(loss, batch, torch.float32)
    assert torch.equal(under, value)
    assert torch.equal(gradient_under, gradient)


def test_settings_of_copies_are_apart(exported: Exported, batch: Batch) -> None:
    loss, _ = losses(exported, "onnxruntime")
    before, _ = value_and_gradient(loss, batch, torch.float32)
    copied = copy.deepcopy(loss)
    copied.naturalness_weight = 0.0
    after, _ = value_and_gradient(loss, batch, torch.float32)
    assert torch.equal(before, after)


def test_bundle_takes_one_resolution(exported: Exported) -> None:
    loss, _ = losses(exported, "onnxruntime")
    assert loss.resolution == Bundle.open(exported[0]).resolution == (16, 16)
    with pytest.raises(ValueError, match=r"restored has shape \[1, 3, 32, 32\]; expected \[1, 3, 16, 16\]"):
        loss(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32))


def test_evaluators_describe_themselves(exported: Exported) -> None:
    for backend in ("onnxruntime", "torch"):
        loss, reference = losses(exported, backend)
        assert f"backend={backend}, backward=fused, device=cpu" in repr(loss)
        assert loss.evaluator.schedule.prediction_type == reference.evaluator.schedule.prediction_type == "v_prediction"
        assert not list(loss.parameters())
        assert not loss.state_dict()


def test_without_diffusers_it_is_not_the_bundle_that_is_blamed(
    exported: tuple[Path, Any, NoiseSchedule], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BackendUnavailableError, match="diffusers cannot be imported"):
        DiffLoss.load(exported[0], "torch", "cpu")
