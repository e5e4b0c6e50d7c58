"""Feeding a generator: latents come with their own text in the order of every feed; what does not belong together is refused."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from tests.pipelines.data.test_feed import same, stream

from kinetok.infra.artifact import Artifact, Counts, InputInfo
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.storage import Folder
from kinetok.llm.text import TextConfig
from kinetok.pipelines.data.latent_feed import LatentFeed, splits
from kinetok.pipelines.data.order import sample_seed
from kinetok.pipelines.data.text_shards import TextSpec
from kinetok.pipelines.data.token_shards import SPEC_FILE, Sample, write_shard
from kinetok.tokenizers.base import DecodeRecipe, TokenSpec

Finish = Callable[[Folder, str, Counts], Artifact]
RECIPE = DecodeRecipe(fps=8, frames=10, height=16, width=16)
TOKENS = TokenSpec(
    tokenizer="tiny", weights="ab" * 32, layout="grid", channels=2, temporal=4, spatial=8, dtype="bfloat16", recipe=RECIPE, chunk_frames=5
)
TEXT = TextSpec(text=TextConfig(max_tokens=6), width=3, weights="cd" * 32, dtype="bf16")
SPLITS = ("train", "val", "train", "train", "train")


def shards(folder: Folder, kind: str, spec: str, tensors: Callable[[int], dict[str, torch.Tensor]], finish: Finish, skip: int) -> Artifact:
    """Five samples in two shards, all but number `skip`; sample n holds the number n."""
    folder.write_text(SPEC_FILE, spec)
    for shard, numbers in enumerate(((0, 1, 2), (3, 4))):
        kept = [number for number in numbers if number != skip]
        samples = [Sample(n, save(tensors(n)), {"id": f"clip-{n}", "split": SPLITS[n]}) for n in kept]
        write_shard(folder, shard, samples, [])
    made = finish(folder, kind, Counts())
    clips = InputInfo(kind="clips", name="clips", key="0" * 16, digest="d" * 64)
    return replace(made, record=made.record.model_copy(update={"inputs": {"data": (clips,)}}))


@pytest.fixture
def make(finish: Finish, tmp_path: Any) -> Callable[..., LatentFeed]:
    """make(split="train", skip_text=-1, tokens=TOKENS): a feed of numbered latents and texts; text n has n tokens."""

    def build(split: str = "train", skip_text: int = -1, tokens: TokenSpec = TOKENS) -> LatentFeed:
        def latent(n: int) -> dict[str, torch.Tensor]:
            return {"tokens": torch.full((2, 4, 2, 2), n, dtype=torch.bfloat16)}

        def text(n: int) -> dict[str, torch.Tensor]:
            return {"text": torch.full((n, 3), n, dtype=torch.bfloat16)}

        latents = shards(Folder(str(tmp_path / "latents")), "encode", tokens.model_dump_json(), latent, finish, skip=-1)
        texts = shards(Folder(str(tmp_path / "texts")), "text", TEXT.model_dump_json(), text, finish, skip_text)
        return LatentFeed(latents, texts, split, seed=3)  # type: ignore[arg-type]

    return build


def test_latents_come_with_their_own_text(make: Callable[..., LatentFeed]) -> None:
    got = next(make().batches(start=0, batch=4, rank=0, world=1))
    numbers = got["latent_BZthw"][:, 0, 0, 0, 0]
    assert sorted(numbers.tolist()) == [0, 2, 3, 4] and got["latent_BZthw"].dtype == torch.float32
    assert torch.equal(got["text_mask_BL"].sum(1), numbers.long()) and got["text_mask_BL"].shape == (4, 6)
    assert torch.equal(got["text_BLE"], (numbers[:, None, None] * got["text_mask_BL"][..., None]).expand(4, 6, 3))
    assert got["seed_B"].tolist() == [sample_seed(3, position) for position in range(4)]


@pytest.mark.parametrize(("start", "batch", "world", "count"), [(0, 1, 4, 3), (0, 2, 2, 3), (4, 4, 1, 2)])
def test_the_order_does_not_depend_on_workers(make: Callable[..., LatentFeed], start: int, batch: int, world: int, count: int) -> None:
    feed: Any = make()
    whole, part = stream(feed, count=3), stream(feed, count=count, start=start, batch=batch, world=world)
    assert same(part, {name: tensor[start : start + 4 * count] for name, tensor in whole.items()})
    assert same(part, stream(pickle.loads(pickle.dumps(feed)), count=count, start=start, batch=batch, world=world))


def test_clips_without_text_leave_the_order(make: Callable[..., LatentFeed]) -> None:
    feed = make(skip_text=2)
    assert len(feed) == 3 and splits(feed.latents) == {"train", "val"}
    assert sorted(next(feed.batches(start=0, batch=3, rank=0, world=1))["text_mask_BL"].sum(1).tolist()) == [0, 3, 4]
    with pytest.raises(DataError, match="share no clips of the val split"):
        len(make(split="val", skip_text=1))


def test_the_spec_says_what_a_chunk_is(make: Callable[..., LatentFeed]) -> None:
    spec = make().spec
    assert (spec.shape, spec.chunk, spec.plan.frames, spec.plan.overlap) == ((2, 4, 2, 2), 2, 5, 0)
    whole = make(tokens=TOKENS.model_copy(update={"chunk_frames": None})).spec
    assert (whole.chunk, whole.plan.frames) == (4, 10)


def test_what_cannot_be_learned_is_refused(make: Callable[..., LatentFeed]) -> None:
    feed = make()
    others = feed.text.record.model_copy(update={"inputs": {}})
    with pytest.raises(ContractError, match="were made of different clips"):
        len(replace(feed, text=replace(feed.text, record=others)))
    for changes in ({"content": "features"}, {"layout": "sequence"}, {"vocabulary": 512, "dtype": "int32"}):
        with pytest.raises(ContractError, match="a diffusion model needs continuous tokens on a grid"):
            len(make(tokens=TOKENS.model_copy(update=changes)))
    with pytest.raises(DataError, match="has 4 samples, a global batch needs 6"):
        make().batches(start=0, batch=6, rank=0, world=1)
