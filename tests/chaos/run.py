"""A small job under a seeded plan of faults, on a three-node Ray cluster and an object store, against the same job left alone.

`python -m tests.chaos.run --faults 32 --seed 1 --json out.json`; more faults make it longer. The harness is the operator: it starts the
same command again until the job is done, and replaces what was lost. A job that ends before the plan does is begun anew on an empty store.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import yaml
from tests.chaos.faults import KINDS, Repair, Target, draw
from tests.chaos.world import BUCKET, World, open_world, wait_until
from tests.small_job import small_job

from kinetok.infra.artifact import Artifact, Store
from kinetok.infra.storage import Folder
from kinetok.pipelines.data.verify import problems

JOB = small_job("chaos", scenes=16, base_steps=24, grown_steps=24, checkpoint_every=4, eval_every=20, log_every=2)
JOB["stages"]["quality"] = {"kind": "evaluate", "data": "clips", "models": ["base", "grown"], "max_clips": 4}
JOB["resources"] |= {
    "base": {"workers": 2, "batch_size": 1, "max_failures": 3},
    "grown": {"workers": 2, "batch_size": 1, "zero": 1, "max_failures": 3},
}
GAP_SECONDS = (3.0, 6.0)
"""At least, between two faults."""
STUCK_TICKS = 300
"""A fault comes at the latest after so many looks, however little was written meanwhile."""
TRIES = 3
TICK_SECONDS = 0.1
PATIENCE_TICKS = 4000
"""A driver that writes nothing for so many looks hangs. Counted, not timed: the harness may be suspended."""


@dataclass
class Outcome:
    """What a chaos run found."""

    seed: int
    faults: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    drivers: int = 0
    rounds: int = 0
    """Times the whole job was built."""
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """Sentences about results that are not those of the undisturbed run; none is the aim."""


def chaos(folder: Path, *, faults: int, seed: int) -> Outcome:
    """The job alone, then under `faults` faults."""
    outcome = Outcome(seed)
    with open_world(folder) as world:
        job = folder / "job.yaml"
        job.write_text(yaml.safe_dump(JOB | {"store": world.store}))
        wait_until(world.cluster.joined, 300)
        # Where the machine suspends this process for longer than a lease lasts, and the store with it, the job is to be run again.
        calm = any(world.driver(job).wait() == 0 for _ in range(TRIES))
        assert calm, f"the undisturbed job failed: see {folder}/driver.log"
        expected = contents(world)
        # Faults are spread over the job by what it writes; what it must write again only makes them come sooner.
        share = world.written() // (faults + 1)
        began = time.monotonic()
        plan = draw(faults, seed)
        while plan or not outcome.rounds:
            clear(world)
            _round(world, job, plan, share, outcome)
            outcome.wrong += differences(expected, contents(world))
            outcome.wrong += [f"{a.name}: {problem}" for a in artifacts(world) for problem in problems(a)]
            outcome.wrong += leftovers(world)
            _say(outcome, f"the job is done {outcome.rounds} times, {len(outcome.wrong)} findings: {outcome.wrong}")
        outcome.seconds = time.monotonic() - began
    return outcome


def _round(world: World, job: Path, plan: list[str], share: int, outcome: Outcome) -> None:
    """Build the whole job, taking a fault off the front of `plan` each time that `share` objects were written."""
    generator = random.Random(f"{outcome.seed} {len(plan)}")
    outcome.rounds += 1
    repairs: list[Repair] = []
    target = Target(world, _driver(world, job, 0, outcome), generator)
    due, calm_ticks, wrote = time.monotonic() + generator.uniform(*GAP_SECONDS), 0, world.written()
    silent_ticks, seen = 0, wrote
    while True:
        now = time.monotonic()
        for repair in [repair for repair in repairs if repair[0] <= now]:
            repairs.remove(repair)
            repair[1]()
        if target.driver.poll() is not None:
            if target.driver.returncode == 0:
                break
            _say(outcome, f"driver ended with {target.driver.returncode}")
            target.driver = _driver(world, job, target.next_skew, outcome)
            target.next_skew = 0
            calm_ticks = silent_ticks = 0
        if plan and now >= due and (world.written() - wrote >= share or calm_ticks > STUCK_TICKS):
            due, wrote = now + generator.uniform(*GAP_SECONDS), world.written()
            if _strike(plan, target, repairs, outcome):
                calm_ticks = 0
        calm_ticks += 1
        before, seen = seen, world.written()
        silent_ticks = silent_ticks + 1 if seen == before else 0
        if silent_ticks > PATIENCE_TICKS:
            raise TimeoutError(f"the driver hangs: see {world.folder}")
        time.sleep(TICK_SECONDS)
    for _, repair_now in repairs:
        repair_now()
    world.start()


def _driver(world: World, job: Path, skew: int, outcome: Outcome) -> "subprocess.Popen[bytes]":
    """What an operator does: see that the cluster is there, and give the same command again."""
    wait_until(world.cluster.joined, 300)
    outcome.drivers += 1
    _say(outcome, f"driver {outcome.drivers} starts" + (f", {skew:+d} s off" if skew else ""))
    return world.driver(job, skew)


def _strike(plan: list[str], target: Target, repairs: list[Repair], outcome: Outcome) -> bool:
    """Let the first fault of the plan that finds a victim now happen."""
    for kind in list(dict.fromkeys(plan)):
        struck = KINDS[kind][0](target)
        if struck is None:
            continue
        plan.remove(kind)
        outcome.faults[kind] += 1
        _say(outcome, f"{kind}: {struck.what}")
        if struck.repair is not None:
            repairs.append((time.monotonic() + struck.repair[0], struck.repair[1]))
        return True
    return False


def _say(outcome: Outcome, text: str) -> None:
    outcome.log.append(f"{time.strftime('%H:%M:%S')} {text}")
    print(outcome.log[-1], file=sys.stderr, flush=True)  # noqa: T201


def artifacts(world: World) -> list[Artifact]:
    return list(Store(Folder(world.store)).all())


def contents(world: World) -> dict[str, object]:
    """What must not depend on what happened on the way, by artifact: data, weights, counts, metrics lines; not the times in logs."""
    return {artifact.name: (_content(artifact), artifact.record.counts.model_dump(), _steps(artifact)) for artifact in artifacts(world)}


def _content(artifact: Artifact) -> object:
    if artifact.kind == "ingest":  # a listing holds the times of the files it lists
        return artifact.record.metrics
    if artifact.kind == "train":
        return {path: info.sha256 for path, info in artifact.record.files.items() if path.startswith("model/")}
    if artifact.kind == "evaluate":  # holds speeds
        return {name: value for name, value in artifact.record.metrics.items() if name.endswith(("psnr", "ssim"))}
    return artifact.digest


def _steps(artifact: Artifact) -> list[int]:
    """Steps of the lines of metrics: none missing, none doubled."""
    files = sorted(path for path in artifact.record.files if path.startswith("metrics/"))
    return [json.loads(line)["step"] for path in files for line in artifact.folder.read_text(path).splitlines()]


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    names = sorted(expected.keys() | found.keys())
    return [f"{name}: {found.get(name)}, undisturbed {expected.get(name)}" for name in names if expected.get(name) != found.get(name)]


def leftovers(world: World) -> list[str]:
    """Scratch files and leases that a finished store must not hold."""
    return [f"{name}: left over" for name in Folder(world.store).files() if "/_work/" in name or name.endswith("lease.json")]


def clear(world: World) -> None:
    world.proxy.plan = lambda request: None
    boto3.resource("s3").Bucket(BUCKET).objects.all().delete()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write what was found here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # leaves no node behind
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    outcome = chaos(folder, faults=options.faults, seed=options.seed)
    found = {"faults": sum(outcome.faults.values()), "by_kind": dict(outcome.faults), "drivers": outcome.drivers, "rounds": outcome.rounds}
    found |= {"seconds": round(outcome.seconds), "seed": outcome.seed, "wrong": outcome.wrong, "log": outcome.log}
    text = json.dumps(found, indent=1)
    if options.json:
        options.json.write_text(text)
    print(text)  # noqa: T201
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
