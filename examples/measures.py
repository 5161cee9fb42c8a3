"""How good a restored photograph is, by measures that need no trained network.

None of these is a human eye. PSNR and SSIM reward an image that is smoother than the truth; GMSD compares edges and was
fitted to opinions on distortions such as blur, noise and JPEG; detail counts noise as detail.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

# ITU-R BT.601, as both papers' authors take luminance.
_LUMINANCE = (0.299, 0.587, 0.114)
# Xue et al. give 170 for pixels from 0 to 255; it stands beside squares of gradients.
_GMSD_CONSTANT = 170 / 255**2


def quality(restored: Tensor, target: Tensor) -> dict[str, float]:
    """Return every measure of an image, float32 [3, H, W] in [0, 1] (restored is clamped), by name."""
    restored = restored.clamp(0, 1)
    psnr, ssim = fidelity(restored, target)
    return {"psnr": psnr, "ssim": ssim, "gmsd": gmsd(restored, target), "detail": detail(restored, target)}


def fidelity(restored: Tensor, target: Tensor) -> tuple[float, float]:
    """Return PSNR in dB and SSIM of an image [3, H, W], clamped to [0, 1]."""
    a, b = restored.clamp(0, 1).numpy(), target.numpy()
    psnr = peak_signal_noise_ratio(b, a, data_range=1)
    return float(psnr), float(structural_similarity(b, a, channel_axis=0, data_range=1))


def gmsd(restored: Tensor, target: Tensor) -> float:
    """Return the gradient magnitude similarity deviation of images [3, H, W] in [0, 1]; 0 if equal, larger is worse.

    Xue, Zhang, Mou & Bovik, IEEE Transactions on Image Processing 23(2), 2014: Prewitt gradients of luminance, halved
    in size, and the standard deviation of their similarity over the image.
    """
    images = F.avg_pool2d(_luminance(torch.stack([restored, target])), 2)
    across = torch.tensor([[1.0, 0.0, -1.0]] * 3, dtype=images.dtype) / 3
    kernels = torch.stack([across, across.T])[:, None]
    squares = F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernels).square().sum(1)
    of_restored, of_target = squares
    similarity = (2 * (of_restored * of_target).sqrt() + _GMSD_CONSTANT) / (of_restored + of_target + _GMSD_CONSTANT)
    return float(similarity.std(correction=0))


def detail(restored: Tensor, target: Tensor) -> float:
    """Return how much power there is in the finer half of the frequencies, in dB relative to the target's.

    Of images [3, H, W]: their luminance, under a Hann window, beyond a quarter of a cycle per pixel. Less than 0:
    smoother than the truth; more: noisier, or sharpened.
    """
    images = _luminance(torch.stack([restored, target]))[:, 0].double()
    height, width = images.shape[1:]
    window = torch.outer(*(torch.hann_window(side, periodic=False, dtype=images.dtype) for side in (height, width)))
    mean = images.mean((1, 2), keepdim=True)
    spectrum = torch.fft.fft2((images - mean) * window).abs().square()
    frequency = torch.hypot(*torch.meshgrid(*(torch.fft.fftfreq(side) for side in (height, width)), indexing="ij"))
    of_restored, of_target = spectrum[:, frequency > 0.25].sum(1).tolist()
    return 10 * math.log10(of_restored / of_target)


def _luminance(images: Tensor) -> Tensor:
    """Map [B, 3, H, W] to [B, 1, H, W]."""
    return (images * images.new_tensor(_LUMINANCE).view(3, 1, 1)).sum(1, keepdim=True)
