"""Released Divot checkpoints: their parameter names, and a strict loader into our modules.

`Divot_tokenizer.bin` holds the tokenizer without its vision transformer, `Divot_detokenizer_stage1.bin` (trained on real features) and
`_stage2.bin` (adapted to sampled ones) the conditioning Perceiver, the U-Net and the image autoencoder. Files are unpickled with
`weights_only`. Every parameter of ours must be in the file and have the size it has there, and nothing may be left over in the file
but what is ignored by name and reported: a vision transformer, a copy of the tokenizer, and the buffers of the noise schedule, of
which `alphas_cumprod` must be ours. Our names differ from the published ones; the tables here say how.

Not covered: the language model's files (`kinetok.llm`), writing the published format.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Self, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from kinetok.tokenizers.divot import schedule
from kinetok.tokenizers.divot.detokenizer import Detokenizer
from kinetok.tokenizers.divot.encoder import TokenEncoder
from kinetok.tokenizers.divot.frame_vae import FrameVAE
from kinetok.tokenizers.divot.perceiver import Perceiver
from kinetok.tokenizers.divot.spacetime import SpaceTimeEncoder
from kinetok.tokenizers.divot.temporal import TemporalEncoder
from kinetok.tokenizers.divot.unet import VideoUNet
from kinetok.tokenizers.divot.unet_layers import ResBlock, SpatialTransformer, TemporalTransformer

State: TypeAlias = Mapping[str, Tensor]
Rules: TypeAlias = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
"""Regular expressions on our names and what takes their place, applied one after the other."""

SCHEDULE_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
IGNORED_IN_TOKENIZER = ("vit_model.",)
IGNORED_IN_DETOKENIZER = ("video_tokenizer.",)
"""Prefixes that may be in a file and are not read."""

DYNAMICRAFTER = "model.diffusion_model."
"""Prefix of the U-Net in DynamiCrafter's checkpoints, whose names are those of Divot but for `FRAME_STRIDE`."""
DYNAMICRAFTER_IMAGES = "image_proj_model."
"""Prefix of the Perceiver that reads the image in DynamiCrafter's checkpoints; its names are those of Divot's."""
FRAME_STRIDE = ("framestride_embed.", "fps_embedding.")
"""The embedding of the frame stride as the 256-pixel DynamiCrafter calls it, and as Divot does."""

