"""Is the built-in prior a denoiser? One-step denoising of held-out photographs, against two classical methods.

    python examples/evaluate_prior.py --out FOLDER

For t = 50, 100, 200 the photograph x is noised to x_t = sqrt(abar) x + sqrt(1 - abar) n; the prior predicts the noise
on overlapping 64x64 tiles and so the clean photograph. Non-local means and wavelet thresholding (scikit-image) get the
same pixels, x_t / sqrt(abar), and the true sigma; each has the best of several settings for the photograph.

Writes a table, pictures of the results and samples drawn from the prior. The exit status is 1 unless the prior has the
highest PSNR everywhere.
"""

from __future__ import annotations

import math
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from rich.progress import track
from skimage.metrics import peak_signal_noise_ratio
from skimage.restoration import denoise_nl_means, denoise_wavelet
from torch import Tensor

from arguments import OneLineParser, output_folder
from diffloss_export.models import load_model
from diffloss_trt import NoiseSchedule
from photographs import HELD_OUT, load
from results import labelled_grid, markdown_table, to_picture, write_json, write_picture, write_whole

TIMESTEPS = (50, 100, 200)
CROP = 256  # side of the centre crop that is denoised, in pixels
TILE, STRIDE = 64, 16
SAMPLES, SAMPLING_STEPS = 36, 100


def tile_window() -> Tensor:
    """Weights of a tile's pixels, [TILE, TILE]: falling towards the borders, never zero."""
    place = (torch.arange(TILE) + 0.5) / TILE
    ramp = torch.sin(math.pi * place) ** 2 + 1e-3
    return ramp[:, None] * ramp[None, :]


@torch.no_grad()
def predict_noise(unet: UNet2DModel, noisy: Tensor, timestep: int) -> Tensor:
    """Predict the noise in `noisy` [3, CROP, CROP] from overlapping tiles."""
    starts = range(0, CROP - TILE + 1, STRIDE)
    places = [(top, left) for top in starts for left in starts]
    total, weight, window = torch.zeros_like(noisy), torch.zeros(CROP, CROP), tile_window()
    for first in range(0, len(places), 16):
        chosen = places[first : first + 16]
        tiles = torch.stack([noisy[:, top : top + TILE, left : left + TILE] for top, left in chosen])
        predicted = unet(tiles, timestep).sample
        for (top, left), tile in zip(chosen, predicted, strict=True):
            total[:, top : top + TILE, left : left + TILE] += tile * window
            weight[top : top + TILE, left : left + TILE] += window
    return total / weight


def non_local_means(noisy: np.ndarray, sigma: float) -> list[np.ndarray]:
    """Denoise [H, W, 3] with several filter strengths and patch sizes."""
    return [
        denoise_nl_means(
            noisy, patch_size=patch, patch_distance=9, h=strength * sigma, sigma=sigma, fast_mode=fast, channel_axis=-1
        )
        for fast, strength, patch in ((True, 0.8, 5), (True, 0.6, 5), (True, 0.6, 7), (True, 0.4, 7))
    ]


def wavelet(noisy: np.ndarray, sigma: float) -> list[np.ndarray]:
    """Denoise [H, W, 3] with both thresholds of scikit-image, on RGB and on YCbCr."""
    return [
        denoise_wavelet(noisy, sigma=scale * sigma, method=method, mode="soft", convert2ycbcr=ycbcr, channel_axis=-1)
        for method, scale in (("BayesShrink", 1.0), ("VisuShrink", 1.0), ("VisuShrink", 0.5), ("VisuShrink", 0.25))
        for ycbcr in (False, True)
    ]


def best(clean: Tensor, candidates: list[np.ndarray]) -> tuple[float, Tensor]:
    """Return the highest PSNR in dB, and the image [3, H, W] that has it."""
    images = [torch.from_numpy(np.clip(image, 0, 1)).permute(2, 0, 1).float() for image in candidates]
    scores = [float(peak_signal_noise_ratio(clean.numpy(), image.numpy(), data_range=1)) for image in images]
    place = int(np.argmax(scores))
    return scores[place], images[place]


