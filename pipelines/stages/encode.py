"""`encode`: every kept clip through a frozen tokenizer, into shards of tokens or trunk features.

The output shards are the groups of the clip index. Each is committed on its own, its index last; a later attempt keeps what is
committed, removes what is not, and writes the rest with the same bytes. With `features`, what a frozen model below made of the clips is
read and no clip is decoded. Not covered: the Ray Data plan (`data/encoding.py`), the work from features (`data/cached_encoding.py`).
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

from pydantic import Field

from kinetok.infra.artifact import MANIFEST, Artifact, Counts
from kinetok.infra.errors import ContractError, DataError, QuarantineLimit
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.train import config_of, misfits
from kinetok.tokenizers.base import ModelConfig
from kinetok.tokenizers.causal.chunks import ChunkPlan
from kinetok.tokenizers.causal.grown import GrownConfig
from kinetok.tokenizers.divot.tokenizer import DivotConfig

if TYPE_CHECKING:
    from kinetok.pipelines.data.clip_index import ClipIndex
    from kinetok.pipelines.data.encoding import Committed, Encoding
    from kinetok.pipelines.data.token_shards import Line
    from kinetok.tokenizers.base import Tokenizer, TokenSpec


class Encode(Stage):
    """Clips through a tokenizer into token or feature shards."""

    kind: Literal["encode"] = "encode"
    version: ClassVar[int] = 2
    compiles: ClassVar[bool] = True
    uses_ray: ClassVar[bool] = True
    rates: ClassVar[Mapping[str, str]] = {
        "decode task": "decode_clips_per_second_per_core",
        "model actor": "model_clips_per_second_per_actor",
    }
    data: Annotated[Ref, Produces("clips")]
    """The clips to encode."""
    model: Annotated[Ref, Produces("train", "model")]
    """The tokenizer."""
    features: Annotated[Ref, Produces("encode", "vit")] | None = None
    """What the tokenizer was trained from, of the same clips: trunk features of the rung below, or a divot's of its vision transformer.
    Tokens are made of these then, rounded as they are stored; None makes them of pixels."""
    content: Literal["tokens", "features"] = "tokens"
    """What to keep: tokens, or the trunk features that a grown stage is trained from."""
    chunks: ChunkPlan | None = None
    """Encode long clips chunk by chunk and join the latents, as generators of long video want them; None encodes each clip at once."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type the numbers are stored in; integer tokens stay integers."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    """More quarantined clips than this fraction fail the stage."""

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """Clips whose sides the model cannot take, chunks that do not tile them."""
        yield from misfits(self.data, stages[self.model], stages)
        clips, config = stages[self.data], config_of(stages[self.model], stages)
        if self.features is not None:
            yield from self._of_features(config)
        if self.features is not None and isinstance(clips, Clips) and isinstance(config, DivotConfig) and clips.frames != config.frames:
            yield f"features: clips of {self.data} have {clips.frames} frames, a window of {self.model} {config.frames}; leave features out"
        if self.chunks is None:
            return
        if self.content != "tokens":
            yield f"chunks: {self.content} are of whole clips; leave chunks out"
        if isinstance(clips, Clips) and any(len(span) != self.chunks.frames for span in self.chunks.spans(clips.frames)):
            yield (
                f"chunks: the clips of {self.data} have {clips.frames} frames, not so many chunks of {self.chunks.frames} that share "
                f"{self.chunks.overlap}"
            )

    def _of_features(self, config: ModelConfig | None) -> Iterator[str]:
        """What cannot be made of features, by what is known of the tokenizer."""
        if self.content != "tokens" or self.chunks is not None:
            yield "features: only tokens of whole clips are made of them; leave content and chunks out, or features"
        if config is not None and not isinstance(config, GrownConfig | DivotConfig):
            yield f"features: a {config.kind} model makes tokens of pixels alone; leave them out"

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        actor = Ask("model actor", resources.worker)
        return (actor,) if self.features is not None else (Ask("decode task", resources.decoder, beside=True), actor)

    def run(self, ctx: StageContext) -> StageResult:
        """Encode the shards that are not committed yet, then write the manifest."""
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.data.encoding import Encoding
        from kinetok.pipelines.models import model_folder, open_model

        index = ClipIndex.open(ctx.input("data"))
        model = partial(open_model, model_folder(ctx.input("model")))
        if (features := ctx.optional("features")) is not None:
            return self._from_features(ctx, index, model, features)
        encoding = Encoding(model, self.content, self.dtype, index.recipe, ctx.resources, self.chunks)
        return encode(ctx, index, encoding, self.max_bad_fraction)

    def _from_features(
        self, ctx: StageContext, index: "ClipIndex", open_model: "Callable[[], Tokenizer]", features: Artifact
    ) -> StageResult:
        """`encode` without pixels. Raises ContractError where the features are of another model or of other clips."""
        from kinetok.pipelines.data.cached_encoding import CachedEncoding, encode_cached
        from kinetok.pipelines.data.token_shards import TokenShards, dtype_name, require_spec
        from kinetok.pipelines.stages.divot_training import require_same_clips

        model = open_model()
        wanted = model.feature_spec()
        if wanted is None:
            raise ContractError(f"features: {ctx.input('model').name} makes tokens of pixels alone; leave them out")
        require_spec(TokenShards.open(features).spec, wanted)
        require_same_clips(features, ctx.input("data"))
        spec = model.spec().model_copy(update={"recipe": index.recipe, "dtype": dtype_name(self.dtype)})
        work = CachedEncoding(open_model, features, self.dtype, index.frames, ctx.resources, ctx.out)
        return commit(ctx, index, spec, lambda due: encode_cached(due, work, ctx.stop), self.max_bad_fraction)


