"""Every kind of model source, on real diffusers folders, and every way in which one can be broken."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler, UNet2DModel
from diffusers.models.unets import unet_2d_blocks
from huggingface_hub.utils import are_progress_bars_disabled, filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffloss_engine.errors import InputError, ModelError
from diffloss_export.models import LoadedModel, load_model
from diffloss_trt.unet import BLOCKS

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def small_unet(**changes: Any) -> UNet2DModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**settings | changes).eval()


@pytest.fixture
def unet() -> UNet2DModel:
    return small_unet()


@pytest.fixture
def pipeline(tmp_path: Path, unet: UNet2DModel) -> Path:
    """Return a pipeline's folder; its schedule is not the default one."""
    folder = tmp_path / "pipeline"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(beta_end=0.03)).save_pretrained(folder)
    return folder


@pytest.fixture
def alone(tmp_path: Path, unet: UNet2DModel) -> Path:
    """Return a UNet's own folder with no scheduler near."""
    folder = tmp_path / "alone"
    unet.save_pretrained(folder)
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS)


def assert_same_unet(model: LoadedModel, unet: UNet2DModel) -> None:
    loaded = model.unet.state_dict()
    assert list(loaded) == list(unet.state_dict())
    for name, weight in unet.state_dict().items():
        assert torch.equal(loaded[name], weight), name
    sample = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.unet(sample, 7).sample, unet(sample, 7).sample)


def refused(source: Path | str, *expected: str) -> str:
    """Return the one line with which `source` is refused, which has each of `expected` in it."""
    with pytest.raises(ModelError) as caught:
        load_model(str(source))
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert text in message
    return message


# Layouts


def test_pipeline_folder(pipeline: Path, unet: UNet2DModel) -> None:
    model = load_model(str(pipeline))
    assert_same_unet(model, unet)
    expected = DDPMScheduler(beta_end=0.03).alphas_cumprod.double()
    torch.testing.assert_close(model.schedule.alphas_cumprod, expected, rtol=1e-5, atol=0)
    assert model.schedule.prediction_type == "epsilon"
    assert model.source == str(pipeline)
    assert model.notes == ()


def test_flat_pipeline_folder(tmp_path: Path, unet: UNet2DModel) -> None:
    unet.save_pretrained(tmp_path)
    DDPMScheduler(num_train_timesteps=500).save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "DDPMScheduler"]})
    )
    model = load_model(str(tmp_path))
    assert_same_unet(model, unet)
    assert len(model.schedule) == 500
    assert model.notes == ()


def test_unet_folder_alone_gets_the_default_schedule_and_a_note(alone: Path, unet: UNet2DModel) -> None:
    model = load_model(str(alone))
    assert_same_unet(model, unet)
    assert len(model.schedule) == 1000
    assert model.schedule.prediction_type == "epsilon"
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(model.schedule.alphas_cumprod, expected, rtol=1e-4, atol=0)
    (note,) = model.notes
    assert "no scheduler" in note
    assert "linear schedule of 1000 steps" in note


@pytest.mark.parametrize("place", ["", "scheduler"])
def test_unet_folder_with_its_own_scheduler(alone: Path, place: str) -> None:
    DDPMScheduler(num_train_timesteps=300).save_pretrained(alone / place)
    model = load_model(str(alone))
    assert len(model.schedule) == 300
    assert model.notes == ()


