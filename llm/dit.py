"""`VideoDiT`: a diffusion transformer over the latents of a video tokenizer, told what to show by a text encoder's embeddings.

The design is DiT's (arXiv 2212.09748) with what text-to-video models of today share: full self-attention over space and time with
rotary positions on three axes (arXiv 2104.09864), RMS-normalised queries and keys (arXiv 2302.05442), AdaLN-zero whose projection all
blocks share (arXiv 2310.00426), cross-attention to the text. The output starts at zero.

A tokenizer encodes a video in chunks of 17 frames, each of `chunk` latent steps whose first is an image of its own, so neighbouring
steps are not alike: every token is told its index inside the chunk, and the index of its chunk. Latents come in and go out normalised
by `mean_Z` and `std_Z`, which belong to the saved model.

Not covered: the flow that it is trained on (`flow.py`), text encoders (`text.py`), gradient checkpointing, sequence parallelism.

Legend: B samples, Z latent channels, t h w latent positions, N tokens, D width, A attention heads, K width of a head, P rotated pairs
of a head, L text tokens, E text width.
"""

import json
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from kinetok.llm.card import generator_card
from kinetok.tokenizers.base import CONFIG_FILE, WEIGHTS_FILE, Config, Count
from kinetok.tokenizers.card import CARD_FILE

TIME_SCALE = 1000.0
"""Flow times in [0, 1] are stretched to the range that the sinusoidal features were made for."""
FREQUENCIES = 128
"""Sines, and as many cosines, of the time and of the chunk's index."""
MODULATIONS = 6
"""Shift, scale and gate of the attention, then of the MLP."""
ROTARY_BASE = 10000.0


