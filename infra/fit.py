"""`fit`: train a model on Ray Train workers, from the driver's side; and what a run is configured by.

The workers run `training.Loop`. The driver starts them, follows the metrics they write, passes on a wish to stop, and tells errors
apart: one that would come again (bad data, a loss that is not finite) ends the run and leaves a marker, anything else costs a restart from
the last committed checkpoint. A second call on the same folder continues where the first was killed. Importing this module imports
neither torch nor Ray, because planning a job reads the configuration only.
"""

import concurrent.futures
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, SerializerFunctionWrapHandler, StrictInt, model_serializer

from kinetok.infra import errors
from kinetok.infra.config import Config
from kinetok.infra.errors import Cancelled, ConfigError, DataError, KinetokError, StoreError, TrainingError
from kinetok.infra.metrics_log import last_line, step_of
from kinetok.infra.stage import Ask, Progress, Resources
from kinetok.infra.storage import Folder

if TYPE_CHECKING:
    from kinetok.infra.training import Feed, Trainable, Work

RUNS = "_work/ray"
"""Checkpoints, one folder for each call of `fit`."""
STARTS = "_work/start"
"""The checkpoint that the present call began from."""
TURN = "_work/turn"
"""Holds the id of the call of `fit` whose workers may go on; see `turn.py`."""
OUTCOMES = "_work/outcomes"
ATTEMPTS = "_work/attempts"
SUMMARY = "training.json"
FOLLOW_SECONDS = 1.0
LATER_FIELDS = ("eps", "floor", "decays", "rates")
"""Of `PlayerConfig`: not written out at their defaults, so that keys of before they were there still hold."""


class PlayerConfig(Config):
    """AdamW and schedule of one player."""

    lr: Annotated[float, Field(gt=0)]
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled (arXiv 1711.05101)."""
    decays: Literal["matrices", "all"] = "matrices"
    """What is decayed: matrices and kernels but no biases and norms, or all that is trained."""
    warmup: Annotated[StrictInt, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine down to `floor` at the last step, or the peak."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient; 0 leaves it alone."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """What the cosine ends at, as a part of the peak."""
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Learning rates of single modules of the player over `lr`, by their dotted names; of two that hold a parameter the inner one counts.

    To go on with another number of workers, DeepSpeed needs as many numbers in what has one rate and one decay: name no single bias.
    """

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        written: dict[str, object] = dump(self)
        fields = type(self).model_fields
        return {
            n: value for n, value in written.items() if n not in LATER_FIELDS or value != fields[n].get_default(call_default_factory=True)
        }


Steps = Annotated[StrictInt, Field(ge=1)]


class FitConfig(Config):
    """What a training run computes; part of the identity of its stage."""

    steps: Steps
    """Optimizer steps."""
    global_batch: Steps
    """Samples of one step: micro-batch x workers x accumulation."""
    optimizers: dict[str, PlayerConfig]
    """One entry for each player of the model."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the averaged weights that are evaluated and saved; None keeps the last weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast: weights and optimizer stay fp32."""
    eval_every: Steps = 500
    """Steps between evaluations; the last step is always evaluated."""
    eval_batches: Steps | None = None
    """Evaluate on the first eval_batches x global_batch samples of the validation feed; None takes all."""
    checkpoint_every: Steps = 500
    keep: Steps = 2
    """Checkpoints kept."""
    log_every: Steps = 10
    """Steps between lines of metrics; each line averages the steps since the line before."""
    seed: StrictInt = 0
    """Of the initial weights."""


