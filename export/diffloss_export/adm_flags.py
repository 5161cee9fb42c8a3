"""guided-diffusion's flags: what they say of a network, and of the noise schedule it was trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffloss_engine.errors import InputError
from diffloss_trt.schedule import NoiseSchedule

# What channel_mult is where it is left empty, by image_size.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}
# Far beyond any network that has been trained: a slip is to be an error, and not an endless search.
_MOST = {"image_size": 4096, "num_channels": 4096, "num_res_blocks": 32, "diffusion_steps": 100_000}
_MOST_CHANNEL_MULT = 1024
# Of training, of sampling or of how arithmetic is done: they say nothing of the trained network.
_WITHOUT_EFFECT = ("dropout", "use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas")


@dataclass(frozen=True)
class AdmFlags:
    """The flags of guided-diffusion's scripts that say what a network is and what it was trained on.

    Names, meanings and defaults are those of its `model_and_diffusion_defaults()`. `channel_mult` and
    `attention_resolutions` are numbers here; an empty `channel_mult` has been replaced by what it stands for.
    """

    image_size: int = 64
    num_channels: int = 128
    num_res_blocks: int = 2
    num_heads: int = 4
    num_heads_upsample: int = -1
    num_head_channels: int = -1
    attention_resolutions: tuple[int, ...] = (16, 8)
    channel_mult: tuple[float, ...] = ()
    resblock_updown: bool = False
    use_scale_shift_norm: bool = True
    learn_sigma: bool = False
    class_cond: bool = False
    use_new_attention_order: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    timestep_respacing: str = ""
    predict_xstart: bool = False
    rescale_timesteps: bool = False

    @classmethod
    def from_json(cls, flags: Mapping[str, Any]) -> AdmFlags:
        """Read an object with flags by name, as guided-diffusion's scripts take them; those left out are defaults.

        Raises InputError for an unknown flag, or a value that cannot be meant.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(flags.keys() - fields.keys() - set(_WITHOUT_EFFECT))
        if unknown:
            raise InputError(
                f"{unknown[0]!r} is not a flag of guided-diffusion's networks; those are {', '.join(fields)}"
            )
        given = {name: _parsed(name, flags[name], field.default) for name, field in fields.items() if name in flags}
        return cls(**given).checked()

    def checked(self) -> AdmFlags:
        """Return these flags with every default filled in. Raises InputError if no network can have them."""
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 to {most}")
        for name in ("num_heads", "num_heads_upsample", "num_head_channels"):
            if getattr(self, name) < 1 and (getattr(self, name) != -1 or name == "num_heads"):
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.noise_schedule not in ("linear", "cosine"):
            raise InputError(f"noise_schedule is {self.noise_schedule!r}, expected 'linear' or 'cosine'")
        multipliers = self.channel_mult or CHANNEL_MULT.get(self.image_size, ())
        if not multipliers:
            raise InputError(
                f"channel_mult is not given, and has no default for image_size {self.image_size}, only for "
                f"{', '.join(map(str, sorted(CHANNEL_MULT)))}"
            )
        if max(multipliers) > _MOST_CHANNEL_MULT:
            raise InputError(f"channel_mult is {multipliers}, expected numbers up to {_MOST_CHANNEL_MULT}")
        flags = dataclasses.replace(self, channel_mult=multipliers)
        if any(channels < 32 or channels % 32 for channels in flags.channels):
            raise InputError(
                f"num_channels {self.num_channels} times channel_mult {multipliers} gives {flags.channels}; "
                "expected multiples of 32, which is the number of groups of every norm"
            )
        halvings = len(multipliers) - 1
        if self.image_size % 2**halvings:
            raise InputError(
                f"image_size {self.image_size} cannot be halved {halvings} times, as channel_mult asks for"
            )
        flags.heads(flags.channels[-1], upsampling=False)
        for level in flags.attention_levels:
            for upsampling in (False, True):
                flags.heads(flags.channels[level], upsampling=upsampling)
        return flags

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(multiplier * self.num_channels) for multiplier in self.channel_mult)

    @property
    def attention_levels(self) -> set[int]:
        """The levels that have attention; the middle block always has."""
        halvings = {self.image_size // resolution for resolution in self.attention_resolutions}
        return {level for level in range(len(self.channel_mult)) if 2**level in halvings}

    def heads(self, channels: int, *, upsampling: bool) -> int:
        """Return the number of heads of an attention of so many channels; InputError if they cannot be shared out."""
        if self.num_head_channels != -1:
            name, heads, rest = "num_head_channels", *divmod(channels, self.num_head_channels)
        else:
            name = "num_heads_upsample" if upsampling and self.num_heads_upsample != -1 else "num_heads"
            heads = getattr(self, name)
            rest = channels % heads
        if rest:
            raise InputError(
                f"{name} is {getattr(self, name)}, which does not divide the {channels} channels of an attention"
            )
        return heads


# The paper's prior: https://github.com/openai/guided-diffusion, 256x256_diffusion_uncond.pt, which is sampled from with
# these flags.
PAPER_FLAGS = AdmFlags(
    image_size=256,
    num_channels=256,
    num_head_channels=64,
    attention_resolutions=(32, 16, 8),
    channel_mult=CHANNEL_MULT[256],
    resblock_updown=True,
    learn_sigma=True,
)


def noise_schedule(flags: AdmFlags) -> NoiseSchedule:
    """Return the schedule that a network was trained with; a respaced one has the kept steps alone."""
    steps = flags.diffusion_steps
    if flags.noise_schedule == "linear":
        # The range is that of 1000 steps, whatever their number (Ho et al., 2020).
        betas = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
        if betas[-1] > 1:
            raise InputError(f"diffusion_steps is {steps}: the linear schedule needs at least 20")
    else:
        # Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, equation 17.
        remaining = torch.cos((torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - remaining[1:] / remaining[:-1]).clamp(max=0.999)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    kept = torch.tensor(kept_steps(steps, flags.timestep_respacing))
    # A respaced process has the same marginals at the steps that it keeps.
    told = kept * (1000.0 / steps) if flags.rescale_timesteps else kept.double()
    index = torch.arange(len(kept), dtype=torch.float64)
    return NoiseSchedule(
        alphas_cumprod[kept],
        "sample" if flags.predict_xstart else "epsilon",
        None if torch.equal(told, index) else told,
    )


def kept_steps(steps: int, respacing: str) -> list[int]:
    """Return which of `steps` timesteps a `timestep_respacing` keeps, rising.

    respacing: "" (all); "N,M,..." (so many of each of as many equal sections, spread evenly, both ends included); or
    "ddimN" (N in all, at the first stride that gives as many). Raises InputError for one that cannot be had.
    """
    if not respacing:
        return list(range(steps))
    wanted = f"timestep_respacing is {respacing!r}; expected '', counts such as '250' or '10,15,20', or 'ddim50'"
    if respacing.startswith("ddim"):
        count = _whole(respacing.removeprefix("ddim"), wanted)
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise InputError(f"{wanted}; no whole stride takes {count} of {steps} steps")
    counts = [_whole(part, wanted) for part in respacing.split(",")]
    kept, start = [], 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise InputError(f"{wanted}; section {section + 1} has {size} of the {steps} steps, fewer than {count}")
        gap = (size - 1) / (count - 1) if count > 1 else 1.0
        place = 0.0
        for _ in range(count):
            kept.append(start + round(place))
            # Added up, not multiplied: where halves are rounded, it decides.
            place += gap
        start += size
    return kept


def _parsed(name: str, value: Any, default: Any) -> Any:
    """Return a flag's value as the dataclass has it; scripts take text, JSON has types of its own."""
    readers: dict[type, Callable[[Any], Any]] = {bool: _switch, int: _integer, str: _text, tuple: _numbers}
    try:
        read = readers[type(default)](value)
    except (ValueError, OverflowError):  # the latter of an integer that no float holds
        read = None
    if read is None:
        expected = {bool: "true or false", int: "a whole number", str: "a text", tuple: "numbers such as '32,16,8'"}
        raise InputError(f"{name} is {value!r}, expected {expected[type(default)]}")
    if name == "attention_resolutions":
        if any(number < 1 or number % 1 for number in read):
            raise InputError(f"{name} is {value!r}, expected whole numbers of at least 1")
        return tuple(int(number) for number in read)
    return read


def _switch(value: Any) -> bool | None:
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    return words.get(value.lower()) if isinstance(value, str) else (value if isinstance(value, bool) else None)


def _integer(value: Any) -> int | None:
    if isinstance(value, str):
        return int(value)
    return value if type(value) is int else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else (str(value) if type(value) is int else None)


def _numbers(value: Any) -> tuple[float, ...] | None:
    if isinstance(value, str):
        value = value.split(",") if value else []
    if not isinstance(value, list) or not all(type(part) in (int, float, str) for part in value):
        return None
    numbers = tuple(float(part) for part in value)
    return numbers if all(math.isfinite(number) and number > 0 for number in numbers) else None


def _whole(text: str, wanted: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(wanted)
    return number