@torch.no_grad()
def draw_samples(unet: UNet2DModel, schedule: NoiseSchedule) -> Tensor:
    """Draw SAMPLES images [SAMPLES, 3, 64, 64] in [0, 1] by DDIM, stochastic (eta 1)."""
    sampler = DDIMScheduler(len(schedule), trained_betas=betas(schedule), clip_sample=True)
    sampler.set_timesteps(SAMPLING_STEPS)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(SAMPLES, 3, TILE, TILE, generator=generator)
    for timestep in track(sampler.timesteps, description="sampling"):
        image = sampler.step(
            unet(image, timestep).sample, int(timestep), image, eta=1.0, generator=generator
        ).prev_sample
    return (image.clamp(-1, 1) + 1) / 2


def betas(schedule: NoiseSchedule) -> list[float]:
    """Return the betas [T] of a schedule."""
    table = schedule.alphas_cumprod
    previous = torch.cat([torch.ones(1, dtype=table.dtype), table[:-1]])
    betas: list[float] = (1 - table / previous).tolist()
    return betas


def provenance() -> dict[str, str]:
    """Return where and when the figures were measured."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "scikit-image": metadata.version("scikit-image"),
    }


def main() -> int:
    parser = OneLineParser(description="One-step denoising with a prior, compared with classical denoisers.")
    parser.add_argument("--out", type=output_folder, required=True, help="folder for table and pictures")
    parser.add_argument("--prior", default="builtin", help="a MODEL as diffloss-export takes it (default: builtin)")
    args = parser.parse_args()
    model = load_model(args.prior)
    out: Path = args.out
    out.mkdir(exist_ok=True)

    methods = ("noisy", "wavelet", "non-local means", "prior")
    rows: list[dict[str, str | int | float]] = []
    pictures: list[list[Tensor]] = []
    captions: list[list[str]] = []
    generator = torch.Generator().manual_seed(0)
    cases = [(name, timestep) for name in HELD_OUT for timestep in TIMESTEPS]
    for name, timestep in track(cases, description="denoising"):
        photograph = load(name)
        top, left = (photograph.shape[1] - CROP) // 2, (photograph.shape[2] - CROP) // 2
        clean = photograph[:, top : top + CROP, left : left + CROP]
        abar = float(model.schedule.alphas_cumprod[timestep])
        noise = torch.randn(clean.shape, generator=generator)
        noisy = math.sqrt(abar) * (2 * clean - 1) + math.sqrt(1 - abar) * noise
        predicted = predict_noise(model.unet, noisy, timestep)
        restored = ((noisy - math.sqrt(1 - abar) * predicted) / math.sqrt(abar) + 1) / 2
        sigma = math.sqrt((1 - abar) / abar) / 2
        observed = ((noisy / math.sqrt(abar) + 1) / 2).permute(1, 2, 0).numpy().astype(np.float64)
        found = {
            "noisy": best(clean, [observed]),
            "wavelet": best(clean, wavelet(observed, sigma)),
            "non-local means": best(clean, non_local_means(observed, sigma)),
            "prior": best(clean, [restored.permute(1, 2, 0).numpy()]),
        }
        rows.append({"photograph": name, "t": timestep, "sigma": sigma, **{m: found[m][0] for m in methods}})
        pictures.append([clean, *(found[method][1] for method in methods)])
        captions.append([f"{name}, t = {timestep}", *(f"{found[method][0]:.2f} dB" for method in methods)])

    cells = [
        [
            f"{row['photograph']}, t = {row['t']}, sigma {row['sigma']:.3f}",
            *(f"{row[method]:.2f}" for method in methods),
        ]
        for row in rows
    ]
    table = markdown_table(["PSNR in dB", *methods], cells)
    print(table)
    write_whole(table.encode(), out / "denoising.md")
    write_json({**provenance(), "rows": rows}, out / "denoising.json")
    write_picture(labelled_grid(pictures, ["ground truth", *methods], captions), out / "denoising.png")
    samples = draw_samples(model.unet, model.schedule)
    side = math.isqrt(SAMPLES)
    tiled = samples.view(side, side, 3, TILE, TILE).permute(2, 0, 3, 1, 4).reshape(3, side * TILE, side * TILE)
    write_picture(to_picture(tiled), out / "samples.png")
    lost = [row for row in rows if float(row["prior"]) <= max(float(row["wavelet"]), float(row["non-local means"]))]
    for row in lost:
        print(f"the prior is not the best on {row['photograph']} at t = {row['t']}", file=sys.stderr)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
