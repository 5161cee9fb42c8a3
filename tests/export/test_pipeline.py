"""Real exports of small UNets: what is in the bundle, equal bytes from equal inputs, and all or nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffloss_engine.bundle import Bundle, file_sha256
from diffloss_engine.errors import InputError, ModelError, ParityError
from diffloss_export.pipeline import check_resolution, export_bundle
from diffloss_trt import tolerances
from diffloss_trt.contract import (
    ENCODER,
    GRADIENT,
    NOISE_HEAD,
    PRECISIONS,
    REFERENCE,
    SCHEDULE,
    SEMANTIC_GRADIENT,
    UNET_CONFIG,
    UNET_WEIGHTS,
)
from diffloss_trt.schedule import NoiseSchedule
from diffloss_trt.unet import TappedUNet, reload_unet
from exports import Exported, edit_json, make_model, make_schedule, rehash
from unets import make_unet

CONFIGURATIONS = [
    # As the tests of `verify` and of the command line export them, too.
    pytest.param("two_levels", "fp32", "epsilon", None, marks=pytest.mark.slow),
    pytest.param("two_levels", "fp16", "epsilon", None, marks=pytest.mark.slow),
    pytest.param("two_levels", "bf16", "epsilon", None, marks=pytest.mark.slow),
    pytest.param("four_levels", "bf16", "epsilon", None, marks=pytest.mark.slow),
    pytest.param("adm", "fp32", "epsilon", None, marks=pytest.mark.slow),
    ("variance", "fp16", "v_prediction", None),
    pytest.param("two_levels", "fp32", "sample", None, marks=pytest.mark.slow),
    ("one_channel", "fp32", "epsilon", (16, 32)),
    ("asymmetric_padding", "fp16", "epsilon", (32, 16)),
    pytest.param("four_levels", "fp32", "epsilon", None, marks=pytest.mark.slow),
    pytest.param("four_levels", "fp16", "sample", None, marks=pytest.mark.slow),
    pytest.param("adm", "fp16", "epsilon", None, marks=pytest.mark.slow),
    pytest.param("adm", "bf16", "v_prediction", None, marks=pytest.mark.slow),
    pytest.param("skip_blocks", "fp32", "epsilon", None, marks=pytest.mark.slow),
    ("one_level", "bf16", "epsilon", None),
    pytest.param("learned_time", "fp16", "epsilon", None, marks=pytest.mark.slow),
    pytest.param("centred", "fp32", "v_prediction", None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "precision", "prediction_type", "resolution"), CONFIGURATIONS)
def test_export_passes_its_own_check(
    exported: Callable[..., Exported],
    kind: str,
    precision: str,
    prediction_type: str,
    resolution: tuple[int, int] | None,
) -> None:
    result = exported(kind, precision, prediction_type, resolution)
    bundle, report = result.bundle, result.report
    assert [row for row in report.rows if not row.passed] == []
    checked = {(row.check, row.quantity) for row in report.rows}
    in_graphs = {(name, spec.name) for name, graph in bundle.graphs.items() for spec in graph.outputs}
    assert tuple(sorted(bundle.graphs)) == (ENCODER, GRADIENT, NOISE_HEAD, SEMANTIC_GRADIENT)
    cosine = "1 - cosine of gradient"
    in_graphs |= {(GRADIENT, cosine), (SEMANTIC_GRADIENT, cosine)}
    in_loss = {("recomputed loss", quantity) for quantity in ("naturalness", "semantic", "gradient", cosine)}
    in_loss |= {("recomputed semantic loss alone", quantity) for quantity in ("semantic", "gradient", cosine)}
    if precision == "bf16":
        in_loss |= {
            (f"{check}, run in PyTorch", quantity)
            for check, quantity in in_graphs
            if check in (GRADIENT, SEMANTIC_GRADIENT)
        }
    assert checked == in_graphs | in_loss
    warned = any("predicts the sample" in note for note in report.notes)
    assert warned == (prediction_type == "sample" and precision != "fp32")
    # An error of exactly zero everywhere would mean that something was compared with itself.
    assert all(row.error > 0 for row in report.rows if row.quantity in ("bottleneck", "noise", "gradient"))

    size = make_unet(kind).config.sample_size
    assert bundle.resolution == (resolution or (size, size))
    assert (bundle.batch_size, bundle.precision) == (2, precision)
    channels = make_unet(kind).config.in_channels
    noisy = bundle.graphs[ENCODER].inputs[0]
    assert (noisy.name, noisy.dtype, noisy.shape) == ("noisy", "float32", (2, channels, *bundle.resolution))
    (noise,) = bundle.graphs[NOISE_HEAD].outputs
    assert (noise.name, noise.dtype, noise.shape) == ("noise", "float32", noisy.shape)
    bottleneck = bundle.graphs[ENCODER].outputs[0]
    assert bottleneck.torch_dtype == PRECISIONS[precision]


def test_every_step_is_announced_in_order(exported: Callable[..., Exported]) -> None:
    assert exported().stages == (
        "writing the UNet",
        "exporting the encoder graph",
        "exporting the noise_head graph",
        "exporting the gradient graph",
        "exporting the semantic_gradient graph",
        "widening the UNet to float64",
        "computing what the gradient graph should return",
        "computing what the semantic_gradient graph should return",
        "checking hashes",
        "replaying the encoder graph",
        "replaying the noise_head graph",
        "replaying the gradient graph",
        "replaying the semantic_gradient graph",
        "comparing loss and gradient of PyTorch's backward",
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bundle_holds_the_unet_in_its_precision(exported: Callable[..., Exported], precision: str) -> None:
    bundle = exported(precision=precision).bundle
    stored = load_file(bundle.file(UNET_WEIGHTS))
    state = make_unet("one_level", dtype=torch.float32).state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], weight.to(PRECISIONS[precision])) for key, weight in state.items())
    assert bundle.unet["class"] == "UNet2DModel"
    assert bundle.unet["parameters"] == sum(weight.numel() for weight in state.values())
    assert bundle.unet["sha256"] == file_sha256(bundle.path / UNET_WEIGHTS)
    assert bundle.read_json(UNET_CONFIG)["block_out_channels"] == [16]
    schedule = NoiseSchedule.from_json(bundle.read_json(SCHEDULE))
    assert torch.equal(schedule.alphas_cumprod, make_schedule().alphas_cumprod)


def test_stored_configuration_counts_where_it_is_the_default(copied: Callable[..., Path]) -> None:
    """A bundle must not change its meaning with the defaults of the diffusers version that reads it."""
    folder = copied()
    edit_json(folder / UNET_CONFIG, lambda config: config.update(norm_eps=0.25))
    rehash(folder)
    unet = reload_unet(Bundle.open(folder), torch.float32, torch.device("cpu"))
    assert unet.conv_norm_out.eps == 0.25


def test_bundle_holds_nothing_else(exported: Callable[..., Exported]) -> None:
    bundle = exported().bundle
    assert set(bundle.files) == {
        *(f"{name}.onnx" for name in (ENCODER, NOISE_HEAD, GRADIENT, SEMANTIC_GRADIENT)),
        UNET_CONFIG,
        UNET_WEIGHTS,
        SCHEDULE,
        REFERENCE,
    }
    # The manifest beside them, and no hidden folder beside the bundle.
    assert [path.name for path in bundle.path.parent.iterdir()] == ["bundle"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow  # in fp32 the tests of the command line do so, in two processes
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_equal_inputs_give_equal_bytes(exported: Callable[..., Exported], tmp_path: Path, precision: str) -> None:
    elsewhere = tmp_path / "a folder of another name"
    export_bundle(make_model(), elsewhere, batch_size=2, precision=precision)
    assert contents(elsewhere) == contents(exported(precision=precision).bundle.path)


def test_source_leaves_no_trace(exported: Callable[..., Exported]) -> None:
    bundle = exported().bundle
    for path, content in contents(bundle.path).items():
        for trace in (str(Path(__file__).parents[2]), str(bundle.path.parent), "site-packages", "Traceback", ".py"):
            assert trace.encode() not in content, (path, trace)


def test_failed_check_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impossible = tolerances.Tolerance(term=1e-30, gradient=1e-30, cosine=0.9)
    monkeypatch.setitem(tolerances.PLAIN, "fp32", impossible)
    with pytest.raises(ParityError, match=r"the error against float64 is .*, allowed 1e-30"):
        export_bundle(make_model(), tmp_path / "bundle", batch_size=1, gradient=False)
    assert list(tmp_path.iterdir()) == []


def test_failed_check_leaves_the_bundle_that_was_to_be_replaced(
    copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied()
    before = contents(folder)
    impossible = tolerances.Tolerance(term=1e-30, gradient=1e-30, cosine=0.9)
    monkeypatch.setitem(tolerances.PLAIN, "fp32", impossible)
    with pytest.raises(ParityError):
        export_bundle(make_model(), folder, batch_size=1, gradient=False, overwrite=True)
    assert contents(folder) == before
    assert list(folder.parent.iterdir()) == [folder]


def test_activations_beyond_half_precision_are_a_failed_check(tmp_path: Path) -> None:
    model = make_model()
    # Every weight is a good fp16 number; what comes out of the first convolution is not.
    model.unet.conv_in.weight *= 6e4 / model.unet.conv_in.weight.abs().max()
    with pytest.raises(ParityError, match=r"error against float64 is inf"):
        export_bundle(model, tmp_path / "bundle", batch_size=1, precision="fp16", gradient=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_half_precision_are_refused(tmp_path: Path) -> None:
    model = make_model()
    model.unet.conv_in.weight[0, 0, 0, 0] = 7e4
    with pytest.raises(InputError, match=r"conv_in\.weight is beyond the range of fp16; use bf16 or fp32"):
        export_bundle(model, tmp_path / "bundle", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_unet_that_onnx_cannot_express_is_refused(tmp_path: Path) -> None:
    class Cumulative(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cummax(dim=-1).values

    model = make_model()
    model.unet.conv_act = Cumulative()
    with pytest.raises(ModelError, match=r"^the noise_head graph cannot be expressed in ONNX: .*cummax"):
        export_bundle(model, tmp_path / "bundle", batch_size=1)
    assert list(tmp_path.iterdir()) == []


def test_another_activation_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="act_fn 'gelu'; expected 'silu'"):
        export_bundle(make_model(act_fn="gelu"), tmp_path / "bundle", batch_size=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "int8"}, "precision is 'int8'; expected one of fp32, fp16, bf16"),
        ({"batch_size": 0}, "batch size is 0; expected 1 to 4096"),
        ({"batch_size": 4097}, "batch size is 4097; expected 1 to 4096"),
        ({"resolution": (16, 16386)}, "resolution is 16x16386; .*multiples of 2, up to 16384"),
        ({"resolution": (16, 17)}, "resolution is 16x17; .*multiples of 2"),
        ({"resolution": (0, 16)}, "resolution is 0x16; .*multiples of 2"),
    ],
)
def test_unusable_settings_are_refused(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        export_bundle(make_model("two_levels"), tmp_path / "bundle", **settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_destination_is_looked_at_before_any_work(copied: Callable[..., Path]) -> None:
    folder = copied()
    stages: list[str] = []
    with pytest.raises(InputError, match="exists already"):
        export_bundle(make_model(), folder, on_stage=stages.append)
    assert stages == []


def test_a_bundle_is_replaced_when_asked(copied: Callable[..., Path]) -> None:
    folder = copied()
    export_bundle(make_model(), folder, batch_size=1, gradient=False, overwrite=True)
    assert Bundle.open(folder).batch_size == 1
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(("sample_size", "expected"), [(16, (16, 16)), ((16, 32), (16, 32))])
def test_default_resolution_is_the_unets(sample_size: object, expected: tuple[int, int]) -> None:
    tapped = TappedUNet(make_unet(sample_size=sample_size), make_schedule())
    assert check_resolution(tapped, None) == expected
    assert check_resolution(tapped, (8, 10)) == (8, 10)


def test_resolution_is_needed_where_the_unet_has_none() -> None:
    tapped = TappedUNet(make_unet(sample_size=None), make_schedule())
    with pytest.raises(InputError, match=r"no sample_size: a resolution \(--resolution\) must be given"):
        check_resolution(tapped, None)


@pytest.mark.parametrize(
    "sample_size", [[], [16], {}, "x", "16", [16, "a"], 16.0, True, 0, -16, 10**9, [16, 16, 16], [16, 16.0]], ids=str
)
def test_sample_sizes_that_are_none(sample_size: object) -> None:
    tapped = TappedUNet(make_unet(sample_size=sample_size), make_schedule())
    with pytest.raises(ModelError, match=rf"sample_size {re.escape(repr(sample_size))}; expected one or two integers"):
        check_resolution(tapped, None)
    assert check_resolution(tapped, (8, 10)) == (8, 10)


def test_a_setting_that_divides_by_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the UNet divides by zero: .*mid_block_scale_factor"):
        export_bundle(make_model(mid_block_scale_factor=0), tmp_path / "bundle", batch_size=1)
    assert list(tmp_path.iterdir()) == []


def test_resolution_multiple_is_that_of_the_levels() -> None:
    tapped = TappedUNet(make_unet("four_levels"), make_schedule())
    with pytest.raises(InputError, match=r"resolution is 32x36; this UNet takes .* multiples of 8"):
        check_resolution(tapped, (32, 36))


def test_manifest_is_sorted_and_readable(exported: Callable[..., Exported]) -> None:
    text = (exported().bundle.path / "manifest.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
