"""`score`: what generated clips are worth: whether they show what their captions ask for, CLIPSIM, and the Fréchet distance of I3D.

Each `decode` is scored on the clips that it shows, and so are the real clips of the same captions, the most that can be had. A figure
whose network is not named is `not measured`. Output: `scores.json`. Runs in the driver's process, on its GPU where `resources.gpus` asks
for one. Not covered: the judge (`kinetok.pipelines.judge`), the other figures (`kinetok.tokenizers.video_metrics`).

Legend: B videos, C T H W colours, frames, rows, columns.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kinetok.infra.artifact import Artifact
from kinetok.infra.errors import ConfigError, DataError
from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult
from kinetok.pipelines.report.tables import GENERATION, SCORES, ClipScore, ClipScores, Generation, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from kinetok.pipelines.data.instructions import Fact
    from kinetok.pipelines.judge import SceneJudge
    from kinetok.tokenizers.video_metrics import I3D, ClipSim

REAL = "real clips"


class Score(Stage):
    """Figures of generated clips, in one table."""

    kind: Literal["score"] = "score"
    version: ClassVar[int] = 1
    generated: Annotated[tuple[Ref, ...], Produces("decode"), Field(min_length=1)]
    """Videos of the clips' own captions."""
    data: Annotated[Ref, Produces("clips")]
    """The real clips."""
    judge: Annotated[Ref, Produces("judge")] | None = None
    """Judges clips of one drawn shape; None where there is nothing to judge so."""
    instructions: Annotated[Ref, Produces("instructions")] | None = None
    """What is true of the drawn scenes, for the judge."""
    clip: str | None = None
    """A CLIP, by folder or hub id, for CLIPSIM."""
    i3d: str | None = None
    """I3D as TorchScript, by path, for the Fréchet distance."""

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.stages.evaluate import threads

        with threads(ctx.resources.cpus):
            scorer = Scorer(self, ctx)
            lines = list(scorer.lines())
        scores = ClipScores(judge=scorer.own_accuracy, protocol=scorer.protocol, lines=tuple(lines))
        ctx.out.write_text(SCORES, scores.model_dump_json(indent=1))
        return StageResult({f"{line.name}/{name}": value for line in lines for name, value in line.figures.items()})


class Scorer:
    """What scores, loaded once."""

    def __init__(self, stage: Score, ctx: StageContext) -> None:
        from kinetok.pipelines.data.clip_index import ClipIndex

        self.ctx, self.stage = ctx, stage
        self.index = ClipIndex.open(ctx.input("data"))
        self.place = {name: row for row, name in enumerate(self.index.rows["id"].to_pylist())}
        self.judge, self.facts = _judge(ctx)
        self.clipsim, self.i3d = _networks(stage)

    @property
    def own_accuracy(self) -> dict[str, float]:
        """Of the judge, on scenes that it never saw."""
        judge = self.ctx.optional("judge")
        found = {} if judge is None else judge.record.metrics
        return {name.removeprefix("val/"): value for name, value in found.items() if name.startswith("val/") and value is not None}

    @property
    def protocol(self) -> Protocol:
        """What has to stand beside the figures."""
        recipe = self.index.recipe
        return Protocol(
            clip=self.stage.clip,
            i3d=self.stage.i3d,
            frames=recipe.frames,
            fps=recipe.fps,
            resize="bicubic with antialiasing to CLIP's edge, centre crop; I3D resizes by itself to 224",
            covariance="over N, of float64 features",
        )

    def lines(self) -> Iterator[ClipScore]:
        """Of each `decode`, and of the real clips of the first."""
        several = self.ctx.several("generated")
        first = _listed(several[0])
        real = list(self._real([id for id, _ in first]))
        yield self._line(REAL, first, real, None)
        for artifact in several:
            listed = _listed(artifact)
            videos = [self._generated(artifact, number) for number in range(len(listed))]
            yield self._line(artifact.name, listed, videos, list(self._real([id for id, _ in listed])))

    def _line(self, name: str, listed: Sequence[tuple[str, str]], videos: "Sequence[Tensor]", real: "Sequence[Tensor] | None") -> ClipScore:
        import torch

        from kinetok.tokenizers.video_metrics import frechet

        video_BCTHW = torch.stack(list(videos))
        shown = self._shown([id for id, _ in listed], video_BCTHW)
        sim = None if self.clipsim is None else float(self.clipsim(video_BCTHW, [caption for _, caption in listed]).mean())
        distance = None
        if self.i3d is not None and real is not None:
            distance = frechet(self.i3d(torch.stack(list(real))), self.i3d(video_BCTHW))
        return ClipScore(name=name, videos=len(videos), shown=shown, clipsim=sim, frechet=distance)

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

    def _real(self, ids: Sequence[str]) -> "Iterator[Tensor]":
        for id in ids:
            if id not in self.place:
                raise DataError(f"{self.ctx.input('data').name} has no clip {id!r}: score videos of the captions of its own clips")
            yield _video(self.index.read_clip(self.place[id]))

    def _generated(self, artifact: Artifact, number: int) -> "Tensor":
        from kinetok.pipelines.data.decode import decode_clip

        about = Generation.model_validate_json(artifact.folder.read_bytes(GENERATION))
        data = artifact.folder.read_bytes(about.videos[number].file)
        recipe = self.index.recipe
        return _video(decode_clip(data, start=0.0, **recipe.model_dump()))


def _listed(artifact: Artifact) -> list[tuple[str, str]]:
    """(id, caption) of every video."""
    about = Generation.model_validate_json(artifact.folder.read_bytes(GENERATION))
    return [(video.id or "", video.prompt) for video in about.videos]


def _video(pixels_THWC: "object") -> "Tensor":
    """(3, T, H, W) in [-1, 1]."""
    import torch

    return torch.as_tensor(pixels_THWC).permute(3, 0, 1, 2).float() / 127.5 - 1


def _judge(ctx: StageContext) -> "tuple[SceneJudge | None, dict[str, Fact]]":
    """The judge, and the one shape of every scene of one shape by its video."""
    from kinetok.pipelines.data.instructions import FACTS, Facts, read_lines
    from kinetok.pipelines.judge import SceneJudge
    from kinetok.pipelines.models import on_disk

    judge, instructions = ctx.optional("judge"), ctx.optional("instructions")
    if judge is None or instructions is None:
        return None, {}
    facts = {line.video: line.shapes[0] for line in read_lines(instructions, FACTS, Facts) if len(line.shapes) == 1}
    with on_disk(judge.folder / "model") as folder:
        return SceneJudge.from_pretrained(folder), facts


def _networks(stage: Score) -> "tuple[ClipSim | None, I3D | None]":
    """CLIP and I3D, where they are named; ConfigError where they cannot be had."""
    from kinetok.tokenizers.video_metrics import I3D, ClipSim

    try:
        return None if stage.clip is None else ClipSim(stage.clip), None if stage.i3d is None else I3D(stage.i3d)
    except (OSError, ValueError) as error:
        raise ConfigError(f"clip, i3d: {error}") from error
