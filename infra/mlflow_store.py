"""Opening MLflow: the embedded SQLite database of a store, or the server that the job names.
The embedded database is built aside and moved into place under a file lock, because several processes that create it at once
corrupt it for ever (mlflow#19943). Time-outs are short: a job never waits for its tracking server. Not covered: what is logged
(`tracking.py`, `registry.py`).
"""

import contextlib
import fcntl
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from kinetok.infra.artifact import Store
from kinetok.infra.errors import ConfigError, KinetokError
from kinetok.infra.secrets import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"
URI_VARIABLE = "MLFLOW_TRACKING_URI"
ANSWER_SECONDS = 3.0
DEFAULT_PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}
CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
}
"""Set before mlflow is imported, where the user has not set them."""


class TrackingDown(KinetokError, RuntimeError):
    """The tracking server does not answer, or refuses; the job goes on and `kinetok sync` replays what was missed."""


def resolve(store: Store, uri: str | None) -> str:
    """The tracking URI to use: `uri`, else MLFLOW_TRACKING_URI, else the store's own database (local stores only)."""
    chosen = uri or os.environ.get(URI_VARIABLE)
    if chosen:
        return chosen
    if not store.root.is_local:
        raise ConfigError(
            f"{store.root} cannot hold a tracking database: set {URI_VARIABLE}, or tracking.uri in the job, to an MLflow server"
        )
    return embedded_uri(store)


def embedded_uri(store: Store) -> str:
    """URI of the SQLite database inside a local store."""
    return f"sqlite:///{store.root.local / DATABASE}"


@contextlib.contextmanager
def connect(store: Store, uri: str) -> Iterator["MlflowClient"]:
    """A client on `uri`; whatever MLflow raises inside the block becomes TrackingDown, within seconds where nobody answers."""
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    try:
        _reach(uri)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError
    except OSError as error:
        raise _down(uri, error) from error
    try:
        if uri == embedded_uri_or_none(store):
            _create_database(store.root.local)
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise _down(uri, error) from error


def embedded_uri_or_none(store: Store) -> str | None:
    """`embedded_uri`, None for a store that is not on a local disk."""
    return embedded_uri(store) if store.root.is_local else None


def experiment_id(client: "MlflowClient", store: Store, uri: str, name: str) -> str:
    """The experiment called `name`, created where it is missing; the embedded one keeps its artifacts below the store."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    location = (store.root.local / ARTIFACTS).as_uri() if uri == embedded_uri_or_none(store) else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except MlflowException:
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


@contextlib.contextmanager
def registered_files(store: Store, address: str) -> Iterator[Path]:
    """A local folder with the files of `models:/name@alias` or `models:/name/version`, for the length of the block."""
    uri = resolve(store, None)
    name, alias, version = _parse_address(address)
    with tempfile.TemporaryDirectory(prefix="kinetok-") as scratch:
        with connect(store, uri) as client:
            from mlflow.artifacts import download_artifacts

            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
            local = Path(download_artifacts(artifact_uri=str(found.source), dst_path=scratch, tracking_uri=uri))
        yield local


def _parse_address(address: str) -> tuple[str, str, str]:
    """(name, alias, version) of a registry address; one of the last two is empty."""
    name, at, alias = address.removeprefix("models:/").partition("@")
    name, _, version = name.partition("/") if not at else (name, "", "")
    if not name or not (alias or version):
        raise ConfigError(f"{address!r} is no model address: write models:/name@alias or models:/name/version")
    return name, alias, version


def ui(store: Store, uri: str | None, port: int) -> NoReturn:
    """Replace this process by the MLflow UI on the store's database, on 127.0.0.1 alone; raises ConfigError where a server has it."""
    chosen = resolve(store, uri)
    if urlsplit(chosen).scheme.startswith("http"):
        raise ConfigError(
            f"the runs are on {redact(chosen)}: open that address in a browser; `kinetok ui` shows databases without a server"
        )
    with connect(store, chosen):
        pass
    places = {"--host": "127.0.0.1", "--port": str(port), "--workers": "1"}
    if store.root.is_local:
        places["--default-artifact-root"] = (store.root.local / ARTIFACTS).as_uri()
    words = [word for pair in places.items() for word in pair]
    # Not among the words, which everybody on the machine may read: the address may hold a password.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": chosen}
    # The bare address opens on traces of agents, of which there are none.
    sys.stderr.write(f"runs: http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning\n")
    os.execve(sys.executable, [sys.executable, "-m", "mlflow", "ui", *words], environment)


def _reach(uri: str) -> None:
    """Raise OSError within seconds where nobody listens: mlflow's own retries would take minutes."""
    parts = urlsplit(uri)
    port = parts.port or DEFAULT_PORTS.get(parts.scheme.split("+")[0])
    if parts.hostname and port:
        socket.create_connection((parts.hostname, port), timeout=ANSWER_SECONDS).close()


def _down(uri: str, error: Exception) -> TrackingDown:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    said = f"MLflow at {uri} cannot be used now ({first}); files on the store are complete, `kinetok sync` replays them"
    return TrackingDown(redact(said))


def _create_database(root: Path) -> None:
    """Build the database aside and rename it: a kill half-way leaves nothing that later runs would trip over."""
    target = root / DATABASE
    root.mkdir(parents=True, exist_ok=True)
    with open(root / f"{DATABASE}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        aside = root / f"{DATABASE}.new"
        aside.unlink(missing_ok=True)
        SqlAlchemyStore(f"sqlite:///{aside}", (root / ARTIFACTS).as_uri()).engine.dispose()  # type: ignore[no-untyped-call]
        os.replace(aside, target)
