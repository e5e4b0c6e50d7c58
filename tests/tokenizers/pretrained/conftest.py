"""diffusers' autoencoders with random weights of a few thousand numbers, and the adapters that load them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor

from kinetok.tokenizers.catalog import load
from kinetok.tokenizers.pretrained.base import Pretrained

MakeVideo: TypeAlias = Callable[..., Tensor]
MakeModel: TypeAlias = Callable[..., Any]
Adapt: TypeAlias = Callable[..., Any]

WAN = {"base_dim": 4, "z_dim": 16, "dim_mult": [1] * 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
WAN22 = WAN | {
    "z_dim": 4,
    "decoder_base_dim": 8,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
    "latents_mean": [0.1] * 4,
    "latents_std": [2.0] * 4,
}
COSMOS = {
    "latent_channels": 4,
    "encoder_block_out_channels": (8,) * 4,
    "decode_block_out_channels": (8,) * 4,
    "attention_resolutions": (8,),
    "resolution": 64,
    "num_layers": 1,
}
COGVIDEOX = {
    "block_out_channels": (8,) * 4,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 64,
    "sample_width": 64,
}
LTX = {
    "latent_channels": 8,
    "block_out_channels": (8,) * 4,
    "decoder_block_out_channels": (8,) * 4,
    "layers_per_block": (1,) * 5,
    "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "patch_size": 1,
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("AutoencoderKLWan", WAN),
    "wan2.2": ("AutoencoderKLWan", WAN22),
    "cosmos-4": ("AutoencoderKLCosmos", COSMOS | {"temporal_compression_ratio": 4}),
    "cosmos-8": ("AutoencoderKLCosmos", COSMOS | {"temporal_compression_ratio": 8}),
    "cogvideox": ("AutoencoderKLCogVideoX", COGVIDEOX),
    "ltx": ("AutoencoderKLLTXVideo", LTX),
    "ltx-0.9.1": ("AutoencoderKLLTXVideo", LTX | {"timestep_conditioning": True}),
}
RUNGS = [name for name in TINY if name != "cogvideox"]


@pytest.fixture
def make_video() -> MakeVideo:
    """Noise in [-1, 1], (clips, 3, frames, 32, 32)."""

    def video(frames: int, clips: int = 1) -> Tensor:
        return torch.rand((clips, 3, frames, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1

    return video


def random_model(name: str, **changes: Any) -> Any:
    """A class of diffusers with random weights; its pixels reach beyond [-1, 1]."""
    import diffusers

    class_name, config = TINY[name]
    torch.manual_seed(0)
    made = getattr(diffusers, class_name)(**config | changes).eval()
    with torch.no_grad():
        for weight in made.decoder.conv_out.parameters():
            weight.mul_(10)
    return made


@pytest.fixture
def make_model() -> MakeModel:
    return random_model


@pytest.fixture
def adapt(tmp_path: Path) -> Adapt:
    """What `kinetok.load` makes of a model that diffusers saved."""

    def adapter(model: Any) -> Pretrained:
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        found = load(folder)
        assert isinstance(found, Pretrained)
        return found

    return adapter
