"""`score`: what generated clips are worth: whether they show what their captions ask for, CLIPSIM, and the Fréchet distance of I3D.

Each `decode` is scored on the clips that it shows, frames as they were decoded, and so are the real clips of the same captions, the most
that can be had; the least is what chance would show (`chances`). A figure whose network is not named is `not measured`. Output:
`scores.json`, with the protocol of the figures. Runs in the driver's process, on its GPU where `resources.gpus` asks for one. Not covered:
the judge (`kinetok.pipelines.judge`), the other figures (`kinetok.tokenizers.video_metrics`).

Legend: B videos, C T H W colours, frames, rows, columns.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.report.tables import FRAMES, GENERATION, SCORES, ClipScore, ClipScores, Generated, Generation, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from kinetok.pipelines.data.instructions import Fact, Question
    from kinetok.pipelines.judge import SceneJudge

REAL = "real clips"
CAPTION = "of the source video of its clip, the same for all clips of that video"
PIXELS = "8-bit frames as the decoder of the tokens makes them; real clips decoded, cut and resized by the recipe of the clips"
RESIZE = "bicubic with antialiasing to CLIP's edge, centre crop; I3D resizes by itself to 224"
COVARIANCE = "over N, of float64 features"


class Score(Stage):
    """Figures of generated clips, in one table."""

    kind: Literal["score"] = "score"
    version: ClassVar[int] = 3
    generated: Annotated[tuple[Ref, ...], Produces("decode"), Field(min_length=1)]
    """Videos of the clips' own captions."""
    data: Annotated[Ref, Produces("clips")]
    """The real clips."""
    judge: Annotated[Ref, Produces("judge")] | None = None
    """Judges clips of one drawn shape; None where there is nothing to judge so."""
    instructions: Annotated[Ref, Produces("instructions")] | None = None
    """What is true of the drawn scenes and could have been, for the judge."""
    clip: str | None = None
    """A CLIP, by folder or hub id, for CLIPSIM."""
    i3d: str | None = None
    """I3D as TorchScript, by path, for the Fréchet distance."""

    def fetch(self) -> None:
        """Download CLIP where only the hub has it."""
        from kinetok.pipelines.outside import fetch_networks

        fetch_networks(clip=self.clip)

    def facts(self) -> Mapping[str, Plain]:
        """Digests of the networks that measure. Raises DataError or StoreError where one is not here."""
        from kinetok.pipelines.outside import network_digests

        return network_digests(clip=self.clip, i3d=self.i3d)

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """A judge who is not told what is true, or the truth without a judge."""
        if self.judge is not None and self.instructions is None:
            yield f"instructions: are missing; they say what is true of the scenes that {self.judge} judges"
        if self.instructions is not None and self.judge is None:
            yield f"judge: is missing; without one nobody reads {self.instructions}"

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.stages.evaluate import threads

        with threads(ctx.resources):
            scorer = Scorer(self, ctx)
            lines = list(scorer.lines())
        scores = ClipScores(judge=scorer.own_accuracy, chance=scorer.chance, protocol=scorer.protocol(), lines=tuple(lines))
        ctx.out.write_text(SCORES, scores.model_dump_json(indent=1))
        return StageResult({f"{line.name}/{name}": value for line in lines for name, value in line.figures.items()})