def test_unet_subfolder_finds_the_pipelines_scheduler(
    pipeline: Path, unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_model(str(pipeline))
    monkeypatch.chdir(pipeline / "unet")
    for source in (str(pipeline / "unet"), "."):
        model = load_model(source)
        assert_same_unet(model, unet)
        assert torch.equal(model.schedule.alphas_cumprod, whole.schedule.alphas_cumprod)
        assert model.notes == ()


def test_scheduler_of_a_folder_beside_is_not_taken(pipeline: Path) -> None:
    (pipeline / "unet").rename(pipeline / "unet_ema")
    assert len(load_model(str(pipeline / "unet_ema")).notes) == 1


def test_sharded_weights(tmp_path: Path, unet: UNet2DModel) -> None:
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_unet(load_model(str(tmp_path)), unet)


def test_scale_shift_unet_with_a_variance_output(tmp_path: Path) -> None:
    unet = small_unet(resnet_time_scale_shift="scale_shift", out_channels=6, downsample_type="resnet")
    unet.save_pretrained(tmp_path)
    assert_same_unet(load_model(str(tmp_path)), unet)


def test_attention_names_from_before_diffusers_0_15(alone: Path, unet: UNet2DModel) -> None:
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            for new, old in renamed.items():
                if f".{new}." in name:
                    weights[name.replace(f".{new}.", f".{old}.")] = weights.pop(name)

    edit_weights(alone, age)
    names = set(load_file(alone / WEIGHTS))
    assert "mid_block.attentions.0.proj_attn.bias" in names
    assert not any(".to_" in name for name in names)
    assert_same_unet(load_model(str(alone)), unet)


def test_builtin() -> None:
    model = load_model("builtin")
    assert model.source == "builtin"
    assert model.notes == ()
    assert len(model.schedule) == 1000
    with torch.no_grad():
        assert model.unet(torch.randn(1, 3, 64, 64), 100).sample.isfinite().all()


def test_missing_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _package: tmp_path)
    refused("builtin", "no built-in prior")


# Blocks

# diffusers' blocks on the way down, each with the one for the way up, and what becomes of a UNet made of them.
PAIRS = {
    "DownBlock2D": "UpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "SkipDownBlock2D": "SkipUpBlock2D",
    "AttnSkipDownBlock2D": "AttnSkipUpBlock2D",
}
REFUSED_PAIRS = {
    "KDownBlock2D": ("KUpBlock2D", "has a KDownBlock2D; expected blocks of"),
    "DownEncoderBlock2D": ("UpDecoderBlock2D", "has a DownEncoderBlock2D; expected blocks of"),
    "AttnDownEncoderBlock2D": ("AttnUpDecoderBlock2D", "has a AttnDownEncoderBlock2D; expected blocks of"),
    "KCrossAttnDownBlock2D": ("KCrossAttnUpBlock2D", "has a KCrossAttnDownBlock2D; expected blocks of"),
    "CrossAttnDownBlock2D": ("CrossAttnUpBlock2D", "no UNet2DModel can be built"),
    "SimpleCrossAttnDownBlock2D": ("SimpleCrossAttnUpBlock2D", "no UNet2DModel can be built"),
}


def block_config(down: str, up: str) -> dict[str, Any]:
    return {"down_block_types": [down] * 2, "up_block_types": [up] * 2, "block_out_channels": [32, 32]}


def test_every_block_of_diffusers_is_known() -> None:
    source = inspect.getsource(unet_2d_blocks.get_down_block) + inspect.getsource(unet_2d_blocks.get_up_block)
    there = set(re.findall(r'_block_type == "(\w+)"', source))
    refused_blocks = {*REFUSED_PAIRS, *(up for up, _ in REFUSED_PAIRS.values())}
    assert there == {*PAIRS, *PAIRS.values()} | refused_blocks
    assert {*PAIRS, *PAIRS.values()} == set(BLOCKS)


@pytest.mark.parametrize(("down", "up"), PAIRS.items())
def test_blocks_that_can_be_used(tmp_path: Path, down: str, up: str) -> None:
    unet = small_unet(**block_config(down, up))
    unet.save_pretrained(tmp_path)
    assert_same_unet(load_model(str(tmp_path)), unet)


@pytest.mark.parametrize(("down", "up", "message"), [(down, *rest) for down, rest in REFUSED_PAIRS.items()])
def test_blocks_that_cannot(alone: Path, down: str, up: str, message: str) -> None:
    edit_json(alone / "config.json", **block_config(down, up))
    with contextlib.suppress(ValueError):  # what diffusers itself cannot build
        small_unet(**block_config(down, up)).save_pretrained(alone)
    refused(alone, message)


# What comes back


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(tmp_path: Path, unet: UNet2DModel, dtype: torch.dtype) -> None:
    unet.to(dtype).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert_same_unet(model, unet.float())


