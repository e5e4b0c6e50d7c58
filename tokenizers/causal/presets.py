"""Configurations with a name: the full-size ladder, a small one for a machine without a GPU, and direct models to compare with.

The paper (arXiv 2501.05442) does not print its widths; the full size is Open-MAGVIT2's video network (arXiv 2409.04410), its nearest
open relative: 128 channels, multipliers 1 2 2 4, four residual blocks a level. All are fully convolutional, so one model serves
256 x 256 and 512 x 512 pixels, and by chunks of 17 frames (`chunks`) any length, 340 frames included. The small ones differ in these
numbers only.
"""

from kinetok.tokenizers.causal.autoencoder import CausalConfig
from kinetok.tokenizers.causal.grown import GrownConfig

FULL_4X = CausalConfig()
"""4x8x8 with 16 latent channels."""
FULL_GROWN = GrownConfig()
"""One doubling, to 8x or to 16x, on `FULL_4X`."""

SMALL_4X = CausalConfig(channels=16, mult=(1, 2, 4), strides=((2, 1), (2, 2)), blocks=1, patch=4, groups=8)
"""4x8x8 for 17 x 64 x 64 clips in minutes on two cores."""
SMALL_GROWN = GrownConfig(blocks=1, groups=8)
"""One doubling on `SMALL_4X`."""


def direct(config: CausalConfig, times: int) -> CausalConfig:
    """`config` with `times` (2, 4, ...) its temporal compression, to be trained end to end: what growing is compared with.

    Each doubling appends a level of the trunk's width behind a temporal stride, which is where a grown rung has its new layers.
    """
    if times < 2 or times & (times - 1):
        raise ValueError(f"times: temporal strides double, so it must be 2, 4, 8 ..., got {times}")
    levels = times.bit_length() - 1
    changes = {"mult": config.mult + config.mult[-1:] * levels, "strides": config.strides + ((2, 1),) * levels}
    return config.model_copy(update=changes)
