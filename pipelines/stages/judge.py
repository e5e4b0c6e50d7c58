"""`judge`: train the classifier that scores clips of drawn scenes, on scenes that nothing else is trained on.

Its own accuracy on scenes it never saw is in its metrics (`val/colour`, `val/shape`, `val/motion`) and bounds what any score can mean.
Not covered: the classifier (`kinetok.pipelines.judge`), scoring with it (`score.py`).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal

from kinetok.infra.fit import FitConfig, fit, fit_problems
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult


class Judge(Stage, FitConfig):
    """A trained judge in `model/`, its metrics in `metrics/`, and `training.json`."""

    kind: Literal["judge"] = "judge"
    version: ClassVar[int] = 3
    uses_ray: ClassVar[bool] = True
    scales_with: ClassVar[tuple[str, ...]] = ("steps", "global_batch")
    scenes: Annotated[Ref, Produces("scenes")]
    """The data set whose like it judges."""
    data: Annotated[Ref, Produces("clips")]
    """How clips are cut of it."""

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """A global batch that does not divide, or another player."""
        yield from fit_problems(self, resources, ("judge",))

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return (Ask("training worker", resources.worker, resources.workers),)

    def run(self, ctx: StageContext) -> StageResult:
        """Train, or continue where an earlier attempt was killed."""
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.judge import JudgeTrainable, SceneFeed
        from kinetok.pipelines.stages.scenes import Scenes

        drawn = Scenes.model_validate(ctx.input("scenes").record.config)
        recipe = ClipIndex.open(ctx.input("data")).recipe
        feed = partial(
            SceneFeed,
            seed=drawn.seed,
            fps=recipe.fps,
            frames=recipe.frames,
            seconds=drawn.seconds,
            plain=drawn.plain,
            loaders=ctx.resources.loaders,
        )
        metrics = fit(
            JudgeTrainable,
            feed(split="train"),
            feed(split="val"),
            FitConfig.model_validate(self.model_dump(include=set(FitConfig.model_fields))),
            out=ctx.out,
            resources=ctx.resources,
            progress=ctx.progress,
            stop=ctx.stop,
        )
        return StageResult(metrics)