def test_unet_is_float32_evaluating_frozen_and_on_the_cpu(pipeline: Path) -> None:
    unet = load_model(str(pipeline)).unet
    assert isinstance(unet, UNet2DModel)
    assert not any(module.training for module in unet.modules())
    for parameter in unet.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
        assert parameter.device.type == "cpu"


def test_weights_do_not_change_with_the_file(alone: Path, unet: UNet2DModel) -> None:
    model = load_model(str(alone))
    with (alone / WEIGHTS).open("r+b") as file:
        file.seek(-4096, 2)
        file.write(bytes(4096))
    assert_same_unet(model, unet)


def test_loading_leaves_the_random_state_alone(pipeline: Path) -> None:
    before = torch.get_rng_state()
    load_model(str(pipeline))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_carried(alone: Path, prediction_type: str) -> None:
    DDPMScheduler(prediction_type=prediction_type).save_pretrained(alone)
    assert load_model(str(alone)).schedule.prediction_type == prediction_type


def test_the_older_word_for_predicting_the_sample(alone: Path) -> None:
    DDPMScheduler().save_pretrained(alone)
    path = alone / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps(config | {"predict_epsilon": False}))
    assert load_model(str(alone)).schedule.prediction_type == "sample"
    path.write_text(json.dumps(config | {"predict_epsilon": True}))
    assert load_model(str(alone)).schedule.prediction_type == "epsilon"


@pytest.mark.parametrize("scheduler", [DDIMScheduler(200), PNDMScheduler(200), diffusers.EulerDiscreteScheduler(200)])
def test_scheduler_classes(alone: Path, scheduler: Any) -> None:
    scheduler.save_pretrained(alone / "scheduler")
    schedule = load_model(str(alone)).schedule
    assert len(schedule) == 200
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=0)


def test_unknown_settings_are_noted(pipeline: Path) -> None:
    edit_json(pipeline / "unet" / "config.json", made_up=1)
    (note,) = load_model(str(pipeline)).notes
    assert "made_up" in note


def in_new_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)


def test_nothing_leaks_to_the_terminal(pipeline: Path) -> None:
    # Each of these makes diffusers log a warning.
    edit_json(pipeline / "unet" / "config.json", made_up=1)
    edit_json(pipeline / "scheduler" / "scheduler_config.json", made_up=1)
    done = in_new_process(
        "import sys\n"
        "from diffloss_engine.errors import ModelError\n"
        "from diffloss_export.models import load_model\n"
        "load_model(sys.argv[1])\n"
        "try: load_model('nobody/nothing')\n"
        "except ModelError: pass\n"
        "print('by diffusers:', file=sys.stderr, flush=True)\n"
        "import diffusers\n"
        "diffusers.UNet2DModel.from_pretrained(sys.argv[1], subfolder='unet')\n"
        "diffusers.DDPMScheduler.from_pretrained(sys.argv[1], subfolder='scheduler')",
        str(pipeline),
    )
    ours, _, by_diffusers = done.stderr.partition("by diffusers:\n")
    assert (done.stdout, ours) == ("", "")
    assert by_diffusers.count("made_up") == 2


def test_log_levels_and_progress_bars_come_back(pipeline: Path) -> None:
    def settings() -> tuple[object, ...]:
        levels = [logging.getLogger(name).level for name in ("diffusers", "huggingface_hub")]
        return levels, are_progress_bars_disabled(), list(warnings.filters)

    before = settings()
    load_model(str(pipeline))
    refused("nobody/nothing")
    edit_json(pipeline / "unet" / "config.json", norm_num_groups=0)
    refused(pipeline)
    assert settings() == before


def test_module_imports_without_heavy_libraries() -> None:
    in_new_process(
        "import sys\n"
        "for name in ('diffusers', 'huggingface_hub', 'safetensors'): sys.modules[name] = None\n"
        "import diffloss_export.models"
    )


# Broken folders


