"""Feeding: sample p is the same whatever the workers, loaders and the source of features; too little data is an error that says so."""

import pickle
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from safetensors.torch import save

from kinetok.infra.artifact import Artifact, Counts
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.storage import Folder
from kinetok.infra.training import Batch
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.feed import ClipFeed
from kinetok.pipelines.data.order import sample_seed
from kinetok.pipelines.data.token_shards import SPEC_FILE, BadSample, Sample, write_shard
from kinetok.tokenizers.base import TokenSpec

Finish = Callable[[Folder, str, Counts], Artifact]
SPEC = TokenSpec(
    tokenizer="tiny", weights="ab" * 32, content="features", layout="grid", channels=2, temporal=4, spatial=4, dtype="bfloat16"
)


def features_of(clips: Artifact, finish: Finish, *, missing: tuple[str, ...] = (), spec: TokenSpec | None = None) -> Artifact:
    """Cached features whose numbers are the row numbers of the clips."""
    index, out = ClipIndex.open(clips), Folder(f"{clips.folder}-features")
    out.write_text(SPEC_FILE, (spec or SPEC.model_copy(update={"recipe": index.recipe})).model_dump_json())
    for shard, rows in enumerate(index.shards):
        clip_ids = [(place, int(row), index.rows["id"][int(row)].as_py()) for place, row in enumerate(rows)]
        samples = [Sample(p, save(tensors(row)), {"id": clip, "split": "train"}) for p, row, clip in clip_ids if clip not in missing]
        write_shard(out, shard, samples, [BadSample(clip, "corrupt", "", None) for _, _, clip in clip_ids if clip in missing])
    return finish(out, "encode", Counts())


def tensors(row: int) -> dict[str, torch.Tensor]:
    return {name: torch.full((2, 1, 1, 1), row + 0.5 * (name == "key"), dtype=torch.bfloat16) for name in ("full", "key")}


def stream(feed: ClipFeed, *, count: int, start: int = 0, batch: int = 4, world: int = 1) -> dict[str, torch.Tensor]:
    """The first `count` global micro-batches, ranks put together in order."""
    ranks = [feed.batches(start=start, batch=batch, rank=rank, world=world) for rank in range(world)]
    batches: list[Batch] = [next(rank) for _ in range(count) for rank in ranks]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_batches_hold_the_clips_of_the_split_once_an_epoch(make_clips: Any) -> None:
    clips = make_clips(6, val=(1, 4))
    index, feed = ClipIndex.open(clips), ClipFeed(clips, "train", seed=3)
    assert len(feed) == 8
    got = stream(feed, count=2)
    assert got["video_BTHWC"].dtype == torch.uint8 and got["seed_B"].tolist() == [sample_seed(3, p) for p in range(8)]
    train = [index.read_clip(row).tobytes() for row, split in enumerate(index.rows["split"].to_pylist()) if split == "train"]
    assert sorted(clip.numpy().tobytes() for clip in got["video_BTHWC"]) == sorted(train)


@pytest.mark.parametrize(("start", "batch", "world", "count"), [(0, 2, 2, 6), (0, 1, 4, 6), (8, 4, 1, 4), (8, 2, 2, 4)])
def test_the_order_does_not_depend_on_workers_or_where_it_is_resumed(
    make_clips: Any, start: int, batch: int, world: int, count: int
) -> None:
    feed = ClipFeed(make_clips(5), "train", seed=1)
    whole = stream(feed, count=6)
    part = stream(feed, count=count, start=start, batch=batch, world=world)
    assert same(part, {name: tensor[start : start + 4 * count] for name, tensor in whole.items()})


def test_loader_processes_change_nothing(make_clips: Any) -> None:
    clips = make_clips(3)
    assert same(stream(ClipFeed(clips, "train", 1), count=3), stream(ClipFeed(clips, "train", 1, loaders=1), count=3))


