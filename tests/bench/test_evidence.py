"""ProMAG's rows from made-up figures of units: each verdict both ways, what a row rests on, budgets that do not mix, the stored rows."""

import importlib
import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS, NEW = {"base": 2400, "direct8": 3200, "direct16": 4000}, {"direct8": 800, "direct16": 1600}
FRAMES = [30.0, 25.0, 25.0, 25.0] + [26.0, 25.0, 25.0, 25.0] * 3 + [26.0]
DCT = "(both started as transform coders)"
Figures = dict[str, Any]
Units = dict[str, Figures]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """The scripts import each other by bare name, as a folder that is run does: one set of them for a test."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "claims"))
    for path in (ROOT / "bench" / "claims").glob("*.py"):
        sys.modules.pop(path.stem, None)
    return importlib.import_module


def units() -> Units:
    """Figures with which every row holds: 60 seconds each, a clip mean frame of 23 dB beside them."""
    psnr = {"base": 27.0, "grown8": 26.8, "grown16": 26.2, "direct8": 25.0, "direct16": 24.0}
    psnr |= {"residual8": 26.0, "modulated8": 25.0, "keyless8": 22.0, "slower8": 27.1, "deeper8": 27.1, "unfrozen8": 27.1}
    found: Units = {name: {"psnr": value, "kept": value, "frames": FRAMES} for name, value in psnr.items()}
    for name, step in NEW.items():
        found[name]["marks"] = {str(step): {"psnr": 24.0, "kept": 24.0, "frames": FRAMES, "seconds": 20.0}}
    found["base"]["subsampled"] = 26.0
    for rate, tokens, loss in (("4x", 1280, 1.0), ("8x", 768, 1.05), ("16x", 512, 1.08)):
        found[f"dit-{rate}"] = {
            "tokens": tokens,
            "step_seconds": tokens / 256,
            "step_megabytes": tokens / 2,
            "flow_loss": loss,
            "steps": 800,
        }
    for name, figures in found.items():
        figures |= {"steps": figures.get("steps", STEPS.get(name, 800)), "seconds": 60.0}
    found["tiling"] = {"whole dB": 20.0, "layer-wise dB": 20.0, "latent dB": 20.0, "layer-wise off": 2e-6, "latent off": 0.06}
    found["seams"] = {"base": [1.1, 1.1], "grown8": [1.2, 1.1], "grown16": [1.4, 1.2]}
    return found


def put(work: Path, trained: Units, seed: int = 0, start: str = "dct") -> None:
    """Units as a work folder has them."""
    folder = work / f"seed{seed}" / start
    for name, figures in trained.items():
        if name not in ("tiling", "seams"):
            (folder / name).mkdir(parents=True)
            (folder / name / "figures.json").write_text(json.dumps(figures))
    (folder / "base" / "tiling.json").write_text(json.dumps(trained["tiling"]))
    for name, jumps in trained["seams"].items():
        for overlap, jump in zip((0, 4), jumps, strict=True):
            if (folder / name).exists():
                (folder / name / f"seams-{overlap}.json").write_text(json.dumps({"jump": jump}))


def stop(work: Path, name: str, seed: int = 0) -> None:
    """Make a finished direct model one that has only passed its mark."""
    folder = work / f"seed{seed}" / "dct" / name
    figures = json.loads((folder / "figures.json").read_text())
    (folder / "figures.json").unlink()
    torch.save({"marks": json.dumps(figures["marks"])}, folder / "state.pt")


def rows(module: Callable[[str], ModuleType], work: Path, start: str = "dct") -> dict[str, Any]:
    """All rows of a start by their claim."""
    evidence, verdicts, ladder = (module(name) for name in ("evidence", "verdicts", "ladder"))
    references = {verdicts.CLIP_MEAN: 23.0, verdicts.KEPT_MEAN: 22.0, verdicts.FLOOR: 1.58}
    ladders = ladder.Material(work, work).ladders(start)
    return {row.claim: row for row in evidence.Evidence(ladders, work, "command", references).all()}


def test_every_row_with_an_aim_can_hold(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    put(tmp_path, units())
    found = rows(module, tmp_path)
    verdicts = module("verdicts")
    assert {claim: row.holds for claim, row in found.items() if row.holds is not True} == {f"key-frame maxima, direct 16x {DCT}": None}
    judging = [rule.claim for rule in verdicts.RULES if not rule.claim.endswith("(baseline)")]
    assert all(any(claim.startswith(begin) for claim in found) for begin in judging)
    assert all(row.seeds == [0] and row.command == "command" for row in found.values())
    assert found[f"mixing matters, 8x {DCT}"].values["clip mean frame"] == 23.0


SPOILT: list[tuple[str, dict[str, Figures]]] = [
    ("key observation", {"direct16": {"kept": 26.5}}),
    ("key observation", {"direct16": {"kept": 25.8}}),
    ("key observation", {"direct16": {"kept": 21.9}}),
    ("key observation", {"base": {"subsampled": 21.9}, "direct16": {"kept": 21.8}}),
    ("growing beats direct extension, 8x, all", {"direct8": {"psnr": 25.4}}),
    ("growing beats direct extension, 8x, all", {"direct8": {"psnr": 22.9}}),
    ("growing beats direct extension, 8x, all", {"direct8": {"psnr": 20.0}, "grown8": {"psnr": 22.9}}),
    ("growing beats direct extension, 8x, new", {"direct8": {"marks": {"800": {"psnr": 22.0, "seconds": 1.0}}}}),
    ("growing beats direct extension, 16x, all", {"direct16": {"psnr": 25.0}}),
    ("growing beats direct extension, 16x, new", {"grown16": {"psnr": 25.0}}),
    ("little is lost, 4x to 8x", {"grown8": {"psnr": 26.4}}),
    ("little is lost, 4x to 8x", {"base": {"psnr": 22.9}, "grown8": {"psnr": 22.8}}),
    ("little is lost, 4x to 16x", {"grown16": {"psnr": 25.6}}),
    ("little is lost, 4x to 16x", {"base": {"psnr": 23.5}, "grown16": {"psnr": 22.8}}),
    ("mixing matters", {"residual8": {"psnr": 27.0}}),
    ("mixing matters", {"modulated8": {"psnr": 21.0}}),
    ("mixing matters", {name: {"psnr": psnr} for name, psnr in (("grown8", 22.9), ("residual8", 22.8), ("modulated8", 22.7))}),
    ("lever, grown 8x: the base's learning rate", {"slower8": {"psnr": 26.8}}),
    ("lever, grown 8x: the base's learning rate", {"slower8": {"psnr": 27.0}}),
    ("lever, grown 8x: 2 blocks", {"grown8": {"psnr": 22.0}, "deeper8": {"psnr": 22.5}}),
    ("lever, grown 8x: the base's rate, decoder", {"grown8": {"psnr": 22.9}}),
    ("key-frame maxima, grown", {"grown16": {"frames": [*FRAMES[:8], 24.0, *FRAMES[9:]]}}),
    ("seams, 4x", {"seams": {"base": [1.1, 1.21]}}),
    ("seams, 8x", {"seams": {"grown8": [1.1, 1.21]}}),
    ("seams, 16x", {"seams": {"grown16": [1.1, 1.21]}}),
    ("tiling", {"tiling": {"layer-wise off": 2e-4}}),
    ("tiling", {"tiling": {"latent off": 2e-5}}),
    ("tokens", {"dit-16x": {"step_seconds": 3.0}}),
    ("tokens", {"dit-8x": {"step_megabytes": 640.0}}),
    ("tokens", {"dit-16x": {"flow_loss": 1.11}}),
    ("tokens", {f"dit-{rate}": {"flow_loss": 1.61} for rate in ("4x", "8x", "16x")}),
    ("tokens", {f"dit-{rate}": {"flow_loss": 1.5} for rate in ("4x", "8x", "16x")}),
]


@pytest.mark.parametrize(("begin", "changes"), SPOILT)
def test_a_row_does_not_hold_where_it_should_not(
    module: Callable[[str], ModuleType], tmp_path: Path, begin: str, changes: dict[str, Figures]
) -> None:
    trained = deepcopy(units())
    for name, change in changes.items():
        trained[name] |= change
    put(tmp_path, trained)
    ((_, row),) = [(claim, row) for claim, row in rows(module, tmp_path).items() if claim.startswith(begin)]
    assert row.holds is False


def test_an_unfinished_direct_model_says_so_and_proves_nothing(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    put(tmp_path, units())
    put(tmp_path, {name: figures for name, figures in units().items() if not name.startswith("direct")}, seed=1)
    stop(tmp_path, "direct8")
    stop(tmp_path, "direct16")
    found = rows(module, tmp_path)
    key, direct = found[f"key observation {DCT}"], found[f"key-frame maxima, direct 16x {DCT}"]
    for row in (key, direct):
        assert row.values["direct at step, of"] == [1600.0, 4000.0] and row.seeds == [0]
    assert key.values["ahead by"] == 2.0 and key.holds is False
    assert (key.minutes, direct.minutes) == (1.3, 0.3)
    assert not [claim for claim in found if "all steps counted" in claim]
    row = found[f"growing beats direct extension, 8x, new blocks' steps only {DCT}"]
    assert row.holds and row.seeds == [0] and row.values["direct at step, of"] == [800.0, 800.0]


def test_finished_and_unfinished_direct_models_do_not_meet_in_a_mean(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    put(tmp_path, units(), seed=0)
    put(tmp_path, units(), seed=1)
    stop(tmp_path, "direct16", seed=1)
    key = rows(module, tmp_path)[f"key observation {DCT}"]
    assert key.seeds == [0] and key.values["direct at step, of"] == [4000.0, 4000.0] and key.holds


def test_rows_are_means_over_the_seeds_that_have_all_they_compare(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    put(tmp_path, units(), seed=0)
    second = units()
    second["grown8"]["psnr"], second["direct8"]["psnr"] = 25.0, 24.0
    del second["keyless8"]
    put(tmp_path, second, seed=2)
    found = rows(module, tmp_path)
    growing = found[f"growing beats direct extension, 8x, all steps counted {DCT}"]
    assert growing.seeds == [0, 2] and growing.values["by seed"] == [1.8, 1.0] and growing.values["gain"] == 1.4
    assert growing.holds is False
    assert found[f"mixing matters, 8x {DCT}"].seeds == [0]


def test_minutes_count_rungs_below_and_searches_once(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    put(tmp_path, units(), seed=0)
    put(tmp_path, units(), seed=1)
    for kind in ("base", "grown8", "direct8"):
        for rate in ("0.0005", "0.001"):
            folder = tmp_path / "rates" / "dct" / kind / rate
            folder.mkdir(parents=True)
            (folder / "figures.json").write_text(json.dumps({"seconds": 30.0}))
    found = rows(module, tmp_path)
    assert found["seams, 4x"].minutes == 2 * 1 + 1
    assert found["tiling at 512x512"].minutes == 1 + 1
    assert found["seams, 16x"].minutes == 2 * 3 + 2
    assert found[f"growing beats direct extension, 8x, all steps counted {DCT}"].minutes == 2 * 3 + 3
    assert found[f"growing beats direct extension, 8x, new blocks' steps only {DCT}"].minutes == round(2 * (2 + 1 / 3) + 3, 1)
    assert found["tokens, 68 frames of 64x64"].minutes == 2 * 6 + 2


def test_starts_do_not_share_a_claim(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    put(tmp_path, units(), start="dct")
    put(tmp_path, units(), start="torch")
    at_random = rows(module, tmp_path, "torch")
    assert at_random and not at_random.keys() & rows(module, tmp_path).keys()


@pytest.mark.parametrize(("name", "steps"), [("grown8", 200), ("direct8", 800), ("dit-8x", 200), ("keyless8", 801)])
def test_units_of_other_budgets_are_refused(module: Callable[[str], ModuleType], tmp_path: Path, name: str, steps: int) -> None:
    trained = units()
    trained[name]["steps"] = steps
    put(tmp_path, trained)
    with pytest.raises(module("unit").OtherBudget, match=rf"{name} was trained for {steps} steps, not \d+"):
        rows(module, tmp_path)


def test_seeds_of_other_budgets_and_marks_at_other_steps_are_refused(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    put(tmp_path / "marks", units())
    stop(tmp_path / "marks", "direct16")
    state = tmp_path / "marks" / "seed0" / "dct" / "direct16" / "state.pt"
    torch.save({"marks": json.dumps({"400": {}})}, state)
    with pytest.raises(module("unit").OtherBudget, match="direct16 was measured at 400 steps, not at 1600"):
        rows(module, tmp_path / "marks")
    put(tmp_path / "seeds", units(), seed=0)
    put(tmp_path / "seeds", units() | {"base": units()["base"] | {"steps": 600}}, seed=1)
    with pytest.raises(module("unit").OtherBudget, match="seed 0: 2400, seed 1: 600"):
        rows(module, tmp_path / "seeds")


def test_the_search_goes_beyond_an_edge_that_is_best_and_stops(module: Callable[[str], ModuleType]) -> None:
    ladder = module("ladder")
    for best, tried in ((1e-3, 3), (2.5e-4, 5), (1e-9, 6), (4e-3, 5), (1.0, 6)):
        asked: list[float] = []

        def reached(lr: float, best: float = best, asked: list[float] = asked) -> float:
            asked.append(lr)
            return -abs(math.log(lr / best))

        found = ladder.best_rate(reached)
        assert len(asked) == len(set(asked)) == tried
        assert found == min(asked, key=lambda lr: abs(math.log(lr / best)))


def test_a_search_passes_its_warm_up_and_sees_no_reported_clip(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder, unit = module("ladder"), module("unit")
    windows = np.arange(48, dtype=np.uint8)[:, None, None, None, None].repeat(64, 2).repeat(64, 3)
    np.save(tmp_path / "train.npy", windows)
    material = ladder.Material(tmp_path, tmp_path)
    held = material.search_pixels
    assert len(held) == 6
    trained_on = material.train_bytes[: material.search_samples]
    assert int(trained_on.max()) == 48 - 6 - 4, "as many windows as a video may have, less one, stand between"
    courses = []

    def run(self: object, unit: object, name: str, course: Any, *, searching: bool = False) -> Figures:
        assert searching
        courses.append(course)
        return {"psnr": 1.0 if course.lr == 1e-3 else 0.0}

    monkeypatch.setattr(ladder.Ladder, "_run", run)
    assert ladder.Ladder(material, 0, "dct", ladder.Budget.of(600), 0.0)._rate("base") == 1e-3
    assert {course.steps for course in courses} == {4 * unit.WARMUP}


def test_baselines_need_no_training(module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    baselines = module("baselines")
    assert baselines.flow_floor() == pytest.approx(1.5774, abs=1e-4)
    window = np.zeros((2, 17, 64, 64, 3), dtype=np.uint8)
    window[:, ::2] = 51
    np.save(tmp_path / "val.npy", window)
    monkeypatch.setattr(baselines, "untrained", lambda val: dict.fromkeys(UNTRAINED, 20.0))
    for _ in range(2):
        found = baselines.baselines(module("ladder").Material(tmp_path, tmp_path), "command")
        still, coders = found.rows
        deviation = (9 / 17 * 8 / 17) ** 0.5 * 51 / 255
        assert found.references["clip mean frame"] == pytest.approx(-20 * math.log10(deviation), abs=0.01)
        assert still.values["whole clip"] == found.references["clip mean frame"] == coders.values["clip mean frame"]
        assert still.holds is None and still.values["windows"] == 2 and coders.values["lost at 8x 16x"] == [0.0, 0.0]
        monkeypatch.setattr(baselines, "standing", lambda val: pytest.fail("measured twice"))


UNTRAINED = ("base psnr", "base subsampled", "direct8 psnr", "direct16 psnr", "direct16 kept")


def test_stored_rows_stand_as_their_values_say(module: Callable[[str], ModuleType]) -> None:
    """The JSON file's verdicts are what the rules make of its values, and the page shows the JSON file."""
    verdicts, table = module("verdicts"), module("rows")
    stored = table.read(ROOT / "docs" / "results" / "promag.json")
    references: Figures = {}
    for row in stored:
        references |= {name: row.values[name] for name in (verdicts.CLIP_MEAN, verdicts.KEPT_MEAN, verdicts.FLOOR) if name in row.values}
    assert [verdicts.judged(row, references) for row in stored] == stored
    baseline = next(row for row in stored if row.claim == "clip mean frame (baseline)")
    assert baseline.values["whole clip"] == references[verdicts.CLIP_MEAN] and baseline.holds is None
    assert table.table(stored) in (ROOT / "docs" / "results.md").read_text()
    with pytest.raises(ValueError, match="on these clips"):
        verdicts.judged(next(row for row in stored if row.claim.startswith("lever")), references | {verdicts.CLIP_MEAN: 20.0})


