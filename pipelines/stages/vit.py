"""`vit`: every kept clip through a frozen vision transformer, into shards beside those of `encode`: what Divot's tokenizer is trained from.

The files and the work are those of `encode`; a clip is one window, of which the transformer sees a few frames. Not covered: the model
(`kinetok.tokenizers.divot.vit`).
"""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from kinetok.infra.fingerprint import Plain, plain
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.stages.encode import encode
from kinetok.tokenizers.base import Count
from kinetok.tokenizers.divot.frames import SPARSE
from kinetok.tokenizers.divot.vit import VitConfig

if TYPE_CHECKING:
    from kinetok.tokenizers.divot.vit import ClipFeatures


class Vit(Stage):
    """Clips into shards of patch features."""

    kind: Literal["vit"] = "vit"
    version: ClassVar[int] = 1
    compiles: ClassVar[bool] = True
    uses_ray: ClassVar[bool] = True
    data: Annotated[Ref, Produces("clips")]
    """The clips."""
    vit: VitConfig
    """The vision transformer, by path or hub id; without one it is untrained, which tells pictures apart and understands none."""
    frames: Count = SPARSE
    """Frames of a clip that it sees; the tokenizer's `encoder.frames`."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type the features are stored in."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """More quarantined clips than this fraction fail the stage."""

    def fetch(self) -> None:
        """Download a transformer that only the hub has."""
        from kinetok.pipelines.outside import fetch_model

        if self.vit.path is not None:
            fetch_model(self.vit.path)

    def facts(self) -> Mapping[str, Plain]:
        """Digests of the files of a transformer by path or id, whose name says nothing of them. Raises StoreError where it is not here."""
        from kinetok.pipelines.outside import model_digests

        return {} if self.vit.path is None else {"vit": plain(model_digests(self.vit.path))}

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return Ask("decode task", resources.decoder, beside=True), Ask("model actor", resources.worker)

    def run(self, ctx: StageContext) -> StageResult:
        """Encode the shards that are not committed yet, then write the manifest."""
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.data.encoding import Encoding

        ctx.progress(note=f"vision transformer: {self.vit.title}")
        index = ClipIndex.open(ctx.input("data"))
        encoding = Encoding(partial(open_vit, self.vit, self.frames), "tokens", self.dtype, index.recipe, ctx.resources)
        return encode(ctx, index, encoding, self.max_bad_fraction)


def open_vit(vit: VitConfig, frames: int) -> "ClipFeatures":
    """The model on the CPU; ConfigError where it cannot be had, or is another than the job says."""
    from kinetok.infra.errors import ConfigError
    from kinetok.tokenizers.divot.vit import ClipFeatures, FrozenViT

    try:
        return ClipFeatures(FrozenViT.load(vit), frames)
    except (OSError, ValueError) as error:
        raise ConfigError(f"vit: {error}") from error
