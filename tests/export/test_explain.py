"""`diffloss-export explain`: the map lights up where a photograph is degraded, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffloss_engine.errors import InputError
from diffloss_export.cli import main
from diffloss_export.explain import Explanation, check_output, draw, explain, load_loss, read_image, scale_end
from diffloss_trt import DiffLoss
from exports import Exported
from photographs import load

TILE = (64, 64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loss() -> DiffLoss:
    loss, tile = load_loss(None, device=CPU, naturalness_weight=1e-3, semantic_weight=1e-6)
    assert tile == TILE
    return loss


@pytest.fixture(scope="module")
def target() -> Tensor:
    """A part of a photograph that the prior has not seen, on which every place has detail: [3, 80, 128]."""
    return load("chelsea")[:, 40:120, 120:248]


def blur(image: Tensor, place: tuple[slice, slice]) -> Tensor:
    """Blur a part of an image, as a network would that does not restore its detail."""
    smooth = F.avg_pool2d(F.pad(image[None], (2, 2, 2, 2), mode="reflect"), 5, stride=1)[0]
    result = image.clone()
    result[:, *place] = smooth[:, *place]
    return result


LEFT, RIGHT = ((slice(24, 56), slice(first, first + 32)) for first in (16, 80))


def contrast(push: Tensor, place: tuple[slice, slice]) -> float:
    """Return the mean push inside of a place over that outside."""
    inside = torch.zeros_like(push, dtype=torch.bool)
    inside[place] = True
    return float(push[inside].mean() / push[~inside].mean())


def test_the_map_lights_up_where_the_image_is_degraded(loss: DiffLoss, target: Tensor) -> None:
    left, right = (explain(loss, blur(target, place), target, tile=TILE, draws=2).push for place in (LEFT, RIGHT))
    assert left.shape == target.shape[1:]
    assert contrast(left, LEFT) > 20
    assert contrast(right, RIGHT) > 20
    assert contrast(left, RIGHT) < 0.1
    assert contrast(right, LEFT) < 0.1


def test_a_perfect_restoration_is_pushed_nowhere(loss: DiffLoss, target: Tensor) -> None:
    explanation = explain(loss, target, target, tile=TILE, draws=1)
    assert not explanation.push.any()
    assert set(explanation.terms.values()) == {0.0}
    assert draw(explanation, target).size[0] > 2 * 3 * 128


def test_one_tile_is_the_gradient_of_the_loss(loss: DiffLoss, target: Tensor) -> None:
    clean = target[:, :64, :64]
    restored = blur(clean, LEFT)
    found = explain(loss, restored, clean, tile=TILE, draws=1, seed=3)
    # The draws again, in the order in which they are made.
    generator = torch.Generator().manual_seed(3)
    timestep = (torch.rand(1, generator=generator, dtype=torch.float64) * 1000).long()
    torch.randperm(1, generator=generator)
    for _ in TILE:
        torch.randint(64, (), generator=generator)
    noise = torch.randn(1, 3, 64, 64, generator=generator)
    leaf = restored[None].clone().requires_grad_()
    terms = loss.terms(leaf, clean[None], timesteps=timestep, noise=noise)
    (gradient,) = torch.autograd.grad(terms.total.sum(), leaf)
    torch.testing.assert_close(found.push, gradient[0].abs().sum(0))
    (row,) = found.rows
    assert row["timestep"] == int(timestep)
    for name in terms._fields:
        assert row[name] == found.terms[name] == pytest.approx(getattr(terms, name).item())


def test_seed_and_draws(loss: DiffLoss, target: Tensor) -> None:
    restored = blur(target, LEFT)
    first, again, other = (explain(loss, restored, target, tile=TILE, draws=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.push, again.push)
    assert first.rows == again.rows
    assert not torch.equal(first.push, other.push)
    assert all(row["timestep"] // 500 == number for number, row in enumerate(first.rows))
    with pytest.raises(InputError, match="draws is 0; expected at least 1"):
        explain(loss, restored, target, tile=TILE, draws=0)


@pytest.mark.parametrize("size", [(64, 64), (65, 127), (200, 64), (40, 100), (20, 30)])
def test_images_of_any_size(loss: DiffLoss, size: tuple[int, int]) -> None:
    image = load("coffee")[:, : size[0], : size[1]]
    push = explain(loss, image * 0.9, image, tile=TILE, draws=1).push
    assert push.shape == size
    assert push.isfinite().all()
    # Every pixel belongs to a tile, those of the last row and column too.
    assert (push.amax(0) > 0).all()
    assert (push.amax(1) > 0).all()


def test_the_scale_leaves_the_largest_out() -> None:
    push = torch.cat([torch.full((999,), 1.0), torch.tensor([100.0])]).view(40, 25)
    assert scale_end(Explanation(push, ())) == 1.0


def save(image: Tensor, path: Path) -> Path:
    pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    Image.fromarray(pixels).save(path)
    return path


def on_map(rows: slice, columns: slice) -> tuple[int, int, int, int]:
    """Return where a place of an image of 128 columns lies in the picture: in the second panel, enlarged thrice."""
    left, top = 3 * 128 + 26, 26
    return left + 3 * columns.start, top + 3 * rows.start, left + 3 * columns.stop, top + 3 * rows.stop


def colourfulness(picture: Image.Image, box: tuple[int, int, int, int]) -> float:
    """Return the mean difference of a pixel's largest and smallest channel, in [0, 255]."""
    pixels = torch.frombuffer(bytearray(picture.crop(box).tobytes()), dtype=torch.uint8).view(-1, 3).float()
    return float((pixels.amax(1) - pixels.amin(1)).mean())


