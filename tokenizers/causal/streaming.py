"""Encoding and decoding a stream: whatever pieces a video comes in, its latents and frames are those of one call, to rounding.

A stream object is the state of one stream: what the causal convolutions look back on, and the frames that do not yet fill a latent
step. The model holds nothing of it, so any number of streams share one, and memory does not grow with the length of the video. Not
covered: rungs on models that keep no such state (their `next_features` says so); `chunks` serves those.

Legend: B clips, C pixel channels, T H W frames, rows, columns, Z latent channels, t h w latent positions.
"""

import torch
from torch import Tensor

from kinetok.tokenizers.base import check_video
from kinetok.tokenizers.causal.layers import Memory
from kinetok.tokenizers.causal.rung import Rung


class EncodeStream:
    """Frames in, latent steps out once their last frame is there: `[stream.push(piece) for piece in pieces] + [stream.finish()]`."""

    def __init__(self, model: Rung) -> None:
        self.model = model
        self.frames = 0
        """Pushed so far: in the end `Tokens.frames` of the whole."""
        self._memories: list[Memory] = [{} for _ in range(model.rates)]
        self._waiting_BCTHW: Tensor | None = None
        self._finished = False

    def push(self, video_BCTHW: Tensor) -> Tensor:
        """Posterior means (B, Z, t, h, w), float32, of the latent steps that these frames, one or more, complete; t may be 0."""
        self._require_open()
        check_video(video_BCTHW, self.model.spatial)
        self.frames += video_BCTHW.shape[2]
        if self._waiting_BCTHW is not None:
            video_BCTHW = torch.cat([self._waiting_BCTHW, video_BCTHW], dim=2)
        first = 0 if self._memories[0] else 1  # it is a latent step by itself
        surplus = (video_BCTHW.shape[2] - first) % self.model.temporal
        ready_BCTHW, waiting_BCTHW = torch.split(video_BCTHW, [video_BCTHW.shape[2] - surplus, surplus], dim=2)
        self._waiting_BCTHW = waiting_BCTHW.clone()
        return self._encode(ready_BCTHW)

    def finish(self) -> Tensor:
        """The step that frames still wait for, if any do, completed by repeating the last frame."""
        self._require_open()
        if self._waiting_BCTHW is None:
            raise ValueError("nothing was pushed, so there is nothing to finish")
        self._finished = True
        waiting_BCTHW, self._waiting_BCTHW = self._waiting_BCTHW, None
        missing = -waiting_BCTHW.shape[2] % self.model.temporal
        return self._encode(torch.cat([waiting_BCTHW, waiting_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2))

    def _require_open(self) -> None:
        if self._finished:
            raise ValueError(
                f"this stream was finished after {self.frames} frames: what follows them is a stream of its own, EncodeStream(model)"
            )

    @torch.no_grad()
    def _encode(self, video_BCTHW: Tensor) -> Tensor:
        B, _, T, H, W = video_BCTHW.shape
        if not T:
            return video_BCTHW.new_empty(B, self.model.heads.z, 0, H // self.model.spatial, W // self.model.spatial)
        (features_BDthw,) = self.model.next_features(video_BCTHW, self._memories)
        return self.model.heads.posterior(features_BDthw, self._memories[0]).mean_BZthw


class DecodeStream:
    """Latent steps in, their frames out: one for the first step and `model.temporal` for each later one, padding not cut off."""

    def __init__(self, model: Rung) -> None:
        self.model = model
        self._memory: Memory = {}

    @torch.no_grad()
    def push(self, latent_BZthw: Tensor) -> Tensor:
        """The video (B, 3, T, H, W) of the next steps, any number, clamped to [-1, 1]."""
        B, _, t, h, w = latent_BZthw.shape
        if not t:
            return latent_BZthw.new_empty(B, 3, 0, h * self.model.spatial, w * self.model.spatial)
        return self.model.next_frames(self.model.heads.decoder_features(latent_BZthw, self._memory), self._memory).clamp(-1, 1)
