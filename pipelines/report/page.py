"""The report page: figures of finished artifacts, gathered into plain values and rendered to one self-contained HTML file.

Everything shown comes from records and files of the inputs; nothing is computed again. Text from data sets (captions, ids, messages)
is escaped by the template engine. Videos are base64 inside the page. Not covered: the looks (`report.html`).
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2

from kinetok.infra.artifact import Artifact, Counts
from kinetok.infra.metrics_log import read_metrics
from kinetok.pipelines.data.quarantine import ReasonCount
from kinetok.pipelines.data.quarantine import report as quarantine_report
from kinetok.pipelines.report.charts import Chart, charts
from kinetok.pipelines.report.tables import (
    ANSWERS,
    CARRIED,
    CONTACT,
    GENERATION,
    PANEL,
    SCORES,
    TABLE,
    Answers,
    Carried,
    ClipScores,
    Generation,
    Shown,
    ShownList,
    Table,
)

TEMPLATE = "report.html"
RAW_BITS = 24
"""Of one pixel."""
RATES = ("clips_per_second", "decode_clips_per_second_per_core", "model_clips_per_second_per_actor")
"""What `encode` says of its speed."""
GENERATOR = "diffusion"
"""Kind of the training runs that are shown beside what their models generate."""


@dataclass(frozen=True)
class Verdict:
    """Whether the job did what it is for: every rung beats the better mean-frame baseline."""

    good: bool
    headline: str
    sentence: str


@dataclass(frozen=True)
class Video:
    """One reconstruction of one clip."""

    model: str
    psnr: float
    ssim: float
    source: str
    """data: URL."""


@dataclass(frozen=True)
class Clip:
    """A clip with its reconstructions, lowest rung first."""

    id: str
    caption: str
    videos: tuple[Video, ...]


@dataclass(frozen=True)
class Training:
    """One model's training run."""

    name: str
    charts: tuple[Chart, ...]
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Gallery:
    """What one `generate` made."""

    name: str
    about: Generation
    videos: tuple[tuple[str, str], ...]
    """(prompt, data: URL)."""
    contact: str
    """data: URL of the contact sheet."""
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Carrying:
    """What one `reconstruct` measured."""

    name: str
    about: Carried
    strips: tuple[tuple[str, str], ...]
    """(caption, data: URL)."""
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Speed:
    """A measured rate beside the floors of the same run: bars of one scale."""

    name: str
    bars: tuple[tuple[str, float], ...]
    """(what, clips per second)."""
    remark: str

    @property
    def longest(self) -> float:
        return max(value for _, value in self.bars)


@dataclass(frozen=True)
class Flow:
    """What became of the samples of one data stage."""

    name: str
    counts: Counts
    reasons: tuple[ReasonCount, ...]


@dataclass(frozen=True)
class Sources:
    """The artifacts a report is made of."""

    quality: Artifact
    clips: Artifact
    trained: tuple[Artifact, ...]
    encoded: tuple[Artifact, ...]
    generated: tuple[Artifact, ...] = ()
    carried: tuple[Artifact, ...] = ()
    answers: tuple[Artifact, ...] = ()
    scores: tuple[Artifact, ...] = ()

    @property
    def all(self) -> tuple[Artifact, ...]:
        shown = (*self.generated, *self.carried, *self.answers, *self.scores)
        return (self.clips, *self.trained, *self.encoded, self.quality, *shown)


def render(title: str, sources: Sources) -> str:
    """The page as HTML text."""
    table = Table.model_validate_json(sources.quality.folder.read_bytes(TABLE))
    shown = ShownList.validate_json(sources.quality.folder.read_bytes(PANEL))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["short"] = short
    return environment.get_template(TEMPLATE).render(
        title=title,
        verdict=judge(table),
        table=table,
        raw_bits=table.recipe.height * table.recipe.width * table.recipe.fps * RAW_BITS,
        longest=max(line.psnr for line in table.ladder),
        panel=_clips(sources.quality, [entry for entry in shown if entry.role == "panel"]),
        worst=_clips(sources.quality, [entry for entry in shown if entry.role == "worst"]),
        trainings=[_training(artifact) for artifact in sources.trained if artifact.kind != GENERATOR],
        generators=[_training(artifact) for artifact in sources.trained if artifact.kind == GENERATOR],
        carried=[_carrying(artifact) for artifact in sources.carried],
        answers=[Answers.model_validate_json(artifact.folder.read_bytes(ANSWERS)) for artifact in sources.answers],
        scores=[ClipScores.model_validate_json(artifact.folder.read_bytes(SCORES)) for artifact in sources.scores],
        galleries=[_gallery(artifact) for artifact in sources.generated],
        speeds=[speed for artifact in sources.encoded if (speed := _speed(artifact)) is not None],
        flows=[_flow(artifact) for artifact in (sources.clips, *sources.encoded, sources.quality, *sources.answers)],
        artifacts=sources.all,
        versions=sources.quality.record.environment,
    )


