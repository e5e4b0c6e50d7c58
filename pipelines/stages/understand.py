"""`understand`: how many questions about held-out clips a language model answers rightly, and what that is worth.

Every question is asked alone, as the first of a conversation, and scored twice: by exact match of what the model says (`same_answer`), and
where it has options, by the option that surprises the model least. Beside each figure stands the same one with the tokens of another clip
shown instead, which is what can be had without looking, and the chance of a guess. Output: `answers.json`. Runs in the driver's process,
on its GPU where `resources.gpus` asks for one. Not covered: answers judged by another language model.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt

from kinetok.infra.artifact import Counts
from kinetok.infra.errors import DataError
from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult
from kinetok.llm.divot.generation import Decoding
from kinetok.pipelines.report.tables import ANSWERS, Answers, Asked, Score

if TYPE_CHECKING:
    from torch import Tensor

    from kinetok.llm.divot.model import DivotLM
    from kinetok.pipelines.data.instructions import Question
    from kinetok.pipelines.data.token_videos import TokenVideos

Exam = list[tuple[int, "Question"]]
"""Videos with a question each."""


class Understand(Stage):
    """Accuracy of answers, by kind of question."""

    kind: Literal["understand"] = "understand"
    version: ClassVar[int] = 2
    model: Annotated[Ref, Produces("language", "language_model")]
    """The language model."""
    tokens: Annotated[Ref, Produces("encode")]
    """Tokens of the clips that are asked about."""
    instructions: Annotated[Ref, Produces("instructions")]
    """The questions."""
    split: Literal["train", "val"] = "val"
    questions: Annotated[StrictInt, Field(ge=1)] | None = None
    """Ask so many, drawn by `seed`; None asks all."""
    clips: Annotated[StrictInt, Field(ge=1)] = 20
    """Most clips of a video that are shown together, evenly chosen."""
    decoding: Decoding = Decoding(temperature=0, max_tokens=64)
    """How answers are drawn."""
    seed: StrictInt = 0

    def run(self, ctx: StageContext) -> StageResult:
        import torch

        from kinetok.pipelines.data.language_feed import require_same_tokenizer
        from kinetok.pipelines.data.token_videos import TokenVideos
        from kinetok.pipelines.models import language_spec, open_language
        from kinetok.pipelines.stages.evaluate import threads

        model = open_language(ctx.input("model")).to(torch.device("cuda" if ctx.resources.gpus else "cpu"))
        spec = language_spec(ctx.input("model"))
        videos = TokenVideos.open(ctx.input("tokens"), self.split, clip_tokens=model.config.clip_tokens)
        require_same_tokenizer(ctx.input("tokens").name, videos.shards.spec, spec.tokens)
        exam = self._exam(ctx, videos)
        with threads(ctx.resources.cpus):
            asked = list(self._asked(ctx, model, videos, exam))
        answers = Answers(model=ctx.input("model").name, split=self.split, scores=tuple(_scores(asked)), asked=tuple(asked))
        ctx.out.write_text(ANSWERS, answers.model_dump_json(indent=1))
        metrics = {f"{score.about}/{name}": value for score in answers.scores for name, value in score.figures.items()}
        return StageResult(metrics, Counts(input=len(exam), written=len(asked)))

    def _exam(self, ctx: StageContext, videos: "TokenVideos") -> Exam:
        """What is asked, in order of the videos."""
        import numpy as np

        from kinetok.pipelines.data.instructions import QUESTIONS, Questions, read_lines

        lines = {line.video: line.questions for line in read_lines(ctx.input("instructions"), QUESTIONS, Questions)}
        exam = [(number, question) for number, name in enumerate(videos.names) for question in lines.get(name, ())]
        if not exam:
            raise DataError(f"{ctx.input('instructions').name} asks nothing about the {self.split} split of {ctx.input('tokens').name}")
        drawn = np.random.default_rng(self.seed).permutation(len(exam))[: self.questions]
        return [exam[place] for place in sorted(drawn)]

    def _asked(self, ctx: StageContext, model: "DivotLM", videos: "TokenVideos", exam: Exam) -> Iterator[Asked]:
        """Every question with what was said and chosen, of its own clip and of another."""
        from kinetok.llm.divot.scoring import same_answer

        size, half = ctx.resources.batch_size, len(videos) // 2 or 1
        for first in range(0, len(exam), size):
            ctx.progress(done=first, total=len(exam), unit="questions")
            part = exam[first : first + size]
            own = [videos.clips(video, self.clips, 0.5) for video, _ in part]
            other = [videos.clips((video + half) % len(videos), self.clips, 0.5) for video, _ in part]
            questions = [question for _, question in part]
            told = [self._answers(model, clips, questions, videos, first) for clips in (own, other)]
            for place, (video, question) in enumerate(part):
                (said, chosen), (blindly_said, blindly_chosen) = (answers[place] for answers in told)
                yield Asked(
                    video=videos.names[video],
                    question=question.question,
                    about=question.about or "question",
                    answer=question.answer,
                    options=question.options,
                    said=said,
                    exact=same_answer(said, question.answer),
                    chosen=chosen,
                    blindly_said=blindly_said,
                    blindly_exact=same_answer(blindly_said, question.answer),
                    blindly_chosen=blindly_chosen,
                )
        ctx.progress(done=len(exam), total=len(exam), unit="questions")

    def _answers(
        self, model: "DivotLM", clips: "Sequence[Tensor]", questions: "Sequence[Question]", videos: "TokenVideos", first: int
    ) -> list[tuple[str, str | None]]:
        """What the model says of each question, and which of its options it chooses; `first` is the place of the first in the exam."""
        from kinetok.llm.divot.generation import complete
        from kinetok.llm.divot.scoring import choose
        from kinetok.llm.divot.sequences import ask
        from kinetok.pipelines.data.order import sample_seed

        prompts = [ask(model.vocabulary, shown, item.question, media=videos.media) for shown, item in zip(clips, questions, strict=True)]
        seeds = [sample_seed(self.seed, first + place) for place in range(len(prompts))]
        said = complete(model, prompts, seeds, self.decoding)
        chosen = [
            item.options[choose(model, shown, item.question, item.options, limit=1 << 20, media=videos.media)] if item.options else None
            for shown, item in zip(clips, questions, strict=True)
        ]
        return list(zip((text.strip() for text in said), chosen, strict=True))


def _scores(asked: "Sequence[Asked]") -> Iterator[Score]:
    """Of every kind of question, then of all."""
    kinds = [list(group) for _, group in groupby(sorted(asked, key=lambda item: item.about), key=lambda item: item.about)]
    for group in kinds:
        yield Score.of(group[0].about, group)
    if len(kinds) > 1:
        yield Score.of("all", asked)
