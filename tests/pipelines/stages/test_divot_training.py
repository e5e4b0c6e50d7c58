"""`train` for a Divot tokenizer: caches and clips train alike, stages follow one another, a resumed run is the same, misuse is refused."""

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from tests.pipelines.data.token_artifacts import SPEC
from tests.pipelines.stages.running import run_stage
from tests.pipelines.stages.test_language import LANGUAGE, MODEL
from tests.pipelines.stages.test_language import fit as fit_alone
from tests.tokenizers.toy_networks import toy_clip, toy_i3d, toy_vgg

from kinetok.infra.artifact import Artifact, Counts, Store
from kinetok.infra.errors import ConfigError, ContractError, DataError
from kinetok.infra.fit import TURN, FitConfig
from kinetok.infra.job import parse_job
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.plan import input_info
from kinetok.infra.stage import Resources, StageContext
from kinetok.infra.storage import Folder
from kinetok.infra.training import Loop, Work
from kinetok.llm.divot.generation import make_clips as draw_clips_of
from kinetok.llm.divot.sequences import ask_clip
from kinetok.llm.text import TextConfig
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.data.clip_index import ClipIndex
from kinetok.pipelines.data.divot_feed import DivotCaches, DivotFeed
from kinetok.pipelines.data.encoding import Encoder, Encoding
from kinetok.pipelines.data.feed import ClipFeed
from kinetok.pipelines.data.text_shards import TextSpec
from kinetok.pipelines.data.token_shards import SPEC_FILE, Sample, TokenShards, write_shard
from kinetok.pipelines.models import open_language, open_model
from kinetok.pipelines.report.carried import shown, strangers
from kinetok.pipelines.report.ladder import Clips as CarriedClips
from kinetok.pipelines.report.ladder import choose
from kinetok.pipelines.report.tables import CARRIED, Carried
from kinetok.pipelines.stages import language
from kinetok.pipelines.stages.encode import _stored_spec
from kinetok.pipelines.stages.evaluate import Evaluate
from kinetok.pipelines.stages.language import Language
from kinetok.pipelines.stages.model import Model
from kinetok.pipelines.stages.reconstruct import Reconstruct
from kinetok.pipelines.stages.train import Train
from kinetok.pipelines.stages.vit import open_vit
from kinetok.tokenizers import video_metrics
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer
from kinetok.tokenizers.causal.perceptual import load_lpips
from kinetok.tokenizers.divot.unet import VideoUNet
from kinetok.tokenizers.divot.vit import VitConfig

VIT = {"edge": 16, "patch": 4, "width": 16, "depth": 1, "heads": 2}
PERCEIVER = {"queries": 4, "depth": 1, "heads": 2, "head_width": 8}
UNET = {"channels": 16, "mult": [1, 2], "blocks": 1, "attention": [1], "head_width": 8, "groups": 4, "context": 16, "split": None}
ENCODER = {"frames": 3, "temporal_width": 16, "temporal_depth": 1, "temporal_heads": 2, "pool": 2, "width": 16, "depth": 1, "heads": 2}
DIVOT = {
    "kind": "divot",
    "frames": 5,
    "edge": 16,
    "vit": VIT,
    "encoder": ENCODER | {"perceiver": PERCEIVER, "token_width": 8},
    "detokenizer": {"perceiver": PERCEIVER, "unet": UNET | {"dropout": 0.0}},
    "sampler": {"steps": 2, "spacing": "trailing", "guidance": 2.0},
}
FIT: dict[str, Any] = {
    "data": "clips",
    "steps": 4,
    "global_batch": 2,
    "optimizers": {"divot": {"lr": 1e-2}},
    "log_every": 1,
    "checkpoint_every": 2,
}
JOINT = FIT | {"lower": "base", "model": DIVOT, "objective": {"kind": "divot"}}
REFINE = FIT | {"start": "joint", "objective": {"kind": "divot", "stage": "refine", "drop": 0.5}}
UNET_FIRST = FIT | {"lower": "base", "text": "text", "model": DIVOT, "objective": {"kind": "divot_unet"}}
ADAPT = FIT | {"start": "refined", "tokens": "written", "objective": {"kind": "divot", "stage": "adapt"}}

