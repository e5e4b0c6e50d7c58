"""Divot's claims, the pure parts: scenes are what they are said to be, the judge's measures, rows from units' figures."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> "type[Modules]":
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "claims"))
    return Modules


class Modules:
    """The scripts import each other by bare name, as a folder that is run does."""

    @staticmethod
    def of(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return importlib.import_module(name)


def test_every_combination_is_drawn_as_its_caption_says(module: type[Modules]) -> None:
    plain = module.of("plain")
    scenes = plain.draw(plain.COMBINATIONS, seed=5)
    assert len({scenes.caption(row) for row in range(len(scenes))}) == plain.COMBINATIONS == 576
    video_NTHWC = scenes.video_NTHWC.float()
    ground_NC = video_NTHWC[:, 0, 0, 0]
    shape_NTHW = (video_NTHWC - ground_NC.view(-1, 1, 1, 1, 3)).abs().amax(-1) > 30
    axis = torch.linspace(-1, 1, plain.EDGE)
    for row in range(len(scenes)):
        x_T, y_T = (
            (shape_NTHW[row] * place).sum((1, 2)) / shape_NTHW[row].sum((1, 2)) for place in (axis[None, None, :], axis[None, :, None])
        )
        moved = (float(x_T[-1] - x_T[0]), float(y_T[-1] - y_T[0]))
        assert moved == pytest.approx([2 * plain.REACH * step for step in plain.DIRECTIONS[scenes.word("direction", row)]], abs=0.1)
        painted = video_NTHWC[row, 4][shape_NTHW[row, 4]].median(0).values / 255
        assert nearest(painted, plain.COLOURS) == scenes.word("colour", row)
        assert nearest(ground_NC[row] / 255, plain.GROUNDS) == scenes.word("ground", row)


def nearest(seen_C: torch.Tensor, named: dict[str, tuple[float, ...]]) -> str:
    """The name of the colour that is seen."""
    return min(named, key=lambda name: float((seen_C - torch.tensor(named[name])).abs().sum()))


def test_another_clips_tokens_are_of_another_scene(module: type[Modules]) -> None:
    study, plain = module.of("study"), module.of("plain")
    scenes = plain.draw(study.RECONSTRUCTED, seed=5)
    others = study.others(study.RECONSTRUCTED)
    assert sorted(others.tolist()) == list(range(study.RECONSTRUCTED))
    assert all(scenes.caption(row) != scenes.caption(int(other)) for row, other in enumerate(others))


def test_the_distance_of_sets_is_zero_to_themselves_and_grows_with_a_shift(module: type[Modules]) -> None:
    judge, plain = module.of("judge"), module.of("plain")
    torch.manual_seed(0)
    eyes = judge.of_clips()
    video_BCTHW = torch.rand(64, 3, plain.FRAMES, plain.EDGE, plain.EDGE)
    same, near, far = (judge.distance(eyes, video_BCTHW + shift, video_BCTHW) for shift in (0.0, 0.5, 2.0))
    assert same == pytest.approx(0.0, abs=1e-6) and 0 < near < far


def test_rows_rest_on_the_seeds_that_have_all_they_compare(module: type[Modules], tmp_path: Path) -> None:
    study, evidence = module.of("study"), module.of("divot_evidence")
    for seed, names in ((0, ("gmm", "mse", "eps", "v")), (1, ("gmm",))):
        for place, name in enumerate(names):
            folder = tmp_path / f"seed{seed}" / name
            folder.mkdir(parents=True)
            (folder / "figures.json").write_text(
                json.dumps(
                    {
                        **{"mean": 0.5 - 0.1 * place, "ground": 0.9, "distance": 1.0, "seconds": 60.0},
                        **{"tokens": {"mean": 0.2 * place, "ground": 0.9}, "token_distance": 2.0},
                    }
                )
            )
    material = study.Material(tmp_path)
    studies = [study.Study(material, seed, study.Budget.of(30), deadline=0.0) for seed in material.seeds()]
    row, of_tokens = evidence.Evidence(studies, "command").all()
    assert row.seeds == [0] and row.holds and row.minutes == 4.0
    assert not of_tokens.holds
    assert row.values["mixture"] == 50.0 and row.values["diffusion, v"] == 20.0


@pytest.mark.parametrize(("ahead", "seeds", "holds"), [(4.0, 1, False), (4.0, 2, True), (6.0, 1, True)])
def test_a_share_is_ahead_where_chance_would_not_put_it_there(
    module: type[Modules], tmp_path: Path, ahead: float, seeds: int, holds: bool
) -> None:
    study, evidence = module.of("study"), module.of("divot_evidence")
    figures = {"refined": 0.5, "adapt": 0.5 + ahead / 100, study.WRITER: 0.5}
    for seed in range(seeds):
        for name, share in figures.items():
            folder = tmp_path / f"seed{seed}" / name
            folder.mkdir(parents=True)
            shown = {"mean": share, "ground": 0.9, "distance": 1.0}
            (folder / "figures.json").write_text(json.dumps({**shown, "written": shown, "seconds": 60.0}))
    studies = [study.Study(study.Material(tmp_path), seed, study.Budget.of(30), deadline=0.0) for seed in range(seeds)]
    (row,) = evidence.Evidence(studies, "command").adapted()
    assert row.holds is holds
    # Two standard errors of a difference of two shares of 192 clips and four factors each.
    assert row.values["certain to"] == round(200 * (0.5 / (192 * 4 * seeds)) ** 0.5, 2)


def test_the_plain_loop_learns_the_same_labels_at_the_same_places(module: type[Modules]) -> None:
    language = module.of("language")
    ids = torch.tensor([[1, 7, 8, 2, 0], [1, 9, 2, 0, 0]])
    batch = {
        "ids_BL": ids,
        "codes_BL": (ids != 0).long(),
        "label_BM": torch.tensor([[8, 2], [2, -100]]),
        "label_at_BM": torch.tensor([[1, 2], [1, 0]]),
    }
    found = language.plain_batch(batch)
    assert found["labels"].tolist() == [[-100, -100, 8, 2, -100], [-100, -100, 2, -100, -100]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]


def test_the_published_head_is_a_small_part(module: type[Modules]) -> None:
    assert 0 < module.of("language").published_share() < 0.05
