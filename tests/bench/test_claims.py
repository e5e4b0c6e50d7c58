"""The claims' pure parts: units stop and resume to the bit, step counts, rows and their page, the measure of seams."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "bench" / "claims"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> "type[Modules]":
    monkeypatch.syspath_prepend(str(FOLDER))
    return Modules


class Modules:
    """The scripts import each other by bare name, as a folder that is run does."""

    @staticmethod
    def of(name: str) -> ModuleType:
        sys.modules.pop(name, None)
        return importlib.import_module(name)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(3, 3))

    def forward(self, batch: dict[str, Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (batch["x"] @ self.slope - 2 * batch["x"]).square().mean(), {}


class Fitted:
    """A trainable of one player."""

    def __init__(self) -> None:
        self.players = {"line": Line()}

    def export(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "slope").write_text(str(self.players["line"].slope.tolist()))


def batch(step: int) -> dict[str, Tensor]:
    return {"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(step))}


def trained(unit: ModuleType, folder: Path, stop_at: int | None = None, steps: int = 12) -> dict[str, object]:
    """Train 12 steps, or as many as are asked for; a deadline strikes before step `stop_at`."""
    made: list[Fitted] = []

    def build() -> Fitted:
        made.append(Fitted())
        return made[-1]

    def feed(step: int) -> dict[str, Tensor]:
        if step == stop_at:
            object.__setattr__(run, "deadline", 0.0)
        return batch(step)

    run = unit.Unit(folder, deadline=time.monotonic() + 1e6)
    course = unit.Course(steps=steps, lr=0.1, seed=0, measured_at=(6,))
    figures: dict[str, object] = run.run(build, feed, lambda: {"slope": made[-1].players["line"].slope.tolist()}, course)
    return figures


def test_a_stopped_unit_ends_where_an_unbroken_one_does(module: type[Modules], tmp_path: Path) -> None:
    unit = module.of("unit")
    whole = trained(unit, tmp_path / "whole")
    with pytest.raises(unit.OutOfTime):
        trained(unit, tmp_path / "stopped", stop_at=8)
    assert not (tmp_path / "stopped" / "figures.json").exists()
    resumed = trained(unit, tmp_path / "stopped")
    assert resumed["slope"] == whole["slope"]
    (mark,), (unbroken,) = resumed["marks"].values(), whole["marks"].values()
    assert mark["slope"] == unbroken["slope"] and list(whole["marks"]) == ["6"]
    assert 0 < mark["seconds"] < resumed["seconds"]
    assert not (tmp_path / "stopped" / "state.pt").exists()


def test_a_finished_unit_is_read(module: type[Modules], tmp_path: Path) -> None:
    unit = module.of("unit")
    first = trained(unit, tmp_path / "unit")
    assert trained(unit, tmp_path / "unit", stop_at=1) == json.loads(json.dumps(first))


def test_a_unit_of_another_number_of_steps_is_refused(module: type[Modules], tmp_path: Path) -> None:
    unit = module.of("unit")
    trained(unit, tmp_path / "finished")
    with pytest.raises(unit.OtherBudget, match=r"finished was trained for 12 steps, not 24: another budget needs another work folder"):
        trained(unit, tmp_path / "finished", steps=24)
    with pytest.raises(unit.OutOfTime):
        trained(unit, tmp_path / "stopped", stop_at=8)
    with pytest.raises(unit.OtherBudget, match="stopped"):
        trained(unit, tmp_path / "stopped", steps=24)


def test_what_is_written_aside_is_there_whole_or_not_at_all(module: type[Modules], tmp_path: Path) -> None:
    unit, file = module.of("unit"), tmp_path / "cache.json"
    with pytest.raises(RuntimeError), unit.aside(file) as part:
        part.write_text("half")
        raise RuntimeError
    assert not file.exists()
    with unit.aside(file) as part:
        part.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"] and file.read_text() == "whole"


def test_what_is_measured_and_exported_is_the_average(module: type[Modules], tmp_path: Path) -> None:
    """Against AdamW and an average that are written out here."""
    figures = trained(module.of("unit"), tmp_path / "unit")
    line = Line()
    optimizer = torch.optim.AdamW(line.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    mean = line.slope.detach().clone()
    for step in range(1, 13):
        optimizer.param_groups[0]["lr"] = 0.1 * step / 50
        optimizer.zero_grad()
        line(batch(step), step)[0].backward()
        nn.utils.clip_grad_norm_(line.parameters(), 1.0)
        optimizer.step()
        mean = torch.lerp(mean, line.slope.detach(), 9 / (10 + step))
    for found in (figures["slope"], json.loads((tmp_path / "unit" / "model" / "slope").read_text())):
        torch.testing.assert_close(torch.tensor(found), mean, rtol=1e-4, atol=1e-6)
    assert (mean - line.slope).abs().max() > 1e-3, "the last weights are others"


def test_a_direct_model_gets_every_step_of_its_rival(module: type[Modules]) -> None:
    budget = module.of("ladder").Budget(base=30, stage=10)
    courses = {name: budget.course(name, lr=1.0, seed=0) for name in ("base", "direct8", "direct16", "grown8", "grown16")}
    assert courses["direct8"].steps == courses["base"].steps + courses["grown8"].steps
    assert courses["direct16"].steps == courses["base"].steps + courses["grown8"].steps + courses["grown16"].steps
    assert courses["direct8"].measured_at == (10,) and courses["direct16"].measured_at == (20,)


def test_quadrants_are_the_corners_of_their_window(module: type[Modules]) -> None:
    footage = module.of("footage")
    windows = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64, 3), dtype=np.uint8)
    cut = footage.quadrants(windows)
    assert cut.shape == (8, 3, 32, 32, 3)
    assert (cut[1] == windows[0, :, :32, 32:]).all() and (cut[6] == windows[1, :, 32:, :32]).all()


def test_the_table_replaces_itself_and_leaves_the_prose(module: type[Modules], tmp_path: Path) -> None:
    rows = module.of("rows")
    page, figures = tmp_path / "results.md", tmp_path / "results" / "promag.json"
    begin, end = rows.markers("promag")
    page.write_text(f"# Before\n{begin}\nstale\n{end}\nAfter.\n")
    row = rows.Row("grows", {"gain": 1.5, "by seed": [1.0, 2.0]}, ">= +1.5", True, "python x", [0, 1], 2.0)
    for _ in range(2):
        rows.write([row], page, figures)
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\nAfter.\n") and "stale" not in text
    assert text.count("| grows | gain 1.5, by seed 1 2 | >= +1.5 | yes | 2 |") == text.count("Made by `python x`.") == 1
    assert set(json.loads(figures.read_text())[0]) == {"claim", "values", "aim", "holds", "command", "seeds", "minutes"}
    page.write_text("no markers")
    with pytest.raises(ValueError, match="once each"):
        rows.write([row], page, figures)


def test_a_jump_counts_at_seams_alone(module: type[Modules]) -> None:
    long = module.of("long")
    jumps = torch.ones(33)
    jumps[16] = 3.0
    assert long.jump_ratio(jumps, [17], 0) == pytest.approx(3.0)
    blended = torch.ones(29)
    blended[12:17] = 1.5
    assert long.jump_ratio(blended, [13], 4) == pytest.approx(1.5)
