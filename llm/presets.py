"""Sizes of the diffusion transformer with a name.

arXiv 2501.05442 names no size for its generator. The two full sizes are our choice: the widths and depths of two open text-to-video
transformers, Wan 2.1 1.3B (arXiv 2503.20314) and Wan 2.2 5B, with patches of 1 x 2 x 2 and embeddings of a T5-XXL's width.
"""

from typing import Final, Literal, get_args

from kinetok.llm.dit import DiTConfig

SizeName = Literal["small", "1b", "5b"]
SIZES: Final[tuple[SizeName, ...]] = get_args(SizeName)
SMALL_TEXT, FULL_TEXT = 64, 4096
"""Width of the untrained text encoder, and of T5-XXL."""


def dit(size: SizeName, *, z: int, chunk: int) -> DiTConfig:
    """The transformer of that size for latents of `z` channels, `chunk` steps to a chunk of 17 frames."""
    match size:
        case "small":
            return DiTConfig(z=z, chunk=chunk, width=128, depth=2, heads=2, text_width=SMALL_TEXT)
        case "1b":
            return DiTConfig(z=z, chunk=chunk, width=1536, depth=30, heads=12, mlp_ratio=8960 / 1536, patch=(1, 2), text_width=FULL_TEXT)
        case "5b":
            return DiTConfig(z=z, chunk=chunk, width=3072, depth=30, heads=24, mlp_ratio=14336 / 3072, patch=(1, 2), text_width=FULL_TEXT)
