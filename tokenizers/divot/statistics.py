"""Statistics of the clips that a new Divot tokenizer is trained on: of the features it reads, and of the latents its de-tokenizer makes.

Both are measured once, before the first step, on the same few clips whether those come from caches or are made on the fly, so that both
ways train alike. An image autoencoder brings the scale of its latents along, which is kept.

Legend: B clips, T frames seen, N patches, D width, Z latent channels, t h w latent positions.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kinetok.tokenizers.base import Batch
from kinetok.tokenizers.divot.frame_vae import FrameVAE
from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
from kinetok.tokenizers.divot.training import features, latents

Statistics = Mapping[str, Tensor]
"""Buffers of a `DivotTokenizer` by name."""
BUFFERS = ("encoder.mean_ND", "encoder.std_D", "detokenizer.mean_Z", "detokenizer.std_Z")


@torch.no_grad()
def measure(model: DivotTokenizer, batches: Iterable[Batch]) -> Statistics:
    """Fit the statistics of `model` to the clips in `batches`, which hold what training batches do; returns them for other copies.

    Those of the features only where its encoder standardises them.
    """
    found = [(features(model, batch).float(), latents(model, batch)) for batch in batches]
    if model.config.encoder.standardise:
        model.encoder.fit_statistics(torch.cat([vit_BTND for vit_BTND, _ in found]))
    if not isinstance(model.lower, FrameVAE):
        latent_ZBthw = torch.cat([latent_BZthw for _, latent_BZthw in found]).transpose(0, 1).flatten(1)
        model.detokenizer.set_statistics(latent_ZBthw.mean(1), latent_ZBthw.std(1))
    state = model.state_dict()
    return {name: state[name] for name in BUFFERS}


def give(model: DivotTokenizer, statistics: Statistics) -> DivotTokenizer:
    """`model` with the statistics that another copy measured."""
    for name, values in statistics.items():
        model.get_buffer(name).copy_(values)
    return model
