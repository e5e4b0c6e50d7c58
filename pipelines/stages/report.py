"""`report`: one HTML page that shows a job's outcome to people: verdict, ladder, videos, generated videos, curves, speed, counts, lineage.

The page (`report.html`) holds everything inside itself and can be mailed. Not covered: its content (`report/page.py`).
"""

from typing import Annotated, ClassVar, Literal

from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult


class Report(Stage):
    """A page about the tokenizers that `quality` measured."""

    kind: Literal["report"] = "report"
    version: ClassVar[int] = 1
    title: str = "Reconstruction report"
    quality: Annotated[Ref, Produces("evaluate")]
    clips: Annotated[Ref, Produces("clips")]
    """The clips of the job, for counts and quarantine."""
    trained: Annotated[tuple[Ref, ...], Produces("train", "diffusion", "language", "judge")] = ()
    """Training runs whose curves are shown."""
    encoded: Annotated[tuple[Ref, ...], Produces("encode", "vit")] = ()
    """Encodings whose speed and counts are shown."""
    generated: Annotated[tuple[Ref, ...], Produces("generate", "decode")] = ()
    """Generated videos to play."""
    carried: Annotated[tuple[Ref, ...], Produces("reconstruct")] = ()
    """What the tokens of Divot tokenizers carry."""
    answers: Annotated[tuple[Ref, ...], Produces("understand")] = ()
    """What language models answered."""
    scores: Annotated[tuple[Ref, ...], Produces("score")] = ()
    """What generated clips are worth."""

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.report.page import Sources, render

        several = (ctx.several(name) for name in ("trained", "encoded", "generated", "carried", "answers", "scores"))
        sources = Sources(ctx.input("quality"), ctx.input("clips"), *several)
        page = render(self.title, sources).encode()
        ctx.out.write_bytes("report.html", page)
        return StageResult({"bytes": float(len(page))})
