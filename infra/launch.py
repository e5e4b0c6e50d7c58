"""Starting Ray, or joining the cluster that `RAY_ADDRESS` names, and running training workers on it. The only module that calls `ray.init`.

On this machine a private cluster is started with as many CPUs as there are cores; its dashboard is off. Environment defaults that
Ray reads at start-up are set here, before it is imported. A cluster elsewhere is sent this very package.
"""

import contextlib
import json
import logging
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kinetok.infra.errors import KinetokError, StoreError, TrainingError
from kinetok.infra.fit import ATTEMPTS, RUNS, outcome_name
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.infra.wheel import cached_wheel, unpacked

if TYPE_CHECKING:
    from ray.train import Result

    from kinetok.infra.training import Loop, Work

RAY_DEFAULTS = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray runs workers at niceness 15: on a small machine its own daemons then push a training step off its core, for a tenth of its time.
    "RAY_worker_niceness": "0",
    # Ray ends a worker that idles for a second. The next one costs a second of CPU, and where old and new overlap, the memory of both.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""On Linux as elsewhere, lets every port of a cluster of one machine listen on 127.0.0.1 alone; without it, on all interfaces."""
ALONE = {"RAY_prestart_worker_first_driver": "0", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""On one machine nobody announces the loss of a node, and each process of Ray's that idles wakes a hundred times a second. Like LOOPBACK,
for the cluster's own processes alone: a command that this one starts may join a cluster whose nodes do go."""
MODEL_MEMORY = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in {"arena_max": 1, "hugetlb": 1, "mmap_threshold": 2**25, "trim_threshold": 2**30}.items()
    )
}
"""Environment of a process that runs a model, which allocates the same activations again and again: by default Linux takes the freed ones
back, and maps and zeroes them anew, a page at a time. Worth a tenth of a training step on a CPU. An allocator that is not glibc's, or is
older than a setting, leaves it out."""
ASIDE = 10
"""Niceness, on this machine, of what counts neither a CPU nor a GPU: it takes what those leave that do."""
UNUSED = {"DatasetsCallback"}
"""Parts of Ray Train that start a process for each training, three seconds of a core, for nothing: our feeds are not Ray datasets."""
UNUSED_ALONE = {"PlacementGroupCleanerCallback"}
"""The same for what a cluster needs, so that it gets its CPUs back from a run that was lost; one of our own ends with the run."""
PLENTY = 1e6
COLLECTIVE_TIMEOUT_SECONDS = 1800
_STARTING = threading.Lock()


def start_ray(*, cpus: int | None = None, custom: Iterable[str] = ()) -> None:
    """Join `RAY_ADDRESS` if set, else start a local cluster with `cpus` (default: the machine's cores); a second call does nothing.

    A local cluster has plenty of each of the `custom` resources: this machine is every group of nodes that a job may name.
    """
    for name, value in RAY_DEFAULTS.items():
        os.environ.setdefault(name, value)
    with _STARTING, _environment({} if joins() else LOOPBACK | ALONE):
        import ray

        if not ray.is_initialized():
            _in_lasting_thread(partial(_connect, cpus, dict.fromkeys(custom, PLENTY)))


def joins() -> bool:
    """Whether Ray is a cluster that is there, rather than one of our own."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _connect(cpus: int | None, custom: dict[str, float]) -> None:
    import ray

    if joins():
        # A submitted Ray job came with its own modules, and Ray refuses a second set.
        ray.init(log_to_driver=False, runtime_env=None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else shipped())
        return
    # Ray reads LOOPBACK when it is imported, which a stage may have done before.
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        "local",  # never a cluster that somebody started on this machine for something else
        num_cpus=cpus or os.cpu_count(),
        resources=custom,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=_short_folder(),
    )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that processes started in the block inherit, and nothing started later."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _in_lasting_thread(start: Callable[[], None]) -> None:
    """Run `start` in a thread that never ends: Linux kills Ray's own processes when the thread that started them does."""
    started: Future[None] = Future()

    def hold() -> None:
        try:
            # All that Ray starts inherits it: the wake-ups of its processes do not push a training step off its core.
            _schedule("SCHED_BATCH")
            start()
            started.set_result(None)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller
            started.set_exception(error)
            return
        threading.Event().wait()

    threading.Thread(target=hold, name="ray", daemon=True).start()
    started.result()


def _schedule(policy: str) -> None:
    """Let Linux schedule this thread, and what it starts from now on, as `policy` says; elsewhere, or where forbidden, as before."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))


def shipped() -> dict[str, object]:
    """The Ray runtime environment that brings this package to workers of another machine."""
    return {"py_modules": [str(unpacked(cached_wheel()))]}


def model_environment(resources: Resources) -> dict[str, object]:
    """The Ray runtime environment of a process that runs a model with these resources."""
    found: dict[str, object] = {"env_vars": MODEL_MEMORY}
    if stands_aside(resources) and not joins():
        found["py_executable"] = f"nice -n {ASIDE} {shlex.quote(sys.executable)}"
    return found


def stands_aside(resources: Resources) -> bool:
    """Whether a model runs beside others that count a CPU or a GPU, and counts none itself."""
    return not resources.cpus and not resources.gpus


def stand_aside() -> None:
    """Let Linux prefer others to this thread until it ends."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ASIDE)


