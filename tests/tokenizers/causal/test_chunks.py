"""Chunks of a video: how they are counted, joined and blended."""

from collections.abc import Callable
from itertools import count, pairwise

import pytest
import torch
from pydantic import ValidationError

from kinetok.tokenizers.base import Tokens, latent_steps
from kinetok.tokenizers.causal.autoencoder import CausalTokenizer
from kinetok.tokenizers.causal.chunks import (
    ChunkPlan,
    blend,
    decode_chunks,
    encode_chunks,
    join_latents,
    split_latents,
)
from kinetok.tokenizers.causal.grown import GrownTokenizer

MakeVideo = Callable[..., torch.Tensor]
OVERLAP = ChunkPlan(overlap=4)


@pytest.mark.parametrize("chunks", [1, 2, 4, 20])
def test_whole_chunks_hold_the_frames_of_the_paper(chunks: int) -> None:
    assert [len(span) for span in OVERLAP.spans(17 + 13 * (chunks - 1))] == [17] * chunks
    assert [len(span) for span in ChunkPlan().spans(17 * chunks)] == [17] * chunks


@pytest.mark.parametrize("overlap", [0, 1, 4, 16])
@pytest.mark.parametrize("frames", [1, 3, 4, 5, 16, 17, 18, 21, 22, 30, 31, 100])
def test_spans_cover_every_frame_and_share_exactly_the_overlap(frames: int, overlap: int) -> None:
    spans = ChunkPlan(overlap=overlap).spans(frames)
    assert (spans[0].start, spans[-1].stop) == (0, frames)
    for before, after in pairwise(spans):
        assert after.start == before.stop - overlap
        assert after.stop > before.stop


@pytest.mark.parametrize("overlap", [0, 1, 4, 16])
@pytest.mark.parametrize("frames", [1, 3, 4, 5, 16, 17, 18, 21, 22, 30, 31, 100])
def test_frames_that_come_one_at_a_time_are_cut_into_the_same_chunks(frames: int, overlap: int) -> None:
    plan = ChunkPlan(overlap=overlap)
    assert list(plan.cut(iter(range(frames)))) == [list(span) for span in plan.spans(frames)]


def test_no_more_than_a_chunk_is_read_ahead() -> None:
    source = count()
    assert next(ChunkPlan().cut(source)) == list(range(17)) and next(source) == 17
    assert list(ChunkPlan().cut([])) == []


@pytest.mark.parametrize(("temporal", "per_chunk", "of_340"), [(4, 5, 100), (8, 3, 60), (16, 2, 40)])
def test_latents_of_a_chunk_and_of_340_frames(temporal: int, per_chunk: int, of_340: int) -> None:
    assert ChunkPlan().steps(68, temporal) == [per_chunk] * 4
    assert sum(ChunkPlan().steps(340, temporal)) == of_340
    assert [latent_steps(frames, temporal) for frames in (1, 2, temporal + 1, temporal + 2)] == [1, 2, 2, 3]


def test_shared_frames_go_from_the_old_to_the_new_linearly() -> None:
    old, new = torch.zeros(1, 1, 6, 1, 1), torch.ones(1, 1, 6, 1, 1)
    video = torch.cat(list(blend([old, new, old], 3)), dim=2).flatten().tolist()
    assert video == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 0.75, 0.5, 0.25, 0, 0, 0])


@pytest.mark.parametrize("plan", [ChunkPlan(frames=9), ChunkPlan(frames=9, overlap=2)], ids=str)
@pytest.mark.parametrize("frames", [1, 2, 9, 10, 16, 23])
def test_any_length_comes_back_as_its_chunks_decoded_alone(
    shaken: GrownTokenizer, make_video: MakeVideo, frames: int, plan: ChunkPlan
) -> None:
    video = make_video(frames)
    chunks = encode_chunks(shaken, video, plan)
    assert [tokens.values.shape[2] for tokens in chunks] == plan.steps(frames, shaken.temporal)
    decoded = decode_chunks(shaken, chunks, plan)
    assert decoded.shape == video.shape
    alone = shaken.decode(shaken.encode(video[:, :, plan.spans(frames)[-1].start :]))
    torch.testing.assert_close(decoded[:, :, frames - alone.shape[2] + plan.overlap :], alone[:, :, plan.overlap :])


def test_chunks_that_agree_are_not_changed_by_blending(make_video: MakeVideo) -> None:
    video = make_video(43)
    pieces = [video[:, :, span.start : span.stop] for span in OVERLAP.spans(43)]
    torch.testing.assert_close(torch.cat(list(blend(pieces, 4)), dim=2), video)


def test_joined_latents_are_split_again(base: CausalTokenizer, make_video: MakeVideo) -> None:
    chunks = encode_chunks(base, make_video(24), OVERLAP)
    joined = join_latents(chunks)
    again = split_latents(joined, OVERLAP, frames=24, temporal=4)
    assert [tokens.frames for tokens in again] == [tokens.frames for tokens in chunks] == [17, 11]
    assert all(torch.equal(ours.values, theirs.values) for ours, theirs in zip(again, chunks, strict=True))
    with pytest.raises(ValueError, match="8x, got 9"):
        split_latents(joined, OVERLAP, frames=24, temporal=8)


def test_a_plan_that_does_not_advance_is_refused() -> None:
    with pytest.raises(ValidationError, match="nothing new"):
        ChunkPlan(frames=4, overlap=4)


def test_one_chunk_is_the_tokenizers_own(base: CausalTokenizer, make_video: MakeVideo) -> None:
    video = make_video(12)
    tokens = Tokens(base.encode(video).values, 12)
    (only,) = encode_chunks(base, video, OVERLAP)
    assert torch.equal(only.values, tokens.values)
    assert torch.equal(decode_chunks(base, [only], OVERLAP), base.decode(tokens))
