"""Where the loss pushes: the size of its gradient at each pixel of a restored image, as a map over the image."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from diffloss_engine.bundle import Bundle
from diffloss_engine.errors import InputError, first_line
from diffloss_export.models import BUILTIN, load_model
from diffloss_export.pictures import check_place
from diffloss_trt import DiffLoss
from diffloss_trt.loss import BATCH
from diffloss_trt.objective import Terms
from diffloss_trt.sampling import TimestepSampler, uniform_range

_AT_ONCE = 8  # tiles
_MODES = {1: "L", 3: "RGB"}
_EIGHT_BITS = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
# From no push to the strongest: dark to light, so that it reads in grey too.
_COLOURS = ((0, 0, 0), (60, 15, 110), (165, 35, 95), (235, 95, 30), (250, 185, 50), (255, 255, 190))
# The map's scale ends here, so that a few pixels do not make the rest of it black.
_QUANTILE = 0.999
# In pixels of the picture; smaller images are enlarged.
_LEAST_SIDE = 384


@dataclass(frozen=True)
class Explanation:
    """How a loss sees a restored image.

    push: the mean gradient's size at each pixel, summed over the channels, float32 [H, W]: loss per unit of a pixel's
        value, with one tile as the image.
    rows: for each timestep that was drawn, the terms' means over the tiles.
    """

    push: Tensor
    rows: tuple[dict[str, float], ...]

    @property
    def terms(self) -> dict[str, float]:
        """The terms' means over all timesteps, by name."""
        return {name: math.fsum(row[name] for row in self.rows) / len(self.rows) for name in Terms._fields}


def explain(
    loss: DiffLoss,
    restored: Tensor,
    target: Tensor,
    *,
    tile: tuple[int, int],
    draws: int,
    seed: int = 0,
    on_stage: Callable[[str], None] = lambda _: None,
) -> Explanation:
    """Return the gradient of `loss` at a restored image, averaged over timesteps and noises.

    restored, target: [C, H, W] in the loss's value range, of any size. They are cut into tiles, [h, w], as a training
        cuts them into crops, in each draw at another place, so that no seams are left; an image that is smaller is
        widened by its borders, and one of that size is one tile.
    draws: timesteps, spread evenly over the schedule, each with noises of its own, all from `seed`.

    Raises InputError if draws is below 1 or `seed` is not in [0, 2**63), and as the loss does.
    """
    check_draws(draws, seed)
    height, width = restored.shape[1:]
    padding = (0, max(0, tile[1] - width), 0, max(0, tile[0] - height))
    images = torch.stack([restored, target]).to(loss.device)
    images = F.pad(images, padding, mode="replicate")
    generator = torch.Generator().manual_seed(seed)
    sampler = TimestepSampler(
        uniform_range(loss.schedule), low_discrepancy=True, generator=generator, device=loss.device
    )
    gradient, covered = torch.zeros_like(images[0]), torch.zeros_like(images[0, 0])
    rows = []
    for number, timestep in enumerate(sampler(draws).sort().values):
        on_stage(f"gradient at timestep {int(timestep)}, {number + 1} of {draws}")
        shifts = [int(torch.randint(size, (), generator=generator)) for size in tile]
        tops, lefts = (_starts(*sizes) for sizes in zip(images.shape[2:], tile, shifts, strict=True))
        places = [(slice(top, top + tile[0]), slice(left, left + tile[1])) for top in tops for left in lefts]
        sums = dict.fromkeys(Terms._fields, 0.0)
        for first in range(0, len(places), _AT_ONCE):
            chosen = places[first : first + _AT_ONCE]
            tiles = torch.stack([images[:, :, rows_, columns] for rows_, columns in chosen], dim=1)
            leaf = tiles[0].clone().requires_grad_()
            noise = torch.randn(leaf.shape, generator=generator).to(loss.device)
            terms = loss.terms(leaf, tiles[1], timesteps=timestep.expand(len(chosen)), noise=noise)
            (pushes,) = torch.autograd.grad(terms.total.sum(), leaf)
            for place, push in zip(chosen, pushes, strict=True):
                gradient[:, *place] += push
                covered[place] += 1
            for name in sums:
                sums[name] += getattr(terms, name).sum().item()
        rows.append({"timestep": int(timestep), **{name: value / len(places) for name, value in sums.items()}})
    push = (gradient / covered)[:, :height, :width].abs().sum(0)
    return Explanation(push.cpu(), tuple(rows))


def check_draws(draws: int, seed: int) -> None:
    """Raise InputError unless `explain` can take them."""
    if draws < 1:
        raise InputError(f"the number of draws is {draws}; expected at least 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; expected 0 to 2**63 - 1")


def _starts(size: int, tile: int, shift: int) -> list[int]:
    """Return where tiles that cover [0, size) begin; `shift` in [0, tile) moves those that touch neither end."""
    return sorted({min(max(start, 0), size - tile) for start in range(shift - tile, size, tile)})


