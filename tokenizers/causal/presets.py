"""Configurations with a name: the full-size ladder, and small ones for a machine without a GPU.

The paper (arXiv 2501.05442) does not print its widths; the full size is Open-MAGVIT2's video network (arXiv 2409.04410), its nearest
open relative: 128 channels, multipliers 1 2 2 4, four residual blocks a level. The small ones differ in these numbers only.
"""

from kinetok.tokenizers.causal.autoencoder import CausalConfig
from kinetok.tokenizers.causal.grown import GrownConfig

FULL_4X = CausalConfig()
"""4x8x8, 16 channels, for 17 x 256 x 256 clips."""
FULL_GROWN = GrownConfig()
"""One doubling, 8x or 16x, on `FULL_4X`."""

SMALL_4X = CausalConfig(channels=16, mult=(1, 2, 4), strides=((2, 1), (2, 2)), blocks=1, patch=4, groups=8)
"""4x8x8 for 17 x 64 x 64 clips in minutes on two cores."""
SMALL_GROWN = GrownConfig(blocks=1, groups=8)
"""One doubling on `SMALL_4X`."""
