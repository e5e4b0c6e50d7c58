"""Secrets that are planted in the environment and in errors are found in nothing that a run leaves or says."""

import io
import logging
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from kinetok.infra import secrets
from kinetok.infra.errors import ConfigError, DataError
from kinetok.infra.lineage import graph, to_html, to_json
from kinetok.infra.mlflow_store import TrackingDown, connect
from kinetok.infra.run import run
from kinetok.infra.stage import StageContext
from kinetok.infra.storage import Folder

PLANTED = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYPLANTED1",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEPLANTED2",
    "MLFLOW_TRACKING_PASSWORD": "hunter2hunter-PLANTED3",
    "HF_TOKEN": "hf_PLANTED4",
}
LOGIN = "https://user:s3cr3t-PLANTED5@host/path"
"""An address that a library may quote in an error."""


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)


def _leaks(text: str) -> list[str]:
    return [value for value in (*PLANTED.values(), "PLANTED5") if value in text]


def test_values_and_logins_are_hidden_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://kinetok:pw-of-the-database@db:5432/mlflow")
    monkeypatch.setenv("MAX_TOKENS", "100000")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    for value in (*PLANTED.values(), "pw-of-the-database"):
        assert secrets.redact(f"a {value} b") == "a *** b"
    assert secrets.redact(f"GET {LOGIN} failed") == "GET https://***@host/path failed"
    assert secrets.redact("s3://b/k?X-Amz-Signature=abc&x=1") == "s3://b/k?X-Amz-Signature=***&x=1"
    for text in ("100000 samples", "/var/run/token", "a@b.c", "s3://bucket/{000..100}.tar", "models:/divot@best", "x=1, token=word"):
        assert secrets.redact(text) == text


def test_a_job_file_with_a_secret_is_refused_without_repeating_it(toys: ModuleType, tmp_path: Path) -> None:
    for override in (f"tracking={{uri: '{LOGIN}'}}", f"store={PLANTED['HF_TOKEN']}", "store=s3://key:word@bucket/x"):
        with pytest.raises(ConfigError, match="environment") as caught:
            toys.job(tmp_path, override)
        assert not _leaks(str(caught.value)) and "word@" not in str(caught.value)


def test_no_folder_is_named_with_a_login() -> None:
    for address in ("s3://key:word@bucket/x", LOGIN, "https://host/a.tar?sig=word"):
        with pytest.raises(ConfigError) as caught:
            Folder(address)
        assert "word" not in str(caught.value) and not _leaks(str(caught.value))


def test_a_run_leaves_no_secret_behind(toys: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Records, the file of the run, MLflow, what is printed, lineage: with one error of ours, and one of a library."""
    caplog.set_level(logging.DEBUG)

    def quote(ctx: StageContext) -> None:
        ctx.progress(note=f"asks {LOGIN}")
        raise DataError(f"cannot read {LOGIN} with {PLANTED['AWS_SECRET_ACCESS_KEY']}")

    def crash(ctx: StageContext) -> None:
        raise OSError(f"401 for {LOGIN}, token {PLANTED['HF_TOKEN']}")

    toys.hooks |= {"other": quote, "last": crash}
    store, said = tmp_path / "work", io.StringIO()
    job, place = toys.job(store, "tracking={}")
    state = run(job, place, console=Console(file=said, width=500))
    assert {name: stage.status for name, stage in state.stages.items()}["total"] == "done" and not state.succeeded
    pages = [to_html(graph(place, found)) + to_json(graph(place, found)) for found in place.all()]
    files = [path.read_bytes().decode("latin-1") for path in store.rglob("*") if path.is_file()]
    assert (store / "mlflow.db").is_file() and len(files) > 20
    for text in (*files, *pages, said.getvalue(), caplog.text, state.model_dump_json()):
        assert not _leaks(text)
    assert "https://***@host/path" in str(state.stages["other"].error) and "***" in said.getvalue()


def test_a_tracking_server_that_is_down_is_named_without_its_password(tmp_path: Path) -> None:
    from kinetok.infra.artifact import Store

    with (
        pytest.raises(TrackingDown) as caught,
        connect(Store(Folder(str(tmp_path))), "postgresql://user:s3cr3t-PLANTED5@127.0.0.1:9/mlflow"),
    ):
        raise AssertionError("nobody listens there")
    assert "127.0.0.1:9" in str(caught.value) and not _leaks(str(caught.value))