def encode(ctx: StageContext, index: "ClipIndex", encoding: "Encoding", max_bad_fraction: float) -> StageResult:
    """`commit` of what a model makes of pixels."""
    from kinetok.pipelines.data.encoding import encode_shards

    named = replace(encoding, stage=ctx.name)
    return commit(ctx, index, _stored_spec(named), lambda due: encode_shards(index, due, named, ctx.out, ctx.stop), max_bad_fraction)


def commit(
    ctx: StageContext,
    index: "ClipIndex",
    spec: "TokenSpec",
    shards: "Callable[[list[int]], Iterable[Committed]]",
    max_bad_fraction: float,
) -> StageResult:
    """Have `shards` commit every shard that is not there yet, count, and write the manifest; `spec` is of what they hold."""
    from kinetok.pipelines.data.token_shards import resume, stamp

    if not len(index):
        raise DataError(f"{ctx.input('data').name} holds no clips to encode: look at its filters and its quarantine")
    stamp(ctx.out, spec)
    lines = resume(ctx.out)
    due = [shard for shard in range(len(index.shards)) if shard not in lines]
    finished: list[Committed] = []
    began = time.perf_counter()
    ctx.progress(done=_counts(lines.values()).input, total=len(index), unit="clips")
    for shard in shards(due) if due else ():
        lines[shard.number] = shard.lines
        finished.append(shard)
        counts = _counts(lines.values())
        ctx.progress(done=counts.input, total=len(index), unit="clips", quarantined=counts.quarantined)
        _check_limit(ctx, counts.quarantined, len(index), max_bad_fraction)
    # Publishing refuses counts that do not balance: what went in is said by the clip index, not by what came out.
    counts = _counts(lines.values()).model_copy(update={"input": len(index)})
    _check_limit(ctx, counts.quarantined, len(index), max_bad_fraction)
    ctx.out.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for number in sorted(lines) for line in lines[number]))
    return StageResult(_speed(finished, time.perf_counter() - began), counts)


def _stored_spec(encoding: "Encoding") -> "TokenSpec":
    """The model's spec, with what is stored, in which type, and how the pixels were made."""
    from kinetok.pipelines.data.token_shards import dtype_name
    from kinetok.pipelines.models import growable

    model = encoding.open_model()
    spec = model.spec()
    changes: dict[str, object] = {"content": encoding.content, "recipe": encoding.recipe}
    if encoding.chunks is not None:
        changes |= {"chunk_frames": encoding.chunks.frames, "chunk_overlap": encoding.chunks.overlap}
    if encoding.content == "features":
        changes["channels"] = growable(cast("Tokenizer", model)).feature_channels
    if encoding.content == "features" or spec.vocabulary is None:
        changes["dtype"] = dtype_name(encoding.dtype)
    return spec.model_copy(update=changes)


def _counts(shards: "Iterable[list[Line]]") -> Counts:
    """Clips in and out, re-added from manifest lines."""
    found = {"index": 0, "quarantine": 0}
    for line in (line for lines in shards for line in lines):
        folder = str(line["path"]).partition("/")[0]
        if folder in found:
            found[folder] += int(str(line["count"]))
    return Counts(input=sum(found.values()), written=found["index"], quarantined=found["quarantine"])


def _check_limit(ctx: StageContext, bad: int, clips: int, max_bad_fraction: float) -> None:
    """Raise QuarantineLimit with the reasons once more clips failed than the stage allows, DataError with them once all did."""
    from kinetok.pipelines.data.quarantine import summary

    if bad > max_bad_fraction * clips:
        raise QuarantineLimit(
            f"stage {ctx.name}: {bad} of {clips} clips could not be encoded, more than max_bad_fraction={max_bad_fraction:g}; "
            f"repair the source or raise the limit\n{summary(ctx.out)}"
        )
    if bad == clips:
        raise DataError(f"stage {ctx.name}: none of {clips} clips could be encoded; repair the source\n{summary(ctx.out)}")


def _speed(finished: "list[Committed]", seconds: float) -> dict[str, float]:
    """Rates of this attempt: end to end, and of the model and, where there was any, of decoding by itself; empty where nothing was left."""
    clips = sum(shard.clips for shard in finished)
    if not clips:
        return {}
    decoding = sum(shard.decode_seconds for shard in finished)
    return {
        "clips_per_second": clips / seconds,
        **({"decode_clips_per_second_per_core": clips / decoding} if decoding else {}),
        "model_clips_per_second_per_actor": clips / sum(shard.encode_seconds for shard in finished),
    }