def test_the_command_names_its_folder_and_nothing_trained_changes_nothing(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promag, ladder = module("promag"), module("ladder")
    put(tmp_path, units(), seed=3)
    for work, shown in ((tmp_path, str(tmp_path)), (promag.ROOT / "work" / "other", "work/other")):
        command = promag.command(ladder.Material(promag.DATA, work), "dct", ladder.Material(tmp_path, tmp_path).ladders("dct"))
        assert command == f"python bench/claims/promag.py --steps 2400 --seeds 3 --starts dct --minutes 120 --work {shown}"
    elsewhere = ladder.Material(tmp_path, tmp_path)
    assert promag.command(elsewhere, "dct", elsewhere.ladders("dct")).endswith(f" --data {tmp_path}")
    monkeypatch.setattr(promag, "put", lambda rows: pytest.fail("rows were written"))
    with pytest.raises(SystemExit, match="nothing is trained"):
        promag.report(ladder.Material(tmp_path / "empty", tmp_path / "empty"))
    (tmp_path / "seed3" / "dct" / "grown8" / "figures.json").write_text(json.dumps(units()["grown8"] | {"steps": 1}))
    references = dict.fromkeys((module("verdicts").CLIP_MEAN, module("verdicts").KEPT_MEAN), 23.0)
    monkeypatch.setattr(promag, "baselines", lambda *_: module("baselines").Baselines(references, []))
    with pytest.raises(SystemExit, match="another budget needs another work folder"):
        promag.report(elsewhere)


def test_a_row_without_an_aim_shows_no_verdict(module: Callable[[str], ModuleType]) -> None:
    table = module("rows")
    row = table.Row("c", {"v": 1.0}, "for comparison", None, "command", [], 0.0)
    assert "| c | v 1 | for comparison | - | - |" in table.table([row])