def test_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "no unet/ and no config.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b'{"_class_name": "UNet2DModel",', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "a JSON list, expected an object"),
        (b" " * (16 * 2**20 + 1), "larger than"),
        (b"{}", "no _class_name"),
    ],
)
@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_malformed_json(pipeline: Path, name: str, text: bytes, expected: str) -> None:
    (pipeline / name).write_bytes(text)
    refused(pipeline, str(pipeline / name), expected)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_missing_json(pipeline: Path, name: str) -> None:
    (pipeline / name).unlink()
    refused(pipeline, str(pipeline / name), "no such file")


def test_text_conditional_unet(pipeline: Path) -> None:
    edit_json(pipeline / "unet" / "config.json", _class_name="UNet2DConditionModel")
    refused(pipeline, "text-conditional UNets", "not supported")


@pytest.mark.parametrize("name", ["AutoencoderKL", ["UNet2DModel"], 3])
def test_other_class(pipeline: Path, name: Any) -> None:
    edit_json(pipeline / "unet" / "config.json", _class_name=name)
    refused(pipeline, repr(name), "'UNet2DModel'")


def test_quantized_unet(pipeline: Path) -> None:
    edit_json(pipeline / "unet" / "config.json", quantization_config={"quant_method": "gguf"})
    refused(pipeline, "quantized")


@pytest.mark.parametrize("component", ["vae", "vqvae"])
def test_latent_pipeline(pipeline: Path, component: str) -> None:
    edit_json(pipeline / "model_index.json", **{component: [None, None]})
    load_model(str(pipeline))
    edit_json(pipeline / "model_index.json", **{component: ["diffusers", "VQModel"]})
    refused(pipeline, "latent diffusion", component)
    refused(pipeline / "unet", "latent diffusion", component)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": [8]},
        {"block_out_channels": "wide"},
        {"norm_num_groups": 5},
        {"norm_num_groups": 0},
        {"down_block_types": ["NoBlock2D", "AttnDownBlock2D"]},
        {"in_channels": None},
        {"act_fn": "no such thing"},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_settings_from_which_no_unet_can_be_built(alone: Path, changes: dict[str, Any]) -> None:
    edit_json(alone / "config.json", **changes)
    refused(alone, "config.json")


def test_architecture_that_cannot_be_used(tmp_path: Path) -> None:
    small_unet(num_class_embeds=10).save_pretrained(tmp_path)
    refused(tmp_path, str(tmp_path), "class-conditional")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"block_out_channels": [8, 24]}, "has shape"),
        ({"down_block_types": ["DownBlock2D", "DownBlock2D"]}, "unexpected tensor"),
        ({"block_out_channels": [8, 16, 16], "down_block_types": ["DownBlock2D"] * 3}, "config.json"),
    ],
)
def test_weights_of_another_architecture(alone: Path, changes: dict[str, Any], expected: str) -> None:
    edit_json(alone / "config.json", **changes)
    refused(alone, expected)


def test_missing_weights(alone: Path) -> None:
    (alone / WEIGHTS).unlink()
    refused(alone, str(alone), "no weights", WEIGHTS, "a pickle, is read if asked for (--allow-pickle)")


def test_variants_of_the_weights_are_named(alone: Path, unet: UNet2DModel) -> None:
    variant = (alone / WEIGHTS).rename(alone / "diffusion_pytorch_model.fp16.safetensors")
    refused(alone, str(alone), f"only variants of the weights, {variant.name}", f"renamed to {WEIGHTS}")
    variant.rename(alone / WEIGHTS)
    assert_same_unet(load_model(str(alone)), unet)


def test_pickled_weights_are_read_if_asked_for(tmp_path: Path, unet: UNet2DModel) -> None:
    unet.save_pretrained(tmp_path, safe_serialization=False)
    refused(tmp_path, str(tmp_path), "only pickled weights", "--allow-pickle", WEIGHTS)
    assert_same_unet(load_model(str(tmp_path), allow_pickle=True), unet)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.bin: damaged"):
        load_model(str(tmp_path), allow_pickle=True)


