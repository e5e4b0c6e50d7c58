"""Ray as this package starts it, and what its workers import."""

import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from kinetok.infra import launch, training
from kinetok.infra.errors import DataError, StoreError
from kinetok.infra.fit import outcome_name
from kinetok.infra.storage import Folder


@pytest.mark.ray
def test_a_second_start_joins_the_first(ray_cluster: None) -> None:
    import ray

    before = ray.get_runtime_context().gcs_address
    launch.start_ray()
    assert ray.get_runtime_context().gcs_address == before


@pytest.mark.parametrize(
    ("error", "recorded"),
    [(StoreError("no answer"), False), (DataError("bad clip"), True), (RuntimeError("lost"), False)],
)
def test_only_an_error_that_would_come_again_ends_the_turn(
    error: Exception, recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(work: object, session: object) -> None:
        raise error

    work = SimpleNamespace(out=Folder(str(tmp_path)), turn="0001-a", start=None)
    monkeypatch.setattr(training, "Loop", fail)
    monkeypatch.setattr(launch, "RaySession", lambda start: None)
    with pytest.raises(type(error)):
        launch._worker({"work": work})  # type: ignore[dict-item]
    assert work.out.exists(outcome_name("0001-a")) == recorded


def test_the_parts_of_ray_train_that_are_left_out_are_there() -> None:
    """By name, as Ray has no switch for them: another version may call them otherwise, and start them again."""
    from ray.train.v2.api import data_parallel_trainer

    assert all(hasattr(data_parallel_trainer, name) for name in launch.UNUSED | launch.UNUSED_ALONE)


@pytest.mark.ray
def test_a_local_cluster_listens_on_loopback_alone(ray_cluster: None) -> None:
    import ray

    ray.get(ray.remote(lambda: None).remote())
    sockets = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a worker of an earlier test that is just ending
            sockets += process.net_connections("tcp")
    listening = [one.laddr.ip.removeprefix("::ffff:") for one in sockets if one.status == psutil.CONN_LISTEN]
    assert len(listening) > 5 and set(listening) == {"127.0.0.1"}


@pytest.mark.ray
def test_what_holds_of_a_local_cluster_is_known_in_it_alone(ray_cluster: None) -> None:
    """Else a command that this process starts, on a cluster elsewhere, would not hear of nodes that are about to go."""
    import ray

    here = launch.LOOPBACK | launch.ALONE
    known = ray.get(ray.remote(lambda: dict(os.environ)).remote())
    assert here.items() <= known.items() and not here.keys() & os.environ.keys()


@pytest.mark.ray
@pytest.mark.long
def test_one_machine_is_every_group_of_nodes() -> None:
    driver = """
        from kinetok.infra.launch import start_ray

        start_ray(cpus=1, custom=["trainer"])
        import ray

        ray.get(ray.remote(resources={"trainer": 1})(lambda: None).remote())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(driver)], check=True)


@pytest.mark.ray
@pytest.mark.slow
def test_workers_elsewhere_import_the_shipped_wheel_and_hugging_face(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    checkout = Path(__file__).parents[2]
    shutil.copytree(checkout / "tokenizers", tmp_path / "tokenizers", ignore=shutil.ignore_patterns("__pycache__"))
    driver = f"""
        import ray
        from kinetok.infra.launch import shipped

        @ray.remote
        def imported():
            import pathlib, tokenizers, kinetok.infra.launch
            assert pathlib.Path("tokenizers/base.py").is_file(), "the job's folder is the current one"
            return kinetok.infra.launch.__file__, tokenizers.__file__

        ray.init(address={ray.get_runtime_context().gcs_address!r}, runtime_env={{**shipped(), "working_dir": {str(tmp_path)!r}}})
        print(*ray.get(imported.remote()), sep="\\n")
    """
    command = [sys.executable, "-c", textwrap.dedent(driver)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | launch.LOOPBACK)
    ours, theirs = done.stdout.splitlines()[-2:]
    assert "py_modules" in ours
    assert Path(theirs).is_relative_to(sys.prefix)
