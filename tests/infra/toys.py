"""A toy job without Ray: `numbers` writes one file a number, `sum` adds them up. Also a script, to be run and killed by tests."""

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field, StrictInt
from rich.console import Console

from kinetok.infra.artifact import MANIFEST, Counts, Store, digest_of_file
from kinetok.infra.config import Config
from kinetok.infra.errors import DataError
from kinetok.infra.job import Job, apply_override, parse_job
from kinetok.infra.run import Selection, run
from kinetok.infra.stage import Produces, Ref, Stage, StageContext, StageResult
from kinetok.infra.storage import Folder

hooks: dict[str, Callable[[StageContext], None]] = {}
"""What a stage does before anything else, by its name."""
built: list[str] = []
"""Names of the stages that ran, in the order of their starts."""


class Scale(Config):
    """A nested section."""

    factor: Annotated[float, Field(gt=0)] = 1.0
    offset: float = 0.0


class Numbers(Stage):
    """`parts/{i}.txt` holds the i-th number."""

    kind: Literal["numbers"] = "numbers"
    version: ClassVar[int] = 1
    count: Annotated[StrictInt, Field(ge=1)] = 3
    bad: Annotated[StrictInt, Field(ge=0)] = 0
    """Numbers to quarantine, at the end."""

    def run(self, ctx: StageContext) -> StageResult:
        _begin(ctx)
        lines = []
        for i in range(self.count - self.bad):
            name = f"parts/{i}.txt"
            if not ctx.out.exists(name):
                _pause(ctx, i)
                ctx.out.write_text(name, str(i))
            lines.append(json.dumps({"path": name, "bytes": ctx.out.size(name), "sha256": digest_of_file(ctx.out, name)}))
            ctx.progress(done=i + 1, total=self.count, unit="numbers")
        ctx.out.write_text("_work/scratch", "gone after publishing")
        ctx.out.write_text(MANIFEST, "\n".join(lines))
        return StageResult(counts=Counts(input=self.count, written=self.count - self.bad, quarantined=self.bad))


class Sum(Stage):
    """`sum.txt` holds the sum of all numbers."""

    kind: Literal["sum"] = "sum"
    numbers: Annotated[Ref, Produces("numbers")]
    more: tuple[Annotated[Ref, Produces("numbers")], ...] = ()
    start: Annotated[Ref, Produces("sum")] | None = None
    scale: Scale = Scale()

    def run(self, ctx: StageContext) -> StageResult:
        _begin(ctx)
        total = self.scale.offset
        for numbers in (ctx.input("numbers"), *ctx.several("more")):
            total += sum(float(numbers.folder.read_text(str(line["path"]))) for line in numbers.manifest())
        earlier = ctx.optional("start")
        total = total * self.scale.factor + (float(earlier.folder.read_text("sum.txt")) if earlier else 0)
        ctx.out.write_text("sum.txt", str(total))
        return StageResult({"sum": total, "unknown": float("nan")})


class Lossy(Numbers):
    """Loses a sample without a word."""

    kind: Literal["lossy"] = "lossy"  # type: ignore[assignment]

    def run(self, ctx: StageContext) -> StageResult:
        return StageResult(counts=Counts(input=self.count, written=self.count - 1))


CATALOG: tuple[type[Stage], ...] = (Numbers, Sum, Lossy)


def raw_job(store: object) -> dict[str, object]:
    """Two sources, a sum of each, and one that stands on the first sum."""
    return {
        "name": "toy",
        "store": str(store),
        "tracking": None,
        "stages": {
            "few": {"kind": "numbers"},
            "many": {"kind": "numbers", "count": 5},
            "total": {"kind": "sum", "numbers": "few", "more": ["many"], "scale": {"factor": 2}},
            "other": {"kind": "sum", "numbers": "many"},
            "last": {"kind": "sum", "numbers": "few", "start": "total"},
        },
    }


def job(store: object, *overrides: str) -> tuple[Job, Store]:
    raw = raw_job(store)
    for override in overrides:
        apply_override(raw, override)
    return parse_job(raw, CATALOG), Store(Folder(str(store)))


def _begin(ctx: StageContext) -> None:
    built.append(ctx.name)
    if ctx.name in hooks:
        hooks[ctx.name](ctx)


def _pause(ctx: StageContext, part: int) -> None:
    """In the script: say so and wait for a line, where the environment asks for it."""
    if os.environ.get("TOY_PAUSE") == f"{ctx.name}:{part}":
        sys.stdout.write("paused\n")
        sys.stdout.flush()
        sys.stdin.readline()


def fail(ctx: StageContext) -> None:
    """A hook: an error a user can act on."""
    raise DataError(f"{ctx.name} has no data: give it some")


def crash(ctx: StageContext) -> None:
    """A hook: a bug."""
    raise ZeroDivisionError(f"bug in {ctx.name}")


def until_stopped(ctx: StageContext) -> None:
    """A hook: work that only ends when the run is stopped."""
    while True:
        ctx.check()
        threading.Event().wait(0.01)


if __name__ == "__main__":
    toy, place = job(sys.argv[1], *sys.argv[2:])
    state = run(toy, place, Selection(), console=Console(file=sys.stderr, force_terminal=False))
    sys.stdout.write(f"{json.dumps({name: stage.status for name, stage in state.stages.items()})}\n")
    sys.exit(0 if state.succeeded else 1)