def test_safetensors_win_over_pickles(alone: Path, unet: UNet2DModel) -> None:
    (alone / "diffusion_pytorch_model.bin").write_bytes(b"no pickle")
    assert_same_unet(load_model(str(alone), allow_pickle=True), unet)


def test_bundle_is_no_model(pipeline: Path) -> None:
    (pipeline / "manifest.json").write_text("{}")
    refused(pipeline, "this is a bundle already")
    refused(pipeline / "unet", "this is a bundle already")


@pytest.mark.parametrize("kind", ["embedding", "timestep"])
def test_class_label_makes_an_unconditional_unet(tmp_path: Path, kind: str) -> None:
    unet = small_unet(**({"num_class_embeds": 10} if kind == "embedding" else {"class_embed_type": "timestep"}))
    unet.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), class_label=7)
    sample, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([7, 900])
    with torch.no_grad():
        expected = unet(sample, timesteps, class_labels=torch.tensor([7, 7])).sample
        other = unet(sample, timesteps, class_labels=torch.tensor([3, 3])).sample
        torch.testing.assert_close(model.unet(sample, timesteps).sample, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(other, expected, rtol=1e-2)
    # It is saved as what it has become.
    model.unet.save_pretrained(tmp_path / "again")
    assert_same_unet(load_model(str(tmp_path / "again")), model.unet)


@pytest.mark.parametrize(
    ("changes", "label", "error", "message"),
    [
        ({"num_class_embeds": 10}, 10, InputError, "class_label is 10, expected 0 to 9"),
        ({"num_class_embeds": 10}, -1, InputError, "class_label is -1, expected 0 to 9"),
        ({"class_embed_type": "timestep"}, -1, InputError, "class_label is -1"),
        ({"class_embed_type": "identity"}, 0, ModelError, "'identity'"),
        ({}, 0, InputError, "not class-conditional"),
    ],
    ids=str,
)
def test_class_labels_that_cannot_be_used(
    tmp_path: Path, changes: dict[str, Any], label: int, error: type[Exception], message: str
) -> None:
    small_unet(**changes).save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        load_model(str(tmp_path), class_label=label)


@pytest.mark.parametrize(
    ("settings", "last"),
    [
        ({"beta_schedule": "linear"}, None),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, None),
        ({"beta_schedule": "squaredcos_cap_v2"}, None),
        ({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3}, 0.9 * 0.8 * 0.7),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 0.0),
    ],
    ids=str,
)
def test_beta_tables(alone: Path, settings: dict[str, Any], last: float | None) -> None:
    scheduler = DDPMScheduler(**settings)
    scheduler.save_pretrained(alone / "scheduler")
    found = load_model(str(alone)).schedule.alphas_cumprod
    torch.testing.assert_close(found, scheduler.alphas_cumprod.double(), rtol=0, atol=0)
    if last is not None:
        assert float(found[-1]) == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1, -5000])
def test_truncated_weights(alone: Path, kept: int) -> None:
    content = (alone / WEIGHTS).read_bytes()
    (alone / WEIGHTS).write_bytes(content[:kept])
    refused(alone, str(alone / WEIGHTS), "damaged")


def test_damaged_header(alone: Path) -> None:
    content = bytearray((alone / WEIGHTS).read_bytes())
    content[8:40] = b"\x00" * 32
    (alone / WEIGHTS).write_bytes(content)
    refused(alone, str(alone / WEIGHTS), "damaged")


def test_appended_bytes(alone: Path) -> None:
    with (alone / WEIGHTS).open("ab") as file:
        file.write(bytes(64))
    refused(alone, str(alone / WEIGHTS), "damaged")


def test_tensor_missing_from_the_weights(alone: Path) -> None:
    edit_weights(alone, lambda weights: weights.pop("conv_out.bias"))
    refused(alone, "'conv_out.bias'", "1 missing")


def test_tensor_too_many_in_the_weights(alone: Path) -> None:
    edit_weights(alone, lambda weights: weights.update(extra=torch.zeros(1)))
    refused(alone, "unexpected tensor 'extra'")


