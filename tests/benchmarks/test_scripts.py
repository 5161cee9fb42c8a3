"""What the benchmarks are made of, and, most of them slowly, each of them on a tiny UNet."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scaling
import torch
from loss_step import describe_work, expected_gradients
from machine import describe
from nafnet import WideRestorationNetwork
from perceptual import PerceptualLoss
from report import ROOT, make_report
from scaling import exponent
from targets import EAGER
from timing import Timing, interleaved
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from ways import Setting, make_images, ways

from diffloss_trt import DiffLoss

CPU = torch.device("cpu")


def test_median_and_quartiles() -> None:
    timing = Timing.of([0.005, 0.001, 0.002, 0.003, 0.004])
    assert timing.to_json() == {"median_ms": 3.0, "quartiles_ms": [2.0, 4.0]}


def test_steps_take_turns() -> None:
    turns: list[str] = []
    interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 2, CPU)
    assert turns == ["a", "b", "a", "b"]


def test_a_power_is_found_again() -> None:
    sizes = [1, 2, 4, 16]
    assert exponent(sizes, [3 * size**0.8 for size in sizes]) == pytest.approx(0.8)


def test_the_restoration_network_is_nafnet_s_size_and_returns_its_input_at_first() -> None:
    network = WideRestorationNetwork()
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(29.1, abs=0.1)
    degraded = torch.rand(1, 3, 16, 32)
    assert torch.equal(network(degraded), degraded)


def test_the_perceptual_loss_is_zero_for_equal_images_alone_and_has_a_gradient() -> None:
    loss = PerceptualLoss()
    target = torch.rand(1, 3, 32, 32)
    restored = (target + 0.1 * torch.randn_like(target)).requires_grad_()
    assert loss(target, target) == 0
    value = loss(restored, target)
    value.backward()
    assert value != 0
    assert restored.grad is not None
    assert restored.grad.norm() > 0


class WithoutBundles(scaling.Setting):
    """Ours on eager PyTorch too, for which nothing is exported."""

    def loss(self, point: scaling.Point) -> DiffLoss:
        return super().loss(dataclasses.replace(point, way=scaling.EAGER))


def test_a_size_that_cannot_be_run_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without the processes that measure memory.
    monkeypatch.setattr(scaling, "build", lambda make, _: (make(), 2**20))
    too_many = 10**12  # images: more bytes than there are addresses
    curves = scaling.measure_sizes(WithoutBundles(tmp_path, "tiny", CPU), (1, 2, too_many), (16,), rounds=2)
    assert [curve["way"] for curve in curves] == [scaling.EAGER] * 2 + ["diffloss-trt, torch, fp32"] * 2
    for curve in curves:
        if curve["over"] == "images":
            assert [point["size"] for point in curve["points"]] == [1, 2]
            assert curve["left_out"].keys() == {str(too_many)}
            assert "RuntimeError: " in curve["left_out"][str(too_many)]
        else:
            assert curve["not_run"] == "a curve needs two sizes"
    result = {**describe(), "configuration": "tiny", "curves": curves, "processes": {"not_run": "of one"}}
    report = make_report({"scaling-cpu": result})
    assert "| not run: a curve needs two sizes" in report.text
    assert f"Left out of {scaling.EAGER}, over images: {too_many} (RuntimeError: " in report.text
    (picture,) = report.pictures
    picture.draw()


def test_eager_steps_are_right_and_half_precision_is_not(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "tiny", 4, CPU)
    errors = {}
    for terms in ("both", "semantic"):
        expected = expected_gradients(setting, terms)[30]
        for way in ways(setting, ("fp32", "bf16")):
            if way.way.startswith(EAGER) and way.terms == terms:
                found = way.step(setting)(make_images(setting, 4, 30))
                errors[way.name] = float((found - expected).norm() / expected.norm())
    right = {name: error for name, error in errors.items() if "fp32" in name}
    assert len(right) == 3
    assert max(right.values()) < 1e-3
    assert min(errors[name] for name in errors.keys() - right.keys()) > 1e-2


def test_a_step_is_three_passes_through_the_unet(tmp_path: Path) -> None:
    setting = Setting(tmp_path, "tiny", 1, CPU)
    tapped = setting.tapped(torch.float32)
    images = make_images(setting, 1, 30)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        tapped.features(images.target, images.timesteps, with_noise=True)
    flops = describe_work(setting)["flops_an_image"]
    # Not quite: back through attention there are two products for one.
    assert flops["both"] / counter.get_total_flops() == pytest.approx(3, rel=0.05)
    assert flops["semantic"] < 0.6 * flops["both"]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("stem", "arguments"),
    [
        ("hot-spots", ["tiny"]),
        *(
            pytest.param(stem, arguments, marks=pytest.mark.slow)
            for stem, arguments in {
                "loss-step": ["tiny", "--batch-sizes", "1", "2", "--precisions", "fp32", "--rounds", "2"],
                "plan-traffic": ["tiny"],
                "train-step": ["tiny", "--side", "16", "--rounds", "2"],
                "scaling": ["tiny", "--batch-sizes", "1", "2", "--sides", "16", "32", "--rounds", "2"],
                "export": ["tiny"],
            }.items()
        ),
    ],
)
def test_it_runs_and_is_reported(stem: str, arguments: list[str], tmp_path: Path) -> None:
    script, result = ROOT / "benchmarks" / f"{stem.replace('-', '_')}.py", tmp_path / "result.json"
    command = [sys.executable, str(script), *arguments, "--threads", "1", "--json", str(result)]
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "export"), str(ROOT)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = make_report({f"{stem}-cpu": json.loads(result.read_text())})
    assert "| " in report.text
    for picture in report.pictures:
        picture.draw()