def load_loss(
    bundle: Bundle | None, *, backend: str = "auto", device: torch.device, **weights: Any
) -> tuple[DiffLoss, tuple[int, int]]:
    """Return the loss of a bundle, or of the built-in prior on eager PyTorch, and the size of the images it is for.

    backend: what runs the bundle. weights: `naturalness_weight` and `semantic_weight`, which have the loss's defaults.
    Raises as `DiffLoss.load` does, and InputError if a backend is asked for and there is no bundle.
    """
    if bundle is not None:
        loss = DiffLoss.load(bundle.path, backend, device, **weights)
        loss.warned.add(BATCH)  # the last tiles are few for any bundle, and this advice is for trainings
        return loss, bundle.resolution
    if backend != "auto":
        raise InputError(f"backend {backend} needs a bundle (--bundle); the built-in prior runs on eager PyTorch alone")
    model = load_model(BUILTIN)
    side = model.unet.config.sample_size
    return DiffLoss.from_unet(model.unet.to(device), model.schedule, **weights), (side, side)


def read_images(restored: Path, target: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Return both images; raises as `read_image` does, and InputError if they are not of one size."""
    images = read_image(restored, channels), read_image(target, channels)
    sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in images]
    if sizes[0] != sizes[1]:
        raise InputError(f"{restored} has {sizes[0]} pixels and {target} {sizes[1]}; expected images of one size")
    return images


def check_output(path: Path, *read: Path, bundle: Bundle | None = None) -> None:
    """Raise InputError if no picture can be written to `path`, or if it is one of the files that are `read`."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise InputError(f"{path} does not end like a picture, such as .png")
    try:
        Image.new("RGB", (1, 1)).save(io.BytesIO(), kind)
    # Of formats that have no colours, or that others have to write.
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be written: {error}; expected a picture in colour, such as .png") from error
    check_place(path, bundle)
    for image in read:
        # By file and not by name: a link, or another spelling, would overwrite it just the same.
        if path.exists() and image.exists() and path.samefile(image):
            raise InputError(f"{path} is not written, because {image} is read from it")


def read_image(path: Path, channels: int) -> Tensor:
    """Return an image file as float32 [channels, H, W] in [0, 1]; transparency is left out.

    It is turned as its EXIF orientation says. Raises InputError if it cannot be read, is not an image of 8 bits a
    channel, or `channels` is neither 1 nor 3.
    """
    if channels not in _MODES:
        raise InputError(f"the loss takes images of {channels} channels, which no picture file has; expected 1 or 3")
    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BITS:
                raise InputError(f"{path} has pixels of kind {image.mode}; expected 8 bits a channel")
            pixels = ImageOps.exif_transpose(image).convert(_MODES[channels])
    except InputError:
        raise
    # The last three where Pillow meets damage inside a file.
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, struct.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise InputError(f"{path} cannot be read: {reason}") from error
    values = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
    return values.view(pixels.height, pixels.width, channels).permute(2, 0, 1).float() / 255


def to_json(explanation: Explanation) -> dict[str, Any]:
    """Return the terms, and the map's mean and largest push, as JSON values."""
    push = explanation.push
    return {
        "terms": explanation.terms,
        "timesteps": list(explanation.rows),
        "push": {"mean": float(push.mean()), "largest": float(push.max()), "scale_end": scale_end(explanation)},
    }


def draw(explanation: Explanation, restored: Tensor) -> Image.Image:
    """Return a picture: the restored image, [C, H, W] in [0, 1], the map over it in grey, and the map's scale."""
    scale = scale_end(explanation)
    # A map without any push is black, and its scale all zeros.
    level = (explanation.push / (scale or 1.0)).clamp(max=1)
    grey = restored.mean(0, keepdim=True)
    # Where little is pushed the image is seen, and where much is, the colour.
    cover = 0.3 + 0.65 * level.sqrt()
    overlay = (1 - cover) * 0.8 * grey + cover * _colours(level)
    height, width = (size * _zoom(level) for size in level.shape)
    text = max(12, height // 28)
    font = ImageFont.load_default(text)
    top, bar_left = 2 * text, 3 * text + 2 * width
    picture = Image.new("RGB", (bar_left + 9 * text, top + height + text), "white")
    pen = ImageDraw.Draw(picture)
    bar = _colours(torch.linspace(1, 0, 256)[:, None])
    for title, left, content, across in (
        ("restored", text, restored.expand(3, -1, -1), width),
        ("where the loss pushes", 2 * text + width, overlay, width),
        ("|d loss / d pixel|", bar_left, bar, text),
    ):
        pen.text((left, text), title, "black", font, anchor="lm")
        pixels = (content.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        panel = Image.fromarray(pixels).resize((across, height), Image.Resampling.NEAREST)
        picture.paste(panel, (left, top))
    for place, value, anchor in ((0.0, scale, "lt"), (0.5, scale / 2, "lm"), (1.0, 0.0, "ls")):
        where = (bar_left + 1.5 * text, top + place * (height - 1))
        pen.text(where, f"{value:.2g}", "black", font, anchor=anchor)
    return picture


def scale_end(explanation: Explanation) -> float:
    """Return the push that the map's scale ends at; a few pixels may have more."""
    push = explanation.push.flatten()
    return float(push.kthvalue(math.ceil(_QUANTILE * len(push))).values)


def _zoom(level: Tensor) -> int:
    """Return how many times as large a small map is drawn."""
    return math.ceil(_LEAST_SIDE / max(level.shape))


def _colours(level: Tensor) -> Tensor:
    """Return the colours, [3, H, W] in [0, 1], of levels [H, W] in [0, 1], between those of the table."""
    table = torch.tensor(_COLOURS) / 255
    place = level * (len(table) - 1)
    below = place.floor().long().clamp(max=len(table) - 2)
    part = (place - below)[..., None]
    return ((1 - part) * table[below] + part * table[below + 1]).permute(2, 0, 1)