def split(config: FitConfig, resources: Resources, workers: int) -> tuple[int, int]:
    """(micro-batch, accumulation) of each of `workers`; raises ConfigError where the global batch does not divide.

    On another number than `resources.workers` the micro-batch is the largest that divides, at most `batch_size`: what a step computes
    does not depend on it.
    """
    batch_size = resources.batch_size
    if workers != resources.workers and config.global_batch % workers == 0:
        share = config.global_batch // workers
        batch_size = max(size for size in range(1, min(batch_size, share) + 1) if share % size == 0)
    together = batch_size * workers
    if config.global_batch % together:
        nearest = sorted({max(together, config.global_batch // together * together), (config.global_batch // together + 1) * together})
        raise ConfigError(
            f"global_batch {config.global_batch} is not a multiple of batch_size {batch_size} x workers {workers}: "
            f"nearest valid global_batch {' or '.join(map(str, nearest))}, "
            f"nearest valid batch_size {_nearest_batch_size(config, batch_size, workers)}"
        )
    return batch_size, config.global_batch // together


def worker_counts(resources: Resources) -> range:
    """Numbers of workers that a training may come to run on."""
    return range(resources.workers, (resources.max_workers or resources.workers) + 1)


def fit_problems(config: FitConfig, resources: Resources, players: tuple[str, ...]) -> Iterator[str]:
    """What of a training's numbers cannot be meant, as `field: sentence`; `players` is what the objective trains."""
    if not resources.worker:
        yield "resources: a training worker counts neither a CPU nor a GPU, and Ray Train places none that asks for nothing; set cpus: 1"
    for workers in worker_counts(resources):
        try:
            split(config, resources, workers)
        except ConfigError as error:
            yield f"global_batch: {error}"
    if set(config.optimizers) != set(players):
        named = ", ".join(sorted(config.optimizers)) or "none"
        yield f"optimizers: they name {named}; the model trains {', '.join(players)}"


def _nearest_batch_size(config: FitConfig, batch_size: int, workers: int) -> str:
    per_worker, rest = divmod(config.global_batch, workers)
    if rest:
        return f"none with {workers} workers"
    divisors = [size for size in range(1, per_worker + 1) if per_worker % size == 0]
    return str(min(divisors, key=lambda size: abs(size - batch_size)))


def fit(
    build: "Callable[[], Trainable]",
    train: "Feed",
    validation: "Feed | None",
    config: FitConfig,
    *,
    out: Folder,
    resources: Resources,
    progress: Progress,
    stop: threading.Event,
) -> dict[str, float]:
    """Train on `resources.workers` Ray Train workers, or up to `max_workers`, and fill `out` with `model/`, `metrics/`, `training.json`.

    Returns the last figures. `build` and the feeds are pickled to the workers. Called again on the same `out` after a kill, it
    continues from the last committed checkpoint, on the present number of workers. Raises ConfigError, DataError or TrainingError
    with the remedy; Cancelled once `stop` is set and the workers have left a checkpoint. May be called from any thread.
    """
    for workers in worker_counts(resources):
        split(config, resources, workers)
    for name, feed in (("training", train), ("validation", validation)):
        if feed is not None and not len(feed):
            raise DataError(f"the {name} feed is empty: look at the filters, the split and the quarantine of its clips")
    from kinetok.infra import capacity, checkpoint, launch, turn
    from kinetok.infra.training import Work

    launch.start_ray()
    capacity.require({"fit": [Ask("training worker", resources.worker, resources.workers)]})
    present = turn.begin(out)
    start = checkpoint.claim(out / RUNS, out / STARTS, present)
    work = Work(build, train, validation, config, out, resources, present, start)
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ray train") as pool:
        running = pool.submit(launch.run_workers, work)
        _follow(running, work, progress, stop)
    return _conclude(running, config, out, present)


def outcome_name(turn: str) -> str:
    """Where the workers of one turn say how it ended."""
    return f"{OUTCOMES}/{turn}.json"


def _follow(running: "concurrent.futures.Future[None]", work: "Work", progress: Progress, stop: threading.Event) -> None:
    """Tell `progress` the last logged step until the workers have ended; on a wish to stop, have them leave a checkpoint and end."""
    from kinetok.infra.turn import ask_to_stop

    asked, line = False, None
    while not concurrent.futures.wait([running], timeout=FOLLOW_SECONDS).done:
        # A store that does not answer now is asked again: the training itself goes on.
        with contextlib.suppress(OSError, StoreError):
            line = last_line(work.out) or line
        try:
            progress(done=step_of(line) if line else 0, total=work.config.steps, unit="steps")
        except Cancelled:
            stop.set()
        if stop.is_set() and not asked:
            with contextlib.suppress(OSError, StoreError):
                ask_to_stop(work.out, work.turn)
                asked = True


def _conclude(running: "concurrent.futures.Future[None]", config: FitConfig, out: Folder, turn: str) -> dict[str, float]:
    """Raise what ended the run, or write `training.json` and return the last figures."""
    failure = running.exception()
    if not out.exists(outcome_name(turn)):
        if failure is not None:
            raise failure
        raise TrainingError("the training workers ended without an outcome; run the job again to continue from the last checkpoint")
    outcome = json.loads(out.read_text(outcome_name(turn)))
    if "error" in outcome:
        kind: type[KinetokError] = getattr(errors, outcome["error"])
        raise kind(outcome["message"])
    attempts = [json.loads(out.read_text(name)) for name in sorted(out.files(ATTEMPTS))]
    line = last_line(out) or {}
    figures = {name: value for name, value in line.items() if value is not None and name not in ("step", "time")}
    frozen = {name: {"before": before, "after": outcome["frozen"][name]} for name, before in attempts[0]["frozen"].items()}
    samples = (config.steps - attempts[-1]["first_step"] + 1) * config.global_batch
    summary = {
        "steps": config.steps,
        "seconds": outcome["seconds"],
        "samples_per_second": samples / outcome["seconds"],
        "restarts": len(attempts) - 1,
        "attempts": [{"workers": attempt["workers"], "first_step": attempt["first_step"]} for attempt in attempts],
        "frozen": frozen,
        "metrics": figures,
    }
    out.write_text(SUMMARY, json.dumps(summary, indent=1))
    return figures