def run_workers(work: "Work") -> None:
    """Run the training loop on Ray Train workers to its end; checkpoints go below `work.out`.

    Raises TrainingError when they keep dying, or what controls them dies.
    """
    from ray.exceptions import RayActorError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    from kinetok.infra.controllers import run_controller

    unused = UNUSED if joins() else UNUSED | UNUSED_ALONE

    class Trainer(TorchTrainer):
        """Ray's, without the parts that are of no use here, and on a Ray of our own without a process for its controller."""

        def _create_default_callbacks(self) -> list[object]:
            every = super()._create_default_callbacks()  # type: ignore[misc]  # the second version's
            return [each for each in every if type(each).__name__ not in unused]

        def _initialize_and_run_controller(self, **parts: object) -> "Result":
            return super()._initialize_and_run_controller(**parts) if joins() else run_controller(parts)  # type: ignore[misc]

    resources = work.resources
    trainer = Trainer(
        _worker,
        train_loop_config={"work": work},
        scaling_config=ScalingConfig(
            # A range is what Ray Train's second version takes; its annotation is the first one's.
            num_workers=(resources.workers, resources.max_workers) if resources.max_workers else resources.workers,  # type: ignore[arg-type]
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.worker,
        ),
        run_config=RunConfig(
            name=work.turn,
            storage_path=(work.out / RUNS).url,
            failure_config=FailureConfig(max_failures=resources.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=work.config.keep),
            worker_runtime_env=model_environment(resources),  # type: ignore[call-arg]  # the second version's, too
        ),
        torch_config=TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_SECONDS),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(
            f"training ended after {resources.max_failures} restarts: {_first_line(error)}; "
            "run the job again to continue from the last checkpoint"
        ) from error
    except RayActorError as error:
        raise TrainingError(
            f"the controller of the training was lost: {_first_line(error)}; run the job again to continue from the last checkpoint"
        ) from error


def _worker(config: dict[str, "Work"]) -> None:
    """What each Ray Train worker runs. An error that would come again is written down, so that a restarted group ends at once."""
    from kinetok.infra.training import Agreed, Loop

    _schedule("SCHED_OTHER")
    work, session = config["work"], RaySession(config["work"].start)
    if work.out.exists(outcome_name(work.turn)):
        return
    try:
        loop = Loop(work, session)
        if session.rank == 0:
            _note_attempt(work, loop)
        began = time.monotonic()
        frozen = loop.run()
    except Agreed as error:
        _write_error(work, error.cause)
        return
    except StoreError:
        # The store may answer again: as with a lost machine, the group is restarted from the last checkpoint.
        raise
    except KinetokError as error:
        _write_error(work, error)
        raise
    if session.rank == 0:
        _write_outcome(work, {"seconds": time.monotonic() - began, "frozen": frozen})


class RaySession:
    """`training.Session` inside a Ray Train worker; `start` is the checkpoint to begin from while this run has none of its own."""

    def __init__(self, start: Folder | None) -> None:
        import ray.train
        import ray.train.torch

        self.start = start
        context = ray.train.get_context()
        self.rank, self.world, self.local_rank = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
        self.device = ray.train.torch.get_device()

    @contextlib.contextmanager
    def latest(self) -> Iterator[Path | None]:
        import ray.train

        found = ray.train.get_checkpoint()
        if found is None and self.start is not None:
            found = ray.train.Checkpoint(self.start.url)
        if found is None:
            yield None
            return
        with found.as_directory() as folder:
            yield Path(folder)

    def report(self, step: int, folder: Path) -> None:
        import ray.train

        ray.train.report({"step": step}, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def preempted(self) -> bool:
        import ray.train

        return ray.train.get_preemption_info() is not None


def _note_attempt(work: "Work", loop: "Loop") -> None:
    """Record where and with how many workers this attempt begins, and refuse frozen weights that differ from the first attempt's."""
    earlier = sorted(work.out.files(ATTEMPTS)) if work.out.exists(ATTEMPTS) else []
    if earlier and json.loads(work.out.read_text(earlier[0]))["frozen"] != loop.frozen:
        raise TrainingError("the frozen weights are not those this training began with; begin again with --force")
    entry = {"workers": loop.session.world, "first_step": loop.start + 1, "frozen": loop.frozen}
    work.out.write_text(f"{ATTEMPTS}/{len(earlier):04d}.json", json.dumps(entry))


def _write_outcome(work: "Work", outcome: dict[str, object]) -> None:
    work.out.write_text(outcome_name(work.turn), json.dumps(outcome))


def _write_error(work: "Work", error: KinetokError) -> None:
    _write_outcome(work, {"error": type(error).__name__, "message": str(error)})


def _first_line(error: Exception) -> str:
    """The cause as one line: the last line of Ray's text, which ends in a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _short_folder() -> str:
    """Ray's socket paths must stay under 107 bytes, so its session folder is not put below a long TMPDIR."""
    folder = Path(tempfile.gettempdir())
    return str((folder if len(str(folder)) < 40 else Path("/tmp")) / "ray")
