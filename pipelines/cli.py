"""`kinetok`: the command line. Each command reads its options and calls one function elsewhere.

Everything is imported inside the commands, so that `kinetok --help` answers at once. A KinetokError, or a file that cannot be
read, becomes its message and exit code 1.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kinetok.infra.errors import KinetokError, StoreError
from kinetok.infra.secrets import redact
from kinetok.pipelines.divot_cli import DIVOT

if TYPE_CHECKING:
    from rich.console import Console

    from kinetok.infra.artifact import Artifact, Store
    from kinetok.infra.job import Job
    from kinetok.infra.job_run import JobRun
    from kinetok.infra.submit import Jobs
    from kinetok.llm.presets import SizeName

JOBS = Path(__file__).parent / "jobs"

_job = click.argument("job")
_set = click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Override a value of the job file: base.steps=10.")
_store = click.option("--store", envvar="KINETOK_STORE", default="work", show_default=True, help="Folder or s3:// prefix of the artifacts.")
_job_store = click.option("--store", help="Another store than the job file's.")
_json = click.option("--json", "as_json", is_flag=True, help="Machine-readable, on standard output.")
_artifact = click.argument("artifact")
_only = click.option("--only", multiple=True, metavar="STAGE", help="Build just this stage; may be repeated.")
_from = click.option(
    "--from", "start", multiple=True, metavar="STAGE", help="Build this stage and all that is made of it; may be repeated."
)
_force = click.option("--force", is_flag=True, help="Delete and build again what is selected, finished or not.")
_model = click.option(
    "--model",
    required=True,
    help="A folder, also of diffusers, an artifact of $KINETOK_STORE, models:/name@alias, or an id of the Hugging Face hub.",
)
_ADDRESS = "RAY_API_SERVER_ADDRESS"
_cluster = click.option("--address", envvar=_ADDRESS, required=True, help="Of the cluster's dashboard: http://127.0.0.1:8265.")


class _Commands(click.Group):
    """Commands in the order of a user's day, and errors a user can act on as plain messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (KinetokError, OSError) as error:
            click.echo(f"{click.style('error', fg='red', bold=True)}: {redact(str(error))}", err=True)
            ctx.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kinetok")
def main() -> None:
    """Turn video into compact tokens, train the models around them, and know what made what.

    ARTIFACT is a folder, a stage's name (the newest of that name), name-key, or the start of a key. JOB is a path or a job that kinetok
    brings along (main).
    """


@main.command()
@_job
@_set
@_job_store
@click.option("--sources", type=int, metavar="N", help="Size the whole job as if its source held N videos.")
@_json
def plan(job: str, overrides: tuple[str, ...], store: str | None, sources: int | None, as_json: bool) -> None:
    """Show what a job would build, why, and what it takes; nothing is built, written or downloaded.

    What it takes is told by earlier records. Training on GPUs that none tells of is sized by its architecture.
    """
    from kinetok.infra.plan import plan, plan_table, size_table
    from kinetok.pipelines.estimate import outline_json, outline_table, outlines, unrecorded

    loaded, place = _load(job, overrides, store)
    steps = plan(loaded, place, sources=sources, outline=True)
    unsized = unrecorded(loaded, steps)
    if as_json:
        sized = {name: {"outline": outline_json(each)} for name, each in outlines(loaded, unsized)}
        click.echo(json.dumps([step.to_json() | sized.get(step.name, {}) for step in steps], indent=1))
        return
    if sources is None:
        _console().print(plan_table(steps))
    if sources is not None or loaded.prices is not None:
        _console().print(size_table(steps))
    if unsized:
        click.echo(f"building {len(unsized)} trainings without their memory, to size them", err=True)
        _console().print(outline_table(outlines(loaded, unsized)))


@main.command()
@_job
@_set
@_job_store
@_only
@_from
@_force
def run(job: str, overrides: tuple[str, ...], store: str | None, only: tuple[str, ...], start: tuple[str, ...], force: bool) -> None:
    """Build what a job lacks; the same command goes on after a kill."""
    from kinetok.infra.run import Selection, run

    loaded, place = _load(job, overrides, store)
    state = run(loaded, place, Selection(only=only, start=start, force=force))
    _summary(state, place)
    sys.exit(0 if state.succeeded else 1)


