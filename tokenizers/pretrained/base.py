"""What the adapters of diffusers' video autoencoders share: loading, saving, identity, normalised latents, and trunks without heads.

An adapter holds one diffusers model whole and unchanged in `model`, and reads and writes diffusers' own format (`config.json` with
`_class_name`, and safetensors): a folder that kinetok saves opens in diffusers, and the other way round. Tokens are the latents that
the class itself encodes to; `normalise` turns them into what diffusion models trained on the class expect. Trunk features are what
comes out of the encoder's last norm: activation, `conv_out` and `quant_conv` are the head to the latent, `post_quant_conv` and
`conv_in` the head from it.

Not covered: classes without an adapter, diffusers' tiling (its blended tiles are not the untiled result), downloads
(`kinetok.pipelines.models`). diffusers takes seconds to import, so nothing but loading a model does it.

Legend: B clips, C pixel channels, T H W frames, rows, columns, D trunk width, Z latent channels, t h w latent positions.
"""

import copy
import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from kinetok.tokenizers.base import CONFIG_FILE, ModelConfig, Tokenizer, import_transformers, weights_digest
from kinetok.tokenizers.card import CARD_FILE, model_card
from kinetok.tokenizers.causal.layers import Memory, pad_frames
from kinetok.tokenizers.causal.posterior import LOG_VARIANCE_RANGE, Heads, Posterior
from kinetok.tokenizers.causal.rung import Rung

CLASS_KEY = "_class_name"
"""Where a `config.json` of diffusers says of which class the model is."""


class PretrainedConfig(ModelConfig):
    """A diffusers model's own settings: those that kinetok reads by name and type, all others as they are."""

    model_config = ConfigDict(extra="allow")

    latents_mean: tuple[float, ...] | None = None
    """Of each latent channel, or of each channel at each of the first latent steps, channel by channel."""
    latents_std: tuple[float, ...] | None = None
    scaling_factor: float = 1.0


class Pretrained(Tokenizer):
    """A diffusers video autoencoder. Subclasses name it, and refuse in `__init__` the settings they cannot carry."""

    config: PretrainedConfig
    class_name: ClassVar[str]
    """Of diffusers, as `config.json` names it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config = cast(PretrainedConfig, self.config_class.model_validate(settings(model)))
        self.model = model

    @property
    def z(self) -> int:
        """Latent channels."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """The model in `folder`, in eval mode and float32; ValueError where weights are missing, unexpected or of another shape."""
        import_transformers()
        source = getattr(importlib.import_module("diffusers"), cls.class_name)
        model, found = source.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
        wrong = [f"{problem} {', '.join(map(str, names))}" for problem, names in found.items() if names]
        if wrong:
            raise ValueError(f"{folder} holds other weights than its {CONFIG_FILE} describes: {'; '.join(wrong)}")
        return cls(model).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in diffusers' format, without the address it came from, and the model card."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        file = Path(folder) / CONFIG_FILE
        kept = {name: value for name, value in json.loads(file.read_text()).items() if name != "_name_or_path"}
        file.write_text(json.dumps(kept, indent=1, sort_keys=True))
        (Path(folder) / CARD_FILE).write_text(model_card(self))

    def digest(self) -> str:
        """sha256 over weights and settings, which decide the tokens together."""
        return hashlib.sha256(f"{weights_digest(self.model)} {self.config.model_dump_json()}".encode()).hexdigest()

    def normalise(self, latent_BZthw: Tensor) -> Tensor:
        """(latent - mean) / std * scaling factor, by the statistics that the class comes with."""
        mean, scale = self._statistics(latent_BZthw)
        return (latent_BZthw - mean) * scale

    def denormalise(self, latent_BZthw: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        mean, scale = self._statistics(latent_BZthw)
        return latent_BZthw / scale + mean

    def _statistics(self, latent_BZthw: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale, (1, Z, 1 or t, 1, 1)."""
        steps = latent_BZthw.shape[2]
        mean = self._by_step(self.config.latents_mean or [0.0] * self.z, steps).to(latent_BZthw)
        std = self._by_step(self.config.latents_std or [1.0] * self.z, steps).to(latent_BZthw)
        return mean, self.config.scaling_factor / std

    def _by_step(self, numbers: Sequence[float], steps: int) -> Tensor:
        table_1Zt11 = torch.tensor(numbers).view(1, self.z, -1, 1, 1)
        if 1 < table_1Zt11.shape[2] < steps:
            raise ValueError(f"{self.class_name} has statistics for its first {table_1Zt11.shape[2]} latent steps, not for {steps}")
        return table_1Zt11[:, :, :steps]


