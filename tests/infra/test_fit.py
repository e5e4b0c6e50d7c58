"""`fit` on real Ray Train workers: killed, stopped and failing ones; and what it refuses before any of them starts."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kinetok.infra import checkpoint, controllers, errors, turn
from kinetok.infra.errors import Cancelled, ConfigError, DataError, StoreError, TrainingError
from kinetok.infra.fit import FitConfig, PlayerConfig, _conclude, _follow, fit, fit_problems, outcome_name, split
from kinetok.infra.launch import MODEL_MEMORY
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.infra.training import Batch, Work

CONFIG = FitConfig(steps=12, global_batch=8, optimizers={"model": PlayerConfig(lr=0.02)}, eval_every=6, checkpoint_every=3, log_every=2)


class Regressor(nn.Module):
    """Player; kills its own process, or its parent's, at step 7 where `victim` says so, once, and leaves its allocator's settings."""

    def __init__(self, flag: Path | None = None, victim: int = 0) -> None:
        super().__init__()
        self.net = nn.Linear(6, 1)
        self.flag, self.victim = flag, victim

    def forward(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self.flag is not None and step == 7 and not self.flag.exists():
            self.flag.write_text(os.environ.get("GLIBC_TUNABLES", ""))
            os.kill(self.victim or os.getpid(), signal.SIGKILL)
        return (self.net(batch["x"]).squeeze(1) - batch["y"]).pow(2).mean(), {}


class Toy:
    """One linear player, one frozen module."""

    def __init__(self, flag: Path | None = None, victim: int = 0) -> None:
        self.frozen = {"lower": nn.Linear(2, 2)}
        self.players = {"model": Regressor(flag, victim)}

    def active(self, player: str, step: int) -> bool:
        return True

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return {"error": (self.players["model"].net(batch["x"]).squeeze(1) - batch["y"]).abs()}

    def digest(self, module: nn.Module) -> str:
        return module.weight.detach().numpy().tobytes().hex()

    def export(self, folder: Path) -> None:
        save_file(self.players["model"].state_dict(), folder / "model.safetensors")


class Numbers:
    """Fixed random samples in rising order; `bad` fails as a damaged source would."""

    def __init__(self, samples: int = 37, bad: bool = False) -> None:
        self.samples, self.bad = samples, bad

    def __len__(self) -> int:
        return self.samples

    def batches(self, *, start: int, batch: int, rank: int, world: int) -> Iterator[Batch]:
        if self.bad and rank == 0:
            raise DataError("clip 7 is damaged")
        x = torch.randn(self.samples, 6, generator=torch.Generator().manual_seed(1))
        position = start + rank * batch
        while True:
            rows = torch.arange(position, position + batch) % self.samples
            yield {"x": x[rows], "y": x[rows].sum(1), "seed_B": rows}
            position += batch * world


@pytest.fixture
def by_value(ray_cluster: None) -> Iterator[None]:
    """Workers cannot import this module, so its classes travel whole."""
    from ray import cloudpickle

    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


def quiet(**_: object) -> None:
    """A `Progress` that nobody looks at."""


def run(
    out: Path, build: Any = Toy, feed: Any = None, config: FitConfig = CONFIG, progress: Any = quiet, **resources: Any
) -> dict[str, float]:
    feed = Numbers() if feed is None else feed
    sizes = Resources(**{"batch_size": 2, "cpus": 1.0, **resources})
    return fit(build, feed, Numbers(), config, out=Folder(str(out)), resources=sizes, progress=progress, stop=threading.Event())


def assert_undisturbed(out: Path) -> None:
    """The model is the one that a loop by hand makes, and the metrics hold each logged step once."""
    from kinetok.infra.training import _seed

    _seed(CONFIG.seed, 0, 0)
    toy = Toy()
    optimizer = torch.optim.AdamW(toy.players["model"].parameters(), betas=(0.9, 0.95), weight_decay=0)
    for step, batch in zip(range(1, 13), Numbers().batches(start=0, batch=8, rank=0, world=1), strict=False):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + torch.cos(torch.tensor(torch.pi * (step - 1) / 12))).item()
        optimizer.zero_grad()
        toy.players["model"](batch, step)[0].backward()
        torch.nn.utils.clip_grad_norm_(toy.players["model"].parameters(), 1.0)
        optimizer.step()
    torch.testing.assert_close(load_file(out / "model" / "model.safetensors"), toy.players["model"].state_dict(), rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in read_metrics(Folder(str(out)))] == [2, 3, 4, 6, 8, 9, 10, 12]


@pytest.mark.ray
@pytest.mark.slow
def test_survives_a_killed_worker_in_a_thread(by_value: None, tmp_path: Path) -> None:
    flag, out = tmp_path / "killed", tmp_path / "out"
    with ThreadPoolExecutor() as pool:
        figures = pool.submit(run, out, lambda: Toy(flag), workers=2).result()
    assert flag.read_text() == MODEL_MEMORY["GLIBC_TUNABLES"]
    assert_undisturbed(out)
    summary = json.loads((out / "training.json").read_text())
    assert summary["restarts"] == 1
    assert [attempt["first_step"] for attempt in summary["attempts"]] in ([1, 1], [1, 4], [1, 7])
    assert summary["frozen"]["lower"]["before"] == summary["frozen"]["lower"]["after"] != ""
    assert summary["metrics"] == figures
    assert figures["val/error"] > 0


@pytest.mark.ray
@pytest.mark.slow
def test_continues_after_a_killed_driver(by_value: None, tmp_path: Path) -> None:
    flag, out = tmp_path / "killed", tmp_path / "out"
    script = f"""
        import importlib.util, os, sys
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("test_fit", {__file__!r})
        module = importlib.util.module_from_spec(spec)
        sys.modules["test_fit"] = module
        spec.loader.exec_module(module)
        from kinetok.infra.launch import start_ray
        from ray import cloudpickle
        cloudpickle.register_pickle_by_value(module)
        start_ray(cpus=2)
        driver = os.getpid()
        module.run(Path({str(out)!r}), lambda: module.Toy(Path({str(flag)!r}), driver))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    orphan = out / "_work" / "ray" / "0001-orphan" / "checkpoint_torn"
    orphan.mkdir(parents=True)
    run(out)
    assert not orphan.exists()
    assert_undisturbed(out)
    assert json.loads((out / "training.json").read_text())["restarts"] == 1


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_stops_when_asked(by_value: None, tmp_path: Path) -> None:
    def progress(*, done: int, **_: object) -> None:
        if done:
            raise Cancelled("the run was asked to stop")

    with pytest.raises(Cancelled, match="asked to stop at step"):
        run(tmp_path, config=CONFIG.model_copy(update={"steps": 10**7, "checkpoint_every": 10**7, "log_every": 100}), progress=progress)
    assert not (tmp_path / "training.json").exists()
    assert checkpoint.committed(Folder(str(tmp_path / "_work" / "ray"))) is not None, "what was trained is not lost"


