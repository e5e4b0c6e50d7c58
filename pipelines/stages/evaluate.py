"""`evaluate`: how well each tokenizer of a ladder reconstructs held-out clips, and at what price, beside two baselines.

PSNR, SSIM, and LPIPS where the job names weights. Output: `table.json` (the ladder), `clips.parquet` (each clip under each rung), `panel/`
(original, reconstruction and error map of a fixed panel and of each rung's worst clips) with `panel.json`. Runs in the driver's process, on
its GPU where `resources.gpus` asks for one. Not covered: how the figures are computed (`report/ladder.py`).
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt

from kinetok.infra.artifact import Counts
from kinetok.infra.errors import DataError
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.report.tables import CLIPS, PANEL, TABLE, Geometry, Shown, ShownList, Table
from kinetok.pipelines.stages.clips import Clips as ClipsStage
from kinetok.pipelines.stages.train import misfits

if TYPE_CHECKING:
    from kinetok.pipelines.report.ladder import ClipFigures, Clips, Rung
    from kinetok.pipelines.report.networks import Networks

# None is not dumped: it would give every stage that does without another key.
Perceptual = Annotated[str | None, Field(exclude_if=lambda value: value is None)]
"""Weights of VGG16 for LPIPS: a file, or `owner/repository` or `owner/repository/file` on the Hugging Face hub."""
LPIPS_EDGE = 16
"""Smaller frames do not survive the poolings of VGG16."""
Figures = Mapping[str, "list[ClipFigures]"]
"""Per rung, one entry for each clip."""


class Evaluate(Stage):
    """Reconstruction quality and cost of tokenizers, in one table."""

    kind: Literal["evaluate"] = "evaluate"
    version: ClassVar[int] = 1
    data: Annotated[Ref, Produces("clips")]
    """The clips; the ladder is measured on one split of them."""
    models: Annotated[tuple[Ref, ...], Produces("train", "model"), Field(min_length=1)]
    """The rungs, lowest first."""
    split: Literal["train", "val"] = "val"
    max_clips: Annotated[StrictInt, Field(ge=1)] | None = None
    """Evaluate on so many clips, drawn by `seed`; None takes all."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type continuous tokens are stored in; they are rounded to it before they are decoded."""
    panel: Annotated[StrictInt, Field(ge=0)] = 4
    """Clips of the fixed panel, the same for every rung."""
    worst: Annotated[StrictInt, Field(ge=0)] = 2
    """Clips with the lowest PSNR shown for each rung."""
    lpips: Perceptual = None
    """A file of VGG16 for LPIPS, by path or hub id; None does not measure it."""
    seed: StrictInt = 0

    def fetch(self) -> None:
        """Download weights of LPIPS that only the hub has."""
        from kinetok.pipelines.outside import fetch_lpips

        if self.lpips is not None:
            fetch_lpips(self.lpips)

    def facts(self) -> Mapping[str, Plain]:
        """Digest of the weights of LPIPS. Raises DataError or StoreError where they are not here."""
        from kinetok.pipelines.outside import lpips_digest

        return {} if self.lpips is None else {"lpips": lpips_digest(self.lpips)}

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """Clips whose sides a model or LPIPS cannot take."""
        yield from dict.fromkeys(problem for name in self.models for problem in misfits(self.data, stages[name], stages))
        yield from too_small(self.lpips, stages[self.data])

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.models import model_folder, open_model
        from kinetok.pipelines.report.ladder import ClipMean, Clips, DataMean, ModelRung, average_frame, choose
        from kinetok.pipelines.report.networks import Networks

        index = ClipIndex.open(ctx.input("data"))
        clips = Clips(index, choose(index, self.split, self.max_clips, self.seed), ctx.resources.batch_size)
        if not clips.rows:
            raise DataError(f"{ctx.input('data').name} has no {self.split} clips: raise val_fraction, or use more source videos")
        networks = Networks.open(ctx.resources, lpips=self.lpips)
        with threads(ctx.resources):
            average = average_frame(clips)
            if len(clips.bad) == len(clips.rows):
                raise DataError(f"none of {len(clips.rows)} clips can be read any more: {next(iter(clips.bad.values()))}")
            models = [ModelRung(a.name, open_model(model_folder(a)), self.dtype, ctx.resources) for a in ctx.several("models")]
            rungs: list[Rung] = [DataMean(average), ClipMean(), *models]
            figures = _measured(ctx, rungs, clips, networks)
            result = self._write_table(ctx, rungs, clips, figures)
            self._write_panel(ctx, models, clips, figures)
        return result

    def _write_table(self, ctx: StageContext, rungs: "Sequence[Rung]", clips: "Clips", figures: Figures) -> StageResult:
        """`table.json`, `clips.parquet` and, where clips could not be read, `quarantine/`."""
        from kinetok.pipelines.report.ladder import summary

        ladder = tuple(summary(rung, figures[rung.name], clips.index.fps) for rung in rungs)
        geometry = Geometry.model_validate(clips.index.recipe.model_dump())
        table = Table(
            split=self.split, clips=len(clips.rows) - len(clips.bad), stored=self.dtype, lpips=self.lpips, recipe=geometry, ladder=ladder
        )
        ctx.out.write_text(TABLE, table.model_dump_json(indent=1))
        _write_parquet(ctx, CLIPS, [row for rung in rungs for row in _clip_rows(clips, rung.name, figures[rung.name])])
        if clips.bad:
            _write_parquet(ctx, "quarantine/000000.parquet", _bad_rows(clips))
        metrics = {f"{line.name}/{name}": value for line in ladder for name, value in line.figures.items()}
        return StageResult(metrics, Counts(input=len(clips.rows), written=table.clips, quarantined=len(clips.bad)))

    def _write_panel(self, ctx: StageContext, models: "Sequence[Rung]", clips: "Clips", figures: Figures) -> None:
        """Videos of the panel and the worst clips of every rung, and `panel.json` naming them in order."""
        shown = []
        for rung in models:
            by_row = {clip.row: clip for clip in figures[rung.name]}
            for number, (role, row) in enumerate(self._chosen(list(by_row.values()))):
                ctx.check()
                name = f"panel/{rung.name}-{number:02d}.mp4"
                ctx.out.write_bytes(name, _video(rung, clips, row))
                about = clips.index.rows.slice(row, 1).select(["id", "caption"]).to_pylist()[0]
                clip = by_row[row]
                shown.append(Shown(model=rung.name, role=role, file=name, psnr=clip.psnr, ssim=clip.ssim, **about))
        ctx.out.write_bytes(PANEL, ShownList.dump_json(shown, indent=1))

    def _chosen(self, figures: "list[ClipFigures]") -> Iterator[tuple[Literal["panel", "worst"], int]]:
        """(role, row): the panel, drawn by the seed from clips in order, then the worst."""
        import numpy as np

        drawn = np.random.default_rng(self.seed).permutation(len(figures))[: self.panel]
        for number in sorted(drawn):
            yield "panel", figures[number].row
        for clip in sorted(figures, key=lambda clip: clip.psnr)[: self.worst]:
            yield "worst", clip.row


