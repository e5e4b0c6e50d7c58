"""`Released`: the released Divot tokenizer and de-tokenizer as one `DivotTokenizer`, ready to encode, decode and be trained on.

The files are `Divot_tokenizer.bin` and `Divot_detokenizer_stage1.bin` (or `_stage2.bin`) of TencentARC/Divot; the vision transformer,
which they do not hold, is OpenCLIP's as transformers reads it. Their authors publish them for academic use.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path

from kinetok.tokenizers.base import import_transformers
from kinetok.tokenizers.divot.checkpoints import LoadReport, load_detokenizer, load_tokenizer, read_state
from kinetok.tokenizers.divot.frame_vae import FrameVAE
from kinetok.tokenizers.divot.presets import FULL
from kinetok.tokenizers.divot.tokenizer import DivotConfig, DivotTokenizer
from kinetok.tokenizers.divot.vit import FrozenViT


@dataclass(frozen=True)
class Released:
    """The model in eval mode, and how each file fitted it."""

    model: DivotTokenizer
    tokenizer: LoadReport
    detokenizer: LoadReport


def open_released(
    tokenizer: str | Path,
    detokenizer: str | Path,
    config: DivotConfig = FULL,
    autoencoder: FrameVAE | None = None,
    ignored: tuple[str, ...] = (),
) -> Released:
    """The files as a model; ValueError where one holds other tensors than the model.

    `autoencoder` takes the weights in the de-tokenizer's file; left out, it has the sizes of Stable Diffusion's, with as many latent
    channels as `config.detokenizer.unet` says. Tensors whose names begin with one of `ignored` are left aside.
    """
    lower = autoencoder or frame_autoencoder(z=config.detokenizer.unet.z)
    model = DivotTokenizer(config, FrozenViT.load(config.vit), lower)
    assert isinstance(model.lower, FrameVAE)
    read = load_tokenizer(model.encoder, read_state(tokenizer), ignored)
    made = load_detokenizer(model.detokenizer, model.lower, read_state(detokenizer), ignored)
    return Released(model.eval(), read, made)


def frame_autoencoder(channels: int = 128, mult: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 2, z: int = 4) -> FrameVAE:
    """An untrained autoencoder of Stable Diffusion's design with `z` latent channels; the defaults are its numbers."""
    import_transformers()
    source = importlib.import_module("diffusers").AutoencoderKL
    return FrameVAE(
        source(
            down_block_types=("DownEncoderBlock2D",) * len(mult),
            up_block_types=("UpDecoderBlock2D",) * len(mult),
            block_out_channels=tuple(channels * factor for factor in mult),
            layers_per_block=blocks,
            latent_channels=z,
        )
    ).eval()