@pytest.mark.ray
@pytest.mark.slow
def test_trainings_at_once_share_the_process_of_their_controllers(by_value: None, tmp_path: Path) -> None:
    import ray

    with ThreadPoolExecutor(2) as pool:
        good, bad = pool.submit(run, tmp_path / "good"), pool.submit(run, tmp_path / "bad", feed=Numbers(bad=True))
        assert good.result()["val/error"] > 0
        with pytest.raises(DataError, match="clip 7 is damaged"):
            bad.result()
    started = Counter(actor["ActorClassName"] for actor in ray._private.state.actors().values())  # type: ignore[attr-defined]
    assert (started["Controllers"], started["TrainController"]) == (1, 0)
    assert started["RayTrainWorker"] >= 2


@pytest.mark.ray
@pytest.mark.slow
def test_a_lost_controller_costs_a_second_run(by_value: None, tmp_path: Path) -> None:
    import ray

    run(tmp_path / "before", config=CONFIG.model_copy(update={"steps": 1}))
    (shared,) = controllers._RUNNING.values()
    controllers_pid = ray.get(shared.__ray_call__.remote(lambda actor: os.getpid()))
    flag, out = tmp_path / "killed", tmp_path / "out"
    with pytest.raises(TrainingError, match=r"controller of the training was lost.*run the job again to continue from the last checkpoint"):
        run(out, lambda: Toy(flag, controllers_pid))
    run(out, lambda: Toy(flag, controllers_pid))
    assert_undisturbed(out)
    assert json.loads((out / "training.json").read_text())["attempts"][-1]["first_step"] > 1