@main.command()
@_job
@_cluster
@_set
@_job_store
@_only
@_from
@_force
@click.option("--wait/--detach", default=True, show_default=True, help="Follow the job to its end, or leave it once it is sent.")
def submit(job: str, address: str, overrides: tuple[str, ...], store: str | None, wait: bool, **selection: Any) -> None:
    """Run a job on a Ray cluster: sends this code and the job file, and nothing else.

    The same job, options and code are not run twice at a time: submitting them again follows what runs. Ctrl-C leaves the job running.
    """
    from kinetok.infra.job import find_job
    from kinetok.infra.run import Selection
    from kinetok.infra.submit import Jobs, Parcel, require_shared
    from kinetok.infra.wheel import cached_wheel

    loaded, _ = _load(job, overrides, store)
    Selection(**selection).names(loaded)
    require_shared(store or loaded.store)
    options = [("--set", overrides), ("--store", (store,) if store else ()), ("--only", selection["only"]), ("--from", selection["start"])]
    given = [word for option, values in options for value in values for word in (option, value)]
    parcel = Parcel(loaded.name, find_job(job, JOBS).read_bytes(), (*given, *(["--force"] if selection["force"] else [])), cached_wheel())
    jobs = Jobs(address)
    sent, there = jobs.submit(parcel)
    click.echo(f"{sent} {'runs already' if there else 'was sent'}: kinetok status|logs|cancel {sent} --address {address}", err=True)
    if wait:
        _follow(jobs, sent)


@main.command()
@click.argument("submission")
@_cluster
@click.option("--follow", is_flag=True, help="Go on until the job has ended; exit code 1 where it failed.")
def logs(submission: str, address: str, follow: bool) -> None:
    """Show what a job on a cluster has printed. SUBMISSION is an id of `submit`, or the start of one."""
    from kinetok.infra.submit import Jobs

    jobs = Jobs(address)
    name = jobs.find(submission)
    if follow:
        _follow(jobs, name)
    else:
        click.echo(jobs.logs(name), nl=False)


@main.command()
@click.argument("submission")
@_cluster
def cancel(submission: str, address: str) -> None:
    """Stop a job on a cluster at its stages' next safe points; what is finished stays, and the same job goes on from there."""
    from kinetok.infra.submit import Jobs

    jobs = Jobs(address)
    name = jobs.find(submission)
    click.echo(f"{name} is stopping" if jobs.cancel(name) else f"{name} had ended already")


@main.command()
@_job
@_set
def estimate(job: str, overrides: tuple[str, ...]) -> None:
    """Price a job before it runs, the stages that train and those that run models: parameters, FLOPs, memory."""
    from kinetok.pipelines.estimate import estimate_table, outlines, trainings
    from kinetok.pipelines.passes import passes, run_outlines, run_table

    loaded, _ = _load(job, overrides, None)
    _console().print(estimate_table(outlines(loaded, trainings(loaded))))
    if passes(loaded):
        _console().print(run_table(loaded, run_outlines(loaded)))


@main.command()
@click.option("--size", type=click.Choice(("small", "1b", "5b")), default="small", show_default=True, help="Of the diffusion transformer.")
@click.option("--frames", default=68, show_default=True)
@click.option("--height", default=192, show_default=True)
@click.option("--width", default=320, show_default=True)
@click.option("--measure/--no-measure", default=True, show_default=True, help="Run one training step at each rate on this machine.")
def budget(size: "SizeName", frames: int, height: int, width: int, measure: bool) -> None:
    """Compare what a video costs a generator at 4x, 8x and 16x: latents, tokens, FLOPs, time, memory."""
    from kinetok.llm.budget import explanation
    from kinetok.pipelines.estimate import budget_rows, budget_table

    rows = budget_rows(size, frames=frames, height=height, width=width, measured=measure)
    _console().print(budget_table(rows))
    click.echo(explanation(rows))


@main.command()
@click.argument("run_id", metavar="[ID]", required=False)
@_store
@click.option("--runs", default=3, show_default=True, help="How many of the latest runs.")
@click.option("--address", envvar=_ADDRESS, help="Of a cluster's dashboard: show the jobs that were submitted to it.")
def status(run_id: str | None, store: str, runs: int, address: str | None) -> None:
    """Show the latest runs and all artifacts of a store, or the jobs of a cluster. ID, or the start of it, chooses one."""
    from kinetok.infra.job_run import artifact_table, recent_runs, run_table

    if address:
        _status_of_cluster(address, run_id)
        return
    place = _open(store)
    found = recent_runs(place, runs if run_id is None else sys.maxsize)
    chosen = [state for state in found if run_id is None or run_id in (state.run_id, state.submission) or state.run_id.startswith(run_id)]
    if run_id is not None and not chosen:
        raise StoreError(f"{place.root} has no run {run_id}; `kinetok status` lists the latest, a submission's id needs --address")
    for state in reversed(chosen):
        _console().print(run_table(state, place))
    if run_id is None:
        _console().print(artifact_table(place.all()))


