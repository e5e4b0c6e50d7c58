"""One training run of the claims: a folder with its weights and figures, and its state while it is under way.

`Unit.run` continues where an earlier call stopped and returns at once what a finished one found. The loop is the plain one that anyone
would write (AdamW, gradient clipping, EMA, a constant rate after the warm-up): with a constant rate the weights at an earlier step are
those of a shorter run, so one run answers for several step counts. Batches are functions of seed and step, so that a stop changes
nothing. A unit has one number of steps: what asks for another is refused. Not covered: several processes on one unit.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from kinetok.infra.fit import PlayerConfig
from kinetok.infra.optim import Average, adamw

FIGURES, STATE = "figures.json", "state.pt"
EMA = 0.995
WARMUP = 50
SAVE_SECONDS = 60.0


class OutOfTime(Exception):
    """The time budget is spent; what was reached is saved."""


class OtherBudget(Exception):
    """A unit was trained for another number of steps than what it would be compared with: mixed, the figures say nothing."""


@contextmanager
def aside(file: Path) -> Iterator[Path]:
    """Where to write `file` so that it is there whole or not at all: it is renamed at the end."""
    part = file.with_name(f"{file.name}.part")
    yield part
    part.rename(file)


def remembered(file: Path, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
    """What was measured once and is kept as JSON."""
    if not file.exists():
        measured = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside(file) as part:
            part.write_text(json.dumps(measured))
    found: dict[str, object] = json.loads(file.read_text())
    return found


class Trainable(Protocol):
    """What kinetok's trainables of one player have in common."""

    players: Mapping[str, nn.Module]

    def export(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class Course:
    """How long a unit is trained, and at which steps it is measured besides the last."""

    steps: int
    lr: float
    seed: int
    measured_at: tuple[int, ...] = ()
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of single modules over `lr`, as of `PlayerConfig`."""


@dataclass(frozen=True)
class Unit:
    """The folder of one run, and when to stop."""

    folder: Path
    deadline: float
    """On `time.monotonic`'s clock."""

    @property
    def figures(self) -> Path:
        return self.folder / FIGURES

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def read(self, steps: int | None = None) -> dict[str, object]:
        """Figures of a finished run. Raises OtherBudget where it was not one of `steps`."""
        found: dict[str, object] = json.loads(self.figures.read_text())
        if steps is not None and found["steps"] != steps:
            raise OtherBudget(
                f"{self.folder} was trained for {found['steps']} steps, not {steps}: another budget needs another work folder"
            )
        return found

    def marks(self) -> dict[str, dict[str, object]]:
        """What was measured on the way, by step, and the seconds it took to get there; of an unfinished run, what it has passed."""
        if self.figures.exists():
            found: dict[str, dict[str, object]] = json.loads(self.figures.read_text())["marks"]
            return found
        state = self.folder / STATE
        return json.loads(torch.load(state, weights_only=True)["marks"]) if state.exists() else {}

    def run(
        self,
        build: Callable[[], Trainable],
        batch: Callable[[int], dict[str, Tensor]],
        measure: Callable[[], dict[str, object]],
        course: Course,
    ) -> dict[str, object]:
        """Figures of the finished run: `measure` at the end and, under `marks`, at the marks. Raises OutOfTime.

        `measure` is called with the averaged weights in place in what `build` made last.
        """
        if self.figures.exists():
            return self.read(course.steps)
        if time.monotonic() > self.deadline:
            raise OutOfTime(str(self.folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(course.seed)
        loop = Loop(build(), course, self.folder / STATE)
        while loop.step < course.steps:
            if time.monotonic() > self.deadline:
                loop.save()
                raise OutOfTime(str(self.folder))
            loop.advance(batch)
            if loop.step in course.measured_at:
                loop.marks[str(loop.step)] = {**loop.averaged(measure), "seconds": loop.seconds}
        return self._finish(loop, measure, course)

    def _finish(self, loop: "Loop", measure: Callable[[], dict[str, object]], course: Course) -> dict[str, object]:
        def last() -> dict[str, object]:
            loop.trainable.export(self.model)
            return measure()

        figures = {**loop.averaged(last), "marks": loop.marks, "seconds": loop.seconds, "parameters": loop.parameters, **asdict(course)}
        with aside(self.figures) as part:
            part.write_text(json.dumps(figures, indent=1))
        loop.state.unlink(missing_ok=True)
        return figures


class Loop:
    """The training loop and what has to be kept of it."""

    def __init__(self, trainable: Trainable, course: Course, state: Path) -> None:
        self.trainable, self.course, self.state = trainable, course, state
        ((_, self.player),) = trainable.players.items()
        self.trained = [parameter for parameter in self.player.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in self.trained)
        self.optimizer = adamw(self.player, PlayerConfig(lr=course.lr, betas=(0.9, 0.99), weight_decay=0.01, rates=course.rates))
        self.average = Average({"player": self.player}, EMA)
        self.step, self.seconds = 0, 0.0
        self.marks: dict[str, object] = {}
        self.saved = time.monotonic()
        if state.exists():
            self._load()

    def advance(self, batch: Callable[[int], dict[str, Tensor]]) -> None:
        """One step."""
        began = time.monotonic()
        self.step += 1
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.course.lr * min(1.0, self.step / WARMUP)
        self.optimizer.zero_grad()
        loss, _ = self.player(batch(self.step), self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.average.update(self.step)
        self.seconds += time.monotonic() - began
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()

    @torch.no_grad()
    def averaged(self, measure: Callable[[], dict[str, object]]) -> dict[str, object]:
        """`measure` with the averaged weights in place."""
        kept = [parameter.detach().clone() for parameter in self.player.parameters()]
        for parameter, (_, mean) in zip(self.player.parameters(), self.average.full(), strict=True):
            parameter.copy_(mean)
        figures = measure()
        for parameter, own in zip(self.player.parameters(), kept, strict=True):
            parameter.copy_(own)
        return figures

    def save(self) -> None:
        """Write the state, whole or not at all."""
        weights, average = self.player.state_dict(), dict(self.average.full())
        progress = {"step": self.step, "seconds": self.seconds, "marks": json.dumps(self.marks), "course": json.dumps(asdict(self.course))}
        with aside(self.state) as part:
            torch.save({"weights": weights, "average": average, "optimizer": self.optimizer.state_dict(), **progress}, part)
        self.saved = time.monotonic()

    def _load(self) -> None:
        kept = torch.load(self.state, weights_only=True)
        if kept["course"] != json.dumps(asdict(self.course)):
            raise OtherBudget(f"{self.state} is of {kept['course']}, not of {self.course}: another budget needs another work folder")
        self.player.load_state_dict(kept["weights"])
        self.average.load(kept["average"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.step, self.seconds, self.marks = kept["step"], kept["seconds"], json.loads(kept["marks"])
