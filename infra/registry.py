"""Artifacts in MLflow: what a record becomes there. Data sets, tags, params, figures, small files, and models in the registry.

Every artifact is a data set whose name and digest are the same wherever it is logged, so MLflow joins the run that made it with those
that read it. One that holds a model is a LoggedModel instead and a registered version under the stage's name, alias `best` on the newest.
Things are found again by key and digest: logging twice changes nothing. A version's tags say which artifact it is, because
`ModelVersion.model_id` comes back empty from open-source servers. Not covered: runs (`tracking.py`), loading (`pipelines/models.py`).
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from kinetok.infra.artifact import RECORD, Artifact, InputInfo, Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

MODEL_FOLDER = "model"
MODEL_CONFIG = f"{MODEL_FOLDER}/config.json"
ALIAS = "best"
DIGEST_LENGTH = 36
"""MLflow refuses longer digests of data sets."""
REPORT = "report.html"
SMALL_FILES = (RECORD, REPORT, "table.json", "training.json", "spec.json", "clips.json", "generator.json", "prompts.json", "contact.png")
PARAMS_PER_REQUEST = 100


@dataclass(frozen=True)
class Place:
    """Where in MLflow an artifact goes: a run of an experiment."""

    client: "MlflowClient"
    experiment: str
    run_id: str


def log_artifact(place: Place, store: Store, artifact: Artifact, *, cached: bool) -> None:
    """All of one artifact into one run. A cached one keeps its lineage, repeats neither files nor figures, and points to its maker."""
    tags = _tags(artifact)
    for name, infos in artifact.record.inputs.items():
        for info in infos:
            _log_input(place, store, name, info)
    model_id = _log_output(place, artifact, tags)
    if cached:
        tags |= _maker(place, artifact)
    else:
        _log_figures(place, artifact, model_id)
        with local_files(artifact, SMALL_FILES) as folder:
            for path in filter(Path.exists, (folder / name for name in SMALL_FILES)):
                place.client.log_artifact(place.run_id, str(path))
    for name, value in tags.items():
        place.client.set_tag(place.run_id, name, value)


def log_report(place: Place, artifact: Artifact) -> None:
    """The report of a job beside its other files, where the artifact has one."""
    if REPORT in artifact.record.files:
        with local_files(artifact, (REPORT,)) as folder:
            place.client.log_artifact(place.run_id, str(folder / REPORT))


def holds_model(artifact: Artifact) -> bool:
    """True for artifacts with an exported model in `model/`."""
    return MODEL_CONFIG in artifact.record.files


@contextmanager
def local_files(artifact: Artifact, names: Iterable[str]) -> Iterator[Path]:
    """The artifact's folder on a local disk; where the store is remote, those of `names` that exist are downloaded for the block."""
    if artifact.folder.is_local:
        yield artifact.folder.local
        return
    with tempfile.TemporaryDirectory(prefix="kinetok-") as scratch:
        for name in (name for name in names if artifact.folder.exists(name)):
            artifact.folder.fetch(name, Path(scratch) / name)
        yield Path(scratch)


def metric_name(name: str) -> str:
    """`name` with what MLflow refuses in it replaced."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def milliseconds(at: object) -> int:
    """An ISO time as MLflow's milliseconds."""
    return int(datetime.fromisoformat(str(at)).timestamp() * 1000)


def _tags(artifact: Artifact) -> dict[str, str]:
    record = artifact.record
    upstream = sorted({f"{info.name}-{info.key}" for infos in record.inputs.values() for info in infos})
    return {
        "kinetok.kind": record.kind,
        "kinetok.key": record.key,
        "kinetok.digest": record.digest,
        "kinetok.upstream": " ".join(upstream),
        "kinetok.commit": str(record.commit),
        "kinetok.folder": artifact.folder.url,
    }


def _maker(place: Place, artifact: Artifact) -> dict[str, str]:
    """Tags of a cached stage: the job run that made the artifact and, where this MLflow knows it, that stage's MLflow run."""
    made_by = str(artifact.record.run_id)
    query = f"tags.`kinetok.run` = '{made_by}' and tags.`kinetok.key` = '{artifact.key}'"
    found = place.client.search_runs([place.experiment], query, max_results=1)
    return {"kinetok.cached": "true", "kinetok.made_by": made_by, "kinetok.made_by_run": found[0].info.run_id if found else "unknown here"}