@main.command()
@_artifact
@_store
@_json
@click.option("--html", type=click.Path(dir_okay=False), help="Write one self-contained page here.")
def lineage(artifact: str, store: str, as_json: bool, html: str | None) -> None:
    """Show what an artifact was made of, up to the sources, and what was made of it."""
    from kinetok.infra.lineage import graph, to_html, to_json, tree

    place = _open(store)
    found = graph(place, place.find(artifact))
    if html:
        Path(html).write_text(to_html(found), encoding="utf-8")
    if as_json:
        click.echo(to_json(found))
    else:
        _console().print(tree(found))


@main.command()
@click.argument("artifact", required=False)
@_store
@click.option("--all", "everything", is_flag=True, help="Every artifact of the store.")
def verify(artifact: str | None, store: str, everything: bool) -> None:
    """Read every file of an artifact again: sizes, digests, counts, nothing missing, doubled or torn."""
    place = _open(store)
    if (artifact is None) != everything:
        raise click.UsageError("name one artifact, or give --all")
    bad = sum(_verify(found) for found in (place.all() if artifact is None else [place.find(artifact)]))
    sys.exit(1 if bad else 0)


@main.command()
@_artifact
@_store
@click.option("--retry", "again", is_flag=True, help="Try the quarantined samples again.")
@click.option("--list", "each", is_flag=True, help="Every sample: id, shard, reason, message and position, with tabs between.")
def quarantine(artifact: str, store: str, again: bool, each: bool) -> None:
    """Count quarantined samples by reason, or list them."""
    from kinetok.pipelines.data.quarantine import listing, summary
    from kinetok.pipelines.data.retry import SHARDED, reopen, retry

    place = _open(store)
    found = place.find(artifact)
    if again and found.kind in SHARDED:
        click.echo(f"{reopen(found)} shards are open again: the next run of the job encodes them, and them alone")
        return
    if again:
        retried = retry(place, found)
        found = retried.artifact
        click.echo(f"{retried.before} quarantined before, {retried.after} now")
    show = listing if each else summary
    click.echo(show(found.folder) or f"{found.name} quarantined nothing")


@main.command()
@_store
@click.option("--age-hours", default=24.0, show_default=True, help="Younger artifacts stay, and what younger runs name.")
@click.option("--keep-runs", type=click.IntRange(min=1), metavar="N", help="Only the newest N runs of each job count; all without it.")
@click.option("--delete", is_flag=True, help="Delete what is listed; without it nothing is.")
def gc(store: str, age_hours: float, keep_runs: int | None, delete: bool) -> None:
    """List what no run and no artifact refers to, or delete it."""
    from kinetok.infra import gc

    place, rules = _open(store), gc.Rules(age_hours * 3600, keep_runs)
    found = gc.find(place, rules)
    for garbage in gc.delete(place, found, rules) if delete else found:
        click.echo(f"{garbage.what:10}  {garbage.bytes:15,}  {garbage.folder}")
    if found and not delete:
        click.echo(f"{sum(garbage.bytes for garbage in found):,} bytes; give --delete to delete them")


@main.command()
@click.argument("folder")
@click.argument("out")
@click.option("--csv", help="Captions and ids in WebVid's columns.")
@click.option("--shard-bytes", default=256 << 20, show_default=True, help="A tar is full at this size.")
def pack(folder: str, out: str, csv: str | None, shard_bytes: int) -> None:
    """Write a folder of videos as WebDataset tars."""
    from kinetok.pipelines.data.pack import pack

    packed = pack(folder, out, csv=csv, shard_bytes=shard_bytes)
    click.echo(f"{packed.videos} videos in {packed.shards} tars, {packed.bytes:,} bytes")
    for name in packed.missing:
        click.echo(f"named in the CSV but not there: {name}", err=True)


for _command in DIVOT:
    main.add_command(_command)


