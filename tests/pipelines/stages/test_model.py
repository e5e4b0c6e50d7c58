"""`model`: what is copied is what the plan saw."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from tests.pipelines.stages.running import run_stage
from tests.tokenizers.pretrained.conftest import random_model

from kinetok.infra.artifact import Store
from kinetok.infra.errors import StoreError
from kinetok.infra.job import parse_job
from kinetok.infra.run import run
from kinetok.infra.stage import Stage
from kinetok.infra.storage import Folder
from kinetok.pipelines.catalog import STAGES
from kinetok.pipelines.models import load
from kinetok.pipelines.stages.model import Model
from kinetok.tokenizers.causal.autoencoder import CausalConfig, CausalTokenizer


def saved(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    CausalTokenizer(CausalConfig(channels=4, mult=(1, 1), strides=((2, 2),), blocks=1, z=4, groups=2)).save_pretrained(folder)
    return str(folder)


def test_a_model_is_copied_whole_under_a_key_of_its_weights(tmp_path: Path) -> None:
    store, where = Store(Folder(str(tmp_path / "store"))), saved(tmp_path / "a", seed=0)
    made = run_stage(store, Model(where=where), "given", {})
    assert load(made.folder.local / "model").spec() == load(where).spec()
    assert Model(where=saved(tmp_path / "b", seed=0)).key({}) == made.key != Model(where=saved(tmp_path / "c", seed=1)).key({})


def test_a_plan_downloads_nothing_and_a_run_does_so_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[bool] = []

    def download(name: str, *, allow_patterns: object = None, local_files_only: bool = False) -> str:
        asked.append(local_files_only)
        raise FileNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(StoreError, match=r"owner/name is not on this machine yet; a run downloads it"):
        Model(where="owner/name").facts()
    with pytest.raises(StoreError, match="the Hugging Face hub gives no model of that name"):
        run(parse_job({"name": "j", "stages": {"given": {"kind": "model", "where": "owner/name"}}}, STAGES), Store(Folder(str(tmp_path))))
    assert asked == [True, False]
    Model(where=saved(tmp_path / "a", seed=0)).fetch()
    assert len(asked) == 2, "what is here is not asked for"


def test_a_model_of_the_hub_that_was_downloaded_is_planned_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_model("wan").save_pretrained(tmp_path / "hub" / "vae")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub"))
    assert Model(where="owner/name").facts() == Model(where=str(tmp_path / "hub")).facts()
    for weights in (tmp_path / "hub" / "vae").glob("diffusion_pytorch_model*"):
        weights.unlink()
    with pytest.raises(StoreError, match="is not on this machine yet"):
        Model(where="owner/name").facts()


def test_another_model_under_the_address_since_the_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = saved(tmp_path / "a", seed=0)
    keys = iter([Stage.key(Model(where=where), {})])
    saved(tmp_path / "a", seed=1)
    monkeypatch.setattr(Model, "key", lambda self, inputs: next(keys, None) or Stage.key(self, inputs))
    with pytest.raises(StoreError, match="became another model"):
        run_stage(Store(Folder(str(tmp_path / "store"))), Model(where=where), "given", {})
