"""Batches of samples, and the order they are made in."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kinetok.llm.divot.collate import bucketed, collate
from kinetok.llm.divot.mask import PADDING, READ
from kinetok.llm.divot.sequences import IGNORED, depict, describe
from kinetok.llm.divot.vocabulary import Vocabulary


def test_labels_and_tokens_stay_with_their_positions(vocabulary: Vocabulary, clips: Callable[[int], Tensor]) -> None:
    samples = [describe(vocabulary, clips(2), "abc", limit=100), depict(vocabulary, "a longer caption", clips(1), limit=100)]
    batch = collate(samples, [7, 8], multiple=16)
    assert batch["ids_BL"].shape == batch["codes_BL"].shape == (2, 32)
    assert batch["seed_B"].tolist() == [7, 8]
    for row, sample in enumerate(samples):
        assert batch["ids_BL"][row, : len(sample)].tolist() == sample.ids_L
        assert (batch["codes_BL"][row, len(sample) :] == PADDING).all()
        learned = [(at, label) for at, label in enumerate(sample.labels_L) if label != IGNORED]
        kept = batch["label_BM"][row] != IGNORED
        found = zip((batch["label_at_BM"][row][kept] + 1).tolist(), batch["label_BM"][row][kept].tolist(), strict=True)
        assert list(found) == learned
    assert torch.equal(batch["read_BND"][0], samples[0].read_CND.flatten(0, 1)) and not batch["read_BND"][1].any()
    assert (batch["codes_BL"] == READ).sum() == 16
    assert torch.equal(batch["written_BND"][1], samples[1].written_CND[0])


def test_a_batch_names_only_what_it_has(vocabulary: Vocabulary, clips: Callable[[int], Tensor]) -> None:
    assert "written_BND" not in collate([describe(vocabulary, clips(1), "a", limit=100)], [0])
    assert "read_BND" not in collate([depict(vocabulary, "a", clips(1), limit=100)], [0])


def test_buckets_hold_like_lengths_and_every_sample_once() -> None:
    lengths = np.random.default_rng(0).integers(10, 1000, 1003)
    order = bucketed(lengths, batch=8, window=16, seed=3)
    assert sorted(order) == list(range(1003)) and order[1000:].tolist() == [1000, 1001, 1002]

    def waste(places: np.ndarray) -> float:
        groups = lengths[places[:1000]].reshape(-1, 8)
        return float(1 - groups.sum() / (groups.max(1) * 8).sum())

    assert waste(order) < 0.1 and waste(np.arange(1003)) > 0.3
    assert (np.abs(order[:1000] - np.arange(1000)) < 8 * 16).all()
    assert (order == bucketed(lengths, batch=8, window=16, seed=3)).all()
    assert (order != bucketed(lengths, batch=8, window=16, seed=4)).any()
    firsts = lengths[order[:1000]].reshape(-1, 8)[:, 0]
    assert (np.diff(firsts[:16]) < 0).any(), "batches of a window are in no order"
