"""`clips`: decode every video once and write the clip index. One Ray task per source shard; a finished part is never made again."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult
from kinetok.pipelines.data.recipe import IndexRecipe

if TYPE_CHECKING:
    from kinetok.pipelines.data.clip_parts import PartInfo


class Clips(IndexRecipe, Stage):
    """Windows of the videos that `videos` lists; the fields of `IndexRecipe` say how they are cut and filtered."""

    kind: Literal["clips"] = "clips"
    version: ClassVar[int] = 1
    uses_ray: ClassVar[bool] = True
    videos: Annotated[Ref, Produces("ingest")]

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.data.clip_parts import cut_shard, finish_index, finished_parts
        from kinetok.pipelines.data.ray_tasks import each_on_ray
        from kinetok.pipelines.data.sources import Shard, SourcePlan

        plan = SourcePlan(ctx.input("videos").folder)
        shards = plan.shards()
        parts = finished_parts(ctx.out)
        out, recipe = ctx.out, IndexRecipe.model_validate(self.model_dump(include=set(IndexRecipe.model_fields)))

        def cut(item: dict[str, Any]) -> dict[str, Any]:
            return dict(cut_shard(Shard(**item), plan, recipe, out))

        pending = [asdict(shard) for shard in shards if shard.shard not in parts]
        kept, bad = (sum(part[name] for part in parts.values()) for name in ("kept", "quarantined"))
        for row in each_on_ray(cut, pending, at_once=ctx.resources.decoders):
            part = cast("PartInfo", row)
            parts[part["shard"]] = part
            kept, bad = kept + part["kept"], bad + part["quarantined"]
            ctx.check()
            ctx.progress(done=len(parts), total=len(shards), unit="shards", quarantined=bad, note=f"{kept} clips")
        counts = finish_index(out, parts.values(), recipe)
        return StageResult({"clips": float(counts.written), "seconds": counts.written * self.frames / self.fps}, counts)
