"""LTX: one variance for all channels, statistics in buffers, and decoders that are no function of the latent."""

import pytest
import torch
from tests.tokenizers.pretrained.conftest import Adapt, MakeModel


def test_statistics_come_from_the_weights(make_model: MakeModel, adapt: Adapt) -> None:
    model = make_model("ltx", scaling_factor=0.5)
    model.latents_mean += 3
    model.latents_std *= 2
    adapter = adapt(model)
    assert torch.equal(adapter.normalise(torch.full((1, 8, 2, 1, 1), 7.0)), torch.ones(1, 8, 2, 1, 1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"decoder_inject_noise": (True,) * 5}, "adds noise as it decodes"), ({"encoder_causal": False}, "an encoder that looks ahead")],
)
def test_what_is_no_lower_stage_is_refused(changes: dict[str, object], reason: str, make_model: MakeModel, adapt: Adapt) -> None:
    with pytest.raises(ValueError, match=reason):
        adapt(make_model("ltx", **changes))


def test_a_causal_decoder_is_said_to_be_one(make_model: MakeModel, adapt: Adapt) -> None:
    assert adapt(make_model("ltx", decoder_causal=True)).geometry.causal_decoder


def test_the_class_counts_its_compression_as_kinetok_does(make_model: MakeModel, adapt: Adapt) -> None:
    model = make_model("ltx")
    adapter = adapt(model)
    assert (adapter.temporal, adapter.spatial) == (model.temporal_compression_ratio, model.spatial_compression_ratio)