def test_tensor_under_its_old_and_its_new_name(alone: Path) -> None:
    old, new = (f"mid_block.attentions.0.{name}.weight" for name in ("query", "to_q"))
    edit_weights(alone, lambda weights: weights.update({old: weights[new].clone()}))
    refused(alone, "unexpected tensor 'mid_block.attentions.0.")


def test_tensor_of_another_shape(alone: Path) -> None:
    edit_weights(alone, lambda weights: weights.update({"conv_in.weight": torch.zeros(8, 3, 1, 1)}))
    refused(alone, "'conv_in.weight'", "(8, 3, 1, 1)", "(8, 3, 3, 3)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(alone: Path, value: float) -> None:
    edit_weights(alone, lambda weights: weights["conv_norm_out.weight"].fill_(value))
    refused(alone, "'conv_norm_out.weight'", "NaN or infinite")


def test_float64_beyond_float32(alone: Path) -> None:
    huge = torch.full((3,), 1e300, dtype=torch.float64)
    edit_weights(alone, lambda weights: weights.update({"conv_out.bias": huge}))
    refused(alone, "'conv_out.bias'", "infinite")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_values_that_are_no_plain_floats(alone: Path, dtype: torch.dtype) -> None:
    edit_weights(alone, lambda weights: weights.update({"conv_out.bias": weights["conv_out.bias"].to(dtype)}))
    refused(alone, "'conv_out.bias'", str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("weight_map", "expected"),
    [
        ({"conv_in.weight": "../outside.safetensors"}, "'../outside.safetensors'"),
        ({"conv_in.weight": "/outside.safetensors"}, "'/outside.safetensors'"),
        ({"conv_in.weight": "..\\outside.safetensors"}, "outside.safetensors"),
        ({"conv_in.weight": "pickle.bin"}, "'pickle.bin'"),
        ({"conv_in.weight": 3}, "'3'"),
        ({"conv_in.weight": "absent.safetensors"}, "absent.safetensors: no such file"),
        ({}, "weight_map"),
        ([], "weight_map"),
        (None, "weight_map"),
    ],
)
def test_malformed_shard_index(alone: Path, weight_map: Any, expected: str) -> None:
    (alone / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(alone, expected)


def test_missing_shard(tmp_path: Path, unet: UNet2DModel) -> None:
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    shard = min(tmp_path.glob("*.safetensors"))
    shard.unlink()
    refused(tmp_path, shard.name, "no such file")


def test_tensor_in_two_shards(alone: Path) -> None:
    shutil.copy(alone / WEIGHTS, alone / "again.safetensors")
    (alone / INDEX).write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": "again.safetensors"}}))
    refused(alone, "again.safetensors", "unexpected tensor")


@pytest.mark.parametrize("name", ["ScoreSdeVeScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_scheduler_without_alphas_cumprod(alone: Path, name: str) -> None:
    getattr(diffusers, name)().save_pretrained(alone / "scheduler")
    refused(alone, "scheduler_config.json", name, "alphas_cumprod")


@pytest.mark.parametrize("name", ["NoSuchScheduler", "UNet2DModel", "logging", "FlaxNothing", ["DDPMScheduler"]])
def test_scheduler_class_that_is_none(pipeline: Path, name: Any) -> None:
    edit_json(pipeline / "scheduler" / "scheduler_config.json", _class_name=name)
    refused(pipeline, "scheduler_config.json", repr(name))


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "no such"},
        {"num_train_timesteps": "many"},
        {"num_train_timesteps": 0},
        {"beta_end": "high"},
        {"trained_betas": [0.1, 2.0]},
        {"prediction_type": "no such"},
    ],
    ids=str,
)
def test_settings_from_which_no_schedule_can_be_built(pipeline: Path, changes: dict[str, Any]) -> None:
    edit_json(pipeline / "scheduler" / "scheduler_config.json", **changes)
    refused(pipeline, "scheduler_config.json")


# Sources that are no folder


def test_other_file(alone: Path) -> None:
    refused(alone / WEIGHTS, "a file, not a folder", "'builtin'", "diffusers folder", "Hub id")


@pytest.mark.parametrize(
    "source", ["", "nothing", "/no/such/folder", "./no/such", "a/b/c", "../x/y", "a" * 5000, "a\0b"]
)
def test_nothing_there(source: str) -> None:
    refused(source, "no such folder", "'builtin'", "diffusers folder", "Hub id")


def test_revision_of_what_is_not_on_the_hub(alone: Path) -> None:
    for source in ("builtin", str(alone)):
        with pytest.raises(InputError, match="revision"):
            load_model(source, revision="main")


# The Hub


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object, **__: object) -> None:
        pytest.fail("a network was tried, which may take minutes to fail")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    message = refused("nobody/nothing", "'nobody/nothing'", "no such local folder", "Hub could not be reached")
    assert "no such repository" in message


