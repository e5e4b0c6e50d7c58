"""The report page from small artifacts: complete, honest, self-contained, and safe with text from strangers."""

import itertools
import json
import math
import re
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kinetok.infra.artifact import Artifact, Counts, Record, Store, publish
from kinetok.infra.metrics_log import MetricsLog
from kinetok.infra.stage import Ref, Resources, StageContext
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.clip_index import part_bytes, part_name
from kinetok.pipelines.report.charts import chart, charts, ticks
from kinetok.pipelines.report.page import judge
from kinetok.pipelines.report.tables import (
    AnswerProtocol,
    Answers,
    Asked,
    Carried,
    ClipScore,
    ClipScores,
    Condition,
    Figure,
    Generated,
    Generation,
    Geometry,
    Line,
    Protocol,
    RungCost,
    Score,
    Shown,
    ShownList,
    Strip,
    Table,
)
from kinetok.pipelines.stages.report import Report

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"
COST = RungCost(
    tokenizer="causal",
    weights="w",
    temporal=4,
    spatial=8,
    latent=(8, 5, 8, 8),
    parameters=1000,
    tokens_per_second=151.0,
    bits_per_second=19276.0,
    encode_frames_per_second=60.0,
    decode_frames_per_second=44.0,
)


def _table(psnr: float) -> Table:
    lines = (Line(name="data-set mean frame", psnr=14.0, ssim=0.1), Line(name="clip mean frame", psnr=24.9, ssim=0.6))
    rung = Line(name="base", psnr=psnr, ssim=0.9, cost=COST)
    return Table(split="val", clips=3, stored="bf16", recipe=Geometry(fps=8, frames=17, height=64, width=64), ladder=(*lines, rung))


def _publish(store: Store, kind: str, name: str, counts: Counts | None = None, metrics: dict[str, float | None] | None = None) -> Artifact:
    record = Record(
        kind=kind, name=name, key=name[0] * 16, version=1, config={}, digest="", counts=counts or Counts(), metrics=metrics or {},
        started="2026-01-01", seconds=2.0, commit="abc", resources={"workers": 2},
    )  # fmt: skip
    return publish(store.folder(kind, name, name[0] * 16), record)


TRAINED = (("train", "base", "autoencoder"), ("diffusion", "flow", "dit"))


def _trained(store: Store, kind: str, name: str, player: str) -> Artifact:
    trained = store.folder(kind, name, name[0] * 16)
    log = MetricsLog(trained, after=-1)
    for step in range(5):
        log.write(step, {f"train/{player}/loss": 1.0 / (step + 1), f"train/{player}/lr": 1e-3, "val/psnr": 20.0 + step})
    log.flush()
    summary = {"steps": 5, "seconds": 60.0, "samples_per_second": 3.0, "restarts": 1, "frozen": {"lower": {"before": "a", "after": "a"}}}
    trained.write_text("training.json", json.dumps(summary))
    return _publish(store, kind, name, metrics={"unknown_questions": 3.0, "unknown_stories": 0.0})


def _generated(store: Store) -> Artifact:
    """One generated video of a hostile prompt."""
    video = Generated(prompt=HOSTILE, file="videos/000.mp4", seed=1)
    about = Generation(tokenizer="base", encoder="untrained", frames=34, fps=8, steps=30, guidance=4, tokens=256, videos=(video,))
    folder = store.folder("generate", "made", "m" * 16)
    folder.write_text("prompts.json", about.model_dump_json())
    folder.write_bytes("contact.png", b"not really a picture")
    folder.write_bytes(video.file, b"not really a video")
    return _publish(store, "generate", "made", metrics={"sample_seconds": 2.5, "decode_seconds": 0.5})


def _carried(store: Store) -> Artifact:
    """What a tokenizer with an untrained transformer carries, with a hostile caption."""
    about = Carried(
        split="val",
        clips=24,
        weights="w",
        vit="untrained (2 layers of 96)",
        tokens=16,
        token_width=32,
        steps=10,
        guidance=2,
        conditions=(
            Condition(name="autoencoder alone", psnr=26.5, ssim=0.8, v_loss=None),
            Condition(name="its own tokens", psnr=19.25, ssim=0.5, v_loss=0.4321),
        ),
        figures=(
            Figure(name="CLIPSIM", value=None, protocol="not measured: no weights"),
            Figure(name="rFVD", value=301.44, protocol="24 clips"),
        ),
        strips=(Strip(id="v/0", caption=HOSTILE, file="strips/000.png"),),
    )
    folder = store.folder("reconstruct", "carried", "c" * 16)
    folder.write_text("carried.json", about.model_dump_json())
    folder.write_bytes("strips/000.png", b"not really a picture")
    return _publish(store, "reconstruct", "carried")


