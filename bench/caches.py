"""What caches save: training steps of Divot's tokenizer and of Divot-LLM on what `encode` stored, against encoding in every step.

The joint step is that of the small tokenizer on the small ladder's base rung, the language model's that of a small model on captions of
the small tokenizer's clips. With caches a batch is read from the bytes of its samples; without, videos are decoded and pass the frozen
models in every step, as in the published code, on the same cores. As a script, prints each line as JSON, and what is counted on paper for
the published sizes: floating-point operations, decoding left out.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from line import Line
from safetensors.torch import load, save
from tokenizer import medians
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kinetok.llm.divot.collate import collate
from kinetok.llm.divot.language import UntrainedLanguage
from kinetok.llm.divot.model import DivotLM, DivotLMConfig
from kinetok.llm.divot.presets import MISTRAL_7B
from kinetok.llm.divot.sequences import describe
from kinetok.llm.divot.training import PLAYER, DivotLMObjective, DivotLMTrainable
from kinetok.pipelines.data.decode import decode_clips
from kinetok.pipelines.data.scenes import draw_scene, encode_mp4
from kinetok.tokenizers.base import Batch
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.presets import SMALL_4X
from kinetok.tokenizers.divot.frame_vae import FrameVAE
from kinetok.tokenizers.divot.presets import FULL, SMALL
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.divot.training import DIVOT, DivotObjective, DivotTrainable
from kinetok.tokenizers.divot.vit import FrozenViT

if TYPE_CHECKING:
    from kinetok.pipelines.data.decode import Pixels

CLIPS: Final = 4
"""Of one batch."""
FPS: Final = 8
CAPTION: Final = "a red disc moves from left to right over sliding teal and white stripes while a green square falls"
LANGUAGE = UntrainedLanguage(width=128, hidden=352, depth=4, heads=4, key_heads=2)
ONLINE: Final = "(floor: videos decoded and encoded in the loop)"
COMPREHENSION, GENERATION = (20, 1400), (1, 180)
"""Clips and positions of the published samples."""

Step = Callable[[Batch], None]


def lines(work: Path) -> list[Line]:
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    return [joint_step(), language_step()]


def joint_step() -> Line:
    """Both through `DivotTrainable`."""
    model, videos, seed_B = small_tokenizer(), scenes(CLIPS), torch.arange(CLIPS)
    video_BCTHW = pixels(decoded(videos))
    vit_BTND = model.vit_features(video_BCTHW)
    latent_BTZhw = model.lower.encode(video_BCTHW).values.transpose(1, 2)
    stored = [save({"vit_BTND": vit.contiguous(), "latent_BTZhw": z.contiguous()}) for vit, z in zip(vit_BTND, latent_BTZhw, strict=True)]
    step = training_step(DivotTrainable(model, DivotObjective()).players[DIVOT])
    took = medians(
        {
            "cached": lambda: step(stacked(stored) | {"seed_B": seed_B}),
            "online": lambda: step({"video_BTHWC": decoded(videos), "seed_B": seed_B}),
        }
    )
    return Line(
        f"tokenizer's joint step from cached features and latents {ONLINE}", 1 / took["cached"], "steps/s", 1 / took["online"], ">= 3"
    )


def language_step() -> Line:
    """Both through `DivotLMTrainable`, one clip and one caption a sample."""
    tokenizer, videos = small_tokenizer().eval(), scenes(CLIPS)
    encoder = SMALL.encoder
    model = DivotLM.build(DivotLMConfig(language=LANGUAGE, clip_tokens=encoder.tokens, token_width=encoder.token_width))
    step = training_step(DivotLMTrainable(model, DivotLMObjective()).players[PLAYER])

    def encoded() -> Tensor:
        return tokenizer.encode(pixels(decoded(videos))).values

    def batch(token_BND: Tensor) -> Batch:
        samples = [describe(model.vocabulary, token_ND[None], CAPTION, limit=256) for token_ND in token_BND]
        return collate(samples, range(CLIPS))

    stored = [save({"token_BND": token_ND.contiguous()}) for token_ND in encoded()]
    took = medians({"cached": lambda: step(batch(stacked(stored)["token_BND"])), "online": lambda: step(batch(encoded()))})
    return Line(f"Divot-LLM's step from cached tokens {ONLINE}", 1 / took["cached"], "steps/s", 1 / took["online"], ">= 3")


def published() -> list[Line]:
    """Operations of a step at the published sizes: with encoding, over from caches.

    A trained part costs three forward passes, and a language model with adapters and gradient checkpointing as much (forward, again, and
    backward to activations alone).
    """
    with torch.device("meta"), torch.no_grad():
        model = DivotTokenizer(
            FULL.model_copy(update={"vit": FULL.vit.model_copy(update={"path": None})}), _vit(), _stable_diffusion()
        ).requires_grad_(False)
        video_BCTHW = torch.zeros(1, 3, FULL.frames, FULL.edge, FULL.edge)
        features_BTND = torch.zeros(1, FULL.encoder.frames, FULL.vit.patches, FULL.vit.width)
        noisy_BZThw, t_B = torch.zeros(1, *_latent(model)), torch.zeros(1, dtype=torch.int64)
        vit = operations(lambda: model.vit(video_BCTHW[:, :, : FULL.encoder.frames].transpose(1, 2).flatten(0, 1)))
        autoencoder = operations(lambda: model.lower.encode(video_BCTHW))
        encoder = operations(lambda: model.encoder(features_BTND))
        detokenizer = operations(lambda: model.detokenizer(noisy_BZThw, t_B, torch.zeros(1, FULL.encoder.tokens, FULL.encoder.token_width)))
    joint = 3 * (encoder + detokenizer)
    found = [Line(f"joint step at the published size, on paper {PAPER}", joint + vit + autoencoder, "TFLOP", joint, ">= 3")]
    for name, (clips, positions) in {"comprehension": COMPREHENSION, "generation": GENERATION}.items():
        language = 3 * 2 * language_weights(MISTRAL_7B) * positions / 1e12
        encoding = clips * (vit + encoder)
        found.append(Line(f"Divot-LLM's {name} step at 7 B, on paper {PAPER}", language + encoding, "TFLOP", language, ">= 3"))
    return found


PAPER: Final = "(with encoding, floor: from caches)"


def language_weights(language: UntrainedLanguage) -> int:
    """Weights that every position meets, the embedding and the output layer left out."""
    keys = language.width * language.key_heads // language.heads
    return language.depth * (2 * language.width**2 + 2 * language.width * keys + 3 * language.width * language.hidden)


def operations(call: Callable[[], object]) -> float:
    """Floating-point operations of a call, in units of 10^12."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e12