@pytest.mark.ray
@pytest.mark.slow
def test_bad_data_ends_the_run_without_further_restarts(by_value: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="clip 7 is damaged"):
        run(tmp_path, feed=Numbers(bad=True), max_failures=5)
    assert len(list((tmp_path / "_work" / "attempts").iterdir())) == 1


@pytest.mark.ray
def test_more_workers_than_the_cluster_can_hold_is_an_error(ray_cluster: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="asks for 4 x training worker of 2 CPU at once, the whole cluster has room for 2"):
        run(tmp_path, workers=4, cpus=2.0, batch_size=1)


def test_global_batch_must_divide() -> None:
    assert split(CONFIG, Resources(workers=2, batch_size=2), 2) == (2, 2)
    with pytest.raises(ConfigError, match="batch_size 3 x workers 1: nearest valid global_batch 6 or 9, nearest valid batch_size 2"):
        split(CONFIG, Resources(batch_size=3), 1)
    with pytest.raises(ConfigError, match="nearest valid global_batch 12, nearest valid batch_size none with 3 workers"):
        split(CONFIG, Resources(workers=3, batch_size=4), 3)


def test_every_number_of_workers_of_a_range_must_divide_the_global_batch() -> None:
    elastic = Resources(workers=1, max_workers=2, batch_size=8)
    assert [split(CONFIG, elastic, workers) for workers in (1, 2)] == [(8, 1), (4, 1)]
    assert list(fit_problems(CONFIG, elastic, ("model",))) == []
    (problem,) = fit_problems(CONFIG, elastic.model_copy(update={"cpus": 0.0}), ("model",))
    assert problem.startswith("resources: a training worker counts neither a CPU nor a GPU")
    (problem,) = fit_problems(CONFIG, elastic.model_copy(update={"max_workers": 4}), ("model",))
    assert problem.startswith("global_batch: ") and "x workers 3" in problem


def test_a_stop_is_only_for_the_turn_that_asks(tmp_path: Path) -> None:
    out = Folder(str(tmp_path))
    first = turn.begin(out)
    second = turn.begin(out)
    assert first < second
    turn.ask_to_stop(out, first)
    assert (turn.wish(out, first), turn.wish(out, second)) == (turn.Wish.GIVE_WAY, turn.Wish.GO_ON)
    turn.ask_to_stop(out, second)
    assert turn.wish(out, second) is turn.Wish.STOP
    assert turn.wish(Folder(str(tmp_path / "gone")), second) is turn.Wish.GIVE_WAY


def test_a_store_that_does_not_answer_ends_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running: Future[None] = Future()
    told: list[int] = []

    def last_line(out: Folder) -> dict[str, float]:
        if not told:
            raise StoreError("does not answer")
        running.set_result(None)
        return {"step": 3.0}

    monkeypatch.setattr("kinetok.infra.fit.FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr("kinetok.infra.fit.last_line", last_line)
    work = Work(Toy, Numbers(), None, CONFIG, Folder(str(tmp_path)), Resources(), "turn")
    _follow(running, work, lambda *, done, total, unit: told.append(done), threading.Event())
    assert told == [0, 3]


def test_an_empty_feed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="training feed is empty"):
        run(tmp_path, feed=Numbers(samples=0))


@pytest.mark.parametrize("name", ["TrainingError", "DataError", "Cancelled"])
def test_errors_cross_the_cluster_as_themselves(tmp_path: Path, name: str) -> None:
    out = Folder(str(tmp_path))
    out.write_text(outcome_name("turn"), json.dumps({"error": name, "message": "why"}))
    running: Future[None] = Future()
    running.set_exception(RuntimeError("worker group failed"))
    with pytest.raises(getattr(errors, name), match="why"):
        _conclude(running, CONFIG, out, "turn")