def _answers(store: Store) -> Artifact:
    """One question about colour with a hostile answer, one that has no options."""
    common = {"video": "v", "answer": "red", "said": HOSTILE, "exact": False, "blindly_said": "red", "blindly_exact": True}
    common |= {"ids": 4, "nats": 4 * math.log(2.5), "blindly_nats": 4 * math.log(12.25)}
    closed = Asked(question="Which colour?", about="colour", options=("red", "blue"), chosen="red", blindly_chosen="blue", **common)  # type: ignore[arg-type]
    free = Asked(question="What?", about="what", options=(), chosen=None, blindly_chosen=None, **common)  # type: ignore[arg-type]
    asked = (closed, free)
    without = closed.model_copy(update=dict.fromkeys(("blindly_said", "blindly_exact", "blindly_chosen", "blindly_nats")))
    scores = (Score.of("colour", [closed]), Score.of("what", [free]), Score.of("alone", [without]), Score.of("all", asked))
    protocol = AnswerProtocol(
        prompt="<s>{question}\n",
        clips=20,
        windows="the first of each part",
        max_tokens=16,
        temperature=0.7,
        top_p=0.5,
        seed=11,
        control="the next one",
        matching="word for word",
        choice="the least",
        perplexity="exp of it",
    )
    folder = store.folder("understand", "answers", "a" * 16)
    folder.write_text("answers.json", Answers(model="tuned", split="val", protocol=protocol, scores=scores, asked=asked).model_dump_json())
    return _publish(store, "understand", "answers", Counts(input=9, written=2, filtered=7))


def _scores(store: Store) -> Artifact:
    """Real clips without I3D's distance, generated ones with it."""
    size = {"frames": 16, "fps": 8, "height": 48, "width": 64}
    how = {"split": "val", "caption": "its own", "pixels": "raw", "resize": "as it is", "covariance": "over N"}
    protocol = Protocol.model_validate({"clip": None, "i3d": "i3d.pt", **size, **how})
    real = ClipScore(
        name="real clips",
        videos=4,
        real=None,
        shown={"colour": 1.0, "shape": 0.75, "motion": 1.0, "all": 0.75},
        clipsim=None,
        frechet=None,
        caveat=None,
    )
    shares = {"colour": 0.25, "shape": 0.5, "motion": 0.0, "all": 0.0}
    made = ClipScore(name="made", videos=4, real=4, shown=shares, clipsim=None, frechet=301.44, caveat="4 are too few")
    chance = {"colour": 0.1, "shape": 0.2, "motion": 0.25, "all": 0.005}
    folder = store.folder("score", "scores", "s" * 16)
    folder.write_text(
        "scores.json", ClipScores(judge={"colour": 0.97}, chance=chance, protocol=protocol, lines=(real, made)).model_dump_json()
    )
    return _publish(store, "score", "scores")


@pytest.fixture
def page(tmp_path: Path) -> str:
    """The page of a good job whose captions and quarantine messages are hostile."""
    store = Store(Folder(str(tmp_path)))
    bad = {"id": HOSTILE, "video": "v", "shard": 0, "decision": "quarantined", "reason": "unreadable", "message": HOSTILE}
    store.folder("clips", "clips", "c" * 16).write_bytes(part_name(0), part_bytes([bad]))
    clips = _publish(store, "clips", "clips", Counts(input=9, written=6, filtered=2, quarantined=1))
    base, diffusion = (_trained(store, kind, name, player) for kind, name, player in TRAINED)
    rates = {"clips_per_second": 40.0, "decode_clips_per_second_per_core": 100.0, "model_clips_per_second_per_actor": 25.0}
    tokens = _publish(store, "encode", "tokens", Counts(input=6, written=6), rates)
    quality = store.folder("evaluate", "quality", "q" * 16)
    quality.write_text("table.json", _table(28.1).model_dump_json())
    shown = [
        Shown(model="base", role=role, file="panel/a.mp4", id="v/0", caption=HOSTILE, psnr=28.0, ssim=0.9) for role in ("panel", "worst")
    ]
    quality.write_bytes("panel.json", ShownList.dump_json(shown))
    quality.write_bytes("panel/a.mp4", b"not really a video")
    inputs: dict[str, Artifact | tuple[Artifact, ...]] = {"clips": clips, "trained": (base, diffusion), "encoded": (tokens,)}
    inputs["quality"] = _publish(store, "evaluate", "quality", Counts(input=3, written=3))
    inputs |= {"generated": (_generated(store),), "carried": (_carried(store),)}
    inputs |= {"answers": (_answers(store),), "scores": (_scores(store),)}
    out = Folder(str(tmp_path / "out"))
    context = StageContext("report", "0" * 16, inputs, out, Resources(), lambda **_: None, threading.Event())
    stage = Report(
        quality=Ref("quality"),
        clips=Ref("clips"),
        trained=(Ref("base"), Ref("flow")),
        encoded=(Ref("tokens"),),
        generated=(Ref("made"),),
        carried=(Ref("carried"),),
        answers=(Ref("answers"),),
        scores=(Ref("scores"),),
    )
    assert stage.run(context).metrics["bytes"] > 1000
    return out.read_text("report.html")


