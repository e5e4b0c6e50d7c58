"""Running jobs: what is built, side by side, after failures, stops, kills and full disks; one builder at a time."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from kinetok.infra import capacity, launch, tracking
from kinetok.infra import run as run_module
from kinetok.infra.artifact import LEASE, RECORD, Lease, Store
from kinetok.infra.errors import ConfigError, StoreError
from kinetok.infra.job_run import JobRun, artifact_table, pages, recent_runs, run_table
from kinetok.infra.plan import plan
from kinetok.infra.progress import Row
from kinetok.infra.provenance import RayJob
from kinetok.infra.run import Selection, run
from kinetok.infra.stage import Ask, Resources, StageContext
from kinetok.infra.storage import Folder

TOYS = Path(__file__).with_name("toys.py")
ALL = ("few", "many", "total", "other", "last")


def go(toys: ModuleType, store: object, *overrides: str, selection: Selection | None = None) -> tuple[JobRun, str]:
    """Run the toy job; the state and what was printed."""
    toys.built.clear()
    text = StringIO()
    state = run(*toys.job(store, *overrides), selection or Selection(), console=Console(file=text))
    return state, text.getvalue()


def statuses(state: JobRun) -> dict[str, str]:
    return {name: stage.status for name, stage in state.stages.items()}


def wide(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)


def test_a_job_is_built_once(toys: ModuleType, tmp_path: Path) -> None:
    state, _ = go(toys, tmp_path)
    assert statuses(state) == dict.fromkeys(ALL, "done") and state.succeeded
    assert sorted(toys.built) == sorted(ALL)
    store = Store(Folder(str(tmp_path)))
    assert store.find("total").folder.read_text("sum.txt") == "26.0"
    assert store.find("last").folder.read_text("sum.txt") == "29.0"
    assert all(not list(artifact.problems()) for artifact in store.all())
    assert not list(tmp_path.rglob("lease*")) and not list(tmp_path.rglob("_work"))
    again, _ = go(toys, tmp_path)
    assert statuses(again) == dict.fromkeys(ALL, "cached") and toys.built == []


def test_the_same_on_an_object_store(toys: ModuleType, object_store: str, tmp_path: Path) -> None:
    store = f"{object_store}/{tmp_path.name}"
    assert statuses(go(toys, store)[0]) == dict.fromkeys(ALL, "done")
    assert all(not list(artifact.problems()) for artifact in Store(Folder(store)).all())
    assert statuses(go(toys, store, "other.scale={offset: 1}")[0]) == dict.fromkeys(ALL, "cached") | {"other": "done"}


def test_a_record_says_what_made_the_artifact(toys: ModuleType, tmp_path: Path) -> None:
    state, _ = go(toys, tmp_path, "few.bad=1")
    store = Store(Folder(str(tmp_path)))
    few, total = store.find("few").record, store.find("total").record
    assert (few.counts.input, few.counts.written, few.counts.quarantined) == (3, 2, 1)
    assert few.config == {"count": 3, "bad": 1} and few.run_id == state.run_id
    assert total.inputs["numbers"][0].digest == few.digest
    assert [info.name for info in total.inputs["more"]] == ["many"]
    assert total.metrics == {"sum": 22.0, "unknown": None}
    assert total.environment["python"].startswith(f"{sys.version_info.major}.") and "torch" in total.environment
    assert total.resources["workers"] == 1 and total.commit == state.commit


def test_the_state_of_a_run_is_on_the_store(toys: ModuleType, tmp_path: Path) -> None:
    states = []
    toys.hooks["total"] = lambda ctx: states.append(json.loads(next((tmp_path / "runs").glob("*.json")).read_text()))
    state, _ = go(toys, tmp_path)
    store = Store(Folder(str(tmp_path)))
    assert recent_runs(store, 5) == [state] and state.ended is not None
    assert states[0]["stages"]["few"]["status"] == "done" and states[0]["stages"]["total"]["status"] == "running"
    assert states[0]["ended"] is None and states[0]["stages"]["last"]["status"] == "planned"
    assert run_table(state, store).row_count == artifact_table(store.all()).row_count == 5
    store.find("other").folder.write_text("page.html", "")
    assert pages(state, store) == []


def test_independent_stages_run_side_by_side(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide(monkeypatch, 2)
    barrier = threading.Barrier(2, timeout=60)
    toys.hooks |= {name: lambda ctx: barrier.wait() and None for name in ("few", "many")}
    assert go(toys, tmp_path)[0].succeeded


def test_what_most_stages_wait_for_is_built_first(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide(monkeypatch, 1)
    raw = toys.raw_job(tmp_path)
    raw["stages"] = {"alone": {"kind": "numbers", "count": 4}, **raw["stages"]}
    assert run(toys.parse_job(raw, toys.CATALOG), Store(Folder(str(tmp_path))), console=Console(file=StringIO())).succeeded
    assert toys.built == ["few", "many", "total", "alone", "other", "last"]


@pytest.mark.parametrize("feeding", [False, True])
def test_stages_whose_cpus_do_not_fit_wait_and_one_too_big_runs_alone(
    toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feeding: bool
) -> None:
    """Workers of two stages must not take the CPUs of the tasks that feed them."""
    wide(monkeypatch, 2)
    if feeding:
        for kind in toys.CATALOG:
            monkeypatch.setattr(kind, "asks", lambda self, resources: (Ask("decode task", {"CPU": 1.0}, beside=True),))
    running: list[str] = []
    seen: list[tuple[str, ...]] = []

    def note(ctx: StageContext) -> None:
        running.append(ctx.name)
        seen.append(tuple(running))
        threading.Event().wait(0.02)
        running.remove(ctx.name)

    toys.hooks |= dict.fromkeys(ALL, note)
    raw = toys.raw_job(tmp_path) | {"resources": {"default": {"workers": 1 if feeding else 2}, "many": {"workers": 5}}}
    job = toys.parse_job(raw, toys.CATALOG)
    assert run(job, Store(Folder(str(tmp_path))), console=Console(file=StringIO())).succeeded
    assert all(len(names) == 1 for names in seen), seen


def test_a_failed_stage_takes_down_only_what_is_made_of_it(toys: ModuleType, tmp_path: Path) -> None:
    toys.hooks["total"] = toys.fail
    state, text = go(toys, tmp_path)
    assert statuses(state) == {"few": "done", "many": "done", "total": "failed", "other": "done", "last": "skipped"}
    assert state.stages["total"].error == "total has no data: give it some"
    assert state.stages["last"].error == "total not built" and not state.succeeded
    assert "total: failed, total has no data" in text
    toys.hooks.clear()
    assert statuses(go(toys, tmp_path)[0]) == dict.fromkeys(ALL, "cached") | {"total": "done", "last": "done"}


def test_a_bug_is_told_with_its_traceback(toys: ModuleType, tmp_path: Path) -> None:
    toys.hooks["total"] = toys.crash
    state, _ = go(toys, tmp_path)
    error = state.stages["total"].error
    assert error is not None and error.startswith("Traceback") and "ZeroDivisionError: bug in total" in error
    assert state.stages["other"].status == "done"


def test_a_stage_that_loses_samples_is_not_published(toys: ModuleType, tmp_path: Path) -> None:
    raw = toys.raw_job(tmp_path)
    raw["stages"] = {"lossy": {"kind": "lossy"}}
    state = run(toys.parse_job(raw, toys.CATALOG), Store(Folder(str(tmp_path))), console=Console(file=StringIO()))
    error = state.stages["lossy"].error
    assert error is not None and "lost or doubled samples" in error and "Traceback" not in error
    assert not list(tmp_path.rglob(RECORD))


def test_only_and_from_choose_stages(toys: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="total needs few, many, which is not built yet"):
        go(toys, tmp_path, selection=Selection(only=("total",)))
    with pytest.raises(ConfigError, match=r"did you mean total\?"):
        go(toys, tmp_path, selection=Selection(only=("totla",)))
    assert not list(tmp_path.iterdir()), "refused before anything was written"
    assert statuses(go(toys, tmp_path, selection=Selection(only=("few", "many")))[0]) == {"few": "done", "many": "done"}
    state, _ = go(toys, tmp_path, selection=Selection(start=("total",)))
    assert statuses(state) == {"total": "done", "last": "done"}


def test_force_builds_again_from_nothing(toys: ModuleType, tmp_path: Path) -> None:
    go(toys, tmp_path)
    store = Store(Folder(str(tmp_path)))
    before = store.find("few")
    before.folder.write_text("parts/left-over.txt", "7")
    state, _ = go(toys, tmp_path, selection=Selection(only=("few",), force=True))
    after = store.find("few")
    assert statuses(state) == {"few": "done"} and toys.built == ["few"]
    assert after.record.run_id == state.run_id != before.record.run_id
    assert after.digest == before.digest and list(after.problems()) == []
    assert statuses(go(toys, tmp_path)[0]) == dict.fromkeys(ALL, "cached")


def test_force_leaves_the_artifact_of_another_name_alone(toys: ModuleType, tmp_path: Path) -> None:
    go(toys, tmp_path)
    raw, store = toys.raw_job(tmp_path), Store(Folder(str(tmp_path)))
    raw["stages"]["renamed"] = raw["stages"].pop("few")
    raw["stages"]["total"]["numbers"] = raw["stages"]["last"]["numbers"] = "renamed"
    before = store.find("few")
    state = run(toys.parse_job(raw, toys.CATALOG), store, Selection(only=("renamed",), force=True), console=Console(file=StringIO()))
    assert state.succeeded and store.find("few").record == before.record
    made = store.find("renamed")
    assert made.folder.local.name == f"renamed-{before.key}" and made.digest == before.digest


def test_what_was_made_of_an_input_that_came_out_otherwise_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    go(toys, tmp_path)
    toys.hooks["few"] = lambda ctx: ctx.out.write_text("extra.txt", "other")
    go(toys, tmp_path, selection=Selection(only=("few",), force=True))
    with pytest.raises(StoreError, match=r"made of few with digest .* --from total --force"):
        go(toys, tmp_path)
    state, _ = go(toys, tmp_path, selection=Selection(start=("total",), force=True))
    assert statuses(state) == {"total": "done", "last": "done"}, "the remedy that the message names"
    toys.hooks.clear()
    state, _ = go(toys, tmp_path, selection=Selection(start=("few",), force=True))
    assert statuses(state) == {"few": "done", "total": "done", "last": "done"}
    toys.hooks["few"] = lambda ctx: ctx.out.write_text("extra.txt", "other")
    (tmp_path / "numbers").rename(tmp_path / "gone")
    state, _ = go(toys, tmp_path)
    assert statuses(state) == {"few": "done", "many": "done", "total": "failed", "other": "cached", "last": "failed"}
    error = state.stages["total"].error
    assert error is not None and "--from total --force" in error


def test_parts_made_of_an_input_that_was_built_anew_are_not_kept(toys: ModuleType, tmp_path: Path) -> None:
    def leave_a_part(ctx: StageContext) -> None:
        ctx.out.write_text("part.txt", "made of the old numbers")
        toys.fail(ctx)

    chosen = Selection(only=("many", "other"))
    toys.hooks["other"] = leave_a_part
    go(toys, tmp_path, selection=chosen)
    (left,) = (tmp_path / "sum").glob("other-*/part.txt")
    go(toys, tmp_path, selection=Selection(only=("other",)))
    assert left.exists(), "the same numbers: the part is kept"
    toys.hooks["many"] = lambda ctx: ctx.out.write_text("more.txt", "another digest under the same key")
    go(toys, tmp_path, selection=Selection(only=("many",), force=True))
    del toys.hooks["other"]
    state, _ = go(toys, tmp_path, selection=chosen)
    assert statuses(state) == {"many": "cached", "other": "done"} and not left.exists()


def test_a_panic_fails_its_stage_alone(toys: ModuleType, tmp_path: Path) -> None:
    def panic(ctx: StageContext) -> None:
        raise BaseException("panic of a library")

    toys.hooks["few"] = panic
    state, _ = go(toys, tmp_path)
    assert statuses(state)["few"] == "failed" and statuses(state)["other"] == "done"


def test_a_stopped_run_ends_its_stages_and_starts_no_more(toys: ModuleType, tmp_path: Path) -> None:
    """The signal arrives while `few` works: it ends at its next check, and nothing made of it begins; an alarm that aborts is off."""

    def interrupt(ctx: StageContext) -> None:
        signal.alarm(200)
        os.kill(os.getpid(), signal.SIGINT)
        toys.until_stopped(ctx)

    toys.hooks["few"] = interrupt
    before = signal.getsignal(signal.SIGINT)
    state, text = go(toys, tmp_path, selection=Selection(only=("few", "total", "many")))
    found = statuses(state)
    assert found["few"] == "failed" and found["total"] == "skipped"
    assert state.stages["few"].error == "stage few was asked to stop" and state.stages["total"].error == "the run was stopped"
    assert "Ctrl-C again" in text and state.ended is not None
    assert signal.getsignal(signal.SIGINT) is before and signal.alarm(0) == 0
    assert not list(tmp_path.rglob(LEASE))


def test_progress_is_shown_and_stops_a_stage_that_never_checks(toys: ModuleType, tmp_path: Path) -> None:
    def report(ctx: StageContext) -> None:
        ctx.progress(done=1, total=4, unit="steps", quarantined=2, note="busy")
        ctx.stop.set()

    toys.hooks["few"] = report
    state, text = go(toys, tmp_path, selection=Selection(only=("few",)))
    assert state.stages["few"].error == "stage few was asked to stop"
    assert "few: failed, 1/3 numbers, 2 quarantined" in text


def test_a_waiting_run_uses_the_others_result(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kinetok.infra.run.POLL_SECONDS", 0.01)
    job, store = toys.job(tmp_path)
    folder = next(step.folder for step in plan(job, store) if step.name == "few")
    other = Lease(folder)
    assert other.acquire()
    waits = threading.Event()
    acquire = Lease.acquire

    def noted(self: Lease) -> bool:
        taken = acquire(self)
        if not taken:
            waits.set()
        return taken

    monkeypatch.setattr(Lease, "acquire", noted)
    results: queue.SimpleQueue[JobRun] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: results.put(go(toys, tmp_path, selection=Selection(only=("few",)))[0]))
    thread.start()
    assert waits.wait(60)
    built = Store(Folder(str(tmp_path / "elsewhere")))
    run(job, built, Selection(only=("few",)), console=Console(file=StringIO()))
    finished = built.find("few").folder
    for name in sorted(finished.files(), key=lambda name: name == RECORD):
        folder.write_bytes(name, finished.read_bytes(name))
    other.release()
    thread.join()
    assert statuses(results.get()) == {"few": "cached"}


def test_a_lost_lease_ends_the_stage_and_publishes_nothing(toys: ModuleType, tmp_path: Path) -> None:
    def stolen(ctx: StageContext) -> None:
        state = {"holder": "elsewhere:1:abc", "generation": 9, "expires": 9e12, "at": "2026-01-01"}
        ctx.out.write_text(LEASE, json.dumps(state))

    toys.hooks["few"] = stolen
    state, _ = go(toys, tmp_path, selection=Selection(only=("few",)))
    error = state.stages["few"].error
    assert error is not None and "another run took over" in error
    assert not list(tmp_path.rglob(RECORD)) and "elsewhere" in next(tmp_path.rglob(LEASE)).read_text()


def test_ray_is_started_once_and_only_where_a_stage_needs_it(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(launch, "start_ray", lambda custom: calls.append(1))
    monkeypatch.setattr(run_module, "ray_job", lambda: RayJob("01000000", None))
    assert go(toys, tmp_path)[0].succeeded and calls == []
    monkeypatch.setattr(toys.Sum, "uses_ray", True)
    assert go(toys, tmp_path)[0].succeeded and calls == []
    state = go(toys, tmp_path, "other.scale={offset: 1}")[0]
    assert state.succeeded and calls == [1] and state.ray_job == "01000000"


def test_a_tracking_server_that_is_down_is_told_once_and_stops_nothing(
    toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def down(store: Store, run_id: str, uri: str | None, experiment: str) -> None:
        calls.append(json.loads(store.root.read_bytes(f"runs/{run_id}.json"))["ended"] is not None)
        raise tracking.TrackingDown("no server at nowhere")

    monkeypatch.setattr(tracking, "mirror", down)
    toys.hooks |= dict.fromkeys(ALL, lambda ctx: threading.Event().wait(0.01) and None)
    state, text = go(toys, tmp_path, "tracking={experiment: toys}")
    assert state.succeeded
    assert text.count("the job goes on without MLflow: no server at nowhere") == 1
    assert calls[-1] is True, "the last replay sees the ended run"


def test_an_unwritable_store_is_refused_before_anything_starts(toys: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write .*file/work/runs/.*: Not a directory"):
        go(toys, tmp_path / "file" / "work")
    assert toys.built == []


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """`folder` as a file system of its own, where this process may mount one."""
    folder.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_a_clear_error_and_the_next_run_goes_on(toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    wide(monkeypatch, 1)
    toys.hooks["many"] = lambda ctx: ctx.out.write_bytes("_work/big", b"x" * 2_000_000)
    with small_disk(disk, "1m"):
        state, _ = go(toys, disk)
        error = state.stages["many"].error
        assert error is not None and "No space left on device" in error and "Traceback" not in error
        assert statuses(state) == {"few": "done", "many": "failed", "total": "skipped", "other": "skipped", "last": "skipped"}
        assert not [path for path in disk.rglob("*") if ".tmp-" in path.name or path.name == LEASE]
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        assert go(toys, disk)[0].succeeded
        assert all(not list(artifact.problems()) for artifact in Store(Folder(str(disk))).all())


def script(store: Path, pause: str = "") -> "subprocess.Popen[str]":
    environment = {**os.environ, "TOY_PAUSE": pause}
    return subprocess.Popen(
        [sys.executable, str(TOYS), str(store)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def paused(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "paused\n", process.stderr and process.stderr.read()


@pytest.mark.parametrize("pause", ["few:0", "many:3"])
def test_a_killed_run_goes_on_where_it_ended(toys: ModuleType, tmp_path: Path, pause: str) -> None:
    killed = script(tmp_path / "killed", pause)
    paused(killed)
    killed.kill()
    killed.communicate()
    name, part = pause.split(":")
    left = next((tmp_path / "killed" / "numbers").glob(f"{name}-*"))
    assert (left / LEASE).exists() and not (left / RECORD).exists()
    assert len(list((left).glob("parts/*"))) == int(part)
    kept = {path: path.stat().st_mtime_ns for path in left.glob("parts/*")}
    again = script(tmp_path / "killed")
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items()), "finished parts were not made again"
    go(toys, tmp_path / "calm")
    disturbed, calm = (Store(Folder(str(tmp_path / folder))) for folder in ("killed", "calm"))
    assert {a.name: a.digest for a in disturbed.all()} == {a.name: a.digest for a in calm.all()}
    assert all(not list(artifact.problems()) for artifact in disturbed.all())


def test_of_two_runs_at_once_each_artifact_has_one_builder(tmp_path: Path) -> None:
    first = script(tmp_path, "few:1")
    paused(first)
    second = script(tmp_path)
    assert second.stderr is not None and first.stdin is not None
    lines = iter(second.stderr.readline, "")
    assert any("many: " in line for line in lines)
    first.stdin.write("\n")
    first.stdin.flush()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    one, two = (json.loads(text.splitlines()[-1]) for text in outputs)
    assert (one["few"], two["few"]) == ("done", "cached")
    for name in ALL:
        assert sorted((one[name], two[name])) == ["cached", "done"], name
    store = Store(Folder(str(tmp_path)))
    assert len(list(store.all())) == 5 and all(not list(artifact.problems()) for artifact in store.all())


def test_sigterm_stops_a_run_as_ctrl_c_does(tmp_path: Path) -> None:
    process = script(tmp_path, "few:1")
    paused(process)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert any("stopping" in line for line in iter(process.stderr.readline, ""))
    text, _ = process.communicate("\n", timeout=60)
    assert process.returncode == 1
    assert json.loads(text.splitlines()[-1])["few"] == "failed"
    assert not list(tmp_path.rglob(LEASE))


def test_a_stage_without_a_first_step_says_what_it_waits_for(toys: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    step = SimpleNamespace(stage=toys.Sum(numbers="few"), resources=Resources())
    row = Row("total")

    def note() -> str:
        run_module._note_waiting(step, row)  # type: ignore[arg-type]
        return row.note

    monkeypatch.setattr(capacity, "waiting", lambda asks: f"{capacity.WAITS} a training worker")
    assert note() == "", "a stage without Ray waits for nothing"
    monkeypatch.setattr(toys.Sum, "uses_ray", True)
    assert note() == "waits for room for a training worker"
    for done in (0, 1):
        row.report(done=done, total=None, unit=None, quarantined=None, note=None)
    assert note() == "", "it has begun"
    row.note = "untrained weights"
    assert note() == "untrained weights"
