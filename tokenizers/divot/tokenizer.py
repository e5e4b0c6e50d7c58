"""`DivotTokenizer`: two seconds of video to 64 continuous tokens, and tokens to video by diffusion (Divot, arXiv 2412.04432).

    16 frames -> five of them -> frozen vision transformer -> `TokenEncoder` -> tokens
    tokens -> `Detokenizer` -> latents of a frozen autoencoder -> 16 frames

A longer video is cut into windows of 16 frames whose tokens follow one another; the last window is filled up with its last frame. The
frozen vision transformer and the frozen autoencoder (`lower`) are no part of the trained weights and are saved in folders beside them.
Decoding draws noise, from seeds: it shows what the tokens say, not the very pixels that were encoded.

Not covered: training (`training.py`), which frames of a file are a window (`frames.py`), released weights (`checkpoints.py`).

Legend: B clips, C channels, T H W pixels, F frames seen by the vision transformer, P patches, N tokens, D width, Z T h w latents.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor

from kinetok.tokenizers.base import Count, LowerStage, ModelConfig, Tokenizer, Tokens, TokenSpec, check_video, weights_digest
from kinetok.tokenizers.divot import frames
from kinetok.tokenizers.divot.ddim import SamplerConfig
from kinetok.tokenizers.divot.detokenizer import Detokenizer, DetokenizerConfig
from kinetok.tokenizers.divot.encoder import EncoderConfig, TokenEncoder
from kinetok.tokenizers.divot.frame_vae import FrameVAE
from kinetok.tokenizers.divot.vit import ClipFeatures, FrozenViT, VitConfig

VIT_FOLDER = "vit"
LOWER_FOLDER = "lower"
WINDOW_SEEDS = 1_000_003
"""From the seed of one window of a video to that of the next."""

LatentSpace: TypeAlias = LowerStage | FrameVAE
"""What the de-tokenizer can stand on: a rung of the ladder, an adapter, or an image autoencoder on every frame."""


class DivotConfig(ModelConfig):
    """Numbers of a Divot tokenizer; the defaults are the published ones."""

    kind: Literal["divot"] = "divot"
    grows: ClassVar[bool] = True
    frames: Count = frames.FRAMES
    """Frames of a window: what one set of tokens stands for, and what the de-tokenizer shows."""
    edge: Count = 256
    """Pixels along an edge of a frame."""
    vit: VitConfig = VitConfig()
    encoder: EncoderConfig = EncoderConfig()
    detokenizer: DetokenizerConfig = DetokenizerConfig()
    sampler: SamplerConfig = SamplerConfig()
    """How `decode` samples unless told otherwise."""

    @property
    def spatial(self) -> int:
        """Frames are `edge` pixels square."""
        return self.edge


class DivotTokenizer(Tokenizer):
    """Frozen vision transformer, token encoder, de-tokenizer, on a frozen autoencoder."""

    config_class = DivotConfig
    config: DivotConfig
    growth_obstacle = "its tokens are no grid"

    def __init__(self, config: DivotConfig, vit: FrozenViT, lower: LatentSpace) -> None:
        super().__init__()
        channels = lower.geometry.channels
        if channels != config.detokenizer.unet.z:
            raise ValueError(f"detokenizer.unet.z: the autoencoder has {channels} latent channels, the config {config.detokenizer.unet.z}")
        self.config = config
        self._hidden = (vit, lower.requires_grad_(False).eval())
        self.encoder = TokenEncoder(config.encoder, config.vit.width, config.vit.patches)
        self.detokenizer = Detokenizer(config.detokenizer, config.encoder.token_width)
        if isinstance(lower, FrameVAE):
            self.detokenizer.std_Z.fill_(1 / lower.config.scaling_factor)

    @property
    def vit(self) -> FrozenViT:
        """The frozen vision transformer."""
        return self._hidden[0]

    @property
    def lower(self) -> LatentSpace:
        """The frozen autoencoder."""
        return self._hidden[1]

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Latent steps, rows and columns of one window."""
        geometry = self.lower.geometry
        return geometry.latent_steps(self.config.frames), self.config.edge // geometry.spatial, self.config.edge // geometry.spatial

    def spec(self) -> TokenSpec:
        """A sequence of continuous tokens; `temporal` and `spatial` are those of the window that all its tokens stand for."""
        return TokenSpec(
            tokenizer=self.config.kind,
            weights=self.digest(),
            layout="sequence",
            channels=self.config.encoder.token_width,
            temporal=self.config.frames,
            spatial=self.config.edge,
        )

    def digest(self) -> str:
        """sha256 over the weights that decide the tokens: training the de-tokenizer alone leaves cached tokens valid."""
        return hashlib.sha256(f"{self.vit.digest()} {weights_digest(self.encoder)}".encode()).hexdigest()

    def identity(self) -> str:
        """The de-tokenizer and the autoencoder as well."""
        return hashlib.sha256(f"{self.digest()} {weights_digest(self.detokenizer)} {self.lower.identity()}".encode()).hexdigest()

    @torch.no_grad()
    def encode(self, video_BCTHW: Tensor) -> Tokens:
        """Tokens (B, windows * N, D), float32, of a video (B, 3, T, edge, edge) in [-1, 1]; ValueError on any other shape."""
        tokens_BND: Tensor = self.encoder(self.vit_features(video_BCTHW)).float()
        return Tokens(torch.unflatten(tokens_BND, 0, (len(video_BCTHW), -1)).flatten(1, 2), frames=video_BCTHW.shape[2])

    def feature_spec(self) -> TokenSpec:
        """Features of the vision transformer, of clips of one window."""
        return ClipFeatures(self.vit, self.config.encoder.frames).spec()

    @torch.no_grad()
    def encode_features(self, features: Mapping[str, Tensor], frames: int) -> Tokens:
        return Tokens(self.encoder(features["tokens"]).float(), frames)

    def vit_features(self, video_BCTHW: Tensor) -> Tensor:
        """What the token encoder is trained from, (B * windows, F, P, D): features of five frames of each window."""
        return self.vit.seen(self.windows(video_BCTHW), self.config.encoder.frames)

    def windows(self, video_BCTHW: Tensor) -> Tensor:
        """The windows of every video one after the other, (B * windows, 3, `frames`, H, W)."""
        check_video(video_BCTHW, self.config.edge)
        if video_BCTHW.shape[3] != self.config.edge or video_BCTHW.shape[4] != self.config.edge:
            raise ValueError(f"frames must be {self.config.edge} pixels square, got {tuple(video_BCTHW.shape[3:])}: crop or resize first")
        length = self.config.frames
        missing = -video_BCTHW.shape[2] % length
        padded_BCTHW = torch.cat([video_BCTHW, video_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        return torch.unflatten(padded_BCTHW, 2, (-1, length)).transpose(1, 2).flatten(0, 1)

    def null_tokens(self) -> Tensor:
        """Tokens of no condition, (N, D): those of a grey window, as the published sampler has them."""
        with torch.no_grad():
            tokens_1ND: Tensor = self.encoder(self.grey_features())
        return tokens_1ND[0].float()

    def grey_features(self) -> Tensor:
        """Features of a grey window, (1, F, P, D)."""
        weight = next(self.encoder.parameters())
        grey_FCHW = torch.zeros(1, 3, self.config.edge, self.config.edge, device=weight.device)
        grey_FPD: Tensor = self.vit(grey_FCHW)
        return grey_FPD.repeat(self.config.encoder.frames, 1, 1)[None]

    @torch.no_grad()
    def decode(self, tokens: Tokens, seeds: Sequence[int] | None = None, sampler: SamplerConfig | None = None) -> Tensor:
        """A video (B, 3, tokens.frames, edge, edge) in [-1, 1] that shows what the tokens say.

        `seeds`, one a video, decide the noise (all 0 where left out); the windows of a video take seeds of their own from it.
        """
        videos, window = len(tokens.values), self.config.encoder.tokens
        token_BND = torch.unflatten(tokens.values, 1, (-1, window))
        count = token_BND.shape[1]
        each = [seed + WINDOW_SEEDS * place for seed in seeds or [0] * videos for place in range(count)]
        latent_BZThw = self.detokenizer.sample(
            token_BND.flatten(0, 1), self.null_tokens(), self.latent_size, sampler or self.config.sampler, each
        )
        video_BCTHW = self.lower.decode(Tokens(latent_BZThw, frames=self.config.frames))
        whole_BCTHW = torch.unflatten(video_BCTHW, 0, (videos, count)).transpose(1, 2).flatten(2, 3)
        return whole_BCTHW[:, :, : tokens.frames]

    def save_pretrained(self, folder: str | Path) -> None:
        """As for every tokenizer, with the frozen models in `vit/` and `lower/`: the folder is whole by itself."""
        super().save_pretrained(folder)
        self.vit.save_pretrained(Path(folder) / VIT_FOLDER)
        self.lower.save_pretrained(Path(folder) / LOWER_FOLDER)

    @classmethod
    def build(cls, config: ModelConfig, lower: Tokenizer | None = None) -> Self:
        """A fresh model on the vision transformer that `config` names and the autoencoder `lower`."""
        assert isinstance(config, DivotConfig)
        return cls(config, FrozenViT.load(config.vit), latent_space(lower))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model saved in `folder` with its frozen models, all in eval mode."""
        from kinetok.tokenizers.catalog import load  # the catalog imports this module

        config = cls.read_config(folder)
        assert isinstance(config, DivotConfig)
        vit = FrozenViT.load(config.vit.model_copy(update={"path": str(Path(folder) / VIT_FOLDER)}))
        return cls(config, vit, latent_space(load(Path(folder) / LOWER_FOLDER))).read_weights(folder)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Device and type moves reach the hidden models too."""
        for hidden in self._hidden:
            hidden._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def latent_space(lower: Tokenizer | None) -> LatentSpace:
    """`lower`, where the de-tokenizer can stand on it; ValueError where it cannot."""
    if isinstance(lower, LowerStage | FrameVAE):
        return lower
    found = "none is given" if lower is None else f"a {lower.config.kind!r} model is not one"
    raise ValueError(f"a 'divot' model needs a frozen autoencoder with a grid of latents as lower: {found}")
