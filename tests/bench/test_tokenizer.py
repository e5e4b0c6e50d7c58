"""What growing adds to encoding, counted: the frames of the trunk, and little beside them where a trunk begins at the pixels."""

import importlib
from pathlib import Path

import pytest

from kinetok.tokenizers.causal.presets import FULL_4X, FULL_GROWN

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.parametrize("full", [False, True])
def test_flops_of_grown_rungs_are_those_of_the_memoised_trunk_and_little_more(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    bench = importlib.import_module("tokenizer")
    base, grown = (FULL_4X, FULL_GROWN) if full else (bench.OURS["from pixels"], bench.GROWN)
    ratios = bench.flop_ratios(base, grown)
    for rung, most in (("8x", 1.6), ("16x", 1.95)):
        assert bench.MEMOISED[rung] < ratios[rung] < most
