"""Tokens become videos, and videos figures: a judge sees what scenes show, real clips are scored beside generated ones."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tests.pipelines.conftest import finish
from tests.pipelines.data.token_artifacts import SPEC, clip_tokens, make_tokens
from tests.pipelines.stages.running import run_stage
from tests.pipelines.stages.test_train import Alone
from tests.pipelines.test_divot import tokenizer
from tests.tokenizers.toy_networks import toy_clip, toy_i3d

from kinetok.infra.artifact import Artifact, Counts, Store
from kinetok.infra.errors import ContractError, DataError, StoreError
from kinetok.infra.fit import TURN, FitConfig, PlayerConfig
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.stage import Resources, StageContext
from kinetok.infra.storage import Folder
from kinetok.infra.training import Loop, Work
from kinetok.pipelines import judge
from kinetok.pipelines.data.clip_index import ClipIndex, part_bytes, part_name
from kinetok.pipelines.data.decode import decode_clip
from kinetok.pipelines.data.instructions import FACTS, OPTIONS, QUESTIONS, Facts, fact_of, of_scenes
from kinetok.pipelines.data.scenes import SceneSet, draw_scene, encode_mp4
from kinetok.pipelines.data.tars import TarWriter
from kinetok.pipelines.data.verify import problems
from kinetok.pipelines.judge import JudgeTrainable, SceneFeed, SceneJudge
from kinetok.pipelines.report.panel import pixels
from kinetok.pipelines.report.tables import FRAMES, GENERATION, SCORES, ClipScores, Generation
from kinetok.pipelines.stages.decode import Decode
from kinetok.pipelines.stages.score import REAL, Score, chances
from kinetok.tokenizers.base import Tokens
from kinetok.tokenizers.video_metrics import I3D, ClipSim, frechet


@pytest.fixture
def decoded(tmp_path: Path) -> tuple[Store, Artifact, dict[str, Any]]:
    """Six clips of made-up tokens, shown by a tiny Divot."""
    store, made = Store(Folder(str(tmp_path / "store"))), tokenizer()
    made.save_pretrained(tmp_path / "train" / "model")
    trained = finish(Folder(str(tmp_path / "train")), "train", Counts())
    spec = SPEC.model_copy(update={"weights": made.digest()})
    tokens = make_tokens(tmp_path / "tokens", 6, val=(0, 2, 4), spec=spec)
    inputs = {"tokens": tokens, "tokenizer": trained}
    return store, run_stage(store, Decode(tokens="t", tokenizer="m", videos=2), "shown", inputs), inputs  # type: ignore[arg-type]


def test_tokens_are_shown_under_their_clips_ids(decoded: tuple[Store, Artifact, dict[str, Any]], tmp_path: Path) -> None:
    _, shown, inputs = decoded
    assert not list(problems(shown))
    about = Generation.model_validate_json(shown.folder.read_bytes(GENERATION))
    assert [video.id for video in about.videos] == ["v/0000/0", "v/0002/0"] and about.videos[1].prompt.startswith("video 2")
    assert (about.frames, about.steps, about.guidance, about.tokens) == (5, 2, 2.0, 4)
    again = Folder(str(tmp_path / "again"))
    ctx = StageContext("x", "0" * 16, inputs, again, Resources(batch_size=1), lambda **_: None, threading.Event())
    Decode(tokens="t", tokenizer="m", videos=2).run(ctx)  # type: ignore[arg-type]
    for name in ("videos/000.mp4", "frames/000.safetensors"):
        assert again.read_bytes(name) == shown.folder.read_bytes(name)
    drawn = tokenizer().decode(Tokens(clip_tokens(0, 0)[None], frames=5), [about.videos[0].seed])[0]
    torch.testing.assert_close(load(shown.folder.read_bytes(str(about.videos[0].frames)))[FRAMES], pixels(drawn), atol=1, rtol=0)
    other = make_tokens(tmp_path / "other", 2, val=(0,))
    with pytest.raises(ContractError, match="these tokens were not written by this tokenizer: weights"):
        Decode(tokens="t", tokenizer="m").run(ctx_with(ctx, tokens=other))  # type: ignore[arg-type]
    trained_alone = make_tokens(tmp_path / "train-only", 2, spec=SPEC.model_copy(update={"weights": tokenizer().digest()}))
    with pytest.raises(DataError, match="no clips of the val split"):
        Decode(tokens="t", tokenizer="m").run(ctx_with(ctx, tokens=trained_alone))  # type: ignore[arg-type]


def ctx_with(ctx: StageContext, **inputs: Artifact) -> StageContext:
    return StageContext(ctx.name, ctx.key, {**ctx.inputs, **inputs}, ctx.out, ctx.resources, ctx.progress, ctx.stop)


class Knowing(SceneJudge):
    """Sees everything rightly but the shape, which it takes for the first of all."""

    def sees(self, video_BCTHW: torch.Tensor) -> list[dict[Any, str]]:
        assert video_BCTHW.shape[1:] == (3, 16, 32, 32)
        facts = [fact_of(draw_scene(0, number, frames=1, size=32, most=1).shapes[0]).answers for number in range(len(video_BCTHW))]
        return [{**answers, "shape": OPTIONS["shape"][0]} for answers in facts]


RECIPE = {"fps": 8.0, "frames": 16, "height": 32, "width": 32}


def scene_clips(
    folder: Path, count: int, change: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[Artifact, Artifact, Artifact]:
    """Real clips of drawn scenes, a `decode` that shows them as they are, or as `change` makes them, and their facts."""
    source, clips, shown, told = folder / "scenes.tar", *(Folder(str(folder / name)) for name in ("clips", "shown", "told"))
    rows, listed, facts, questions = [], [], [], []
    drawn = SceneSet(count=count, seed=0, frames=16, size=32, fps=8, most=1)
    with source.open("wb") as file:
        tar = TarWriter(file)
        for number, (asked, _) in enumerate(of_scenes(drawn, shard_videos=16)):
            scene = drawn.scene(number)
            data, video = encode_mp4(scene.pixels_THWC, 8), f"s/{number:04d}"
            offset = tar.add(f"{number:04d}.mp4", data)
            place = {"id": f"{video}/0", "video": video, "url": str(source), "offset": offset, "bytes": len(data)}
            rows.append({**place, "start": 0.0, "end": 2.0, "caption": scene.caption, "split": "val", "decision": "kept"})
            frames_THWC = torch.from_numpy(decode_clip(data, start=0.0, **RECIPE))
            shown.write_bytes(f"frames/{number:03d}.safetensors", save({FRAMES: (frames_THWC if change is None else change(frames_THWC))}))
            files = {"file": f"videos/{number:03d}.mp4", "frames": f"frames/{number:03d}.safetensors"}
            listed.append({"prompt": scene.caption, "seed": 0, "id": f"{video}/0", **files})
            questions.append(asked.model_copy(update={"video": video}).model_dump_json())
            facts.append(Facts(video=video, shapes=(fact_of(scene.shapes[0]),)).model_dump_json())
        tar.close()
    clips.write_text("clips.json", json.dumps(RECIPE | {"shard_clips": 4}))
    clips.write_bytes(part_name(0), part_bytes(rows))
    numbers = {"frames": 16, "fps": 8, "steps": 0, "guidance": 1, "tokens": 4}
    shown.write_text(
        GENERATION, Generation.model_validate({"tokenizer": "t", "encoder": "e", "videos": listed, **numbers}).model_dump_json()
    )
    told.write_text(FACTS, "\n".join(facts))
    told.write_text(QUESTIONS, "\n".join(questions))
    return (
        finish(clips, "clips", Counts(input=count, written=count)),
        finish(shown, "decode", Counts()),
        finish(told, "instructions", Counts()),
    )


def test_clips_are_scored_by_what_the_judge_sees_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, shown, told = scene_clips(tmp_path, 8)
    JudgeTrainable().export(tmp_path)
    (tmp_path / "judge" / "model").mkdir(parents=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "judge" / "model" / "model.safetensors")
    judged = finish(Folder(str(tmp_path / "judge")), "judge", Counts())
    judged.record.metrics.update({"val/colour": 0.9, "train/loss": 1.0})
    monkeypatch.setattr(judge, "SceneJudge", Knowing)
    inputs = {"generated": (shown,), "data": clips, "judge": judged, "instructions": told}
    made = run_stage(
        Store(Folder(str(tmp_path / "store"))), Score(generated=("g",), data="c", judge="j", instructions="i"), "scores", inputs
    )  # type: ignore[arg-type]
    scores = ClipScores.model_validate_json(made.folder.read_bytes(SCORES))
    discs = sum(draw_scene(0, number, frames=1, size=32, most=1).shapes[0].shape == OPTIONS["shape"][0] for number in range(8)) / 8
    assert scores.chance == pytest.approx({"colour": 1 / 11, "shape": 1 / 5, "motion": 1 / 6, "all": 1 / 330})
    assert scores.judge == {"colour": 0.9} and [line.name for line in scores.lines] == [REAL, "decode"]
    for line in scores.lines:
        assert line.shown == {"colour": 1.0, "shape": discs, "motion": 1.0, "all": discs}
        assert line.clipsim is None and line.frechet is None and line.caveat is None
    assert made.record.metrics["decode/all"] == discs


@pytest.mark.parametrize(("plain", "ways"), [(False, 6), (True, 4)])
def test_chance_is_one_of_the_values_that_scenes_can_have(plain: bool, ways: int) -> None:
    """Plain ones go straight, and have a background of one colour."""
    for asked, facts in of_scenes(SceneSet(count=4, seed=1, frames=2, size=32, fps=8, most=1, plain=plain), shard_videos=16):
        found = chances(facts.shapes[0], asked.questions)
        values = {factor: len(OPTIONS[factor]) for factor in facts.shapes[0].answers} | {"motion": ways}
        assert ("background" in values) is plain and found == pytest.approx(
            {factor: 1 / count for factor, count in values.items()} | {"all": 1 / np.prod(list(values.values()))}
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("count", "few"), [(5, False), (3, True)])
def test_figures_are_those_of_the_frames_themselves(count: int, few: bool, tmp_path: Path) -> None:
    """CLIPSIM and the distance against the metrics called on the very frames; the protocol says what they are of."""
    clips, shown, _ = scene_clips(tmp_path, count, lambda frames: 255 - frames // 2)
    names = {"clip": toy_clip(tmp_path / "clip"), "i3d": toy_i3d(tmp_path / "i3d.pt")}
    stage = Score.model_validate({"generated": ["g"], "data": "c", **names})
    store = Store(Folder(str(tmp_path / "store")))
    made = run_stage(store, stage, "scores", {"generated": (shown,), "data": clips}, resources=Resources(batch_size=2))
    scores = ClipScores.model_validate_json(made.folder.read_bytes(SCORES))

    index, about = ClipIndex.open(clips), Generation.model_validate_json(shown.folder.read_bytes(GENERATION))
    real = torch.stack([torch.from_numpy(index.read_clip(row)) for row in range(count)])
    fake = torch.stack([load(shown.folder.read_bytes(str(video.frames)))[FRAMES] for video in about.videos])
    videos = [frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1 for frames in (real, fake)]
    clipsim, i3d = ClipSim(names["clip"]), I3D(names["i3d"])
    for line, video in zip(scores.lines, videos, strict=True):
        assert line.clipsim == pytest.approx(float(clipsim(video, [shown.prompt for shown in about.videos]).mean()), rel=1e-4)
    first, second = scores.lines
    assert (first.frechet, first.real, second.real) == (None, None, count)
    assert second.frechet == pytest.approx(frechet(*map(i3d, videos)), rel=1e-4) and second.frechet > 0.1
    assert (second.caveat is not None) is few
    assert made.record.metrics["decode/frechet"] == second.frechet
    protocol = scores.protocol
    assert protocol.model_dump(include={*RECIPE, *names}) == {**RECIPE, **names} and protocol.split == "val"
    assert "8-bit frames as the decoder" in protocol.pixels and "source video" in protocol.caption


def test_videos_of_another_size_than_the_clips_do_not_compare(tmp_path: Path) -> None:
    clips, shown, _ = scene_clips(tmp_path, 2, lambda frames: frames[:, ::2].contiguous())
    with pytest.raises(ContractError, match=r"decode has videos of \(16, 16, 32\), clips clips of \(16, 32, 32\) frames, rows, columns"):
        run_stage(
            Store(Folder(str(tmp_path / "store"))),
            Score.model_validate({"generated": ["g"], "data": "c"}),
            "scores",
            {"generated": (shown,), "data": clips},
        )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("field", "error", "problem"), [("clip", StoreError, "holds no config.json"), ("i3d", DataError, "i3d: .* is no file here")]
)
def test_weights_that_are_not_there_are_refused(
    field: str, error: type[Exception], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    clips, shown, _ = scene_clips(tmp_path, 2)
    stage = Score.model_validate({"generated": ["g"], "data": "c", field: str(tmp_path / "none")})
    with pytest.raises(error, match=problem):
        run_stage(Store(Folder(str(tmp_path / "store"))), stage, "scores", {"generated": (shown,), "data": clips})


def test_scores_need_the_clips_own_captions(decoded: tuple[Store, Artifact, dict[str, Any]], tmp_path: Path) -> None:
    clips, _, _ = scene_clips(tmp_path, 2)
    with pytest.raises(DataError, match="clips has no clip 'v/0000/0': score videos of the captions of its own clips"):
        run_stage(decoded[0], Score(generated=("g",), data="c"), "scores", {"generated": (decoded[1],), "data": clips})  # type: ignore[arg-type]


@pytest.mark.parametrize("plain", [False, True])
def test_a_judge_learns(plain: bool, process_group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On few scenes it soon knows which is which, and what it is fed does not depend on the workers."""
    monkeypatch.setattr(judge, "TRAINED", 16)
    monkeypatch.setattr(judge, "TESTED", 8)
    feed = SceneFeed("train", seed=0, fps=8, frames=16, seconds=2.25, plain=plain)
    whole = next(feed.batches(start=0, batch=8, rank=0, world=1))
    half = next(feed.batches(start=0, batch=4, rank=1, world=2))
    assert all(torch.equal(values[4:], half[name]) for name, values in whole.items())
    assert whole["video_BCTHW"].shape == (8, 3, 8, 32, 32) and whole["video_BCTHW"].abs().max() <= 1
    held_out = SceneFeed("val", seed=0, fps=8, frames=16, seconds=2.25, plain=plain).load(list(range(8)))["video_BCTHW"]
    seen = feed.load(list(range(16)))["video_BCTHW"]
    assert np.abs(held_out[:, None].numpy() - seen[None].numpy()).mean((2, 3, 4, 5)).min() > 0.01
    out, config = Folder(str(tmp_path)), FitConfig(steps=30, global_batch=16, optimizers={"judge": PlayerConfig(lr=3e-3)}, log_every=10)
    out.write_text(TURN, "mine")
    Loop(Work(JudgeTrainable, feed, feed, config, out, Resources(batch_size=16), "mine"), Alone()).run()
    line = read_metrics(out)[-1]
    assert line["val/motion"] > 0.6 and line["val/colour"] > 0.4 and ("val/background" in line) is plain
    logits = SceneJudge.from_pretrained(tmp_path / "model")(whole["video_BCTHW"])
    assert {factor: values.shape for factor, values in logits.items()} == {factor: (8, len(OPTIONS[factor])) for factor in OPTIONS}


def test_a_judge_is_told_what_is_true_and_nobody_is_told_for_nothing() -> None:
    fields = {"kind": "score", "generated": ["shown"], "data": "clips"}
    told = {
        names: list(Score.model_validate(fields | dict.fromkeys(names, "made")).problems(Resources(), {}))
        for names in ((), ("judge", "instructions"), ("judge",), ("instructions",))
    }
    assert not told[()] and not told["judge", "instructions"]
    assert [line.partition(":")[0] for names in (("judge",), ("instructions",)) for line in told[names]] == ["instructions", "judge"]
