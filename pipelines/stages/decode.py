"""`decode`: token shards, encoded or written by a language model, as videos to look at, through the decoder of their tokenizer.

Output: `videos/{number:03d}.mp4`, `contact.png` (a row of frames of each) and `prompts.json`, as of `generate`, and the frames themselves
in `frames/{number:03d}.safetensors`: no codec stands between them and `score`. All noise of a decoder that draws some comes from `seed` and
the number of the video. Runs in the driver's process, on its GPU where `resources.gpus` asks for one.
Not covered: how good the videos are (`score.py`).

Legend: B videos, C T H W colours, frames, rows, columns, N tokens, D width.
"""

import time
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt

from kinetok.infra.errors import DataError
from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult
from kinetok.pipelines.report.tables import CONTACT, FRAMES, GENERATION, Generated, Generation
from kinetok.tokenizers.divot.ddim import SamplerConfig

if TYPE_CHECKING:
    from kinetok.pipelines.data.token_shards import TokenShards
    from kinetok.pipelines.tokens_shown import Shower


class Decode(Stage):
    """Videos of tokens."""

    kind: Literal["decode"] = "decode"
    version: ClassVar[int] = 2
    compiles: ClassVar[bool] = True
    scales_with: ClassVar[tuple[str, ...]] = ("videos",)
    tokens: Annotated[Ref, Produces("write", "encode")]
    """The tokens."""
    tokenizer: Annotated[Ref, Produces("train", "model")]
    """Whose tokens they are; another training stage of the same tokens will do."""
    split: Literal["train", "val"] = "val"
    videos: Annotated[StrictInt, Field(ge=1)] = 8
    """How many, the first of the split."""
    sampler: SamplerConfig | None = None
    """How a diffusion decoder samples; None leaves it to the tokenizer."""
    seed: StrictInt = 0

    def run(self, ctx: StageContext) -> StageResult:
        import numpy as np
        import pyarrow.compute as pc

        from kinetok.pipelines.data.token_shards import TokenShards, require_spec
        from kinetok.pipelines.models import model_folder, open_model
        from kinetok.pipelines.stages.evaluate import threads
        from kinetok.pipelines.tokens_shown import Shower

        shards, tokenizer = TokenShards.open(ctx.input("tokens")), open_model(model_folder(ctx.input("tokenizer")))
        require_spec(shards.spec, tokenizer.spec())
        rows = np.flatnonzero(pc.equal(shards.rows["split"], self.split).to_numpy(zero_copy_only=False))[: self.videos].tolist()
        if not rows:
            raise DataError(f"{ctx.input('tokens').name} has no clips of the {self.split} split: name the other one")
        with threads(ctx.resources):
            return self._write(ctx, shards, rows, Shower(tokenizer, shards.spec, ctx.resources, self.sampler))

    def _write(self, ctx: StageContext, shards: "TokenShards", rows: list[int], show: "Shower") -> StageResult:
        """The videos, in batches of `resources.batch_size`, then the contact sheet and the listing."""
        from safetensors.torch import save

        from kinetok.pipelines.data.order import sample_seed
        from kinetok.pipelines.data.token_shards import TOKENS
        from kinetok.pipelines.report.panel import contact_sheet, enlarged, mp4, pixels, png

        size, began, shown, listed = ctx.resources.batch_size, time.perf_counter(), [], []
        for first in range(0, len(rows), size):
            ctx.progress(done=first, total=len(rows), unit="videos")
            chosen = rows[first : first + size]
            seeds = [sample_seed(self.seed, first + place) for place in range(len(chosen))]
            videos = show([shards.read(row)[TOKENS] for row in chosen], seeds)
            for number, (row, seed, video_CTHW) in enumerate(zip(chosen, seeds, videos, strict=True), start=first):
                frames_THWC, about = pixels(video_CTHW).contiguous(), shards.about(row)
                file, kept = f"videos/{number:03d}.mp4", f"frames/{number:03d}.safetensors"
                ctx.out.write_bytes(file, mp4(enlarged(frames_THWC).numpy(), show.recipe.fps))
                ctx.out.write_bytes(kept, save({FRAMES: frames_THWC}))
                shown.append(frames_THWC)
                caption, id = str(about["caption"] or ""), str(about["id"])
                listed.append(Generated(prompt=caption, file=file, seed=seed, id=id, frames=kept))
        ctx.progress(done=len(rows), total=len(rows), unit="videos")
        ctx.out.write_bytes(CONTACT, png(contact_sheet(shown)))
        about_all = Generation(
            tokenizer=ctx.input("tokenizer").name,
            encoder=ctx.input("tokens").name,
            frames=show.recipe.frames,
            fps=show.recipe.fps,
            steps=show.steps,
            guidance=show.guidance,
            tokens=len(shards.read(rows[0])[TOKENS]),
            videos=tuple(listed),
        )
        ctx.out.write_text(GENERATION, about_all.model_dump_json(indent=1))
        seconds = time.perf_counter() - began
        return StageResult({"videos": float(len(rows)), "sample_seconds": 0.0, "decode_seconds": seconds})
