"""`write`: a language model makes the tokens of a clip for every caption, in shards like those of `encode`.

They stand for the tokens of the tokenizer that the model learned from, and carry its spec: what reads encoded clips reads these. A
de-tokenizer is adapted to them, and `decode` shows them. Each shard is committed on its own; a later attempt keeps what is committed and
writes the rest with the same bytes. Not covered: the work (`data/written_shards.py`).
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictInt, StringConstraints

from kinetok.infra.artifact import MANIFEST, Counts
from kinetok.infra.errors import DataError
from kinetok.infra.fingerprint import Plain
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.pipelines.data.user_files import read_user_file, read_user_text

if TYPE_CHECKING:
    from kinetok.pipelines.data.token_shards import Stored
    from kinetok.tokenizers.base import TokenSpec

Prompt = Annotated[str, StringConstraints(min_length=1)]


class Write(Stage):
    """Captions into token shards."""

    kind: Literal["write"] = "write"
    version: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ("prompts",)
    uses_ray: ClassVar[bool] = True
    model: Annotated[Ref, Produces("language", "language_model")]
    """The language model."""
    data: Annotated[Ref, Produces("clips")] | None = None
    """Clips for whose captions to write, under their ids."""
    prompts: Annotated[tuple[Prompt, ...], Field(min_length=1)] | Prompt | None = None
    """Prompts instead, or the path of a UTF-8 file with one a line; blank lines are left out."""
    seed: StrictInt = 0
    variance_scale: Annotated[float, Field(ge=0)] | None = None
    """Of the variance of what is drawn, over the predicted one; None takes that of the model's head."""
    # 1 is not dumped: it would give all tokens that were ever written another key.
    draws: Annotated[StrictInt, Field(ge=1, exclude_if=lambda value: value == 1)] = 1
    """How often a clip's tokens are drawn: a de-tokenizer that adapts to them meets another draw in every epoch, all else the first."""
    media: Annotated[Literal["video", "image"] | None, Field(exclude_if=lambda value: value is None)] = None
    """What to write of a model that learned videos and pictures; None writes what its first source was."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type the tokens are stored in."""

    def facts(self) -> Mapping[str, Plain]:
        """Digest of a file of prompts. Raises DataError where it is not there."""
        listed = isinstance(self.prompts, str)
        return {"prompts": hashlib.sha256(read_user_file(str(self.prompts))).hexdigest()} if listed else {}

    def problems(self, resources: Resources, stages: Mapping[str, Stage]) -> Iterator[str]:
        """Neither or both of the two origins."""
        if (self.data is None) == (self.prompts is None):
            yield "data: name either the clips whose captions to write for, or prompts"

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return (Ask("model actor", resources.worker),)

    def run(self, ctx: StageContext) -> StageResult:
        """Write the shards that are not committed yet, then the manifest."""
        from kinetok.pipelines.data.token_shards import resume, stamp
        from kinetok.pipelines.data.token_videos import media_of
        from kinetok.pipelines.data.written_shards import Captions, Drawing, Writing, seconds_of, write_clips
        from kinetok.pipelines.models import language_spec

        spec = language_spec(ctx.input("model"))
        tokens = spec.of(self.media)
        captions = Captions(ctx.optional("data"), self._prompts(), seconds_of(tokens))
        if not len(captions):
            raise DataError("data: there are no captions to write for: look at the clips' filters and quarantine")
        stamp(ctx.out, _stored_spec(tokens, self.dtype))
        lines = resume(ctx.out)
        due = [shard for shard in range(captions.shards) if shard not in lines]
        done, began = sum(len(captions.shard(shard)[1]) for shard in lines), time.perf_counter()
        before = done
        ctx.progress(done=done, total=len(captions), unit="clips")
        drawing = Drawing(self.seed, self.draws, self.variance_scale)
        work = Writing(ctx.input("model"), media_of(tokens), spec.instructed, captions, drawing, self.dtype, ctx.resources, ctx.out)
        for shard, written in write_clips(due, work, ctx.stop):
            lines[shard] = written
            done += len(captions.shard(shard)[1])
            ctx.progress(done=done, total=len(captions), unit="clips")
        ctx.out.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for number in sorted(lines) for line in lines[number]))
        metrics = {"clips_per_second": (done - before) / (time.perf_counter() - began)} if due else {}
        return StageResult(metrics, Counts(input=len(captions), written=done))

    def _prompts(self) -> tuple[str, ...]:
        if isinstance(self.prompts, str):
            return tuple(line for line in read_user_text(self.prompts).splitlines() if line.strip())
        return self.prompts or ()


def _stored_spec(spec: "TokenSpec", dtype: "Stored") -> "TokenSpec":
    from kinetok.pipelines.data.token_shards import dtype_name

    return spec.model_copy(update={"dtype": dtype_name(dtype)})
