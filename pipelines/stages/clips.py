"""`clips`: decode every video once and write the clip index. One Ray task per source shard; a finished part is never made again."""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from kinetok.infra import meters
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.data.recipe import IndexRecipe

if TYPE_CHECKING:
    from kinetok.pipelines.data.clip_parts import PartInfo


class Clips(IndexRecipe, Stage):
    """Windows of the videos that `videos` lists; the fields of `IndexRecipe` say how they are cut and filtered."""

    kind: Literal["clips"] = "clips"
    version: ClassVar[int] = 1
    uses_ray: ClassVar[bool] = True
    videos: Annotated[Ref, Produces("ingest")]

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return (Ask("decode task", resources.decoder),)

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.data.clip_parts import count_videos, cut_shard, finish_index, finished_parts
        from kinetok.pipelines.data.guard import begun_before, guard
        from kinetok.pipelines.data.ray_tasks import each_on_ray
        from kinetok.pipelines.data.sources import Shard, SourcePlan

        plan = SourcePlan(ctx.input("videos").folder)
        shards = plan.shards()
        parts = finished_parts(ctx.out)
        out, seconds = ctx.out, ctx.resources.decode_seconds
        recipe = IndexRecipe.model_validate(self.model_dump(include=set(IndexRecipe.model_fields)))

        def cut(item: dict[str, Any]) -> dict[str, Any]:
            began, shard = time.perf_counter(), Shard(**item)
            with guard(seconds, apart=begun_before()) as guarded:
                part = cut_shard(shard, plan, recipe, out, guarded)
            meters.did(meters.stage_of(out), "cut", samples=part["count"], seconds=time.perf_counter() - began, size=shard.bytes)
            return dict(part)

        pending = [asdict(shard) for shard in shards if shard.shard not in parts]
        kept, bad = (sum(part[name] for part in parts.values()) for name in ("kept", "quarantined"))
        for row in each_on_ray(ctx.name, cut, pending, resources=ctx.resources, stop=ctx.stop):
            part = cast("PartInfo", row)
            parts[part["shard"]] = part
            kept, bad = kept + part["kept"], bad + part["quarantined"]
            ctx.check()
            ctx.progress(done=len(parts), total=len(shards), unit="shards", quarantined=bad, note=f"{kept} clips")
        counts = finish_index(out, parts.values(), recipe)
        seconds_kept = counts.written * self.frames / self.fps
        return StageResult({"clips": float(counts.written), "seconds": seconds_kept, "sources": float(count_videos(out))}, counts)
