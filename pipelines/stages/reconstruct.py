"""`reconstruct`: what of held-out clips the tokens of a Divot tokenizer carry: own tokens against another clip's and none.

Output: `carried.json` (losses, PSNR, SSIM, and the figures that need weights of others, with their protocol) and `strips/`, one picture a
clip: frames of the original, from its tokens, and from another clip's. Runs in the driver's process, on its GPU where `resources.gpus`
asks for one. Not covered: how the figures are computed (`report/carried.py`, `kinetok.tokenizers.video_metrics`), tokenizers that do not
draw noise (`evaluate`).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt

from kinetok.infra.artifact import Counts
from kinetok.infra.errors import ConfigError, ContractError, DataError
from kinetok.infra.stage import Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.report.tables import CARRIED, Carried, Condition, Figure, Strip
from kinetok.pipelines.stages.train import misfits
from kinetok.tokenizers.divot.ddim import SamplerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kinetok.pipelines.report.carried import Shown
    from kinetok.pipelines.report.ladder import Clips
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer
    from kinetok.tokenizers.video_metrics import I3D, ClipSim

AUTOENCODER = "autoencoder alone"
NOT_MEASURED = "not measured: the job names no weights"


class Reconstruct(Stage):
    """Reconstruction by diffusion, from tokens and against controls."""

    kind: Literal["reconstruct"] = "reconstruct"
    version: ClassVar[int] = 1
    data: Annotated[Ref, Produces("clips")]
    """The clips; one split of them is measured."""
    model: Annotated[Ref, Produces("train", "model")]
    """A Divot tokenizer; guidance needs one that was refined."""
    split: Literal["train", "val"] = "val"
    max_clips: Annotated[StrictInt, Field(ge=2)] | None = None
    """Measure so many clips, drawn by `seed`; None takes all."""
    sampler: SamplerConfig | None = None
    """How videos are sampled; None leaves it to the tokenizer."""
    clip: str | None = None
    """A CLIP of transformers, by path or id, for CLIPSIM; None does not measure it."""
    i3d: str | None = None
    """A TorchScript file of I3D for rFVD; None does not measure it."""
    strips: Annotated[StrictInt, Field(ge=0)] = 6
    """Clips that are shown, the first of those measured."""
    seed: StrictInt = 0

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """Clips whose sides the model cannot take."""
        yield from misfits(self.data, stages[self.model], stages)

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.models import model_folder, open_model
        from kinetok.pipelines.report.carried import shown
        from kinetok.pipelines.report.ladder import Clips, choose
        from kinetok.pipelines.stages.evaluate import threads
        from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

        model = open_model(model_folder(ctx.input("model")))
        if not isinstance(model, DivotTokenizer):
            raise ContractError(
                f"{ctx.input('model').name} is a {model.config.kind!r} tokenizer, which draws no noise: measure it by evaluate"
            )
        index = ClipIndex.open(ctx.input("data"))
        clips = Clips(index, choose(index, self.split, self.max_clips, self.seed), ctx.resources.batch_size)
        sampler, tally = self.sampler or model.config.sampler, self._tally()
        with threads(ctx.resources.cpus):
            for item in shown(model, clips, ctx.resources, sampler, self.seed):
                ctx.progress(done=tally.clips, total=len(clips.rows), unit="clips")
                self._show(ctx, clips, item, tally)
        if tally.clips < 2:
            raise DataError(
                f"{ctx.input('data').name} has {tally.clips} {self.split} clips that can be read, two are needed: raise val_fraction"
            )
        carried = self._carried(model, sampler, clips, tally)
        ctx.out.write_text(CARRIED, carried.model_dump_json(indent=1))
        return StageResult(carried.metrics, Counts(input=len(clips.rows), written=tally.clips, quarantined=len(clips.bad)))

    def _tally(self) -> "_Tally":
        """ConfigError where weights that the job names cannot be had."""
        from kinetok.tokenizers.video_metrics import I3D, ClipSim

        try:
            return _Tally(ClipSim(self.clip) if self.clip else None, I3D(self.i3d) if self.i3d else None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"clip, i3d: {error}") from error

    def _show(self, ctx: StageContext, clips: "Clips", item: "Shown", tally: "_Tally") -> None:
        """Count one clip, and draw it where it is among the first."""
        from kinetok.pipelines.report.carried import OWN, SHUFFLED
        from kinetok.pipelines.report.panel import contact_sheet, pixels, png

        about = clips.index.rows.slice(item.row, 1).select(["id", "caption"]).to_pylist()[0]
        if tally.clips < self.strips:
            rows = [item.original_CTHW, item.made_CTHW[OWN], item.made_CTHW[SHUFFLED]]
            file = f"strips/{tally.clips:03d}.png"
            ctx.out.write_bytes(file, png(contact_sheet([pixels(video_CTHW) for video_CTHW in rows])))
            tally.strips.append(Strip(id=about["id"], caption=about["caption"] or "", file=file))
        tally.add(item, about["caption"] or "")

    def _carried(self, model: "DivotTokenizer", sampler: SamplerConfig, clips: "Clips", tally: "_Tally") -> Carried:
        recipe = clips.index.recipe
        protocol = f"{tally.clips} {self.split} clips of {recipe.frames} frames, {recipe.height} x {recipe.width}, {recipe.fps:g} fps"
        return Carried(
            split=self.split,
            clips=tally.clips,
            weights=model.digest(),
            vit=model.config.vit.title,
            tokens=model.config.encoder.tokens,
            token_width=model.config.encoder.token_width,
            steps=sampler.steps,
            guidance=sampler.guidance,
            conditions=tally.conditions(),
            figures=tuple(tally.figures(protocol)),
            strips=tuple(tally.strips),
        )


class _Tally:
    """Figures of the clips so far."""

    def __init__(self, clip: "ClipSim | None", i3d: "I3D | None") -> None:
        self.clip, self.i3d = clip, i3d
        self.clips = 0
        self.strips: list[Strip] = []
        self.rows: dict[str, list[tuple[float, float, float | None]]] = {}
        self.cosines: list[float] = []
        self.features: dict[str, list[Tensor]] = {"real": [], "made": []}

    def add(self, item: "Shown", caption: str) -> None:
        from kinetok.pipelines.report.carried import OWN, psnr_and_ssim

        self.clips += 1
        made: dict[str, Tensor] = {AUTOENCODER: item.copy_CTHW, **item.made_CTHW}
        for name, video_CTHW in made.items():
            self.rows.setdefault(name, []).append((*psnr_and_ssim(video_CTHW, item.original_CTHW), item.v_loss.get(name)))
        if self.clip is not None:
            self.cosines.append(float(self.clip(item.made_CTHW[OWN][None], [caption])))
        if self.i3d is not None:
            self.features["real"].append(self.i3d(item.original_CTHW[None]))
            self.features["made"].append(self.i3d(item.made_CTHW[OWN][None]))

    def conditions(self) -> tuple[Condition, ...]:
        """Means over clips."""
        return tuple(
            Condition(
                name=name,
                psnr=_mean([psnr for psnr, _, _ in rows]),
                ssim=_mean([ssim for _, ssim, _ in rows]),
                v_loss=_mean(losses) if (losses := [loss for _, _, loss in rows if loss is not None]) else None,
            )
            for name, rows in self.rows.items()
        )

    def figures(self, protocol: str) -> Iterator[Figure]:
        """What needs weights of others, measured or not."""
        import torch

        from kinetok.tokenizers.video_metrics import frechet

        sim = _mean(self.cosines) if self.clip is not None else None
        yield Figure(name="CLIPSIM", value=sim, protocol=f"mean cosine of frames and caption; {protocol}" if self.clip else NOT_MEASURED)
        distance = frechet(*(torch.cat(found) for found in self.features.values())) if self.i3d is not None else None
        how = f"I3D logits of Kinetics-400, resized to 224 by the network, covariance over N; {protocol}"
        yield Figure(name="rFVD", value=distance, protocol=how if self.i3d else NOT_MEASURED)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