def judge(table: Table) -> Verdict:
    """Failed as soon as one rung is no better than a standing mean frame."""
    bar, top = table.bar, table.rungs[-1]
    below = [line for line in table.rungs if line.psnr <= bar.psnr]
    if below:
        names = ", ".join(f"{line.name} at {line.psnr:.2f} dB" for line in below)
        return Verdict(
            False, "No better than a standing picture", f"{names}: not above the {bar.name} at {bar.psnr:.2f} dB. This job failed."
        )
    assert top.cost is not None
    gain = top.psnr - bar.psnr
    rate = f"{top.cost.temporal}×{top.cost.spatial}×{top.cost.spatial}"
    best = f"{top.name} compresses {rate} and reconstructs held-out clips at {top.psnr:.2f} dB, {gain:.2f} dB above the {bar.name}."
    return Verdict(True, f"{top.psnr:.1f} dB at {rate}", best)


def short(value: float, digits: int = 3) -> str:
    """A number for people: 1234567 as 1.23 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def _clips(quality: Artifact, shown: Sequence[Shown]) -> list[Clip]:
    """Entries of one clip together, clips in order of their first mention."""
    order = list(dict.fromkeys(entry.id for entry in shown))
    together = sorted(shown, key=lambda entry: order.index(entry.id))
    clips = []
    for name, entries in groupby(together, key=lambda entry: entry.id):
        found = list(entries)
        videos = tuple(Video(entry.model, entry.psnr, entry.ssim, _data_url(quality, entry.file)) for entry in found)
        clips.append(Clip(name, found[0].caption or "", videos))
    return clips


def _gallery(artifact: Artifact) -> Gallery:
    about = Generation.model_validate_json(artifact.folder.read_bytes(GENERATION))
    metrics = artifact.record.metrics
    seconds = [metrics[name] or 0.0 for name in ("sample_seconds", "decode_seconds")]
    facts = (
        ("frames", f"{about.frames} at {about.fps:g} fps"),
        ("tokens a video", f"{about.tokens:,}"),
        ("steps", str(about.steps)),
        ("guidance", f"{about.guidance:g}"),
        ("text", about.encoder),
        ("seconds a video", f"{short(seconds[0] / len(about.videos))} to sample, {short(seconds[1] / len(about.videos))} to decode"),
    )
    videos = tuple((video.prompt, _data_url(artifact, video.file)) for video in about.videos)
    return Gallery(artifact.name, about, videos, _data_url(artifact, CONTACT, "image/png"), facts)


def _carrying(artifact: Artifact) -> Carrying:
    about = Carried.model_validate_json(artifact.folder.read_bytes(CARRIED))
    facts = (
        ("clips", f"{about.clips} of {about.split}"),
        ("tokens", f"{about.tokens} of {about.token_width} numbers"),
        ("vision transformer", about.vit),
        ("DDIM steps", str(about.steps)),
        ("guidance", f"{about.guidance:g}"),
    )
    strips = tuple((strip.caption or strip.id, _data_url(artifact, strip.file, "image/png")) for strip in about.strips)
    return Carrying(artifact.name, about, strips, facts)


def _data_url(artifact: Artifact, name: str, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64," + base64.b64encode(artifact.folder.read_bytes(name)).decode()


def _training(artifact: Artifact) -> Training:
    summary = json.loads(artifact.folder.read_text("training.json"))
    frozen = summary.get("frozen", {})
    facts = [
        ("steps", f"{summary['steps']:,}"),
        ("minutes", f"{summary['seconds'] / 60:.1f}"),
        ("samples / s", short(summary["samples_per_second"])),
        ("restarts", str(summary["restarts"])),
    ]
    if frozen:
        facts.append(("frozen weights", "unchanged" if all(pair["before"] == pair["after"] for pair in frozen.values()) else "CHANGED"))
    unknown = {name: artifact.record.metrics.get(name) for name in ("unknown_questions", "unknown_stories")}
    facts += [(name.replace("_", " "), f"{count:g}") for name, count in unknown.items() if count]
    facts += [("note", note) for note in summary.get("notes", ())]
    return Training(artifact.name, tuple(charts(read_metrics(artifact.folder))), tuple(facts))


def _speed(artifact: Artifact) -> Speed | None:
    """End to end beside its floors; None where the last attempt had nothing left to do."""
    metrics = artifact.record.metrics
    whole, decode, model = (metrics.get(name) for name in RATES)
    if whole is None or decode is None or model is None:
        return None
    actors = int(str(artifact.record.resources.get("workers", 1)))
    bars = (("end to end", whole), ("decoding alone, one core", decode), ("model alone, one actor", model))
    plural = "" if actors == 1 else "s"
    return Speed(artifact.name, bars, f"{whole / (model * actors):.0%} of {actors} model actor{plural} that never wait")


def _flow(artifact: Artifact) -> Flow:
    bad = artifact.record.counts.quarantined
    return Flow(artifact.name, artifact.record.counts, tuple(quarantine_report(artifact.folder)) if bad else ())
