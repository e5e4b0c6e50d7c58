"""`understand`: how many questions about held-out clips a language model answers rightly, and what that is worth.

Every question is asked alone, as the first of a conversation (a model that was not tuned on instructions is shown the clips and no
question: its captions are scored as answers), and scored by exact match of what the model says (`same_answer`), where it has options by the
one that surprises the model least, and by the perplexity of the true answer. Beside each figure stands the same one with the tokens of
another clip shown instead, which is what can be had without looking (not measured where the split has one video alone), and the chance of a
guess. Output: `answers.json`, with the protocol that the figures are of. Questions about videos that the tokens lack count as filtered;
those of the other split, and those that `questions` leaves out, were never put. Runs in the driver's process, on its GPU where
`resources.gpus` asks for one. Not covered: answers judged by another language model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictInt

from kinetok.infra.artifact import Counts
from kinetok.infra.errors import DataError
from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult
from kinetok.llm.divot.generation import Decoding
from kinetok.pipelines.report.tables import ANSWERS, AnswerProtocol, Answers, Asked, Score

if TYPE_CHECKING:
    from torch import Tensor

    from kinetok.llm.divot.model import DivotLM
    from kinetok.pipelines.data.instructions import Question
    from kinetok.pipelines.data.token_videos import TokenVideos

CONTROL = "the clips of the video half the split further on"
"""What stands in for a question's own clips."""
NO_CONTROL = "none, for the split has one video alone"
WINDOWS = "all of a video's clips in order, or where it has more, the first of each of so many equal parts"
"""Which clips are shown, `TokenVideos.clips` at draw 0: those that `kinetok ask` and the reference read of a file."""

Exam = list[tuple[int, "Question"]]
"""Videos with a question each."""


@dataclass(frozen=True)
class Reply:
    """What the model makes of one question with some clips shown."""

    said: str
    chosen: str | None
    """None where there are no options."""
    nats: float
    """Of the true answer, summed over its ids."""
    ids: int


