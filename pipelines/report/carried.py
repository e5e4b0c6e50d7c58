"""The figures of `reconstruct`: how much of a video the tokens of Divot carry, against wrong tokens and none.

A clip is shown from its own tokens, from those of a clip of another video (`strangers`), and from those of a grey one (`CONDITIONS`),
with the same noise each time. The v-loss is that of training, averaged over the same steps for every clip; PSNR and SSIM are of sampled
videos. A diffusion decoder is no copying machine: what tells that the tokens are used is the distance between the conditions. What the
frozen autoencoder alone loses bounds all of them.

Legend: B clips, W windows of a clip, C T H W colours, frames, rows, columns, N tokens, D width, Z t h w latents.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinetok.infra.compiling import compile_parts
from kinetok.infra.stage import Resources
from kinetok.pipelines.data.order import sample_seed
from kinetok.pipelines.report.ladder import PSNR_CAP, STORED, Clips
from kinetok.tokenizers.base import Tokens, standing
from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.divot.training import draw, mean_v_loss
from kinetok.tokenizers.metrics import clip_psnr, clip_ssim

OWN, SHUFFLED, NONE = "its own tokens", "another clip's tokens", "no tokens"
CONDITIONS = (OWN, SHUFFLED, NONE)


@dataclass(frozen=True)
class Shown:
    """One clip, and what was made of it under each condition."""

    row: int
    original_CTHW: Tensor
    copy_CTHW: Tensor
    """Through the autoencoder alone."""
    made_CTHW: dict[str, Tensor]
    v_loss: dict[str, float]


def shown(model: DivotTokenizer, clips: Clips, resources: Resources, sampler: SamplerConfig, seed: int) -> Iterator[Shown]:
    """Every clip of `clips`; those that can no longer be read are left out."""
    device = torch.device("cuda" if resources.gpus and torch.cuda.is_available() else "cpu")
    work = _Work(model.to(device).eval(), sampler, seed, device)
    if resources.compile:
        compile_parts(standing(model))
    arithmetic = STORED[resources.dtype]
    precision = torch.autocast(device.type, dtype=arithmetic, enabled=arithmetic != torch.float32)
    tokens: dict[int, Tensor] = {}
    for rows, video_BCTHW in clips.batches():
        with precision:
            tokens |= dict(zip(rows, model.encode(video_BCTHW.to(device)).values.cpu(), strict=True))
    other = strangers(list(tokens), clips.index.rows["video"].take(list(tokens)).to_pylist())
    for rows, video_BCTHW in clips.batches():
        with torch.no_grad(), precision:
            conditions = {
                OWN: torch.stack([tokens[row] for row in rows]),
                SHUFFLED: torch.stack([tokens[other[row]] for row in rows]),
                NONE: work.null_tokens(tokens[rows[0]]).expand(len(rows), -1, -1),
            }
            made = list(work.batch(rows, video_BCTHW, conditions))
        # Outside of the block, or whoever takes them would compute in its type too.
        yield from made


def strangers(rows: Sequence[int], videos: Sequence[str]) -> dict[int, int]:
    """For each row one of another video, half the rows further or from there on the next: neighbours are of one video, or of one source.

    Where all are of one video, the row half of them further.
    """
    count, half = len(rows), len(rows) // 2
    found = {}
    for place, row in enumerate(rows):
        others = ((place + half + more) % count for more in range(count))
        found[row] = rows[next((other for other in others if videos[other] != videos[place]), (place + half) % count)]
    return found


@dataclass(frozen=True)
class _Work:
    model: DivotTokenizer
    sampler: SamplerConfig
    seed: int
    device: torch.device

    def null_tokens(self, like_ND: Tensor) -> Tensor:
        """Tokens of a grey clip, as many as `like_ND` has: (1, windows * N, D)."""
        null_ND = self.model.null_tokens().cpu()
        return null_ND.repeat(len(like_ND) // len(null_ND), 1)[None]

    def batch(self, rows: Sequence[int], video_BCTHW: Tensor, conditions: dict[str, Tensor]) -> Iterator[Shown]:
        model, frames = self.model, video_BCTHW.shape[2]
        seeds = [sample_seed(self.seed, row) for row in rows]
        windows_BCTHW = model.windows(video_BCTHW.to(self.device))
        latent = model.lower.encode(windows_BCTHW)
        copy_BCTHW = torch.unflatten(model.lower.decode(latent), 0, (len(rows), -1)).transpose(1, 2).flatten(2, 3)[:, :, :frames]
        made, losses = {}, {}
        for name, token_BND in conditions.items():
            given = token_BND.to(self.device)
            made[name] = model.decode(Tokens(given, frames), seeds, self.sampler).float().cpu().clamp(-1, 1)
            losses[name] = self._v_loss(latent.values, given, seeds)
        for place, row in enumerate(rows):
            yield Shown(
                row,
                video_BCTHW[place],
                copy_BCTHW[place].float().cpu().clamp(-1, 1),
                {name: video[place] for name, video in made.items()},
                {name: float(loss_B[place]) for name, loss_B in losses.items()},
            )

    def _v_loss(self, latent_BZthw: Tensor, token_BND: Tensor, seeds: Sequence[int]) -> Tensor:
        """Mean over the windows of each clip, (B,)."""
        detokenizer, window = self.model.detokenizer, self.model.config.encoder.tokens
        each = [seed for seed in seeds for _ in range(len(latent_BZthw) // len(seeds))]
        noise_BZthw = draw(each, latent_BZthw.shape[1:], self.device).noise_BZThw
        windows_BND = torch.unflatten(token_BND, 1, (-1, window)).flatten(0, 1)
        stride = self.sampler.stride
        stride_B = None if stride is None else torch.full((len(noise_BZthw),), stride, device=self.device)
        loss_B = mean_v_loss(detokenizer, detokenizer.normalise(latent_BZthw), windows_BND, noise_BZthw, stride_B)
        return loss_B.view(len(seeds), -1).mean(1).cpu()


def psnr_and_ssim(video_CTHW: Tensor, target_CTHW: Tensor) -> tuple[float, float]:
    """Of one clip; PSNR in dB, at most `PSNR_CAP`."""
    psnr = clip_psnr(video_CTHW[None], target_CTHW[None]).clamp(max=PSNR_CAP)
    return float(psnr), float(clip_ssim(video_CTHW[None], target_CTHW[None]))