Finish = Callable[[Folder, str, Counts], Artifact]
Make = Callable[..., Artifact]


class Alone:
    """The `Session` of a run in this process, which goes on from `latest_folder` and keeps its checkpoints in `kept`."""

    rank, local_rank, world, device = 0, 0, 1, torch.device("cpu")

    def __init__(self, kept: Path, latest_folder: Path | None = None) -> None:
        self.kept, self.latest_folder = kept, latest_folder

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        yield self.latest_folder

    def report(self, step: int, folder: Path) -> None:
        shutil.copytree(folder, self.kept / str(step))

    def preempted(self) -> bool:
        return False


@pytest.fixture
def train(process_group: None, tmp_path: Path, finish: Finish) -> Make:
    """train(fields, name, start=None, zero=0, **inputs): the artifact of a training in this process, without Ray."""

    def make(fields: dict[str, Any], name: str, resumed: Path | None = None, zero: int = 0, **inputs: Artifact) -> Artifact:
        out, stage = Folder(str(tmp_path / name)), Train.model_validate(fields)
        resources = Resources(batch_size=2, zero=zero)
        ctx = StageContext(name, "0" * 16, dict(inputs), out, resources, lambda **_: None, threading.Event())
        build, feed = stage._work(ctx)
        out.write_text(TURN, "mine")
        config = FitConfig.model_validate(stage.model_dump(include=set(FitConfig.model_fields)))
        Loop(Work(build, feed("train"), feed("val"), config, out, resources, "mine"), Alone(tmp_path / f"{name}-kept", resumed)).run()
        return finish(out, "train", Counts())

    return make


@pytest.fixture
def clips(make_clips: Any) -> Artifact:
    made: Artifact = make_clips(6, val=(1, 4))
    return made


@pytest.fixture
def base(tmp_path: Path, finish: Finish) -> Artifact:
    torch.manual_seed(0)
    out = Folder(str(tmp_path / "base"))
    CausalTokenizer(CausalConfig(channels=8, mult=(1, 2), strides=((2, 2),), blocks=1, z=4, patch=2, groups=4)).save_pretrained(
        out.local / "model"
    )
    return finish(out, "train", Counts())


@pytest.fixture
def cache(clips: Artifact, finish: Finish, tmp_path: Path) -> Callable[[str, Callable[[], Any]], Artifact]:
    """cache(name, open_model): what the actors of `encode` and `vit` make of every clip, in float32."""

    def make(name: str, opened: Callable[[], Any]) -> Artifact:
        index, out = ClipIndex.open(clips), Folder(str(tmp_path / name))
        encoding = Encoding(opened, "tokens", "fp32", index.recipe, Resources(batch_size=2))
        out.write_text(SPEC_FILE, _stored_spec(encoding).model_dump_json())
        encoder = Encoder(encoding)
        for shard, rows in enumerate(index.shards):
            samples = []
            for place, row in enumerate(rows):
                (payload,) = encoder.encode(index.read_clip(int(row))[None])
                assert isinstance(payload, bytes)
                about = index.rows.slice(int(row), 1).select(["id", "caption", "split"]).to_pylist()[0]
                samples.append(Sample(place, payload, about))
            write_shard(out, shard, samples, [])
        made = finish(out, "encode", Counts())
        return replace(made, record=made.record.model_copy(update={"inputs": {"data": (input_info(clips),)}}))

    return make


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    return load_file(artifact.folder.local / "model" / "model.safetensors")


def caches_of(cache: Any, base: Artifact) -> dict[str, Artifact]:
    return {
        "latents": cache("latents", partial(open_model, base.folder / "model")),
        "features": cache("vit", partial(open_vit, VitConfig.model_validate(VIT), 3)),
    }


