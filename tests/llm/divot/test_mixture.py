"""Shares are exact, every batch of a source comes once, and nothing but the number decides."""

from collections import Counter

import pytest

from kinetok.llm.divot.mixture import CYCLE, Mixture, Once

WEIGHTS = {"video": 1.3, "clip": 1.0, "image": 0.3, "picture": 0.3}


def test_shares_are_exact_in_every_cycle() -> None:
    mixture = Mixture(WEIGHTS, seed=0)
    first, second = ([mixture.draw(cycle * CYCLE + place)[0] for place in range(CYCLE)] for cycle in range(2))
    assert Counter(first) == Counter(second) == {"video": 45, "clip": 35, "image": 10, "picture": 10}
    assert first != second and first != sorted(first)


def test_batches_of_a_source_are_counted_without_gaps() -> None:
    mixture = Mixture(WEIGHTS, seed=0)
    drawn = [mixture.draw(batch) for batch in range(3 * CYCLE)]
    for source in WEIGHTS:
        numbers = [number for name, number in drawn if name == source]
        assert numbers == list(range(len(numbers)))


def test_a_fresh_mixture_draws_the_same_anywhere() -> None:
    drawn = Mixture(WEIGHTS, seed=3)
    assert [Mixture(WEIGHTS, seed=3).draw(batch) for batch in (777, 5)] == [drawn.draw(batch) for batch in (777, 5)]
    assert [drawn.draw(batch) for batch in range(20)] != [Mixture(WEIGHTS, seed=4).draw(batch) for batch in range(20)]


def test_a_source_that_would_never_come_is_refused() -> None:
    with pytest.raises(ValueError, match="gives rare none of 100"):
        Mixture({"often": 1000.0, "rare": 1.0}, seed=0)


def test_once_is_every_sample_with_something_of_each_source_early() -> None:
    once = Once([10, 0, 3, 25], group=4)
    found = [once.draw(position) for position in range(len(once))]
    assert len(once) == 38 and sorted(found) == [(source, number) for source, size in ((0, 10), (2, 3), (3, 25)) for number in range(size)]
    assert found[:11] == [(0, number) for number in range(4)] + [(2, number) for number in range(3)] + [(3, number) for number in range(4)]
    assert once.draw(38) == found[0] and len(Once([0], group=4)) == 0