def _measured(ctx: StageContext, rungs: "Sequence[Rung]", clips: "Clips", networks: "Networks") -> Figures:
    """Figures of every rung on the same clips, with progress and an open ear for a stop."""
    from kinetok.pipelines.report.ladder import measure

    figures: dict[str, list[ClipFigures]] = {rung.name: [] for rung in rungs}
    for name, batch in measure(rungs, clips, networks):
        ctx.check()
        figures[name] += batch
        ctx.progress(done=len(figures[name]), total=len(clips.rows), unit="clips", note=name)
    return figures


def _video(rung: "Rung", clips: "Clips", row: int) -> bytes:
    from kinetok.pipelines.report.panel import mp4, triptych

    video_CTHW = clips.read(row)
    assert video_CTHW is not None, "rows with figures could be read"
    return mp4(triptych(video_CTHW, rung(video_CTHW[None])[0]), clips.index.fps)


def _clip_rows(clips: "Clips", name: str, figures: "list[ClipFigures]") -> list[dict[str, object]]:
    about = clips.index.rows.select(["id", "video", "caption"]).take([clip.row for clip in figures]).to_pylist()
    return [{"model": name, **row, **clip.figures} for row, clip in zip(about, figures, strict=True)]


def _bad_rows(clips: "Clips") -> list[dict[str, object]]:
    about = clips.index.rows.select(["id", "shard"]).take(list(clips.bad)).to_pylist()
    return [
        {**row, "reason": str(bad.reason), "message": bad.message, "position": bad.position}
        for row, bad in zip(about, clips.bad.values(), strict=True)
    ]


def _write_parquet(ctx: StageContext, name: str, rows: list[dict[str, object]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), buffer, compression="zstd")
    ctx.out.write_bytes(name, buffer.getvalue())


def too_small(lpips: str | None, clips: Stage) -> Iterator[str]:
    """A sentence where LPIPS is asked for of clips that are too small for it."""
    if lpips is not None and isinstance(clips, ClipsStage) and min(clips.height, clips.width) < LPIPS_EDGE:
        yield f"lpips: needs frames of {LPIPS_EDGE} x {LPIPS_EDGE} pixels or more, the clips have {clips.height} x {clips.width}"


@contextmanager
def threads(resources: Resources) -> Iterator[None]:
    """Torch's intra-op threads for the block; this thread, which is the stage's own, steps back where it counts neither CPU nor GPU."""
    import torch

    from kinetok.infra.launch import stand_aside, stands_aside

    if stands_aside(resources):
        stand_aside()
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, int(resources.cpus)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
