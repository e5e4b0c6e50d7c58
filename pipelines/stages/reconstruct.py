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
from kinetok.infra.errors import ContractError, DataError
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.report.tables import CARRIED, Carried, Condition, Figure, Strip
from kinetok.pipelines.stages.evaluate import Perceptual, too_small
from kinetok.pipelines.stages.train import misfits
from kinetok.tokenizers.divot.ddim import SamplerConfig

if TYPE_CHECKING:
    from torch import Tensor

    from kinetok.pipelines.report.carried import Shown
    from kinetok.pipelines.report.ladder import Clips
    from kinetok.pipelines.report.networks import Networks
    from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

AUTOENCODER = "autoencoder alone"
NOT_MEASURED = "not measured: the job names no weights"
CLIP_RESIZE = "bicubic with antialiasing to CLIP's edge, centre crop"


class Reconstruct(Stage):
    """Reconstruction by diffusion, from tokens and against controls."""

    kind: Literal["reconstruct"] = "reconstruct"
    version: ClassVar[int] = 2
    compiles: ClassVar[bool] = True
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
    lpips: Perceptual = None
    """A file of VGG16 for LPIPS, by path or hub id; None does not measure it."""
    strips: Annotated[StrictInt, Field(ge=0)] = 6
    """Clips that are shown, the first of those measured."""
    seed: StrictInt = 0

    def fetch(self) -> None:
        """Download CLIP and weights of LPIPS that only the hub has."""
        from kinetok.pipelines.outside import fetch_networks

        fetch_networks(clip=self.clip, lpips=self.lpips)

    def facts(self) -> Mapping[str, Plain]:
        """Digests of the networks that measure. Raises DataError or StoreError where one is not here."""
        from kinetok.pipelines.outside import network_digests

        return network_digests(clip=self.clip, i3d=self.i3d, lpips=self.lpips)

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """Clips whose sides the model or LPIPS cannot take."""
        yield from misfits(self.data, stages[self.model], stages)
        yield from too_small(self.lpips, stages[self.data])

    def run(self, ctx: StageContext) -> StageResult:
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.models import model_folder, open_model
        from kinetok.pipelines.report.carried import shown
        from kinetok.pipelines.report.ladder import Clips, choose
        from kinetok.pipelines.report.networks import Networks
        from kinetok.pipelines.stages.evaluate import threads
        from kinetok.tokenizers.divot.tokenizer import DivotTokenizer

        model = open_model(model_folder(ctx.input("model")))
        if not isinstance(model, DivotTokenizer):
            raise ContractError(
                f"{ctx.input('model').name} is a {model.config.kind!r} tokenizer, which draws no noise: measure it by evaluate"
            )
        index = ClipIndex.open(ctx.input("data"))
        clips = Clips(index, choose(index, self.split, self.max_clips, self.seed), ctx.resources.batch_size)
        sampler = self.sampler or model.config.sampler
        tally = _Tally(Networks.open(ctx.resources, clip=self.clip, i3d=self.i3d, lpips=self.lpips))
        with threads(ctx.resources):
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
        size = f"{recipe.frames} frames, {recipe.height} x {recipe.width}, {recipe.fps:g} fps"
        protocol = f"{tally.clips} {self.split} clips of {size}, each drawn once from its own tokens, through no codec"
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
            figures=tuple(tally.figures(self, protocol)),
            strips=tuple(tally.strips),
        )


class _Tally:
    """Figures of the clips so far."""

    def __init__(self, networks: "Networks") -> None:
        self.networks = networks
        self.clips = 0
        self.strips: list[Strip] = []
        self.rows: dict[str, list[tuple[float, float, float | None]]] = {}
        self.cosines: list[Tensor] = []
        self.distances: list[Tensor] = []
        self.features: dict[str, list[Tensor]] = {"real": [], "made": []}

    def add(self, item: "Shown", caption: str) -> None:
        from kinetok.pipelines.report.carried import OWN, psnr_and_ssim

        self.clips += 1
        made: dict[str, Tensor] = {AUTOENCODER: item.copy_CTHW, **item.made_CTHW}
        for name, video_CTHW in made.items():
            self.rows.setdefault(name, []).append((*psnr_and_ssim(video_CTHW, item.original_CTHW), item.v_loss.get(name)))
        original_1CTHW, own_1CTHW = item.original_CTHW[None], item.made_CTHW[OWN][None]
        found = (
            (self.cosines, self.networks.clipsim(own_1CTHW, [caption])),
            (self.distances, self.networks.distance(own_1CTHW, original_1CTHW)),
            (self.features["real"], self.networks.features(original_1CTHW)),
            (self.features["made"], self.networks.features(own_1CTHW)),
        )
        for kept, values in found:
            if values is not None:
                kept.append(values)

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

    def figures(self, stage: Reconstruct, protocol: str) -> Iterator[Figure]:
        """What needs weights of others, measured or not."""
        import torch

        from kinetok.tokenizers.video_metrics import caveat, frechet

        sim = float(torch.cat(self.cosines).mean()) if self.cosines else None
        how = f"{stage.clip}; mean cosine of frames and the caption of the source video; {protocol}; {CLIP_RESIZE}"
        yield Figure(name="CLIPSIM", value=sim, protocol=NOT_MEASURED if sim is None else how)
        near = float(torch.cat(self.distances).mean()) if self.distances else None
        how = f"{stage.lpips}; LPIPS on VGG16, mean over frames and clips, not resized; {protocol}"
        yield Figure(name="LPIPS", value=near, protocol=NOT_MEASURED if near is None else how)
        if not self.features["real"]:
            yield Figure(name="rFVD", value=None, protocol=NOT_MEASURED)
            return
        real_ND, made_ND = (torch.cat(found) for found in self.features.values())
        how = f"{stage.i3d}; I3D resizes to 224 by itself, as many real clips as drawn ones, covariance over N; {protocol}"
        few = caveat(real_ND, made_ND)
        yield Figure(name="rFVD", value=frechet(real_ND, made_ND), protocol=f"{how}; {few}" if few else how)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
