"""`scenes`: a data set made on the spot: drawn moving scenes with true captions, and the small embedded set of real clips, as tars."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt

from kinetok.infra.artifact import Counts
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Stage, StageContext, StageResult

if TYPE_CHECKING:
    from kinetok.pipelines.data.scenes import SceneSet

Count = Annotated[StrictInt, Field(ge=1)]
MOST_SHAPES = 3


class Scenes(Stage):
    """`count` drawn videos of `seconds` at `fps`; the same fields give the same bytes."""

    kind: Literal["scenes"] = "scenes"
    version: ClassVar[int] = 2
    scales_with: ClassVar[tuple[str, ...]] = ("count",)
    count: Count = 96
    seed: Annotated[StrictInt, Field(ge=0)] = 0
    size: Annotated[StrictInt, Field(ge=32, multiple_of=2)] = 96
    """Pixels of an edge."""
    seconds: Annotated[float, Field(ge=0.5)] = 3.0
    fps: Count = 16
    real: bool = True
    """Add the embedded real clips (freely licensed, see `pipelines/data/embedded`)."""
    shard_videos: Count = 16
    """Videos of one tar."""
    most_shapes: Annotated[Count, Field(le=MOST_SHAPES)] = MOST_SHAPES
    """Shapes of one scene, one to so many."""
    plain: bool = False
    """Large shapes that go straight, on one colour instead of something that moves: what a scene shows is learned much sooner."""

    @property
    def drawn(self) -> "SceneSet":
        """The drawn scenes."""
        from kinetok.pipelines.data.scenes import SceneSet

        frames = round(self.seconds * self.fps)
        return SceneSet(
            count=self.count, seed=self.seed, frames=frames, size=self.size, fps=self.fps, most=self.most_shapes, plain=self.plain
        )

    def literals(self) -> dict[str, Plain]:
        """Without what came later where it is at its default: keys of before it was there still hold."""
        later = {"most_shapes": MOST_SHAPES, "plain": False}
        return {name: value for name, value in super().literals().items() if name not in later or value != later[name]}

    def facts(self) -> Mapping[str, Plain]:
        """What is plain: at first that was a grey behind all scenes, then shapes of any size that moved in any way."""
        return {"plain": "one colour, large and straight"} if self.plain else {}

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.data.pack import pack
        from kinetok.pipelines.data.scenes import EMBEDDED, write_scenes

        def progress(done: int, total: int) -> None:
            ctx.check()
            ctx.progress(done=done, total=total, unit="videos")

        shards = ctx.out / "shards"
        videos = write_scenes(self.drawn, shards, shard_videos=self.shard_videos, progress=progress).videos
        if self.real:
            videos += pack(str(EMBEDDED.parent), str(shards), csv=str(EMBEDDED), shard_videos=self.shard_videos, prefix="real").videos
        return StageResult({"videos": float(videos)}, Counts(input=videos, written=videos))