def test_the_page_shows_what_was_measured(page: str) -> None:
    for text in ("28.1 dB at 4×8×8", "passed", "clip mean frame", "24.90", "19.3 k", "quarantined", "unchanged", "80% of 2 model actors"):
        assert text in page, text
    assert "unknown questions <b>3</b>" in page and "unknown stories" not in page
    assert page.count("<video") == 3 and page.count("data:video/mp4;base64,") == 3 and page.count("<svg") == 4


def test_generated_videos_stand_with_prompt_sheet_and_curve(page: str) -> None:
    section = page[page.index("<h2>Generated") : page.index("<h2>Training")]
    for text in ("34 at 8 fps", "untrained", "2.5 to sample, 0.5 to decode", "data:image/png;base64,", "train/dit/loss", "&lt;script&gt;"):
        assert text in section, text
    assert section.count("<video") == 1 and section.count("<svg") == 2 and "train/dit/loss" not in page[page.index("<h2>Training") :]


def test_what_tokens_carry_stands_with_its_controls_and_with_what_was_not_measured(page: str) -> None:
    for text in (
        "What the tokens carry",
        "0.4321",
        "19.25",
        "untrained (2 layers of 96)",
        "CLIPSIM</b> (not measured: no weights)",
        "301.4 (24",
    ):
        assert text in page, text


def test_answers_and_scores_stand_beside_chance_and_what_was_not_measured(page: str) -> None:
    rows = [re.sub(r"<[^>]+>", "|", row).replace("||", "|") for row in re.findall(r"<tr><td class=\"name\">.*?</tr>", page)]
    text = "\n".join(rows)
    assert "|colour|1|0 %|100 %|100 %|0 %|50 %|2.5|12.25|" in text and "|what|1|0 %|100 %|" in text
    assert "|alone|1|0 %|not measured|100 %|not measured|50 %|2.5|not measured|" in text
    assert "|all|2|0 %|100 %|100 %|0 %|50 %|2.5|12.25|" in text
    assert "|real clips|4|–||100 %|75 %|100 %|75 %|not measured|not measured|" in text
    assert "75 %|not measured|not measured|\n|chance|–|–||10 %|20 %|25 %|0.5 %|–|–|\n|made|" in text
    assert "|made|4|4||25 %|50 %|0 %|0 %|not measured|301.4|" in text
    assert (
        "Split val; clips of 16 frames, 48 × 64, at 8 fps; captions: its own; pixels: raw; CLIP none, I3D i3d.pt; as it is; covariance"
        in page
    )
    assert "covariance over N. <b>made</b>: 4 are too few." in page


def test_how_questions_were_asked_stands_below_their_answers(page: str) -> None:
    section = page[page.index("<h2>Asked and answered") : page.index("<h2>What generated clips show")]
    told = re.sub(r"\s+", " ", section)
    for text in (
        "Prompt <code>&lt;s&gt;{question}\\n</code>, at most 20 clips of a video: the first of each part. Answers",
        "of at most 16 ids, drawn at temperature 0.7 and top-p 0.5; seed 11.",
        "Said: word for word. Chosen: the least. Perplexity: exp of it. Another clip: the next one.",
    ):
        assert text in told, text
    flow = page[page.index("<h3>answers</h3>") :]
    assert "filtered <b>7</b>" in flow[: flow.index("</article>")]


def test_text_from_strangers_is_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page and page.count("<img") == 2 and "<img src=x" not in page


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "@import" not in page and "url(" not in page


def test_tags_are_balanced(page: str) -> None:
    open_tags: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "line", "circle", "path", "br", "img"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("line", "circle", "path"):
                assert open_tags.pop() == tag

    Check().feed(page)
    assert not open_tags


def test_a_rung_below_the_mean_frame_fails_the_job() -> None:
    verdict = judge(_table(24.9))
    assert not verdict.good and "base at 24.90 dB" in verdict.sentence and "failed" in verdict.sentence
    assert judge(_table(24.91)).good


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.2, 3.2), (-5.0, 1e4), (0.0012, 0.0031), (0.0, 0.0)])
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 7
    steps = {round((b - a) / (marks[1] - marks[0]), 6) for a, b in itertools.pairwise(marks)}
    assert steps == {1.0}


def test_long_series_keep_their_end_and_stay_inside() -> None:
    drawn = chart("loss", {"train/loss": [(float(step), 1 / (step + 1)) for step in range(10_000)]})
    (series,) = drawn.series
    numbers = [float(number) for number in re.findall(r"[\d.]+", series.path)]
    assert len(numbers) < 600 and series.end == (numbers[-2], numbers[-1])
    assert all(0 <= x <= drawn.width for x in numbers[::2]) and all(0 <= y <= drawn.height for y in numbers[1::2])


def test_charts_put_training_and_validation_together() -> None:
    lines = [{"step": float(step), "time": 0.0, "train/l1": 1.0, "train/loss": 2.0, "train/lr": 0.1, "val/l1": 3.0} for step in range(3)]
    found = charts(lines)  # type: ignore[arg-type]
    assert [(drawn.title, [series.name for series in drawn.series]) for drawn in found] == [
        ("loss", ["train/loss"]),
        ("l1", ["train/l1", "val/l1"]),
    ]
