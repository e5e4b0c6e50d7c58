"""tokenize: a folder of videos and a saved model, nothing else; what was skipped is told; a second call does nothing."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kinetok.infra.errors import ConfigError, KinetokError
from kinetok.infra.stage import Resources
from kinetok.pipelines.data.recipe import Filters, IndexRecipe
from kinetok.pipelines.data.token_shards import TokenShards, require_spec
from kinetok.pipelines.data.verify import problems
from kinetok.pipelines.models import load
from kinetok.pipelines.tokenize import settings, skipped, summary, tokenize
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.chunks import ChunkPlan

RECIPE = IndexRecipe(fps=8, frames=5, height=16, width=16, shard_clips=4, max_bad_fraction=0.5, filters=Filters(min_side=8))
QUIET = Console(file=io.StringIO())
OPTIONS = {"fps": 8, "frames": 17, "size": 64, "batch_size": 4, "workers": 1, "gpus": 0, "tile": None, "chunk": None, "overlap": 0}


@pytest.fixture
def model(tmp_path: Path) -> str:
    torch.manual_seed(0)
    CausalTokenizer(CausalConfig(channels=8, mult=(1, 1, 1, 1), blocks=1, z=4, groups=4)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_folder_of_videos_becomes_tokens_of_the_model(model: str, tmp_path: Path, video_bytes: Callable[[int, int], bytes]) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.mp4").write_bytes(video_bytes(number, 2))
    (source / "torn.mp4").write_bytes(video_bytes(9, 2)[:300])
    resources = Resources(batch_size=2)
    done = tokenize(model, str(source), str(tmp_path / "out"), recipe=RECIPE, resources=resources, console=QUIET)
    assert done.tokens.record.counts.written == 6
    assert [(decision, count) for decision, _, count in skipped(done)] == [("quarantined", 1)]
    printed = io.StringIO()
    Console(file=printed, width=160).print(summary(done))
    assert "unreadable" in printed.getvalue() and "clips/s" in printed.getvalue()
    shards = TokenShards.open(done.tokens)
    require_spec(shards.spec, load(model).spec())
    assert len(shards) == 6 and shards.read(0)["tokens"].dtype == torch.bfloat16
    assert list(problems(done.clips)) == list(problems(done.tokens)) == []
    assert done.tokens.record.inputs["model"][0].kind == "model"
    again = tokenize(model, str(source), str(tmp_path / "out"), recipe=RECIPE, resources=resources, console=QUIET)
    assert again.tokens.record == done.tokens.record


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_videos_that_give_no_clip_are_told_with_the_options_that_would(
    model: str, tmp_path: Path, video_bytes: Callable[[int, int], bytes]
) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    (source / "short.mp4").write_bytes(video_bytes(0, 1))
    (source / "torn.mp4").write_bytes(video_bytes(9, 2)[:300])
    recipe = RECIPE.model_copy(update={"frames": 9, "max_bad_fraction": 1.0})
    told = (
        r"(?s)clips: none of 2 samples gives a clip\n.*1 too_short: .*5 frames at 8 fps, a window has 9.*1 unreadable: .*--frames and --fps"
    )
    with pytest.raises(KinetokError, match=told):
        tokenize(model, str(source), str(tmp_path / "out"), recipe=recipe, resources=Resources(batch_size=2), console=QUIET)


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KinetokError, match="nowhere"):
        tokenize("nowhere", str(tmp_path), str(tmp_path / "out"), recipe=RECIPE, resources=Resources(), console=QUIET)


def test_an_option_out_of_range_is_named() -> None:
    with pytest.raises(ConfigError, match=r"frames: .*greater than or equal to 1"):
        settings(OPTIONS | {"frames": 0})
    with pytest.raises(ConfigError, match=r"20 frames leave nothing new"):
        settings(OPTIONS | {"chunk": 17, "overlap": 20})
    with pytest.raises(ConfigError, match=r"give --chunk too"):
        settings(OPTIONS | {"overlap": 4})


def test_chunks_and_tiles_reach_the_stages() -> None:
    assert settings(OPTIONS)[2] is None
    recipe, resources, chunks = settings(OPTIONS | {"frames": 30, "chunk": 17, "overlap": 4, "tile": 64})
    assert (recipe.frames, resources.tile, chunks) == (30, 64, ChunkPlan(frames=17, overlap=4))
