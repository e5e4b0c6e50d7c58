"""`kinetok.load` finds the same model in a folder, a store and MLflow's registry."""

from pathlib import Path

import pytest
import torch

import kinetok
from kinetok.infra.artifact import Artifact, Record, Store, publish
from kinetok.infra.errors import ConfigError, StoreError
from kinetok.infra.mlflow_store import connect, embedded_uri, experiment_id
from kinetok.infra.registry import Place, log_artifact
from kinetok.infra.storage import Folder
from kinetok.pipelines.models import model_folder
from kinetok.tokenizers.base import weights_digest
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A train artifact in the default store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("KINETOK_STORE", str(tmp_path / "work"))
    torch.manual_seed(3)
    store = Store(Folder(str(tmp_path / "work")))
    folder = store.folder("train", "base", "b" * 16)
    config = CausalConfig(channels=4, mult=(1, 1), strides=((2, 2),), blocks=1, z=4, groups=2)
    CausalTokenizer(config).save_pretrained(folder.local / "model")
    record = Record(
        kind="train", name="base", key="b" * 16, version=1, config={}, digest="", started="2026-01-01T00:00:00+00:00", seconds=1.0
    )
    return publish(folder, record)


def _digest(where: str | Path, **options: str) -> str:
    model = kinetok.load(where, **options)
    assert not model.training
    return weights_digest(model)


def test_one_model_from_every_door(trained: Artifact) -> None:
    store = Store(Folder(str(trained.folder.local.parents[1])))
    uri = embedded_uri(store)
    with connect(store, uri) as client:
        experiment = experiment_id(client, store, uri, "kinetok")
        run = client.create_run(experiment)
        log_artifact(Place(client, experiment, run.info.run_id), store, trained, cached=False)
    doors = [trained.folder.local / "model", str(trained.folder), "base", "b" * 6, "models:/base@best", "models:/base/1"]
    assert len({_digest(door) for door in doors}) == 1
    assert _digest("base", store=str(store.root)) == _digest("base")


@pytest.mark.parametrize("address", ["models:/base", "models:/@best", "models:/base@"])
def test_an_address_that_is_none_is_refused(trained: Artifact, address: str) -> None:
    with pytest.raises(ConfigError, match="models:/name@alias"):
        kinetok.load(address)


def test_an_artifact_without_model_is_refused(trained: Artifact) -> None:
    with pytest.raises(StoreError, match="it holds base"):
        kinetok.load("nowhere")
    empty = Artifact(trained.folder, trained.record.model_copy(update={"files": {}, "kind": "clips"}))
    with pytest.raises(StoreError, match="without a model"):
        model_folder(empty)
