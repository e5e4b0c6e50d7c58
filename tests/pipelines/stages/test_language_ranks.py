"""Language models on several workers of Ray Train: the same numbers as on one, though in some steps one rank reads while another writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipelines.data.token_artifacts import make_tokens
from tests.pipelines.stages.running import run_stage
from tests.pipelines.stages.test_language import LANGUAGE

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.metrics_log import read_metrics
from kinetok.infra.stage import Resources
from kinetok.infra.storage import Folder
from kinetok.pipelines.models import open_language
from kinetok.pipelines.stages.language import Language

ADAPTERS = {"lora": {"rank": 2, "dropout": 0.0}}


def trained(folder: Path, tokens: Artifact, objective: dict[str, Any], resources: Resources) -> Artifact:
    stage = Language.model_validate(LANGUAGE | {"group": 1, "steps": 4, "checkpoint_every": 2, "objective": objective})
    return run_stage(Store(Folder(str(folder))), stage, "language", {"tokens": (tokens,)}, resources=resources)


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.parametrize(("zero", "objective"), [(2, ADAPTERS), (3, {}), (3, ADAPTERS)])
def test_two_workers_equal_one(ray_cluster: None, tmp_path: Path, zero: int, objective: dict[str, Any]) -> None:
    tokens = make_tokens(tmp_path / "tokens", 12, val=(3, 7))
    one = trained(tmp_path / "one", tokens, objective, Resources(batch_size=1))
    two = trained(tmp_path / "two", tokens, objective, Resources(batch_size=1, workers=2, zero=zero, recompute=True))
    lines, others = (read_metrics(made.folder) for made in (one, two))
    for name in ("train/divot_lm/loss", "train/lm_loss", "train/head_loss", "train/writing"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in others], rel=1e-4, abs=1e-5), name
    assert any(0 < (line["train/writing"] or 0) < 1 for line in lines), "in some step both are done"
    mine, theirs = (open_language(made).state_dict() for made in (one, two))
    for weight, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[weight], rtol=1e-3, atol=2e-5)
