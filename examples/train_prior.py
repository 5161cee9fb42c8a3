"""Train the built-in prior: a small unconditional DDPM on 64x64 crops of photographs.

    python examples/train_prior.py --out FOLDER [--steps 5500]

Epsilon prediction on the linear 1000-step schedule, Adam, an exponential moving average of the
weights, bf16 autocast. Writes `FOLDER/checkpoint.pt` every few hundred steps (a run that is started again continues
from there) and, at the end, the averaged weights as a diffusers pipeline folder in fp16.
"""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from photographs import TRAINING, RandomCrops

RESOLUTION = 64
EMA_DECAY = 0.9995


def new_unet() -> UNet2DModel:
    """Return the prior's architecture with fresh weights: 2.1 M parameters, 64x64."""
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 48, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=16,
    )


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm up over 200 steps, stay, and fall to zero over the last third."""
    return peak * min(1.0, (step + 1) / 200, 3 * (steps - step) / steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-every", type=int, default=250)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    unet = new_unet()
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.Adam(unet.parameters(), lr=args.learning_rate)
    generator = torch.Generator().manual_seed(args.seed)
    crops = RandomCrops(list(TRAINING), RESOLUTION, args.seed)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        crops.generator.set_state(state["crops"])
        start = state["step"]

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    running = 1.0
    with Progress(*columns) as progress:
        task = progress.add_task("training the prior", total=args.steps, completed=start)
        for step in range(start, args.steps):
            clean = crops.batch(args.batch_size) * 2 - 1
            noise = torch.randn(clean.shape, generator=generator)
            # One timestep from each of `batch_size` equal slices: the same uniform law, less variance.
            slices = torch.arange(args.batch_size) + torch.rand(args.batch_size, generator=generator)
            timesteps = (slices * (1000 / args.batch_size)).long().clamp(max=999)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, args.steps, args.learning_rate)
            with torch.autocast("cpu", torch.bfloat16):
                predicted = unet(noisy, timesteps).sample
            loss = F.mse_loss(predicted.float(), noise)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            with torch.no_grad():
                for kept, new in zip(average.parameters(), unet.parameters(), strict=True):
                    kept.lerp_(new, 1 - decay)
            running = 0.99 * running + 0.01 * loss.item()
            progress.update(task, completed=step + 1, description=f"training the prior, loss {running:.4f}")
            if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
                partial = checkpoint.with_suffix(".partial")
                torch.save(
                    {
                        "unet": unet.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "generator": generator.get_state(),
                        "crops": crops.generator.get_state(),
                        "step": step + 1,
                    },
                    partial,
                )
                os.replace(partial, checkpoint)
                print(f"step {step + 1}: loss {running:.4f}", flush=True)
    DDPMPipeline(unet=average.half(), scheduler=scheduler).save_pretrained(args.out / "prior")


if __name__ == "__main__":
    main()