@pytest.mark.parametrize("source", ["nobody/no--thing", "nobody/.."])
def test_name_that_the_hub_does_not_allow(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(source, repr(source), "no such local folder")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str | None]]:
    """Replace the Hub by a folder; return it and the list of revisions asked for."""
    remote, cache = tmp_path / "remote", tmp_path / "cache" / COMMIT
    remote.mkdir()
    asked: list[str | None] = []

    def snapshot_download(_repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        files = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(remote / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return remote, asked


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
@pytest.mark.parametrize("flat", [False, True])
def test_hub_repository(
    hub: tuple[Path, list[str | None]], unet: UNet2DModel, flat: bool, shard_size: str, tmp_path: Path
) -> None:
    remote, asked = hub
    unet.save_pretrained(remote / ("" if flat else "unet"), max_shard_size=shard_size)
    DDPMScheduler(300).save_pretrained(remote / ("" if flat else "scheduler"))
    (remote / "model_index.json").write_text("{}")
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", "README.md"):
        (remote / name).write_bytes(b"not wanted")
    model = load_model("someone/something", revision="main")
    assert_same_unet(model, unet)
    assert len(model.schedule) == 300
    assert model.source == "someone/something"
    assert asked == ["main", COMMIT]
    fetched = {path.name for path in (tmp_path / "cache").rglob("*")}
    assert not fetched & {"diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", "README.md"}


@pytest.mark.parametrize("safe", [True, False])
def test_pickles_of_the_hub_are_fetched_where_there_is_nothing_else(
    hub: tuple[Path, list[str | None]], unet: UNet2DModel, safe: bool, tmp_path: Path
) -> None:
    remote, _ = hub
    unet.save_pretrained(remote, safe_serialization=False)
    if safe:
        unet.save_pretrained(remote)
    assert_same_unet(load_model("someone/something", allow_pickle=True), unet)
    assert any((tmp_path / "cache").rglob("*.bin")) is not safe


def test_hub_repository_is_refused_before_its_weights_are_fetched(
    hub: tuple[Path, list[str | None]], unet: UNet2DModel
) -> None:
    remote, asked = hub
    unet.save_pretrained(remote / "unet")
    edit_json(remote / "unet" / "config.json", _class_name="UNet2DConditionModel")
    refused("someone/something", "text-conditional")
    assert asked == [None]


def test_so_is_a_hub_repository_of_which_nothing_could_be_made(
    hub: tuple[Path, list[str | None]], unet: UNet2DModel
) -> None:
    remote, asked = hub
    unet.save_pretrained(remote)
    (remote / "scheduler_config.json").write_text('{"_class_name": "NoSuchScheduler"}')
    refused("someone/something", "'NoSuchScheduler' is not a scheduler")
    (remote / "scheduler_config.json").unlink()
    edit_json(remote / "config.json", down_block_types=["NoSuchBlock"] * 2)
    refused("someone/something", "no UNet2DModel can be built from it")
    assert asked == [None, None]


def test_repository_in_the_hubs_cache_needs_no_network(
    tmp_path: Path, unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--something"
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(300)).save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    model = load_model("someone/something")
    assert_same_unet(model, unet)
    assert len(model.schedule) == 300


def test_local_folder_wins_over_a_hub_id(tmp_path: Path, unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unet.save_pretrained(tmp_path / "someone" / "something")
    assert_same_unet(load_model("someone/something"), unet)