class PretrainedRung(Pretrained, Rung):
    """An adapter that can be grown upon: its trunks are what its class computes, its heads the class's own convolutions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.heads = self.build_heads()

    def build_heads(self) -> Heads:
        """The class's own convolutions between the trunks: shared with `model`, copied by whoever grows on this rung."""
        raise NotImplementedError

    def trunk(self, video_BCTHW: Tensor) -> Tensor:
        """Trunk features (B, D, t, h, w) of a video of a legal length."""
        raise NotImplementedError

    @property
    def z(self) -> int:
        return self.heads.z

    def feature_ladder(self, video_BCTHW: Tensor, rates: int) -> list[Tensor]:
        padded_BCTHW = pad_frames(video_BCTHW, self.temporal * 2 ** (rates - 1))
        return [self.trunk(padded_BCTHW[:, :, :: 2**rate]) for rate in range(rates)]


class ConvHeads(Heads):
    """Heads out of the convolutions of a class: features -> moments, and latent -> decoder features."""

    def __init__(self, z: int, to_moments: nn.Sequential, from_latent: nn.Sequential) -> None:
        super().__init__()
        self.z, self.to_moments, self.from_latent = z, to_moments, from_latent

    def posterior(self, features_BDthw: Tensor, memory: Memory | None = None) -> Posterior:
        moments = looking_back(self.to_moments, features_BDthw, memory)
        mean, log_variance = self.split(moments.to(torch.promote_types(moments.dtype, torch.float32)))
        return Posterior(mean, log_variance.clamp(*LOG_VARIANCE_RANGE))

    def split(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance, (B, Z, t, h, w) each, out of what the head emits."""
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance

    def decoder_features(self, latent_BZthw: Tensor, memory: Memory | None = None) -> Tensor:
        return looking_back(self.from_latent, latent_BZthw.to(next(self.from_latent.parameters()).dtype), memory)


def looking_back(head: nn.Module, x_BCthw: Tensor, memory: Memory | None) -> Tensor:
    """A head that sees each step and the two before it, which `memory` holds for the next piece of a stream."""
    seen_BCthw = torch.cat([memory[head], x_BCthw], dim=2) if memory and head in memory else x_BCthw
    if memory is not None:
        memory[head] = seen_BCthw[:, :, -2:].clone()
    y_BCthw: Tensor = head(seen_BCthw)
    return y_BCthw[:, :, seen_BCthw.shape[2] - x_BCthw.shape[2] :]


class Passage(nn.Module):
    """Stands where a trunk's head was taken off: returns its input, whatever state comes with it."""

    def forward(self, x_BCTHW: Tensor, *_: object, **__: object) -> Tensor:
        return x_BCTHW


def without(module: nn.Module, **parts: nn.Module) -> nn.Module:
    """A view of `module` with other `parts` in place of its own. Weights are shared and `module` stays as it is."""
    view = copy.copy(module)
    view._modules = {**module._modules, **parts}
    return view


def settings(model: nn.Module) -> dict[str, object]:
    """The settings of a diffusers model, without addresses and versions."""
    return {name: value for name, value in json.loads(model.to_json_string()).items() if not name.startswith("_")}  # type: ignore[operator]
