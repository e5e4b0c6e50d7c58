"""`text`: the caption of every kept clip through a frozen text encoder, into shards of embeddings beside those of `encode`.

Each shard is committed on its own, its index last; a later attempt keeps what is committed and writes the rest with the same bytes.
A clip without a caption is encoded as the empty text. Not covered: the files and the work on them (`data/text_shards.py`).
"""

import json
import time
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from kinetok.infra.artifact import MANIFEST, Counts
from kinetok.infra.errors import DataError
from kinetok.infra.fingerprint import Plain, plain
from kinetok.infra.stage import Ask, Produces, Ref, Resources, Stage, StageContext, StageResult
from kinetok.llm.text import TextConfig


class Text(Stage):
    """Captions into shards of text embeddings."""

    kind: Literal["text"] = "text"
    version: ClassVar[int] = 1
    uses_ray: ClassVar[bool] = True
    data: Annotated[Ref, Produces("clips")]
    """The clips whose captions to encode."""
    text: TextConfig
    """The text encoder."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type the embeddings are stored in."""

    def fetch(self) -> None:
        """Download an encoder that only the hub has."""
        from kinetok.pipelines.outside import fetch_model

        if self.text.path is not None:
            fetch_model(self.text.path)

    def facts(self) -> Mapping[str, Plain]:
        """Digests of the files of an encoder by path or id, whose name says nothing of them. Raises StoreError where it is not here."""
        from kinetok.pipelines.outside import model_digests

        return {} if self.text.path is None else {"encoder": plain(model_digests(self.text.path))}

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return (Ask("model actor", resources.worker),)

    def run(self, ctx: StageContext) -> StageResult:
        """Encode the captions of the shards that are not committed yet, then write the manifest."""
        from kinetok.pipelines.data.clip_index import ClipIndex
        from kinetok.pipelines.data.text_shards import TextEncoding, TextSpec, encode_captions, open_encoder
        from kinetok.pipelines.data.token_shards import resume, stamp

        index = ClipIndex.open(ctx.input("data"))
        if not len(index):
            raise DataError(f"{ctx.input('data').name} holds no clips: look at its filters and its quarantine")
        stamp(ctx.out, TextSpec.of(open_encoder(self.text), self.dtype))
        lines = resume(ctx.out)
        due = [shard for shard in range(len(index.shards)) if shard not in lines]
        done, began = sum(len(index.shards[shard]) for shard in lines), time.perf_counter()
        ctx.progress(done=done, total=len(index), unit="captions")
        work = TextEncoding(ctx.input("data"), self.text, self.dtype, ctx.resources, ctx.out)
        for shard, written in encode_captions(due, work, ctx.stop):
            lines[shard] = written
            done += len(index.shards[shard])
            ctx.progress(done=done, total=len(index), unit="captions")
        ctx.out.write_text(MANIFEST, "".join(json.dumps(line) + "\n" for number in sorted(lines) for line in lines[number]))
        encoded = sum(len(index.shards[shard]) for shard in due)
        metrics = {"captions_per_second": encoded / (time.perf_counter() - began)} if due else {}
        return StageResult(metrics, Counts(input=len(index), written=done))
