"""A Divot tokenizer small enough to be made in every test."""

from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.detokenizer import DetokenizerConfig
from kinetok.tokenizers.divot.encoder import EncoderConfig
from kinetok.tokenizers.divot.perceiver import PerceiverConfig
from kinetok.tokenizers.divot.tokenizer import DivotConfig
from kinetok.tokenizers.divot.unet import UNetConfig
from kinetok.tokenizers.divot.vit import VitConfig

UNET = UNetConfig(channels=16, mult=(1, 2), blocks=1, attention=(1,), head_width=8, groups=4, context=16, split=None, dropout=0.0)


def tiny_divot(*, frames: int = 5, z: int = 4, tokens: int = 4, width: int = 8) -> DivotConfig:
    """`frames` frames of 16 x 16 pixels to `tokens` tokens of `width` numbers, over latents of `z` channels."""
    perceiver = PerceiverConfig(queries=tokens, depth=1, heads=2, head_width=8)
    return DivotConfig(
        frames=frames,
        edge=16,
        vit=VitConfig(edge=16, patch=4, width=16, depth=1, heads=2),
        encoder=EncoderConfig(
            frames=3,
            temporal_width=16,
            temporal_depth=1,
            temporal_heads=2,
            pool=2,
            width=16,
            depth=1,
            heads=2,
            perceiver=perceiver,
            token_width=width,
        ),
        detokenizer=DetokenizerConfig(perceiver=perceiver, unet=UNET.model_copy(update={"z": z})),
        sampler=SamplerConfig(steps=2, spacing="trailing", guidance=2.0),
    )