def test_the_stages_follow_one_another_and_caches_train_as_clips_do(
    train: Make, cache: Any, clips: Artifact, base: Artifact, tmp_path: Path
) -> None:
    cached = caches_of(cache, base)
    plain = train(JOINT, "plain", data=clips, lower=base)
    joint = train(JOINT, "joint", data=clips, lower=base, **cached)
    for mine, theirs in zip(read_metrics(plain.folder), read_metrics(joint.folder), strict=True):
        assert mine["train/divot/loss"] == pytest.approx(theirs["train/divot/loss"], rel=1e-4)
    assert not torch.equal(weights(joint)["encoder.mean_ND"], torch.zeros(16, 16))
    figures = read_metrics(joint.folder)[-1]
    assert {"val/v_loss", "val/v_loss_null"} <= figures.keys()

    tokens = cache("tokens", partial(open_model, joint.folder / "model"))
    given = {"data": clips, "start": joint, "latents": cached["latents"]}
    refined = train(REFINE | {"tokens": "tokens"}, "refined", tokens=tokens, **given)
    again = train(REFINE, "again", **given)
    for mine, theirs in zip(read_metrics(refined.folder), read_metrics(again.folder), strict=True):
        assert mine["train/divot/loss"] == pytest.approx(theirs["train/divot/loss"], rel=1e-4)
    for name, values in weights(refined).items():
        same = torch.equal(values, weights(joint)[name])
        assert same or not name.startswith("encoder."), f"{name} is frozen"
    models = [open_model(artifact.folder / "model") for artifact in (joint, refined)]
    assert models[0].spec() == models[1].spec()
    assert not torch.equal(weights(refined)["detokenizer.unet.to_latent.weight"], weights(joint)["detokenizer.unet.to_latent.weight"])

    # Two decoders of the same tokens are two models all the same.
    keys = {Model(where=str(artifact.folder.local / "model")).key({}) for artifact in (joint, refined)}
    assert len(keys) == 2

    adapted = train(ADAPT, "adapted", data=clips, start=refined, latents=cached["latents"], tokens=tokens)
    assert open_model(adapted.folder / "model").spec() == models[0].spec()
    assert "\n| `objective" not in (adapted.folder / "model").read_text("README.md")


@pytest.fixture
def plain_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO-3 replaces `torch.nn.functional.linear` for the whole process; other tests get torch's own back."""
    linear = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = linear


@pytest.mark.usefixtures("plain_linear")
@pytest.mark.parametrize(("fields", "zero"), [(JOINT, 3), (UNET_FIRST, 2)], ids=["joint", "unet"])
def test_a_split_context_trains_alike_under_zero(
    fields: dict[str, Any], zero: int, train: Make, clips: Artifact, base: Artifact, finish: Finish, tmp_path: Path
) -> None:
    """Published U-Nets split their context, and are too large to train without ZeRO."""
    fields = fields | {"model": DIVOT | {"detokenizer": {"perceiver": PERCEIVER, "unet": UNET | {"dropout": 0.0, "split": 3}}}}
    inputs = {"data": clips, "lower": base}
    if "text" in fields:
        inputs["text"] = captions(clips, finish, Folder(str(tmp_path / "text")))
    alone, scattered = (weights(train(fields, f"zero-{stage}", zero=stage, **inputs)) for stage in (0, zero))
    assert any(name.endswith("context.alpha") and tensor.all() for name, tensor in alone.items()), "both parts are read"
    torch.testing.assert_close(scattered, alone, rtol=1e-3, atol=1e-5)


