"""The de-tokenizer's 3D U-Net and its sampling against diffusers' UNet3DConditionModel, of the same family (arXiv 2308.06571).

Both have the same widths, blocks, levels with transformers, context and input, random weights and, within 5 %, as many parameters.
Sampling is DDIM with guidance on two clips at once; their loop is that of diffusers' TextToVideoSDPipeline, with our schedule, and
starts from context tokens, ours from the tokens that its Perceiver makes them of.
"""

import os
from pathlib import Path
from typing import Final

import torch
from line import Line
from tokenizer import check_sizes, medians
from torch import Tensor, nn

from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.detokenizer import Detokenizer, DetokenizerConfig
from kinetok.tokenizers.divot.perceiver import PerceiverConfig
from kinetok.tokenizers.divot.schedule import FIRST_BETA, LAST_BETA
from kinetok.tokenizers.divot.unet import UNetConfig

CLIPS: Final = 2
UNET = UNetConfig(channels=64, mult=(1, 2, 4), blocks=1, attention=(0, 1), head_width=16, context=128, split=None, dropout=0.0)
CONTEXT: Final = 64
TOKENS: Final = (16, 32)
FRAMES: Final = 16
EDGE, SAMPLED_EDGE = 16, 8
"""Latent rows and columns of one pass, and of sampling."""
SAMPLER = SamplerConfig(steps=2, spacing="trailing")


@torch.no_grad()
def lines(work: Path) -> list[Line]:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    perceiver = PerceiverConfig(queries=CONTEXT, depth=1, heads=4)
    ours = Detokenizer(DetokenizerConfig(perceiver=perceiver, unet=UNET), token_width=TOKENS[1]).eval()
    theirs = unet3d().eval()
    check_sizes({"kinetok": ours.unet, "diffusers": theirs})
    return [one_pass(ours, theirs), sampling(ours, theirs)]


def one_pass(ours: Detokenizer, theirs: nn.Module) -> Line:
    """The U-Nets alone."""
    x_BZThw, context_BLC = torch.randn(CLIPS, UNET.z, FRAMES, EDGE, EDGE), torch.randn(CLIPS, CONTEXT, UNET.context)
    t_B = torch.tensor([900, 100])
    took = medians({"ours": lambda: ours.unet(x_BZThw, t_B, context_BLC), "theirs": lambda: theirs(x_BZThw, t_B, context_BLC)})
    return Line(f"de-tokenizer's U-Net, one pass {FLOOR}", CLIPS / took["ours"], "clips/s", CLIPS / took["theirs"], ">= 1.0")


def sampling(ours: Detokenizer, theirs: nn.Module) -> Line:
    """Two steps, of two clips with guidance."""
    token_BND, null_ND, context_BLC = torch.randn(CLIPS, *TOKENS), torch.zeros(*TOKENS), torch.randn(CLIPS, CONTEXT, UNET.context)
    size = (FRAMES, SAMPLED_EDGE, SAMPLED_EDGE)
    took = medians(
        {
            "ours": lambda: ours.sample(token_BND, null_ND, size, SAMPLER, range(CLIPS)),
            "theirs": lambda: their_sampling(theirs, context_BLC),
        }
    )
    name = f"DDIM sampling, {SAMPLER.steps} steps of {CLIPS} clips {FLOOR}"
    return Line(name, CLIPS / took["ours"], "clips/s", CLIPS / took["theirs"], ">= 1.0")


FLOOR: Final = "(floor: diffusers' UNet3DConditionModel)"


def unet3d() -> nn.Module:
    """What diffusers calls `attention_head_dim` is the number of heads, one for all levels."""
    from diffusers import UNet3DConditionModel

    crossed = [level in UNET.attention for level in range(len(UNET.mult))]
    model: nn.Module = UNet3DConditionModel(
        in_channels=UNET.z,
        out_channels=UNET.z,
        block_out_channels=tuple(UNET.channels * factor for factor in UNET.mult),
        layers_per_block=UNET.blocks,
        down_block_types=tuple("CrossAttnDownBlock3D" if cross else "DownBlock3D" for cross in crossed),
        up_block_types=tuple("CrossAttnUpBlock3D" if cross else "UpBlock3D" for cross in reversed(crossed)),
        cross_attention_dim=UNET.context,
        attention_head_dim=8,
        norm_num_groups=UNET.groups,
    )
    return model


def their_sampling(model: nn.Module, context_BLC: Tensor) -> Tensor:
    """DDIM as diffusers' text-to-video pipeline runs it: frames are the batch of the scheduler."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=FIRST_BETA,
        beta_end=LAST_BETA,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing=SAMPLER.spacing,
        clip_sample=False,
    )
    scheduler.set_timesteps(SAMPLER.steps)
    both_BLC = torch.cat([torch.zeros_like(context_BLC), context_BLC])
    x_BZThw = torch.randn(CLIPS, UNET.z, FRAMES, SAMPLED_EDGE, SAMPLED_EDGE)
    for t in scheduler.timesteps:
        null_BZThw, v_BZThw = model(torch.cat([x_BZThw] * 2), t, encoder_hidden_states=both_BLC).sample.chunk(2)
        guided_BZThw = null_BZThw + SAMPLER.guidance * (v_BZThw - null_BZThw)
        v_FZhw, x_FZhw = guided_BZThw.transpose(1, 2).flatten(0, 1), x_BZThw.transpose(1, 2).flatten(0, 1)
        x_FZhw = scheduler.step(v_FZhw, t, x_FZhw, eta=SAMPLER.eta).prev_sample
        x_BZThw = torch.unflatten(x_FZhw, 0, (CLIPS, FRAMES)).transpose(1, 2)
    return x_BZThw


if __name__ == "__main__":
    for line in lines(Path()):
        print(f"{line.name}: {line.value:.3f} {line.unit}, floor {line.floor:.3f}, ratio {line.ratio:.2f}, aim {line.aim}")
