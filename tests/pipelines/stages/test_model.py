"""`model`: what is copied is what the plan saw."""

from pathlib import Path

import pytest
import torch
from tests.pipelines.stages.running import run_stage

from kinetok.infra.artifact import Store
from kinetok.infra.errors import StoreError
from kinetok.infra.stage import Stage
from kinetok.infra.storage import Folder
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


def test_another_model_under_the_address_since_the_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = saved(tmp_path / "a", seed=0)
    keys = iter([Stage.key(Model(where=where), {})])
    saved(tmp_path / "a", seed=1)
    monkeypatch.setattr(Model, "key", lambda self, inputs: next(keys, None) or Stage.key(self, inputs))
    with pytest.raises(StoreError, match="became another model"):
        run_stage(Store(Folder(str(tmp_path / "store"))), Model(where=where), "given", {})