TEMPORAL: Rules = (
    (r"^position_TD$", "positional_embedding"),
    (r"^from_features\.", "input_proj."),
    (r"^to_out\.", "output_proj."),
    (r"^norm\.", "ln_final."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\bnorm_attention\.", "ln_1."),
    (r"\bnorm_mlp\.", "ln_2."),
    (r"\bto_qkv\.", "attn.in_proj_"),
    (r"\bto_out\.", "attn.out_proj."),
    (r"\bwiden\.", "mlp.c_fc."),
    (r"\bnarrow\.", "mlp.c_proj."),
)
SPACE_TIME: Rules = (
    (r"^space_PD$", "pos_embed_spatial"),
    (r"^time_TD$", "pos_embed_temporal"),
    (r"\bnorm_attention\.", "norm1."),
    (r"\bnorm_mlp\.", "norm2."),
    (r"\bto_qkv\.", "attn.qkv."),
    (r"\bto_out\.", "attn.proj."),
    (r"\bwiden\.", "mlp.fc1."),
    (r"\bnarrow\.", "mlp.fc2."),
)
PERCEIVER: Rules = (
    (r"^latents_1MD$", "latents"),
    (r"^from_read\.", "proj_in."),
    (r"^to_out\.", "proj_out."),
    (r"^norm\.", "norm_out."),
    (r"^blocks\.(\d+)\.reading\.", r"layers.\1.0."),
    (r"^blocks\.(\d+)\.mlp\.", r"layers.\1.1."),
    (r"\bnorm_read\.", "norm1."),
    (r"\bnorm_latents\.", "norm2."),
)
RES_BLOCK: Rules = (
    (r"\bnorm_in\.", "in_layers.0."),
    (r"\bconv_in\.", "in_layers.2."),
    (r"\bfrom_time\.", "emb_layers.1."),
    (r"\bnorm_out\.", "out_layers.0."),
    (r"\bconv_out\.", "out_layers.3."),
    (r"\bskip\.", "skip_connection."),
    (r"\btemporal\.norms\.(\d+)\.", lambda found: f"temopral_conv.conv{int(found[1]) + 1}.0."),
    (r"\btemporal\.convs\.0\.", "temopral_conv.conv1.2."),
    (r"\btemporal\.convs\.(\d+)\.", lambda found: f"temopral_conv.conv{int(found[1]) + 1}.3."),
)
TRANSFORMER: Rules = (
    (r"\b(attention|context|first|second)\.to_out\.", r"\1.to_out.0."),
    (r"\bto_out\.(weight|bias)$", r"proj_out.\1"),
    (r"\bto_in\.", "proj_in."),
    (r"\bto_([kv])_second\.", r"to_\1_ip."),
    (r"\bnorm_(self|first)\.", "transformer_blocks.0.norm1."),
    (r"\bnorm_(context|second)\.", "transformer_blocks.0.norm2."),
    (r"\bnorm_mlp\.", "transformer_blocks.0.norm3."),
    (r"\b(attention|first)\.", "transformer_blocks.0.attn1."),
    (r"\b(context|second)\.", "transformer_blocks.0.attn2."),
    (r"\bmlp\.widen\.", "transformer_blocks.0.ff.net.0.proj."),
    (r"\bmlp\.narrow\.", "transformer_blocks.0.ff.net.2."),
)
UNET: Rules = (
    (r"^from_step\.", "time_embed."),
    (r"^from_stride\.", "fps_embedding."),
    (r"^from_latent\.", "input_blocks.0.0."),
    (r"^first\.", "init_attn.0."),
    (r"^down\.(\d+)\.0\.conv\.", lambda found: f"input_blocks.{int(found[1]) + 1}.0.op."),
    (r"^down\.(\d+)\.", lambda found: f"input_blocks.{int(found[1]) + 1}."),
    (r"^middle\.", "middle_block."),
    (r"^up\.", "output_blocks."),
    (r"^norm\.", "out.0."),
    (r"^to_latent\.", "out.2."),
    *RES_BLOCK,
    *TRANSFORMER,
)
AUTOENCODER: Rules = (
    (r"^model\.", ""),
    (r"\bmid_block\.resnets\.(\d+)\.", lambda found: f"mid.block_{int(found[1]) + 1}."),
    (r"\bmid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"\bmid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"\bmid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"\bdown_blocks\.", "down."),
    (r"\bup_blocks\.", "up."),
    (r"\bresnets\.", "block."),
    (r"\bdownsamplers\.0\.", "downsample."),
    (r"\bupsamplers\.0\.", "upsample."),
    (r"\bconv_shortcut\.", "nin_shortcut."),
    (r"\bconv_norm_out\.", "norm_out."),
)
RULES: Mapping[type[nn.Module], Rules] = {
    TemporalEncoder: TEMPORAL,
    SpaceTimeEncoder: SPACE_TIME,
    Perceiver: PERCEIVER,
    ResBlock: RES_BLOCK,
    SpatialTransformer: TRANSFORMER,
    TemporalTransformer: TRANSFORMER,
    VideoUNet: UNET,
    FrameVAE: AUTOENCODER,
    nn.LayerNorm: (),
}
PARTS: Mapping[type[nn.Module], Mapping[str, str]] = {
    TokenEncoder: {
        "temporal": "temporal_encoder",
        "norm": "norm",
        "space_time": "image_proj_model",
        "head": "image_proj_model.down_sampler",
    },
    Detokenizer: {"perceiver": "image_proj_model", "unet": "diffusion_model"},
}
"""Modules made of others: names of the parts, ours and the published ones."""


@dataclass(frozen=True)
class LoadReport:
    """How a file and a model fit together; names are the published ones."""

    loaded: int
    """Tensors that are in both and alike in size."""
    missing: tuple[str, ...]
    """The model has them, the file does not."""
    unexpected: tuple[str, ...]
    """The file has them, the model does not."""
    misshapen: tuple[str, ...]
    """In both, with their sizes in the file and in the model."""
    ignored: tuple[str, ...]
    """In the file, not to be read."""

    def check(self) -> Self:
        """ValueError unless the file has all that the model needs, in its size, and nothing else."""
        wrong = {"missing": self.missing, "unexpected": self.unexpected, "of another size": self.misshapen}
        found = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for what, names in wrong.items() if names
        ]
        if found:
            raise ValueError(
                f"these weights are not of this model: {'; '.join(found)}; {self.loaded} fit. "
                "Build the model with the numbers they were trained with"
            )
        return self


def official_names(module: nn.Module) -> dict[str, str]:
    """The published name of each of our parameters; KeyError for a module that has no published form."""
    if type(module) in PARTS:
        return {
            f"{ours}.{name}": f"{theirs}.{published}"
            for ours, theirs in PARTS[type(module)].items()
            for name, published in official_names(module.get_submodule(ours)).items()
        }
    names = {name: _published(name, RULES[type(module)]) for name in module.state_dict()}
    return {name: _mirrored(published, module) for name, published in names.items()} if isinstance(module, FrameVAE) else names


def load_official(parts: Mapping[str, nn.Module], state: State, ignored: Iterable[str] = ()) -> LoadReport:
    """Copy the published `state` into `parts`, modules by the prefix of their published names. Loads nothing where `check` fails.

    Kernels of size 1 may be kept as plain matrices. Tensors of half precision are widened to what the model has.
    """
    ours = published_state(parts)
    report = compare(ours, state, ignored).check()
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(state[name].view_as(tensor))
    return report


def published_state(parts: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of modules under their published names, each module's behind its prefix."""
    found: dict[str, Tensor] = {}
    for prefix, module in parts.items():
        state = module.state_dict()
        found |= {prefix + published: state[name] for name, published in official_names(module).items()}
    return found


def compare(ours: State, state: State, ignored: Iterable[str] = ()) -> LoadReport:
    """The report for tensors of ours under their published names, and a published state; `ignored` are prefixes."""
    left_out = tuple(name for name in state if name.startswith(tuple(ignored)))
    rest = state.keys() - set(left_out)
    common = ours.keys() & rest
    misshapen = sorted(name for name in common if _size(ours[name]) != _size(state[name]))
    return LoadReport(
        loaded=len(common) - len(misshapen),
        missing=tuple(sorted(ours.keys() - rest)),
        unexpected=tuple(sorted(rest - ours.keys())),
        misshapen=tuple(f"{name} {tuple(state[name].shape)} {tuple(ours[name].shape)}" for name in misshapen),
        ignored=left_out,
    )


def load_tokenizer(encoder: TokenEncoder, state: State, ignored: Iterable[str] = ()) -> LoadReport:
    """Load `Divot_tokenizer.bin`, read by `read_state`; ValueError where it does not fit.

    Names that begin with one of `ignored` may be in the file too, here and in `load_detokenizer`.
    """
    return load_official({"": encoder}, state, (*IGNORED_IN_TOKENIZER, *ignored))


def load_detokenizer(detokenizer: Detokenizer, autoencoder: FrameVAE, state: State, ignored: Iterable[str] = ()) -> LoadReport:
    """Load `Divot_detokenizer_stage1.bin` or `_stage2.bin`; ValueError where it does not fit, or was trained with another schedule."""
    if "alphas_cumprod" in state and not _same_schedule(state["alphas_cumprod"]):
        raise ValueError(
            "these weights were trained with another noise schedule: their alphas_cumprod is not that of zero terminal SNR. Name "
            "Divot_detokenizer_stage1.bin or _stage2.bin; DynamiCrafter's checkpoint is one to train from (objective.dynamicrafter)"
        )
    buffers = {name: tensor for name, tensor in state.items() if name not in SCHEDULE_BUFFERS}
    parts = {"": detokenizer, "first_stage_model.": autoencoder}
    return load_official(parts, buffers, (*IGNORED_IN_DETOKENIZER, *ignored))


def load_dynamicrafter(unet: VideoUNet, images: Perceiver, file: str | Path) -> LoadReport:
    """Load DynamiCrafter's U-Net and the Perceiver of its images; ValueError where one does not fit.

    Of the U-Net's first kernel, the channels of the image beside are left out.
    """
    held = read_state(file)
    state = {_renamed(name.removeprefix(DYNAMICRAFTER)): tensor for name, tensor in held.items() if name.startswith(DYNAMICRAFTER)}
    first = official_names(unet)["from_latent.weight"]
    if first in state:
        state[first] = state[first][:, : unet.config.z]
    state |= {name: tensor for name, tensor in held.items() if name.startswith(DYNAMICRAFTER_IMAGES)}
    return load_official({"": unet, DYNAMICRAFTER_IMAGES: images}, state)


def read_state(file: str | Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file or in what `torch.save` wrote, on the CPU; ValueError where it holds anything else.

    Of a checkpoint of a training, those of its `state_dict`.
    """
    path = Path(file)
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged: it is not loaded ({str(error).splitlines()[0]}). Fetch it again, or save its "
            "tensors alone"
        ) from error
    if isinstance(state, Mapping):
        state = state.get("state_dict", state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no plain mapping of names to tensors: save the model's state_dict() alone, with torch.save")
    return dict(state)


def _same_schedule(stored: Tensor) -> bool:
    """Whether a file's alpha_bar is ours, to the precision of the type that it is stored in."""
    wanted = schedule.alpha_bar()
    if stored.shape != wanted.shape or not stored.is_floating_point():
        return False
    return torch.allclose(stored.double(), wanted, atol=1e-6, rtol=torch.finfo(stored.dtype).eps)


def _renamed(name: str) -> str:
    """A name in DynamiCrafter's U-Net as it is in Divot's."""
    theirs, divots = FRAME_STRIDE
    return divots + name.removeprefix(theirs) if name.startswith(theirs) else name


def _published(name: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _mirrored(name: str, autoencoder: FrameVAE) -> str:
    """The published decoder counts its levels from the finest, diffusers from the coarsest."""
    last = len(autoencoder.config.block_out_channels) - 1
    return re.sub(r"\bup\.(\d+)\.", lambda found: f"up.{last - int(found[1])}.", name)


def _size(tensor: Tensor) -> tuple[int, ...]:
    """The shape without trailing ones."""
    shape = tuple(tensor.shape)
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
