"""`tokenize`: a source of videos through a finished tokenizer, for someone who never wrote a job file.

It is a job of four stages (model, ingest, clips, encode) in a store at `out`, so it resumes, verifies and tells its lineage like any
other. Not covered: reading the tokens (`data/token_shards.py`, or plain webdataset).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.errors import ConfigError, KinetokError
from kinetok.infra.job import Job
from kinetok.infra.run import run
from kinetok.infra.stage import Ref, Resources
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.recipe import IndexRecipe
from kinetok.pipelines.stages.clips import Clips
from kinetok.pipelines.stages.encode import Encode
from kinetok.pipelines.stages.ingest import Ingest
from kinetok.pipelines.stages.model import Model
from kinetok.tokenizers.causal.chunks import ChunkPlan


@dataclass(frozen=True)
class Tokenized:
    """What `tokenize` made."""

    clips: Artifact
    tokens: Artifact


def tokenize(
    model: str,
    source: str,
    out: str,
    *,
    recipe: IndexRecipe,
    resources: Resources,
    chunks: ChunkPlan | None = None,
    csv: str | None = None,
    console: Console | None = None,
) -> Tokenized:
    """Write the tokens of every video of `source` below `out`; run it again to continue. Raises KinetokError where a stage fails.

    `model` is what `kinetok.load` takes; `source` is tars (`s3://b/{000000..000099}.tar`) or a folder, with an optional WebVid CSV.
    Clips longer than a chunk go through in `chunks`, whose latents are joined; None encodes each at once.
    """
    job = Job(
        name="tokenize",
        store=out,
        tracking=None,
        resources={name: resources for name in ("model", "videos", "clips", "tokens")},
        stages={
            "model": Model(where=model),
            "videos": Ingest(source=source, csv=csv),
            "clips": Clips(videos=Ref("videos"), **dict(recipe)),
            "tokens": Encode(data=Ref("clips"), model=Ref("model"), chunks=chunks, max_bad_fraction=recipe.max_bad_fraction),
        },
    )
    store = Store(Folder(out))
    done = run(job, store, console=console)
    errors = [f"{name}: {stage.error}" for name, stage in done.stages.items() if stage.error]
    if errors:
        raise KinetokError("\n".join(errors))
    clips, tokens = (store.read(Folder(done.stages[name].folder)) for name in ("clips", "tokens"))
    assert clips is not None and tokens is not None
    return Tokenized(clips, tokens)


def settings(options: Mapping[str, float | None]) -> tuple[IndexRecipe, Resources, ChunkPlan | None]:
    """Options of the command line (fps, frames, size, batch_size, workers, gpus, tile, chunk, overlap) as recipe, resources and chunks;
    ConfigError out of range."""
    fps, frames, size = (options[name] for name in ("fps", "frames", "size"))
    given = {name: options[name] for name in ("batch_size", "workers", "gpus", "tile")}
    try:
        recipe = IndexRecipe.model_validate({"fps": fps, "frames": frames, "height": size, "width": size, "max_bad_fraction": 1.0})
        resources = Resources.model_validate({**given, "dtype": "bf16" if options["gpus"] else "fp32"})
        if options["chunk"] is None:
            if options["overlap"]:
                raise ConfigError("--overlap: chunks share frames, and clips are encoded at once; give --chunk too")
            return recipe, resources, None
        return recipe, resources, ChunkPlan.model_validate({"frames": options["chunk"], "overlap": options["overlap"]})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())) from error


def summary(done: Tokenized) -> Table:
    """What was written, how fast, and what was skipped and why."""
    table = Table("", "clips", "", title=f"tokens in {done.tokens.folder.path('shards')}", title_justify="left")
    counts, rate = done.tokens.record.counts, done.tokens.record.metrics.get("clips_per_second")
    table.add_row("written", str(counts.written), f"{rate:.1f} clips/s" if rate else "")
    for decision, reason, count in skipped(done):
        table.add_row(decision, str(count), reason)
    return table


def skipped(done: Tokenized) -> list[tuple[str, str, int]]:
    """(decision, reason, number) of everything that gave no tokens."""
    from kinetok.pipelines.data.clip_index import read_parts
    from kinetok.pipelines.data.quarantine import report
    from kinetok.pipelines.data.reasons import MEANINGS

    rows = read_parts(done.clips.folder, columns=["reason"], decision="filtered")["reason"].to_pylist()
    filtered = [("filtered", f"{reason}: {MEANINGS[reason]}", count) for reason, count in Counter(rows).most_common()]
    bad = [entry for artifact in (done.clips, done.tokens) for entry in report(artifact.folder)]
    return filtered + [("quarantined", f"{entry.reason}: {entry.meaning}", entry.count) for entry in bad]
