"""`instructions`: questions about videos with their answers, and stories, for a language model to learn and to be scored on.

They come from a file of the user's, or from the facts of drawn scenes, whose answers are exact. With `data`, a file whose videos are none
of these clips fails here, as soon as the clips are cut, and not in a stage that learns from it, hours later; lines about other videos are
counted and stay. Not covered: the forms of lines (`data/instructions.py`).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from kinetok.infra.artifact import Counts
from kinetok.infra.config import Config
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.data.user_files import read_user_file, read_user_text


class Instructions(Stage):
    """`questions.jsonl`, `stories.jsonl`, and of drawn scenes `facts.jsonl`."""

    kind: Literal["instructions"] = "instructions"
    version: ClassVar[int] = 2
    reads: ClassVar[tuple[str, ...]] = ("source",)
    scenes: Annotated[Ref, Produces("scenes")] | None = None
    """Drawn scenes to ask about."""
    source: str | None = None
    """A `.jsonl` of the user's, by path or s3:// address."""
    data: Annotated[Ref, Produces("clips")] | None = None
    """The clips that are asked about, to compare names with; lines may then name the files of videos, with their ending."""

    def literals(self) -> dict[str, Plain]:
        """Nothing: the same lines elsewhere are the same."""
        return {}

    def facts(self) -> Mapping[str, Plain]:
        """Digest of the user's file. Raises DataError where it is not there."""
        return {} if self.source is None else {"source": hashlib.sha256(read_user_file(self.source)).hexdigest()}

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """Neither or both of the two origins."""
        if (self.scenes is None) == (self.source is None):
            yield "scenes: name either scenes or a source, the one that the questions are from"

    def run(self, ctx: StageContext) -> StageResult:
        """Raises DataError for a line that is none, ContractError where no video is one of `data`."""
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.data.instructions import FACTS, QUESTIONS, STORIES, Story, of_scenes, parse
        from kinetok.pipelines.data.token_videos import called, unknown_lines
        from kinetok.pipelines.stages.scenes import Scenes

        drawn = ctx.optional("scenes")
        if drawn is not None:
            scenes = Scenes.model_validate(drawn.record.config)
            found = list(of_scenes(scenes.drawn, shard_videos=scenes.shard_videos))
            questions = [asked for asked, _ in found]
            stories: list[Story] = []
            _write(ctx, FACTS, [facts for _, facts in found])
        else:
            questions, stories = parse(read_user_text(str(self.source)), str(self.source))
        clips = ctx.optional("data")
        ids = None if clips is None else ClipIndex.open(clips).rows["id"]
        if ids is not None:
            questions, stories = called(questions, stories, ids)
        _write(ctx, QUESTIONS, questions)
        _write(ctx, STORIES, stories)
        lines = len(questions) + len(stories)
        metrics = {"questions": float(sum(len(line.questions) for line in questions)), "stories": float(len(stories))}
        if clips is not None and ids is not None:
            metrics |= unknown_lines(questions, stories, ids, asker=ctx.name, holder=clips.name)
        return StageResult(metrics, Counts(input=lines, written=lines))


def _write(ctx: StageContext, name: str, lines: Sequence[Config]) -> None:
    ctx.out.write_text(name, "".join(f"{line.model_dump_json()}\n" for line in lines))
