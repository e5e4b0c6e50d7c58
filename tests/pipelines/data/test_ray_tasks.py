"""Rows come back as they finish; a user's error keeps its kind and message across processes."""

import threading
from typing import Any

import pytest

from kinetok.infra.errors import DataError, KinetokError, StoreError
from kinetok.infra.stage import Resources
from kinetok.pipelines.data.ray_tasks import each_on_ray


def test_nothing_to_do_starts_nothing() -> None:
    assert list(each_on_ray(lambda item: item, [], resources=Resources(), stop=threading.Event())) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_every_item_once() -> None:
    rows = each_on_ray(
        lambda item: {"square": item["n"] ** 2}, [{"n": n} for n in range(6)], resources=Resources(decoders=2), stop=threading.Event()
    )
    assert sorted(row["square"] for row in rows) == [0, 1, 4, 9, 16, 25]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (DataError("tar 3 is odd"), DataError, "^tar 3 is odd$"),
        (OSError(28, "No space left on device", "x"), StoreError, r"No space left on device.*then run again"),
    ],
)
def test_errors_keep_their_meaning(error: Exception, kind: type[KinetokError], message: str) -> None:
    def fail(item: dict[str, Any]) -> dict[str, Any]:
        raise error

    with pytest.raises(kind, match=message):
        list(each_on_ray(fail, [{"n": 1}], resources=Resources(), stop=threading.Event()))
