"""Models of others in kinetok's pipelines: wherever they lie they load, encode, and carry a grown rung, or say why not."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from rich.console import Console
from tests.pipelines.conftest import video_bytes
from tests.pipelines.stages.running import run_stage
from tests.pipelines.stages.test_train import in_process  # noqa: F401 a fixture
from tests.tokenizers.pretrained.conftest import random_model

from kinetok.infra.artifact import Store
from kinetok.infra.errors import ConfigError, StoreError
from kinetok.infra.job import parse_job
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.run import run
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.recipe import IndexRecipe
from kinetok.pipelines.data.token_shards import TokenShards
from kinetok.pipelines.data.verify import problems
from kinetok.pipelines.models import growable, load, open_model
from kinetok.pipelines.stages.model import Model
from kinetok.pipelines.tokenize import tokenize
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.grown import GrownConfig, GrownTokenizer
from kinetok.tokenizers.causal.rung import Rung
from kinetok.tokenizers.pretrained.base import Pretrained

QUIET = Console(file=io.StringIO())
CLIPS: dict[str, Any] = {"fps": 8, "frames": 5, "height": 16, "width": 16, "shard_clips": 8, "filters": {"min_side": 8}}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers, as far as kinetok looks at it: the autoencoder in `vae/`, and what is none of its business."""
    folder = tmp_path_factory.mktemp("pipeline")
    random_model("wan").save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_model_of_diffusers_is_found_in_its_folder_its_pipeline_and_on_the_hub(wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        assert name == "owner/name"
        asked.append(allow_patterns)
        return str(wan)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    digests = {load(where).spec().weights for where in (wan, wan / "vae", "owner/name")}
    assert len(digests) == 1
    assert asked == [["config.json", "vae/config.json"], ["vae/diffusion_pytorch_model*"]]


def test_a_name_that_the_hub_does_not_know_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: list[str]) -> str:
        raise FileNotFoundError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(StoreError, match=r"owner/name is no folder with .*, and the Hugging Face hub gives no model of that name"):
        load("owner/name")


def test_what_has_no_adapter_is_refused_before_its_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLMochi"}')
    for where in ("owner/name", str(tmp_path)):
        with pytest.raises(StoreError, match="no adapter for diffusers' AutoencoderKLMochi"):
            load(where)
    assert len(asked) == 1


def test_identity_is_weights_and_settings_not_the_address(wan: Path, tmp_path: Path) -> None:
    made = run_stage(Store(Folder(str(tmp_path / "store"))), Model(where=str(wan)), "wan", {})
    shutil.copytree(wan / "vae", tmp_path / "elsewhere")
    assert Model(where=str(tmp_path / "elsewhere")).key({}) == made.key
    random_model("wan", latents_std=[3.0] * 16).save_pretrained(tmp_path / "scaled")
    assert Model(where=str(tmp_path / "scaled")).key({}) != made.key
    copied = open_model(made.folder / "model")
    assert isinstance(copied, Pretrained) and copied.spec() == load(wan).spec()


def test_growing_on_a_model_that_cannot_carry_it_is_an_error_of_the_job(tmp_path: Path) -> None:
    random_model("cogvideox").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="nothing can be grown upon a 'cogvideox' model"):
        growable(load(tmp_path))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster", "in_process")
def test_a_rung_grows_on_wan_and_both_tokenize(wan: Path, tmp_path: Path, video_bytes: Callable[[int, int], bytes]) -> None:
    source = tmp_path / "videos"
    source.mkdir()
    for number in range(4):
        (source / f"{number}.mp4").write_bytes(video_bytes(number, 2))
    train = {"steps": 3, "global_batch": 2, "optimizers": {"autoencoder": {"lr": 1e-3}}, "ema": 0.9, "log_every": 1}
    stages = {
        "wan": {"kind": "model", "where": str(wan)},
        "videos": {"kind": "ingest", "source": str(source)},
        "clips": {"kind": "clips", "videos": "videos", **CLIPS},
        "trunk": {"kind": "encode", "data": "clips", "model": "wan", "content": "features"},
        "grown": {"kind": "train", "data": "clips", "features": "trunk", "lower": "wan", "model": {"kind": "grown", "groups": 4}, **train},
    }
    store = Store(Folder(str(tmp_path / "store")))
    job = parse_job({"name": "grow", "stages": stages, "resources": {"default": {"batch_size": 2, "cpus": 1}}}, STAGES)
    state = run(job, store, console=QUIET)
    assert state.succeeded, [stage.error for stage in state.stages.values()]
    grown = store.find("grown")
    assert [line["step"] for line in read_metrics(grown.folder)] == [1, 2, 3]
    whole = open_model(grown.folder / "model")
    lower: Any = open_model(grown.folder / "model" / "lower")
    assert lower.digest() == load(wan).digest() and (whole.spec().temporal, whole.spec().channels) == (8, 16)

    recipe = IndexRecipe.model_validate(CLIPS)
    for model in (str(wan), str(grown.folder)):  # in the same store, which has the clips already
        done = tokenize(model, str(source), str(store.root), recipe=recipe, resources=Resources(batch_size=4), console=QUIET)
        shards = TokenShards.open(done.tokens)
        assert len(shards) == 8 and shards.read(0)["tokens"].shape == (16, 2, 2, 2)
        assert shards.spec.weights == load(model).spec().weights


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One video, of two windows."""
    folder = tmp_path_factory.mktemp("film")
    (folder / "0.mp4").write_bytes(video_bytes(0, 2))
    return folder


def _save_ours(folder: Path, doublings: int) -> None:
    torch.manual_seed(0)
    model: Rung = CausalTokenizer(CausalConfig(channels=8, mult=(1, 1, 1), strides=((2, 2), (2, 2)), blocks=1, z=4, groups=4))
    for _ in range(doublings):
        model = GrownTokenizer(GrownConfig(blocks=1, groups=4), model)
    model.save_pretrained(folder)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", ["ours, 8x", "ours, 16x", "cosmos-8", "cogvideox", "ltx"])
def test_every_family_tokenizes_a_folder(name: str, film: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What lies in the shards is what the model makes of the clips; all runs share a store, and so the clips."""
    folder = tmp_path_factory.mktemp("model")
    if name.startswith("ours"):
        _save_ours(folder, 1 if "8x" in name else 2)
    else:
        random_model(name).save_pretrained(folder)
    recipe = IndexRecipe.model_validate(CLIPS | {"height": 32, "width": 32})
    done = tokenize(str(folder), str(film), f"{film}-store", recipe=recipe, resources=Resources(batch_size=2), console=QUIET)
    shards, index, model = TokenShards.open(done.tokens), ClipIndex.open(done.clips), load(folder)
    assert len(shards) == len(index) == 2 and list(problems(done.tokens)) == []
    assert shards.spec.weights == model.spec().weights
    for row in range(2):
        video = torch.from_numpy(index.read_clip(row)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        with torch.no_grad():
            expected = model.encode(video).values[0]
        torch.testing.assert_close(shards.read(row)["tokens"].float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
