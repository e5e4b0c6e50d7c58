"""Configurations of Divot with a name, from the published one down to one for a machine without a GPU; they differ in numbers only.

`FULL` is the published model (arXiv 2412.04432) on Stable Diffusion's autoencoder and OpenCLIP's ViT-H/14: 1.69 billion trained
weights. `MIDDLE` has 278 million for 128 x 128 pixels on the same autoencoder. `SMALL` has 3.2 million, for 9 frames of 64 x 64 pixels
on `SMALL_4X`, the base rung of the small ladder, where three latent steps stand for a clip.
"""

from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.detokenizer import DetokenizerConfig
from kinetok.tokenizers.divot.encoder import EncoderConfig
from kinetok.tokenizers.divot.perceiver import PerceiverConfig
from kinetok.tokenizers.divot.tokenizer import DivotConfig
from kinetok.tokenizers.divot.unet import UNetConfig
from kinetok.tokenizers.divot.vit import VitConfig

VIT_H = VitConfig(path="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
"""OpenCLIP's ViT-H/14 on LAION-2B, as transformers reads it."""

FULL = DivotConfig(vit=VIT_H)

MIDDLE = DivotConfig(
    edge=128,
    vit=VitConfig(width=768, depth=12, heads=12, patch=16),
    encoder=EncoderConfig(temporal_width=384, temporal_depth=4, width=512, perceiver=PerceiverConfig(queries=64, depth=4, heads=8)),
    detokenizer=DetokenizerConfig(
        perceiver=PerceiverConfig(queries=125, depth=4, heads=8), unet=UNetConfig(channels=128, context=512, split=None)
    ),
)

SMALL = DivotConfig(
    frames=9,
    edge=64,
    vit=VitConfig(edge=64, patch=8, width=96, depth=2, heads=4),
    encoder=EncoderConfig(
        temporal_width=96,
        temporal_depth=1,
        temporal_heads=4,
        pool=4,
        width=128,
        depth=2,
        heads=4,
        perceiver=PerceiverConfig(queries=16, depth=2, heads=4, head_width=32),
        token_width=32,
    ),
    detokenizer=DetokenizerConfig(
        perceiver=PerceiverConfig(queries=24, depth=1, heads=4, head_width=32),
        unet=UNetConfig(
            z=16, channels=32, mult=(1, 2), blocks=1, attention=(0, 1), head_width=16, groups=8, context=64, split=None, dropout=0.0
        ),
    ),
    sampler=SamplerConfig(steps=1, eta=0.0, spacing="trailing", guidance=1.0),
)