@main.command()
@_model
@click.option("--source", required=True, help="Tars (s3://b/{000000..000099}.tar) or a folder of videos.")
@click.option("--out", required=True, help="Folder or s3:// prefix; give the same again to continue.")
@click.option("--csv", help="Captions and ids in WebVid's columns, for a folder.")
@click.option("--fps", default=8.0, show_default=True)
@click.option("--frames", default=17, show_default=True, help="Of one clip; a video is cut into as many as it has.")
@click.option("--size", default=256, show_default=True, help="Pixels of an edge, a multiple of what the model compresses.")
@click.option("--batch-size", default=4, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Model actors.")
@click.option("--gpus", default=0.0, show_default=True, help="Of one actor.")
@click.option("--chunk", type=click.IntRange(min=1), help="Encode clips in chunks of so many frames, 17 in ProMAG, and join their latents.")
@click.option("--overlap", type=click.IntRange(min=0), default=0, help="Frames that neighbouring chunks share; 4 in ProMAG.")
@click.option(
    "--tile", type=click.IntRange(min=1), help="Convolve tiles of so many cells an edge, for large pictures; the result is the same."
)
def tokenize(model: str, source: str, out: str, csv: str | None, **options: float | None) -> None:
    """Turn videos into token shards with a finished tokenizer; no job file needed."""
    from kinetok.pipelines.tokenize import settings, summary, tokenize

    recipe, resources, chunks = settings(options)
    _console().print(summary(tokenize(model, source, out, csv=csv, recipe=recipe, resources=resources, chunks=chunks)))


@main.command()
@click.argument("video", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_model
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="reconstructed.mp4", show_default=True)
@click.option("--overlap", type=click.IntRange(min=0), default=0, help="Frames that neighbouring chunks share and blend; 4 in ProMAG.")
@click.option("--stream", is_flag=True, help="One stream of latents without seams, where the model keeps its state.")
@click.option("--frames", type=click.IntRange(min=1), help="Of a chunk; without it 17, or the model's window.")
@click.option(
    "--tile", type=click.IntRange(min=1), help="Convolve tiles of so many cells an edge, for large pictures; the result is the same."
)
@click.option("--fps", type=click.FloatRange(0.01, 1000), help="Without it, the video's own.")
@click.option("--size", type=click.IntRange(min=1), help="Pixels of the shorter side; without it, the video's own.")
@click.option("--seed", default=0, show_default=True, help="Of a model that samples.")
def reconstruct(video: Path, model: str, out: Path, **way: Any) -> None:
    """Show what a tokenizer makes of a video: an mp4 of the original beside it, tokens, PSNR and SSIM.

    The video may be of any length: it goes through in chunks, or as a stream. Its edges are cropped to what the model takes.
    """
    from kinetok.pipelines.models import load
    from kinetok.pipelines.round_trip import Way, round_trip

    def note(frames: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r{frames:,} frames\r", nl=False, err=True)

    for line in round_trip(load(model), video, out, Way(**way), note).lines():
        click.echo(line)


@main.command()
@_store
@click.option("--uri", envvar="MLFLOW_TRACKING_URI", help="MLflow server; without it, the database in the store.")
@click.option("--experiment", default="kinetok", show_default=True)
def sync(store: str, uri: str | None, experiment: str) -> None:
    """Tell MLflow what it missed while it was down."""
    from kinetok.infra.tracking import sync

    replayed = sync(_open(store), uri, experiment)
    click.echo(f"replayed {', '.join(replayed)}" if replayed else "MLflow has every run of this store")


@main.command()
@_store
@click.option("--port", default=5000, show_default=True)
def ui(store: str, port: int) -> None:
    """Open the MLflow UI on a store's database."""
    from kinetok.infra.tracking import ui

    ui(_open(store), None, port)


def _follow(jobs: "Jobs", submission: str) -> None:
    """Show a job of a cluster to its end, and exit as it does; Ctrl-C leaves it alone."""

    def note(text: str) -> None:
        click.echo(text, err=True)

    try:
        succeeded = jobs.follow(submission, partial(click.echo, nl=False), note)
    except KeyboardInterrupt:
        note(f"left; the job goes on: kinetok logs {submission} --follow --address {jobs.address}")
        sys.exit(130)
    sys.exit(0 if succeeded else 1)


def _status_of_cluster(address: str, start: str | None) -> None:
    from kinetok.infra.submit import Jobs, submission_table

    jobs = Jobs(address)
    _console().print(submission_table(jobs.all() if start is None else [jobs.info(jobs.find(start))]))


def _load(job: str, overrides: tuple[str, ...], store: str | None) -> "tuple[Job, Store]":
    from kinetok.infra.job import find_job, load_job
    from kinetok.pipelines.catalog import STAGES

    loaded = load_job(find_job(job, JOBS), STAGES, overrides)
    return loaded, _open(store or loaded.store)


def _open(store: str) -> "Store":
    from kinetok.infra.artifact import Store
    from kinetok.infra.storage import Folder

    return Store(Folder(store))


def _console() -> "Console":
    """Standard output; as wide as it takes where nobody is looking."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)


def _summary(state: "JobRun", store: "Store") -> None:
    """What a run did, whole errors, and the pages to open."""
    from kinetok.infra.job_run import pages, run_table

    _console().print(run_table(state, store))
    for name, stage in state.stages.items():
        if stage.status == "failed":
            click.echo(f"{click.style(name, fg='red', bold=True)}: {stage.error}", err=True)
    for page in pages(state, store):
        click.echo(page)


def _verify(artifact: "Artifact") -> bool:
    """Print what is wrong with an artifact; says whether anything is."""
    from kinetok.pipelines.data.verify import problems

    found = list(problems(artifact))
    click.echo(f"{artifact.folder}: {'fine' if not found else f'{len(found)} problems'}")
    for problem in found:
        click.echo(f"  {problem}")
    return bool(found)


if __name__ == "__main__":
    main()