def _log_input(place: Place, store: Store, name: str, info: InputInfo) -> None:
    from mlflow.entities import LoggedModelInput

    source = store.get(info.kind, info.name, info.key)
    model = _find_model(place, source) if source is not None and holds_model(source) else None
    if model is not None:
        place.client.log_inputs(place.run_id, models=[LoggedModelInput(model)])
    else:
        place.client.log_inputs(place.run_id, [_dataset(source or info, context="input", field=name)])


def _log_output(place: Place, artifact: Artifact, tags: dict[str, str]) -> str | None:
    """The artifact as output of the run; the id of its LoggedModel where it holds a model."""
    from mlflow.entities import LoggedModelOutput

    if not holds_model(artifact):
        place.client.log_inputs(place.run_id, [_dataset(artifact, context="output", field="")])
        return None
    model_id = _find_model(place, artifact) or _upload_model(place, artifact, tags)
    _register(place, artifact, model_id, tags)
    place.client.log_outputs(place.run_id, [LoggedModelOutput(model_id, step=0)])
    return model_id


def _dataset(artifact: Artifact | InputInfo, *, context: str, field: str) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source, profile = ("local", "{}"), "{}"
    if isinstance(artifact, Artifact):
        source, profile = _source(artifact.folder.url), artifact.record.counts.model_dump_json()
    dataset = Dataset(artifact.name, artifact.digest[:DIGEST_LENGTH], source[0], source[1], profile=profile)
    tags = {"mlflow.data.context": context, "kinetok.key": artifact.key, "kinetok.field": field}
    return DatasetInput(dataset, [InputTag(name, value) for name, value in tags.items() if value])


def _source(url: str) -> tuple[str, str]:
    """(source type, source) as MLflow's own data set sources write them."""
    if "://" in url:
        return url.split("://", 1)[0], json.dumps({"uri": url})
    return "local", json.dumps({"uri": Path(url).as_uri()})


def _log_figures(place: Place, artifact: Artifact, model_id: str | None) -> None:
    """Result figures at step 0 (linked to the model where there is one), and the literal config as params."""
    from mlflow.entities import Metric, Param

    record = artifact.record
    counts = {f"count/{name}": float(value) for name, value in record.counts.model_dump().items()}
    results = {f"result/{metric_name(name)}": value for name, value in record.metrics.items() if value is not None}
    figures = {**results, **counts, "seconds": record.seconds}
    at = milliseconds(record.started)
    place.client.log_batch(place.run_id, metrics=[Metric(name, value, at, 0, model_id=model_id) for name, value in figures.items()])
    params = [Param(name, text) for name, text in _flat(record.config)]
    for start in range(0, len(params), PARAMS_PER_REQUEST):
        place.client.log_batch(place.run_id, params=params[start : start + PARAMS_PER_REQUEST])


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested config as dotted names and texts."""
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, value if isinstance(value, str) else json.dumps(value)


def _find_model(place: Place, artifact: Artifact) -> str | None:
    """Id of the finished LoggedModel made from this very artifact."""
    found = place.client.search_logged_models([place.experiment], filter_string=f"tags.`kinetok.key` = '{artifact.key}'")
    same = [model for model in found if model.tags.get("kinetok.digest") == artifact.digest and model.status == "READY"]
    return str(same[0].model_id) if same else None


def _upload_model(place: Place, artifact: Artifact, tags: dict[str, str]) -> str:
    made = place.client.create_logged_model(
        place.experiment, name=artifact.name, source_run_id=place.run_id, tags=tags, model_type=artifact.kind
    )
    names = [name for name in artifact.record.files if name.startswith(f"{MODEL_FOLDER}/")]
    with local_files(artifact, names) as folder:
        place.client.log_model_artifacts(made.model_id, str(folder / MODEL_FOLDER))
    place.client.finalize_logged_model(made.model_id, "READY")
    return str(made.model_id)


def _register(place: Place, artifact: Artifact, model_id: str, tags: dict[str, str]) -> None:
    """One version per artifact; the alias goes to the newest artifact, in whatever order runs are replayed."""
    client, name = place.client, artifact.name
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    versions = list(client.search_model_versions(f"name = '{name}'"))
    if not any(version.tags.get("kinetok.digest") == artifact.digest for version in versions):
        marks = {**tags, "kinetok.model_id": model_id, "kinetok.started": artifact.record.started}
        source = client.get_logged_model(model_id).artifact_location  # `models:/<id>` would be looked up at the process's own tracking URI
        versions.append(client.create_model_version(name, source, place.run_id, tags=marks, model_id=model_id))
    newest = max(versions, key=lambda version: (version.tags.get("kinetok.started", ""), int(version.version)))
    client.set_registered_model_alias(name, ALIAS, str(newest.version))