class DiTConfig(Config):
    """Numbers of a diffusion transformer; `z`, `text_width` and `chunk` follow from the tokenizer and the text encoder."""

    kind: Literal["dit"] = "dit"
    z: Count
    """Latent channels."""
    width: Count
    """Channels of a token."""
    depth: Count
    """Blocks."""
    heads: Count
    """Of each attention; a head has `width / heads` channels."""
    mlp_ratio: Annotated[float, Field(gt=0)] = 4.0
    """Width of the MLP's hidden layer over `width`."""
    patch: tuple[Count, Count] = (1, 1)
    """Latent steps, and latent cells along an edge, of one token."""
    text_width: Count
    """Numbers of one text token's embedding."""
    chunk: Count
    """Latent steps of one 17-frame chunk: 5 at 4x, 3 at 8x, 2 at 16x."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.width % self.heads or self.head_width % 2 or self.head_width < 6:
            raise ValueError(f"heads: {self.heads} heads of a width of {self.width} are no whole, even widths of 6 or more")
        if self.chunk % self.patch[0]:
            raise ValueError(f"patch: {self.patch[0]} latent steps do not divide a chunk of {self.chunk}")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def token_channels(self) -> int:
        """Latent numbers of one token."""
        return self.z * self.patch[0] * self.patch[1] ** 2

    def grid(self, latent: tuple[int, int, int]) -> tuple[int, int, int]:
        """Tokens along t, h, w of a latent of that size; ValueError where patches do not tile it."""
        sizes = (self.patch[0], self.patch[1], self.patch[1])
        for axis, extent, size in zip("thw", latent, sizes, strict=True):
            if extent % size:
                raise ValueError(f"a latent of {latent} cannot be cut into patches of {sizes}: {axis} = {extent} is no multiple of {size}")
        return (latent[0] // sizes[0], latent[1] // sizes[1], latent[2] // sizes[2])


class VideoDiT(nn.Module):
    """Velocity of the flow at a noisy, normalised latent; see the module. Starts as the velocity zero."""

    mean_Z: Tensor
    std_Z: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.from_patch = nn.Linear(config.token_channels, width)
        self.in_chunk = nn.Embedding(config.chunk // config.patch[0], width)
        self.of_chunk = nn.Linear(2 * FREQUENCIES, width)
        self.from_time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, MODULATIONS * width)
        self.from_text = nn.Sequential(
            nn.RMSNorm(config.text_width), nn.Linear(config.text_width, width), nn.GELU("tanh"), nn.Linear(width, width)
        )
        self.null_D = nn.Parameter(torch.empty(width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.last = LastLayer(width, config.token_channels)
        self.register_buffer("mean_Z", torch.zeros(config.z))
        self.register_buffer("std_Z", torch.ones(config.z))
        self._start()

    def forward(self, noisy_BZthw: Tensor, time_B: Tensor, text_BLE: Tensor, text_mask_BL: Tensor) -> Tensor:
        """d x_t / d t of `noisy_BZthw` at the times `time_B` in [0, 1] (1 is noise), float32.

        `text_mask_BL` is true where `text_BLE` holds a token; a sample without any is unconditional.
        """
        grid = self.config.grid((noisy_BZthw.shape[2], noisy_BZthw.shape[3], noisy_BZthw.shape[4]))
        x_BND = self.from_patch(patchify(noisy_BZthw, self.config.patch)) + self._chunk_positions(grid).to(noisy_BZthw.dtype)
        time_BD = self.from_time(sinusoids(TIME_SCALE * time_B))
        modulation_B6D = torch.unflatten(self.modulation(F.silu(time_BD)), -1, (MODULATIONS, -1))
        text_BLD, mask_B11L = self._text(text_BLE, text_mask_BL)
        angles_NP = rotary_angles(grid, self.config.head_width, noisy_BZthw.device)
        for block in self.blocks:
            x_BND = block(x_BND, modulation_B6D, text_BLD, mask_B11L, angles_NP)
        return unpatchify(self.last(x_BND, time_BD).float(), grid, self.config.patch)

    def normalise(self, latent_BZthw: Tensor) -> Tensor:
        """A tokenizer's latents, each channel with mean 0 and standard deviation 1 over the training set."""
        return (latent_BZthw - self.mean_Z[:, None, None, None]) / self.std_Z[:, None, None, None]

    def denormalise(self, latent_BZthw: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return latent_BZthw * self.std_Z[:, None, None, None] + self.mean_Z[:, None, None, None]

    def set_statistics(self, mean_Z: Tensor, std_Z: Tensor) -> Self:
        """Mean and standard deviation of each latent channel; ValueError unless they are Z finite numbers, deviations positive."""
        for name, values in (("mean_Z", mean_Z), ("std_Z", std_Z)):
            if values.shape != (self.config.z,) or not values.isfinite().all():
                raise ValueError(f"{name}: needed are {self.config.z} finite numbers, one a latent channel, got {values.tolist()}")
        if not (std_Z > 0).all():
            raise ValueError(f"std_Z: a channel that never changes cannot be normalised, got {std_Z.tolist()}")
        self.mean_Z.copy_(mean_Z)
        self.std_Z.copy_(std_Z)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json`, `model.safetensors`, latent statistics included, and the model card."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / CONFIG_FILE).write_text(json.dumps(self.config.model_dump(mode="json"), indent=1, sort_keys=True))
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, target / WEIGHTS_FILE)
        (target / CARD_FILE).write_text(generator_card(self))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder`, in eval mode; raises on missing or unexpected weights."""
        model = cls(DiTConfig.model_validate_json((Path(folder) / CONFIG_FILE).read_text()))
        model.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE), strict=True)
        return model.eval()

    def _start(self) -> None:
        """Xavier-uniform matrices as in DiT, then zeros where a block, or the model, is to start as nothing."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.in_chunk.weight, self.null_D):
            nn.init.normal_(embedding, std=0.02)
        for nothing in (self.modulation, self.last.modulation, self.last.to_patch):
            nn.init.zeros_(nothing.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.cross.to_out.weight)

    def _chunk_positions(self, grid: tuple[int, int, int]) -> Tensor:
        """What each token is told of its chunk, (N, D)."""
        step_t = torch.arange(grid[0], device=self.in_chunk.weight.device)
        per_chunk = self.in_chunk.num_embeddings
        position_tD: Tensor = self.in_chunk(step_t % per_chunk) + self.of_chunk(sinusoids((step_t // per_chunk).float()))
        return position_tD.repeat_interleave(grid[1] * grid[2], dim=0)

    def _text(self, text_BLE: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values for the blocks, led by a learned token that is never masked: attention always has somewhere to look."""
        # What stands under the mask may be anything; even 0 * inf in a matrix product would spoil the sum.
        text_BLD = self.from_text(text_BLE.masked_fill(~mask_BL[..., None], 0.0))
        null_B1D = self.null_D.to(text_BLD.dtype).expand(len(text_BLD), 1, -1)
        mask_BL = torch.cat([torch.ones_like(mask_BL[:, :1]), mask_BL], dim=1)
        return torch.cat([null_B1D, text_BLD], dim=1), mask_BL[:, None, None]


class Block(nn.Module):
    """Self-attention and MLP, each modulated and gated by the time (AdaLN-zero), with cross-attention to the text between them."""

    worth_compiling: ClassVar[bool] = True

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.modulation_6D = nn.Parameter(torch.zeros(MODULATIONS, width))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, config.heads)
        self.norm_cross = nn.LayerNorm(width, eps=1e-6)
        self.cross = Attention(width, config.heads)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU("tanh"), nn.Linear(config.hidden, width))

    def forward(self, x_BND: Tensor, modulation_B6D: Tensor, text_BLD: Tensor, mask_B11L: Tensor, angles_NP: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (self.modulation_6D + modulation_B6D).unsqueeze(2).unbind(1)
        modulated_BND = self.norm(x_BND) * (1 + scale_a) + shift_a
        x_BND = x_BND + gate_a * self.attention(modulated_BND, modulated_BND, angles_NP=angles_NP)
        x_BND = x_BND + self.cross(self.norm_cross(x_BND), text_BLD, mask_B11L=mask_B11L)
        return torch.add(x_BND, gate_m * self.mlp(self.norm_mlp(x_BND) * (1 + scale_m) + shift_m))


class Attention(nn.Module):
    """Multi-head attention of x to a context (itself, or the text), with normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.to_out = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, context_BMD: Tensor, *, angles_NP: Tensor | None = None, mask_B11L: Tensor | None = None) -> Tensor:
        q_BANK = self._heads(self.to_q(x_BND))
        k_BAMK, v_BAMK = (self._heads(part) for part in self.to_kv(context_BMD).chunk(2, dim=-1))
        # In float32 under autocast too: the fused norm takes one type for numbers and weights.
        q_BANK, k_BAMK = self.norm_q(q_BANK.float()), self.norm_k(k_BAMK.float())
        if angles_NP is not None:
            q_BANK, k_BAMK = rotate(q_BANK, angles_NP), rotate(k_BAMK, angles_NP)
        mixed_BANK = F.scaled_dot_product_attention(q_BANK.to(v_BAMK.dtype), k_BAMK.to(v_BAMK.dtype), v_BAMK, attn_mask=mask_B11L)
        out_BND: Tensor = self.to_out(mixed_BANK.transpose(1, 2).flatten(2))
        return out_BND

    def _heads(self, x_BND: Tensor) -> Tensor:
        return torch.unflatten(x_BND, -1, (self.heads, -1)).transpose(1, 2)


class LastLayer(nn.Module):
    """Tokens to patches of velocity: a norm that the time shifts and scales, and a projection; starts at zero."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_patch = nn.Linear(width, channels)

    def forward(self, x_BND: Tensor, time_BD: Tensor) -> Tensor:
        shift_B1D, scale_B1D = self.modulation(F.silu(time_BD)).unsqueeze(1).chunk(2, dim=-1)
        patch_BNC: Tensor = self.to_patch(self.norm(x_BND) * (1 + scale_B1D) + shift_B1D)
        return patch_BNC


def patchify(latent_BZthw: Tensor, patch: tuple[int, int]) -> Tensor:
    """Tokens (B, N, Z * patch_t * patch_s^2), N running over t, then h, then w."""
    time, space = patch
    samples, channels, t, h, w = latent_BZthw.shape
    cells = latent_BZthw.reshape(samples, channels, t // time, time, h // space, space, w // space, space)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def unpatchify(tokens_BNC: Tensor, grid: tuple[int, int, int], patch: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for `grid` tokens along t, h, w."""
    time, space = patch
    cells = tokens_BNC.reshape(len(tokens_BNC), *grid, -1, time, space, space)
    return cells.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)


def sinusoids(position_B: Tensor) -> Tensor:
    """Cosines and sines of a position at `FREQUENCIES` geometric frequencies from 1 down to 1e-4, (B, 2 * FREQUENCIES)."""
    exponent = torch.arange(FREQUENCIES, device=position_B.device, dtype=torch.float32) / FREQUENCIES
    angle = position_B.float()[:, None] * ROTARY_BASE**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotary_angles(grid: tuple[int, int, int], head_width: int, device: torch.device) -> Tensor:
    """Angle of each rotated pair of a head at each token, (N, P): a third of the pairs turn with h, a third with w, the rest with t."""
    pairs = head_width // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    axes = []
    for axis, (extent, share) in enumerate(zip(grid, shares, strict=True)):
        frequency = ROTARY_BASE ** -(torch.arange(share, device=device, dtype=torch.float32) / share)
        angle = torch.arange(extent, device=device, dtype=torch.float32)[:, None] * frequency
        along = [extent if other == axis else 1 for other in range(3)]
        axes.append(angle.view(*along, share).expand(*grid, share))
    return torch.cat(axes, dim=-1).flatten(0, 2)


def rotate(x_BANK: Tensor, angles_NP: Tensor) -> Tensor:
    """Turn pair p of each head, numbers p and p + K/2, by its token's angle, so that q . k depends on differences of positions alone."""
    a, b = x_BANK.chunk(2, dim=-1)
    cos, sin = angles_NP.cos(), angles_NP.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