def test_cached_features_come_with_their_clips_in_the_same_order(make_clips: Any, finish: Finish) -> None:
    clips = make_clips(5)
    plain, cached = ClipFeed(clips, "train", 1), ClipFeed(clips, "train", 1, features_of(clips, finish))
    without, with_features = stream(plain, count=5), stream(cached, count=5)
    assert same(without, {name: with_features[name] for name in without})
    assert with_features["full_BDthw"].dtype == torch.float32 and with_features["full_BDthw"].shape == (20, 2, 1, 1, 1)
    index = ClipIndex.open(clips)
    rows = {index.read_clip(row).tobytes(): row for row in range(len(index))}
    assert [rows[clip.numpy().tobytes()] for clip in with_features["video_BTHWC"]] == with_features["full_BDthw"][:, 0, 0, 0, 0].tolist()
    assert torch.equal(with_features["key_BDthw"], with_features["full_BDthw"] + 0.5)


def test_clips_without_features_leave_the_order(make_clips: Any, finish: Finish) -> None:
    clips = make_clips(3)
    feed = ClipFeed(clips, "train", 1, features_of(clips, finish, missing=("video-001/0",)))
    assert len(feed) == 5
    assert sorted(stream(feed, count=1, batch=5)["full_BDthw"][:, 0, 0, 0, 0].tolist()) == [0, 1, 3, 4, 5]


def test_a_feed_pickles_small_after_use(make_clips: Any) -> None:
    feed = ClipFeed(make_clips(3), "train", 1)
    first = next(feed.batches(start=0, batch=2, rank=0, world=1))
    again = pickle.loads(pickle.dumps(feed))
    assert same(first, next(again.batches(start=0, batch=2, rank=0, world=1)))
    assert "_opened" not in vars(pickle.loads(pickle.dumps(feed)))


def test_too_little_data_is_an_error_that_says_so(make_clips: Any) -> None:
    clips = make_clips(2)
    with pytest.raises(DataError, match="no clips in the val split"):
        len(ClipFeed(clips, "val", 1))
    with pytest.raises(DataError, match="has 4 samples, a global batch needs 6"):
        ClipFeed(clips, "train", 1).batches(start=0, batch=3, rank=0, world=2)


def test_validation_may_be_smaller_than_a_batch(make_clips: Any) -> None:
    feed = ClipFeed(make_clips(2, val=(1,)), "val", 1)
    assert len(feed) == 2
    seeds = stream(feed, count=1, batch=3)["seed_B"].tolist()
    assert seeds == [sample_seed(1, p) for p in range(3)]


def test_a_clip_that_no_longer_decodes_is_named(make_clips: Any) -> None:
    feed = ClipFeed(make_clips(2, bad=(1,)), "train", 1)
    with pytest.raises(DataError, match="clip video-001/"):
        list(islice(feed.batches(start=0, batch=4, rank=0, world=1), 1))


@pytest.mark.parametrize(("room", "epochs_decoded"), [(2**28, 1), (0, 3)])
def test_a_split_that_fits_into_memory_is_decoded_once_and_is_the_same(
    make_clips: Any, monkeypatch: pytest.MonkeyPatch, room: int, epochs_decoded: int
) -> None:
    clips = make_clips(4)
    expected = stream(ClipFeed(clips, "train", 1), count=6)
    decoded: list[int] = []
    read = ClipIndex.read_clip

    def counted(index: ClipIndex, row: int) -> Any:
        decoded.append(row)
        return read(index, row)

    monkeypatch.setattr("kinetok.pipelines.data.feed.HELD_BYTES", room)
    monkeypatch.setattr(ClipIndex, "read_clip", counted)
    assert same(stream(ClipFeed(clips, "train", 1), count=6), expected)
    assert len(expected["seed_B"]) == 3 * len(set(decoded)) and len(decoded) == epochs_decoded * len(set(decoded))


def test_features_of_other_pixels_or_content_are_refused(make_clips: Any, finish: Finish) -> None:
    clips = make_clips(2)
    recipe = ClipIndex.open(clips).recipe
    other = SPEC.model_copy(update={"recipe": recipe.model_copy(update={"fps": 4.0})})
    with pytest.raises(ContractError, match="made of other pixels"):
        len(ClipFeed(clips, "train", 1, features_of(clips, finish, spec=other)))
    with pytest.raises(ContractError, match="holds tokens"):
        len(ClipFeed(clips, "train", 1, features_of(clips, finish, spec=SPEC.model_copy(update={"content": "tokens", "recipe": recipe}))))