def test_tokens_that_depend_on_their_positions_go_through_a_job(
    train: Make, cache: Any, clips: Artifact, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No Perceiver in the encoder: a token for each of 2 x 2 places of 3 frames, which a language model then reads and writes."""
    bound = DIVOT | {"encoder": ENCODER | {"perceiver": None, "token_width": 8}}
    joint = train(JOINT | {"model": bound, "steps": 2}, "joint", data=clips, lower=base)
    tokens = cache("tokens", partial(open_model, joint.folder / "model"))
    assert TokenShards.open(tokens).read(0)["tokens"].shape == (12, 8)
    train(REFINE | {"tokens": "tokens", "steps": 1}, "refined", data=clips, start=joint, tokens=tokens)
    monkeypatch.setattr(language, "fit", fit_alone)
    fields = LANGUAGE | {"model": MODEL | {"clip_tokens": 12}, "steps": 1}
    made = run_stage(Store(Folder(str(tmp_path / "store"))), Language.model_validate(fields), "language", {"tokens": (tokens,)})
    model = open_language(made)
    assert draw_clips_of(model, [ask_clip(model.vocabulary, "a disc", instructed=False)], [1]).shape == (1, 12, 8)


def test_a_resumed_training_is_the_undisturbed_one(train: Make, clips: Artifact, base: Artifact, tmp_path: Path) -> None:
    joint = train(JOINT | {"ema": 0.5}, "joint", data=clips, lower=base)
    resumed = train(JOINT | {"ema": 0.5}, "resumed", tmp_path / "joint-kept" / "2", data=clips, lower=base)
    assert [line["step"] for line in read_metrics(resumed.folder)] == [3, 4]
    torch.testing.assert_close(weights(resumed), weights(joint), rtol=0, atol=0)


def test_the_unet_learns_from_captions_and_images_first(
    train: Make, cache: Any, clips: Artifact, base: Artifact, finish: Finish, tmp_path: Path
) -> None:
    text, before = captions(clips, finish, Folder(str(tmp_path / "text"))), {"data": clips, "lower": base}
    unet = train(UNET_FIRST, "unet", text=text, **before, **caches_of(cache, base))
    on_the_fly = train(UNET_FIRST, "flying", text=text, **before)
    for mine, theirs in zip(read_metrics(unet.folder), read_metrics(on_the_fly.folder), strict=True):
        assert mine["train/divot/loss"] == pytest.approx(theirs["train/divot/loss"], rel=1e-4)
    assert "val/v_loss" in read_metrics(unet.folder)[-1] and not [name for name in weights(unet) if "images" in name]
    joint = train(FIT | {"start": "unet", "objective": {"kind": "divot"}, "steps": 2}, "joint", data=clips, start=unet)
    given, found = weights(unet), weights(joint)
    assert torch.equal(given["encoder.mean_ND"], found["encoder.mean_ND"]) and given["encoder.mean_ND"].any()
    assert not torch.equal(given["encoder.norm.weight"], found["encoder.norm.weight"])
    narrow = captions(clips, finish, Folder(str(tmp_path / "narrow")), width=8)
    with pytest.raises(ContractError, match="3 tokens of 8 numbers; the context of the U-Net is any number of tokens of 16"):
        train(UNET_FIRST, "refused", text=narrow, **before)


def captions(clips: Artifact, finish: Finish, out: Folder, width: int = 16) -> Artifact:
    """Embeddings of every clip, one to three tokens long."""
    index = ClipIndex.open(clips)
    spec = TextSpec(text=TextConfig(max_tokens=3), width=width, weights="0" * 64, dtype="fp32")
    out.write_text(SPEC_FILE, spec.model_dump_json())
    generator = torch.Generator().manual_seed(0)
    for shard, rows in enumerate(index.shards):
        about = [index.rows.slice(int(row), 1).select(["id", "caption", "split"]).to_pylist()[0] for row in rows]
        texts = [torch.randn(1 + place % 3, width, generator=generator) for place in range(len(rows))]
        write_shard(out, shard, [Sample(p, save({"text": text}), a) for p, (text, a) in enumerate(zip(texts, about, strict=True))], [])
    made = finish(out, "text", Counts())
    return replace(made, record=made.record.model_copy(update={"inputs": {"data": (input_info(clips),)}}))


def test_caches_spare_the_pixels_and_keep_the_order(cache: Any, clips: Artifact, base: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    found = caches_of(cache, base)
    films = ClipFeed(clips, "train", 3).load([0, 1, 5])
    on_the_fly = DivotFeed(clips, "train", 3).load([0, 1, 5])
    assert on_the_fly.keys() == films.keys() and all(torch.equal(on_the_fly[name], films[name]) for name in films)
    monkeypatch.setattr(ClipIndex, "read_clip", None)
    batch = DivotFeed(clips, "train", 3, DivotCaches(**found)).load([0, 1, 5])
    assert batch.keys() == {"seed_B", "latent_BTZhw", "vit_BTND"}
    assert torch.equal(batch["seed_B"], films["seed_B"])
    video = films["video_BTHWC"].permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    features = open_vit(VitConfig.model_validate(VIT), 3).encode(video).values
    torch.testing.assert_close(batch["vit_BTND"], features, rtol=1e-4, atol=1e-5)
    latent = open_model(base.folder / "model").encode(video).values
    torch.testing.assert_close(batch["latent_BTZhw"].transpose(1, 2), latent, rtol=1e-4, atol=1e-5)


def test_every_epoch_of_adapting_takes_another_draw_and_a_resumed_one_the_same(clips: Artifact, finish: Finish, tmp_path: Path) -> None:
    """A sample's draws take turns by the epoch, from whatever position and on whatever workers; one draw is every epoch's."""

    def tokens(name: str, draws: int) -> DivotFeed:
        index, out = ClipIndex.open(clips), Folder(str(tmp_path / name))
        out.write_text(SPEC_FILE, SPEC.model_dump_json())
        for shard, rows in enumerate(index.shards):
            payloads = [torch.full((1 + draws, 4, 8), 100.0 * row) + torch.arange(1 + draws)[:, None, None] for row in rows]
            drawn = [{"tokens": p[0].clone(), "draws": p[1:].clone()} if draws else {"tokens": p[0].clone()} for p in payloads]
            about = [index.rows.slice(int(row), 1).select(["id", "caption", "split"]).to_pylist()[0] for row in rows]
            write_shard(out, shard, [Sample(place, save(d), a) for place, (d, a) in enumerate(zip(drawn, about, strict=True))], [])
        return DivotFeed(clips, "train", 3, DivotCaches(tokens=finish(out, "write", Counts())))

    feed = tokens("three", 2)
    seen: dict[int, list[int]] = {}
    for position in range(4 * len(feed)):
        number = int(feed.load([position])["token_BND"][0, 0, 0])
        seen.setdefault(number // 100, []).append(number % 100)
    assert len(seen) == len(feed) == 8 and all(turns == [0, 1, 2, 0] for turns in seen.values())
    onwards = feed.batches(start=0, batch=3, rank=0, world=1)
    whole = torch.cat([next(onwards)["token_BND"] for _ in range(8)])
    resumed = tokens("again", 2).batches(start=12, batch=2, rank=1, world=2)
    assert all(torch.equal(next(resumed)["token_BND"], whole[first : first + 2]) for first in (14, 18, 22))
    single = tokens("one", 0)
    assert torch.equal(single.load([0])["token_BND"], feed.load([0])["token_BND"])
    assert {int(single.load([position])["token_BND"][0, 0, 0]) % 100 for position in range(24)} == {0}


@pytest.mark.parametrize("fields", [JOINT, UNET_FIRST], ids=["joint", "unet"])
def test_the_stride_that_reaches_the_unet_is_that_of_the_clips(
    fields: dict[str, Any], train: Make, make_clips: Any, base: Artifact, finish: Finish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source rate over clip rate, where the objective asks for it; the configured one, and the key that was, where not."""
    rates = {number: 8.0 + 5.5 * number for number in range(6)}
    clips = make_clips(6, val=(1, 4), source_fps=rates.get)
    inputs = {"data": clips, "lower": base}
    if "text" in fields:
        inputs["text"] = captions(clips, finish, Folder(str(tmp_path / "text")))
    seen: list[torch.Tensor | None] = []
    forward = VideoUNet.forward

    def spy(self: VideoUNet, x: Any, t: Any, context: Any, stride_B: torch.Tensor | None = None) -> torch.Tensor:
        seen.append(stride_B)
        return forward(self, x, t, context, stride_B)

    monkeypatch.setattr(VideoUNet, "forward", spy)
    train(fields, "plain", **inputs)
    assert seen and all(stride is None for stride in seen)
    seen.clear()
    asked = fields | {"objective": fields["objective"] | {"stride": True}}
    train(asked, "asked", **inputs)
    index, feed = ClipIndex.open(clips), DivotFeed(clips, "train", 0, strides=True)
    rows = feed._opened.rows_at(list(range(8)))
    expected = torch.tensor([rates[int(index.rows["video"][row].as_py()[-3:])] / 8 for row in rows])
    told = [stride for stride in seen if stride is not None]
    assert len(told) == len(seen) and {float(each) for stride in told for each in stride} <= {rate / 8 for rate in rates.values()}
    assert all(any(torch.equal(stride, expected[first : first + 2]) for stride in told) for first in (0, 2, 4, 6))
    assert "stride" not in str(Train.model_validate(fields).literals()["objective"])


def test_strides_of_sources_whose_rate_is_not_known_are_refused(make_clips: Any) -> None:
    with pytest.raises(DataError, match=r"clips does not say the rate of the source of video-00\d/\d+: leave objective\.stride out"):
        DivotFeed(make_clips(2, source_fps=lambda number: None), "train", 0, strides=True).load([0])


def test_caches_of_other_models_or_clips_are_refused(train: Make, cache: Any, clips: Artifact, base: Artifact) -> None:
    found = caches_of(cache, base)
    with pytest.raises(ContractError, match="weights"):
        train(JOINT | {"model": DIVOT | {"vit": VIT | {"depth": 2}}}, "other", data=clips, lower=base, **found)
    changed = replace(clips, record=clips.record.model_copy(update={"digest": "1" * 64}))
    with pytest.raises(ContractError, match="was not made of clips"):
        train(JOINT, "moved", data=changed, lower=base, **found)
    with pytest.raises(ContractError, match="a 'causal' model cannot be trained as a divot"):
        train(REFINE, "base-on", data=clips, start=base)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_the_tokens_carry_is_measured_on_clips(
    train: Make, clips: Artifact, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = train(JOINT, "joint", data=clips, lower=base)
    stage = Reconstruct.model_validate({"data": "clips", "model": "joint", "strips": 2})
    out = Folder(str(tmp_path / "carried"))
    ctx = StageContext(
        "carried", "0" * 16, {"data": clips, "model": joint}, out, Resources(batch_size=3), lambda **_: None, threading.Event()
    )
    result = stage.run(ctx)
    carried = Carried.model_validate_json(out.read_bytes(CARRIED))
    assert (carried.clips, result.counts.written, len(carried.strips), carried.vit) == (4, 4, 2, "untrained (1 layers of 16)")
    assert [line.name for line in carried.conditions] == ["autoencoder alone", "its own tokens", "another clip's tokens", "no tokens"]
    assert [line.v_loss is None for line in carried.conditions] == [True, False, False, False]
    assert all(figure.value is None and figure.protocol.startswith("not measured") for figure in carried.figures)
    assert out.read_bytes("strips/000.png").startswith(b"\x89PNG")

    # With weights, each figure is that of the very videos, whatever type the model computes in.
    monkeypatch.setattr(video_metrics, "I3D_FRAMES", 5)
    names = {
        "clip": toy_clip(tmp_path / "clip"),
        "i3d": toy_i3d(tmp_path / "i3d.pt"),
        "lpips": toy_vgg(tmp_path / "vgg.safetensors"),
    }
    resources = Resources(batch_size=3, dtype="bf16")
    ctx = replace(ctx, out=Folder(str(tmp_path / "measured")), resources=resources)
    metrics = stage.model_copy(update=names).run(ctx).metrics
    index = ClipIndex.open(clips)
    rows, model = choose(index, "val", None, 0), open_model(joint.folder / "model")
    items = list(shown(model, CarriedClips(index, rows, 3), resources, model.config.sampler, 0))
    real, made = (torch.stack(videos) for videos in ([i.original_CTHW for i in items], [i.made_CTHW["its own tokens"] for i in items]))
    spoken = [index.rows["caption"][row].as_py() for row in rows]
    i3d = video_metrics.I3D(names["i3d"])
    assert metrics["CLIPSIM"] == pytest.approx(float(video_metrics.ClipSim(names["clip"])(made, spoken).mean()), rel=1e-4)
    assert metrics["LPIPS"] == pytest.approx(float(load_lpips(names["lpips"])(made, real).mean()), rel=1e-4)
    assert metrics["rFVD"] == pytest.approx(video_metrics.frechet(i3d(real), i3d(made)), rel=1e-4)
    measured = {figure.name: figure.protocol for figure in Carried.model_validate_json(ctx.out.read_bytes(CARRIED)).figures}
    for name, field in (("CLIPSIM", "clip"), ("LPIPS", "lpips"), ("rFVD", "i3d")):
        assert measured[name].startswith(names[field]) and "4 val clips of 5 frames, 16 x 16, 8 fps" in measured[name]
    assert "lpips" not in stage.literals() and stage.model_copy(update=names).literals()["lpips"] == names["lpips"]
    ctx = replace(ctx, resources=Resources(batch_size=3))

    # The ladder's table takes it too, at the same noise for every clip.
    quality = Evaluate.model_validate({"data": "clips", "models": ["base", "joint"], "panel": 0, "worst": 0})
    models = tuple(
        replace(model, record=model.record.model_copy(update={"name": name})) for name, model in (("base", base), ("joint", joint))
    )
    ctx = replace(ctx, inputs={"data": clips, "models": models}, out=Folder(str(tmp_path / "quality")))
    assert set(quality.run(ctx).metrics) >= {"joint/psnr", "base/ssim"}


@pytest.mark.parametrize(
    ("videos", "others"),
    [
        ("aabbccdd", [4, 5, 6, 7, 0, 1, 2, 3]),
        ("aaaabb", [4, 4, 5, 4, 1, 2]),
        ("abc", [1, 2, 0]),
        ("aaa", [1, 2, 0]),
    ],
)
def test_another_clip_is_of_another_video_and_far_away(videos: str, others: list[int]) -> None:
    rows = [10 + 3 * place for place in range(len(videos))]
    assert strangers(rows, videos) == {row: 10 + 3 * other for row, other in zip(rows, others, strict=True)}


def told(**changes: dict[str, Any]) -> list[str]:
    """Every problem of a job with the stages of Divot."""
    tune = {"kind": "train", **FIT, "latents": "latents"}
    stages: dict[str, dict[str, Any]] = {
        "videos": {"kind": "ingest", "source": "a.tar"},
        "clips": {"kind": "clips", "videos": "videos", "fps": 8, "frames": 5, "height": 16, "width": 16},
        "base": {
            "kind": "train",
            "data": "clips",
            "model": {"kind": "causal", "channels": 8, "mult": [1, 2], "strides": [[2, 2]], "blocks": 1, "z": 4, "patch": 2, "groups": 4},
            "steps": 4,
            "global_batch": 4,
            "optimizers": {"autoencoder": {"lr": 1e-3}},
        },
        "latents": {"kind": "encode", "data": "clips", "model": "base"},
        "vit": {"kind": "vit", "data": "clips", "vit": VIT, "frames": 3},
        "joint": {**tune, **JOINT, "latents": "latents", "features": "vit"},
        "tokens": {"kind": "encode", "data": "clips", "model": "joint"},
        "refined": {**tune, **REFINE, "tokens": "tokens"},
        "adapted": {**tune, **ADAPT, "tokens": "tokens"},
    }
    for name, fields in changes.items():
        stages[name] = {field: value for field, value in (stages[name] | fields).items() if value is not None}
    try:
        parse_job({"name": "j", "stages": stages, "resources": {"default": {"batch_size": 1}}}, STAGES)
    except ConfigError as error:
        return [line.strip().removeprefix("stages.") for line in str(error).splitlines()]
    return []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"joint": {"objective": None, "optimizers": {"autoencoder": {"lr": 1}}}},
            "joint.objective.kind: a divot model is trained by an objective of kind divot",
        ),
        ({"refined": {"objective": {"kind": "divto"}}}, "refined.objective: 'divto' is unknown"),
        ({"joint": {"lower": None}}, "joint.lower: is missing; a divot model stands on"),
        ({"joint": {"model": None}}, "joint.model: a training is of a new model (`model`) or goes on"),
        ({"refined": {"lower": "base"}}, "refined.lower: the model that start names brings its own along"),
        ({"refined": {"features": "vit"}}, "refined.features: tokens take their place"),
        ({"adapted": {"tokens": None}}, "adapted.tokens: are missing; adapt learns from those that a language model wrote"),
        ({"joint": {"tokens": "latents", "features": None}}, "joint.tokens: the joint stage learns to make them"),
        ({"vit": {"frames": 5}}, "joint.features: vit is of another vision transformer, or of other frames"),
        ({"joint": {"model": DIVOT | {"frames": 4}}}, "joint.data: clips has clips of 5 frames; a window of the model has 4"),
        ({"base": {"latents": "latents"}}, "stages: "),
        ({"tokens": {"features": "vit", "content": "features"}}, "tokens.features: only tokens of whole clips are made of them"),
        ({"latents": {"features": "vit"}}, "latents.features: a causal model makes tokens of pixels alone"),
        ({"clips": {"frames": 6}, "tokens": {"features": "vit"}}, "tokens.features: clips of clips have 6 frames, a window of joint 5"),
    ],
)
def test_what_cannot_train_is_refused_when_the_job_is_read(changes: dict[str, dict[str, Any]], problem: str) -> None:
    found = told(**changes)
    assert any(line.startswith(problem) for line in found), found