class Understand(Stage):
    """Accuracy of answers, by kind of question."""

    kind: Literal["understand"] = "understand"
    version: ClassVar[int] = 4
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
    """Most clips of a video that are shown together; of more, the first of each of so many equal parts."""
    decoding: Decoding = Decoding(temperature=0, max_tokens=64)
    """How answers are drawn."""
    seed: StrictInt = 0

    def run(self, ctx: StageContext) -> StageResult:
        """Raises ContractError where tokens do not belong to the model or the questions, DataError where nothing is asked."""
        import torch

        from kinetok.pipelines.data.language_feed import require_same_tokenizer
        from kinetok.pipelines.data.token_videos import TokenVideos
        from kinetok.pipelines.models import language_spec, open_language
        from kinetok.pipelines.stages.evaluate import threads
        from kinetok.pipelines.stages.language import model_config

        config, spec = model_config(ctx.input("model")), language_spec(ctx.input("model"))
        videos = TokenVideos.open(ctx.input("tokens"), self.split, clip_tokens=config.clip_tokens)
        require_same_tokenizer(ctx.input("tokens").name, videos.shards.spec, spec.tokens)
        exam, unknown = self._exam(ctx, videos)
        model = open_language(ctx.input("model")).to(torch.device("cuda" if ctx.resources.gpus else "cpu"))
        with threads(ctx.resources):
            asked = list(self._asked(ctx, model, spec.instructed, videos, exam))
        protocol = self._protocol(model, spec.instructed, videos)
        answers = Answers(
            model=ctx.input("model").name, split=self.split, protocol=protocol, scores=tuple(_scores(asked)), asked=tuple(asked)
        )
        ctx.out.write_text(ANSWERS, answers.model_dump_json(indent=1))
        metrics = {f"{score.about}/{name}": value for score in answers.scores for name, value in score.figures.items()}
        return StageResult(metrics, Counts(input=len(exam) + unknown, written=len(asked), filtered=unknown))

    def _exam(self, ctx: StageContext, videos: "TokenVideos") -> tuple[Exam, int]:
        """What is asked, in order of the videos, and how many questions are about videos that the tokens lack."""
        import numpy as np

        from kinetok.pipelines.data.instructions import questions_of
        from kinetok.pipelines.data.token_videos import held

        asker, tokens = ctx.input("instructions"), ctx.input("tokens")
        lines = questions_of(asker)
        here = held(list(lines), videos.shards.rows["id"], asker=asker.name, holder=tokens.name)
        unknown = sum(len(asked) for asked, known in zip(lines.values(), here, strict=True) if not known)
        exam = [(number, question) for number, name in enumerate(videos.names) for question in lines.get(name, ())]
        if not exam:
            raise DataError(f"{asker.name} asks nothing about the {self.split} split of {tokens.name}")
        drawn = np.random.default_rng(self.seed).permutation(len(exam))[: self.questions]
        return [exam[place] for place in sorted(drawn)], unknown

    def _protocol(self, model: "DivotLM", instructed: bool, videos: "TokenVideos") -> AnswerProtocol:
        """Said by the code that does it."""
        from kinetok.llm.divot.scoring import CHOICE, MATCHING, PERPLEXITY
        from kinetok.llm.divot.sequences import template

        return AnswerProtocol(
            prompt=template(model.vocabulary, media=videos.media, instructed=instructed),
            clips=self.clips,
            windows=WINDOWS,
            **self.decoding.model_dump(),
            seed=self.seed,
            control=CONTROL if len(videos) > 1 else NO_CONTROL,
            matching=MATCHING,
            choice=CHOICE,
            perplexity=PERPLEXITY,
        )

    def _asked(self, ctx: StageContext, model: "DivotLM", instructed: bool, videos: "TokenVideos", exam: Exam) -> Iterator[Asked]:
        """Every question with what was said and chosen, of its own clip and, where there are two videos, of another."""
        from kinetok.llm.divot.scoring import same_answer
        from kinetok.pipelines.data.order import sample_seed

        size, half = ctx.resources.batch_size, len(videos) // 2
        for first in range(0, len(exam), size):
            ctx.progress(done=first, total=len(exam), unit="questions")
            part = exam[first : first + size]
            # By the place in the exam: what is said must not depend on the batch.
            seeds = [sample_seed(self.seed, place) for place in range(first, first + len(part))]
            own = [videos.clips(video, self.clips, 0.0) for video, _ in part]
            questions = [question for _, question in part]
            told = self._replies(model, instructed, own, questions, videos, seeds)
            blindly: Sequence[Reply | None] = [None] * len(part)
            # One video is no other than itself: shown again, its clips would give every figure a control of the same value.
            if half:
                other = [videos.clips((video + half) % len(videos), self.clips, 0.0) for video, _ in part]
                blindly = self._replies(model, instructed, other, questions, videos, seeds)
            for (video, question), reply, blind in zip(part, told, blindly, strict=True):
                yield Asked(
                    video=videos.names[video],
                    question=question.question,
                    about=question.about or "question",
                    answer=question.answer,
                    options=question.options,
                    said=reply.said,
                    exact=same_answer(reply.said, question.answer),
                    chosen=reply.chosen,
                    blindly_said=None if blind is None else blind.said,
                    blindly_exact=None if blind is None else same_answer(blind.said, question.answer),
                    blindly_chosen=None if blind is None else blind.chosen,
                    ids=reply.ids,
                    nats=reply.nats,
                    blindly_nats=None if blind is None else blind.nats,
                )
        ctx.progress(done=len(exam), total=len(exam), unit="questions")

    def _replies(
        self,
        model: "DivotLM",
        instructed: bool,
        clips: "Sequence[Tensor]",
        questions: "Sequence[Question]",
        videos: "TokenVideos",
        seeds: Sequence[int],
    ) -> list[Reply]:
        """What the model says of each question, which of its options it chooses, and how surprising the true answer is."""
        from kinetok.llm.divot.generation import complete
        from kinetok.llm.divot.scoring import cost
        from kinetok.llm.divot.sequences import ask

        form: dict[str, Any] = {"media": videos.media, "instructed": instructed}
        prompts = [ask(model.vocabulary, shown, item.question, **form) for shown, item in zip(clips, questions, strict=True)]
        replies = []
        for said, shown, item in zip(complete(model, prompts, seeds, self.decoding), clips, questions, strict=True):
            texts = item.options or (item.answer,)
            costs, true = cost(model, shown, item.question, texts, limit=1 << 20, **form), texts.index(item.answer)
            chosen = texts[costs.choice] if item.options else None
            replies.append(Reply(said.strip(), chosen, float(costs.nats_O[true]), int(costs.ids_O[true])))
        return replies


def _scores(asked: "Sequence[Asked]") -> Iterator[Score]:
    """Of every kind of question, then of all."""
    kinds = [list(group) for _, group in groupby(sorted(asked, key=lambda item: item.about), key=lambda item: item.about)]
    for group in kinds:
        yield Score.of(group[0].about, group)
    if len(kinds) > 1:
        yield Score.of("all", asked)
