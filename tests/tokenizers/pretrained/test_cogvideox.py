"""CogVideoX: lengths that the class would silently change are padded or refused."""

import pytest
import torch
from tests.tokenizers.pretrained.conftest import Adapt, MakeModel, MakeVideo

from kinetok.tokenizers.base import Tokens
from kinetok.tokenizers.causal.chunks import ChunkPlan, encode_chunks, join_latents, split_latents


def test_videos_are_padded_to_what_comes_back_whole(make_model: MakeModel, adapt: Adapt, make_video: MakeVideo) -> None:
    model, video = make_model("cogvideox"), make_video(5)
    assert model.decode(model.encode(video).latent_dist.mode()).sample.shape[2] == 8  # what the class makes of 5 frames
    adapter = adapt(model)
    tokens = adapter.encode(video)
    assert (tokens.values.shape[2], adapter.geometry.legal_frames(5), adapter.decode(tokens).shape[2]) == (3, 9, 5)


def test_chunks_that_are_padded_to_its_window_are_taken_apart_again(make_model: MakeModel, adapt: Adapt, make_video: MakeVideo) -> None:
    adapter, plan = adapt(make_model("cogvideox")), ChunkPlan()
    geometry, chunks = adapter.geometry, encode_chunks(adapter, make_video(22), plan)
    assert [tokens.values.shape[2] for tokens in chunks] == plan.steps(22, geometry.temporal, geometry.window) == [5, 3]
    again = split_latents(join_latents(chunks), plan, frames=22, temporal=geometry.temporal, window=geometry.window)
    assert all(torch.equal(ours.values, theirs.values) for ours, theirs in zip(again, chunks, strict=True))


def test_what_it_cannot_take_is_refused(make_model: MakeModel, adapt: Adapt, make_video: MakeVideo) -> None:
    adapter = adapt(make_model("cogvideox"))
    with pytest.raises(ValueError, match="odd number of steps; 2 would come back as others"):
        adapter.decode(Tokens(torch.zeros(1, 4, 2, 2, 2), frames=5))
    with pytest.raises(ValueError, match="multiples of 8, got 28 x 32"):
        adapter.encode(make_video(5)[:, :, :, :28])