def test_a_sound_job_has_no_problems_and_clips_of_another_size_are_told_once_a_stage() -> None:
    assert not told()
    found = told(clips={"height": 32, "width": 32})
    assert [line.split(".")[0] for line in found] == ["joint", "tokens", "refined", "adapted"]
    assert all("takes 16 x 16 alone" in line for line in found)


@pytest.mark.ray
@pytest.mark.slow
def test_features_are_encoded_on_real_actors(ray_cluster: None, clips: Artifact, tmp_path: Path) -> None:
    from kinetok.pipelines.stages.vit import Vit

    out, stage = Folder(str(tmp_path / "vit")), Vit.model_validate({"data": "clips", "vit": VIT, "frames": 3, "dtype": "fp32"})
    result = stage.run(StageContext("vit", "0" * 16, {"data": clips}, out, Resources(batch_size=2), lambda **_: None, threading.Event()))
    assert result.counts.written == len(ClipIndex.open(clips))
    shards = TokenShards.open(Artifact(out, clips.record))
    assert (shards.spec.tokenizer, shards.spec.layout, shards.spec.channels) == ("vit", "sequence", 16)
    video = torch.from_numpy(ClipIndex.open(clips).read_clip(0)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    torch.testing.assert_close(
        shards.read(0)["tokens"], open_vit(VitConfig.model_validate(VIT), 3).encode(video).values[0], rtol=1e-4, atol=1e-5
    )