def _vit() -> FrozenViT:
    return FrozenViT.load(FULL.vit.model_copy(update={"path": None}))


def _stable_diffusion() -> FrameVAE:
    from diffusers import AutoencoderKL

    levels = 4
    model: nn.Module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
    )
    return FrameVAE(model)


def _latent(model: DivotTokenizer) -> tuple[int, ...]:
    return (FULL.detokenizer.unet.z, *model.latent_size)


def small_tokenizer() -> DivotTokenizer:
    """The small preset on the small base rung, both untrained."""
    return DivotTokenizer(SMALL, FrozenViT.load(SMALL.vit), CausalTokenizer(SMALL_4X).eval())


def scenes(count: int) -> list[bytes]:
    """Drawn videos of one window each, MP4."""
    return [encode_mp4(draw_scene(0, number, frames=SMALL.frames, size=SMALL.edge).pixels_THWC, FPS) for number in range(count)]


def decoded(videos: list[bytes]) -> Tensor:
    """Bytes (B, T, H, W, C) of one window of each video."""

    def window(video: bytes) -> "Pixels":
        (found,) = decode_clips(video, starts=[0.0], fps=float(FPS), frames=SMALL.frames, height=SMALL.edge, width=SMALL.edge)
        return found

    return torch.stack([torch.from_numpy(window(video)) for video in videos])


def pixels(video_BTHWC: Tensor) -> Tensor:
    """Floats in [-1, 1], (B, C, T, H, W)."""
    return video_BTHWC.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def stacked(stored: list[bytes]) -> Batch:
    """A batch out of its samples' bytes."""
    samples = [load(sample) for sample in stored]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def training_step(player: nn.Module) -> Step:
    """Forward, backward and AdamW on one batch."""
    optimizer = torch.optim.AdamW([weight for weight in player.parameters() if weight.requires_grad], lr=1e-4)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        loss, _ = player(batch, 0)
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    for line in [*lines(Path()), *published()]:
        print(json.dumps(asdict(line)))