class Scorer:
    """What scores, loaded once."""

    def __init__(self, stage: Score, ctx: StageContext) -> None:
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.report.networks import Networks

        self.ctx, self.stage = ctx, stage
        self.index = ClipIndex.open(ctx.input("data"))
        self.place = {name: row for row, name in enumerate(self.index.rows["id"].to_pylist())}
        self.judge, self.facts, self.chance = _judge(ctx)
        self.networks = Networks.open(ctx.resources, clip=stage.clip, i3d=stage.i3d)

    @property
    def own_accuracy(self) -> dict[str, float]:
        """Of the judge, on scenes that it never saw."""
        judge = self.ctx.optional("judge")
        found = {} if judge is None else judge.record.metrics
        return {name.removeprefix("val/"): value for name, value in found.items() if name.startswith("val/") and value is not None}

    def protocol(self) -> Protocol:
        """What has to stand beside the figures."""
        scored = [self._row(video.id or "") for artifact in self.ctx.several("generated") for video in _listed(artifact)]
        splits = self.index.rows["split"].take(scored).unique().to_pylist()
        return Protocol(
            clip=self.stage.clip,
            i3d=self.stage.i3d,
            split=", ".join(sorted(splits)),
            caption=CAPTION,
            pixels=PIXELS,
            resize=RESIZE,
            covariance=COVARIANCE,
            **self.index.recipe.model_dump(),
        )

    def lines(self) -> Iterator[ClipScore]:
        """Of each `decode`, and of the real clips of the first."""
        several = self.ctx.several("generated")
        first = _listed(several[0])
        yield self._line(REAL, first, self._real(first), None)
        for artifact in several:
            listed = _listed(artifact)
            yield self._line(artifact.name, listed, self._generated(artifact, listed), self._real(listed))

    def _line(self, name: str, listed: Sequence[Generated], video_BCTHW: "Tensor", real_BCTHW: "Tensor | None") -> ClipScore:
        sim_B = self.networks.clipsim(video_BCTHW, [video.prompt for video in listed])
        distance, caution = (None, None) if real_BCTHW is None else self._distance(real_BCTHW, video_BCTHW)
        return ClipScore(
            name=name,
            videos=len(listed),
            real=None if real_BCTHW is None else len(real_BCTHW),
            shown=self._shown([video.id or "" for video in listed], video_BCTHW),
            clipsim=None if sim_B is None else float(sim_B.mean()),
            frechet=distance,
            caveat=caution,
        )

    def _distance(self, real_BCTHW: "Tensor", made_BCTHW: "Tensor") -> tuple[float | None, str | None]:
        """The Fréchet distance, and what is to be known of it."""
        from kinetok.tokenizers.video_metrics import caveat, frechet

        real_ND, made_ND = (self.networks.features(video_BCTHW) for video_BCTHW in (real_BCTHW, made_BCTHW))
        return (None, None) if real_ND is None or made_ND is None else (frechet(real_ND, made_ND), caveat(real_ND, made_ND))

    def _shown(self, ids: Sequence[str], video_BCTHW: "Tensor") -> dict[str, float]:
        """Share of the clips that show what is asked, by factor and in all; empty without a judge."""
        if self.judge is None:
            return {}
        pairs = [(self.facts[video], place) for place, id in enumerate(ids) if (video := id.rpartition("/")[0]) in self.facts]
        if not pairs:
            raise DataError("judge: none of the clips is of a drawn scene of one shape; leave the judge out")
        seen = self.judge.sees(video_BCTHW[[place for _, place in pairs]])
        right = [
            {factor: found[factor] == answer for factor, answer in fact.answers.items()}
            for (fact, _), found in zip(pairs, seen, strict=True)
        ]
        shares: dict[str, float] = {factor: sum(each[factor] for each in right) / len(right) for factor in right[0]}
        return {**shares, "all": sum(all(each.values()) for each in right) / len(right)}

    def _row(self, id: str) -> int:
        if id not in self.place:
            raise DataError(f"{self.ctx.input('data').name} has no clip {id!r}: score videos of the captions of its own clips")
        return self.place[id]

    def _real(self, listed: Sequence[Generated]) -> "Tensor":
        """The clips whose videos are listed, (B, 3, T, H, W) in [-1, 1]."""
        return _videos(self.index.read_clip(self._row(video.id or "")) for video in listed)

    def _generated(self, artifact: Artifact, listed: Sequence[Generated]) -> "Tensor":
        """The videos, (B, 3, T, H, W) in [-1, 1]; ContractError where they are not as long and large as the clips."""
        from safetensors.torch import load

        recipe, frames = self.index.recipe, []
        for video in listed:
            assert video.frames is not None, "`decode` keeps them"
            frames.append(load(artifact.folder.read_bytes(video.frames))[FRAMES])
            found, wanted = tuple(frames[-1].shape[:3]), (recipe.frames, recipe.height, recipe.width)
            if found != wanted:
                raise ContractError(
                    f"{artifact.name} has videos of {found}, {self.ctx.input('data').name} clips of {wanted} frames, rows, columns: name "
                    "the clips that the tokens were made of"
                )
        return _videos(frames)


def _listed(artifact: Artifact) -> tuple[Generated, ...]:
    return Generation.model_validate_json(artifact.folder.read_bytes(GENERATION)).videos


def _videos(clips: "Iterable[object]") -> "Tensor":
    """Bytes (T, H, W, 3) as (B, 3, T, H, W) in [-1, 1]."""
    import torch

    return torch.stack([torch.as_tensor(pixels_THWC) for pixels_THWC in clips]).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def chances(fact: "Fact", asked: "Iterable[Question]") -> dict[str, float]:
    """What a guess among the options of each factor shows of a scene rightly, and in `all`; `asked` are the questions about it."""
    options = {question.about: question.options for question in asked}
    found: dict[str, float] = {factor: 1 / len(options[factor]) for factor in fact.answers}
    return {**found, "all": math.prod(found.values())}


def _judge(ctx: StageContext) -> "tuple[SceneJudge | None, dict[str, Fact], dict[str, float]]":
    """The judge, the one shape of every scene of one shape by its video, and the chances of their factors."""
    from kinetok.pipelines.data.instructions import FACTS, Facts, questions_of, read_lines
    from kinetok.pipelines.judge import SceneJudge
    from kinetok.pipelines.models import on_disk

    judge, instructions = ctx.optional("judge"), ctx.optional("instructions")
    if judge is None or instructions is None:
        return None, {}, {}
    facts = {line.video: line.shapes[0] for line in read_lines(instructions, FACTS, Facts) if len(line.shapes) == 1}
    # Scenes of one data set have the same options, so that one of them tells those of all.
    first = next(iter(facts), None)
    chance = {} if first is None else chances(facts[first], questions_of(instructions)[first])
    with on_disk(judge.folder / "model") as folder:
        return SceneJudge.from_pretrained(folder), facts, chance
