"""Seconds, hours and money of a stage: by the slowest sort of process where a record says what one does, else by their number."""

from typing import ClassVar, Literal

import pytest

from kinetok.infra.artifact import Record
from kinetok.infra.sizing import Prices, processes, size
from kinetok.infra.stage import Ask, Resources, Stage


class Coded(Stage):
    """Decode tasks and model actors."""

    kind: Literal["coded"] = "coded"
    rates: ClassVar[dict[str, str]] = {"decode task": "decode", "model actor": "model"}

    def asks(self, resources: Resources) -> tuple[Ask, ...]:
        return Ask("decode task", resources.decoder), Ask("model actor", resources.worker)


class Plainly(Coded):
    """The same without rates."""

    rates: ClassVar[dict[str, str]] = {}


def _record(**metrics: float) -> Record:
    held = Resources(workers=1, decoders=2).model_dump(mode="json")
    facts = {"kind": "coded", "name": "a", "key": "k", "version": 1, "config": {}, "digest": "", "started": "2026-01-01"}
    return Record.model_validate({**facts, "seconds": 100.0, "bytes": 10**9, "resources": held, "metrics": metrics})


def test_the_slowest_sort_of_process_decides() -> None:
    resources = Resources(workers=8, gpus=1, decoders=64)
    found = size(Coded(), resources, _record(decode=10, model=50), samples=1_000_000, scale=50, prices=None)
    assert found.seconds == 1_000_000 / 400  # 64 x 10 decoded, 8 x 50 encoded
    assert (found.cpu_hours, found.gpu_hours) == (pytest.approx(found.seconds / 3600 * 72), pytest.approx(found.seconds / 3600 * 8))
    more = size(
        Coded(), resources.model_copy(update={"workers": 80}), _record(decode=10, model=50), samples=1_000_000, scale=50, prices=None
    )
    assert more.seconds == 1_000_000 / 640


def test_a_record_may_know_of_processes_that_are_not_wanted_now() -> None:
    """What was decoded then may be read from a cache now."""

    class Cached(Coded):
        def asks(self, resources: Resources) -> tuple[Ask, ...]:
            return (Ask("model actor", resources.worker),)

    found = size(Cached(), Resources(workers=4), _record(decode=10, model=50), samples=1_000, scale=1, prices=None)
    assert found.seconds == 1_000 / 200


def test_without_rates_the_least_grown_sort_decides() -> None:
    prices = Prices(cpu_hour=1, gpu_hour=2, storage_gb_month=0.02)
    found = size(Plainly(), Resources(workers=10, gpus=1, decoders=4), _record(), samples=1, scale=6, prices=prices)
    assert found.seconds == 100 * 6 / 2
    assert found.money == pytest.approx(300 / 3600 * (14 + 10 * 2)) and found.storage == pytest.approx(6 * 0.02)


def test_decode_tasks_take_what_is_left_of_the_machine() -> None:
    assert processes(Coded(), Resources(workers=2), 8) == {"decode task": 6, "model actor": 2}
    assert processes(Coded(), Resources(workers=9), 8)["decode task"] == 1
    assert processes(Stage(kind="other"), Resources(), 8) == {"process": 1}