def test_command_draws_the_map_and_prints_the_terms(
    target: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restored = save(blur(target, LEFT), tmp_path / "restored.png")
    arguments = ["--restored", str(restored), "--target", str(save(target, tmp_path / "target.png"))]
    arguments += ["-o", str(tmp_path / "out.png"), "--draws", "2", "--device", "cpu"]
    assert main(["explain", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"terms", "timesteps", "push"}
    assert found["terms"]["total"] == pytest.approx(
        1e-3 * found["terms"]["naturalness"] + 1e-6 * found["terms"]["semantic"], rel=1e-4
    )
    assert len(found["timesteps"]) == 2
    assert 0 < found["push"]["mean"] < found["push"]["scale_end"] <= found["push"]["largest"]
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.mode == "RGB"
        assert colourfulness(picture, on_map(*LEFT)) > 10 * colourfulness(picture, on_map(*RIGHT))


def test_command_on_a_bundle(
    exported: Callable[..., Exported], target: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported().bundle.path
    first, second = save(target[:, :32, :24], tmp_path / "a.png"), save(target[:, 1:33, :24], tmp_path / "b.png")
    arguments = ["explain", "--restored", str(first), "--target", str(second), "--bundle", str(bundle)]
    assert main([*arguments, "-o", str(tmp_path / "out.jpg"), "--draws", "2", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'out.jpg'}: total ")
    assert "--batch-size" not in err
    assert "means over 2 timesteps, tiles of 16x16" in out
    assert (tmp_path / "out.jpg").stat().st_size > 1000


def test_backend_is_that_which_was_asked_for(
    exported: Callable[..., Exported], target: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported().bundle
    loss, _ = load_loss(bundle, backend="torch", device=CPU)
    assert loss.backend == "torch"
    image = save(target[:, :16, :16], tmp_path / "a.png")
    arguments = ["--restored", image, "--target", image, "--device", "cpu", "-o", tmp_path / "out.png", "--backend"]
    said = refused(capsys, *arguments, "tensorrt", "--bundle", bundle.path)
    assert "tensorrt needs a GPU that torch can use" in said
    said = refused(capsys, *arguments, "torch")
    assert "backend torch needs a bundle (--bundle); the built-in prior runs on eager PyTorch alone" in said


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line with which `explain` refuses these arguments."""
    assert main(["explain", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = (line for line in captured.err.splitlines() if not line.startswith("["))
    return line


def test_what_cannot_be_read_or_written(
    exported: Callable[..., Exported], target: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = save(target[:, :16, :16], tmp_path / "a.png")
    larger = save(target[:, :16, :17], tmp_path / "b.png")
    (tmp_path / "text.png").write_text("no picture")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    rest = ["--bundle", exported().bundle.path, "--device", "cpu", "-o"]
    out = tmp_path / "out.png"
    for restored, message in (
        (larger, "b.png has 17x16 pixels and "),
        (tmp_path / "none.png", "No such file"),
        (tmp_path / "text.png", "cannot identify image file"),
    ):
        assert message in refused(capsys, "--restored", restored, "--target", image, *rest, out)
    for path, message in (
        (tmp_path / "out.txt", "does not end like a picture"),
        (tmp_path / "out.xbm", "out.xbm cannot be written: cannot write mode RGB as XBM; expected a picture in colour"),
        (tmp_path / "out.bufr", "out.bufr cannot be written: BUFR save handler not installed; expected"),
        (tmp_path / "none" / "out.png", "there is no folder"),
        (exported().bundle.path / "unet" / "out.png", "it would be in the bundle"),
        (folder, "folder.png cannot be written: it is a folder"),
    ):
        assert message in refused(capsys, "--restored", image, "--target", image, *rest, path)
    for option, value, message in (
        ("--seed", 2**64, f"seed is {2**64}; expected 0 to 2**63 - 1"),
        ("--draws", 0, "the number of draws is 0; expected at least 1"),
    ):
        assert message in refused(capsys, "--restored", image, "--target", image, *rest, out, option, value)
    assert not out.exists()


def test_an_image_that_is_read_is_not_overwritten(tmp_path: Path) -> None:
    restored, target, link = (tmp_path / name for name in ("restored.png", "target.png", "link.png"))
    for path in (restored, target):
        path.touch()
    link.symlink_to(target)
    for path, image in ((restored, restored), (tmp_path / ".." / tmp_path.name / "target.png", target), (link, target)):
        with pytest.raises(InputError, match=f"is not written, because {image} is read from it"):
            check_output(path, restored, target)
    check_output(tmp_path / "out.png", restored, target)
    check_output(tmp_path / "out.png", restored, tmp_path / "none.png")


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.png cannot be read: No such file or directory"):
        read_image(tmp_path / "none.png", 3)
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"part\.png cannot be read: image file is truncated"):
        read_image(tmp_path / "part.png", 3)


def test_damage_inside_of_an_image_is_no_traceback(tmp_path: Path) -> None:
    """Pillow has other classes of errors for it than OSError."""
    path = tmp_path / "damaged.png"
    Image.effect_noise((400, 400), 50).save(path)
    whole = path.read_bytes()
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    path.write_bytes(whole[:second] + b"I\0AT" + whole[second + 4 :])
    with pytest.raises(InputError, match=r"damaged\.png cannot be read: broken PNG file"):
        read_image(path, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (4, 2)).save(path.with_suffix(".jpg"), exif=exif, dpi=(72, 72))
    whole = path.with_suffix(".jpg").read_bytes()
    path.with_suffix(".jpg").write_bytes(whole.replace(b"Exif\0\0MM\0*", b"Exif\0\0XX\0*"))
    with pytest.raises(InputError, match=r"damaged\.jpg cannot be read: not a TIFF file"):
        read_image(path.with_suffix(".jpg"), 3)


def test_images_are_turned_as_they_say(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new("L", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg", 1).shape == (1, 4, 2)


def test_formats_of_images(tmp_path: Path) -> None:
    grey = Image.new("L", (4, 2), 51)
    grey.save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png", 3), torch.full((3, 2, 4), 0.2))
    assert read_image(tmp_path / "grey.png", 1).shape == (1, 2, 4)
    Image.new("RGBA", (4, 2), (255, 0, 51, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 3)[:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    Image.new("I;16", (4, 2), 51).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="pixels of kind I;16; expected 8 bits a channel"):
        read_image(tmp_path / "deep.png", 3)
    with pytest.raises(InputError, match="2 channels"):
        read_image(tmp_path / "grey.png", 2)
    check_output(Path("out.PNG"))
