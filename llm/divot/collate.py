"""Samples to a batch: padding on the right, positions of labels, and buckets of like lengths.

A batch holds only what its samples have: `read_BND` where some are shown a clip, `written_BND` where some make one. What a model
must compute thus follows from the names in the batch, and no step has to look at numbers on a GPU to know it. Labels come with the
positions that predict them, so that logits are made there alone: of a thousand positions of video, none has any.

Legend: B samples, L positions, N tokens of all a sample's clips, M labels of a sample, D token width.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kinetok.llm.divot.mask import PADDING
from kinetok.llm.divot.sequences import IGNORED, Packed
from kinetok.tokenizers.base import Batch


def collate(samples: Sequence[Packed], seeds: Sequence[int], *, multiple: int = 8) -> Batch:
    """`ids_BL`, `codes_BL`, `label_BM` (`IGNORED` where there is none), `label_at_BM` (the position before the label's own), `seed_B`,
    and `read_BND` and `written_BND`, zero past a sample's own tokens. Lengths are padded to a multiple, so that few shapes occur.
    """
    length = -(-max(map(len, samples)) // multiple) * multiple
    labels = [torch.tensor(sample.labels_L) for sample in samples]
    at = [(row != IGNORED).nonzero()[:, 0] for row in labels]
    batch = {
        "ids_BL": _right_padded([torch.tensor(sample.ids_L) for sample in samples], length, 0),
        "codes_BL": _right_padded([torch.tensor(sample.codes_L) for sample in samples], length, PADDING),
        "label_BM": pad_sequence([row[places] for row, places in zip(labels, at, strict=True)], batch_first=True, padding_value=IGNORED),
        "label_at_BM": pad_sequence([places - 1 for places in at], batch_first=True),
        "seed_B": torch.tensor(seeds),
    }
    for name, clips in (("read_BND", [s.read_CND for s in samples]), ("written_BND", [s.written_CND for s in samples])):
        if any(map(len, clips)):
            width = max(clip_CND.shape[-1] for clip_CND in clips)
            batch[name] = pad_sequence([clip_CND.reshape(-1, width).float() for clip_CND in clips], batch_first=True)
    return batch


def _right_padded(rows: list[Tensor], length: int, value: int) -> Tensor:
    padded_BL = torch.full((len(rows), length), value)
    for target, row in zip(padded_BL, rows, strict=True):
        target[: len(row)] = row
    return padded_BL


def bucketed(lengths: NDArray[np.int64], *, batch: int, window: int, seed: int) -> NDArray[np.int64]:
    """An order of the samples in which every run of `batch` has about one length: (len(lengths),) places.

    Samples only move inside their own window of `window` batches, which are then shuffled, so that an order stays random at large and
    no step is always followed by a longer one. What is left at the end keeps its place.
    """
    whole = len(lengths) // batch * batch
    order = np.arange(len(lengths))
    for number, start in enumerate(range(0, whole, batch * window)):
        places = order[start : min(start + batch * window, whole)]
        groups = places[np.argsort(lengths[places], kind="stable")].reshape(-1, batch)
        shuffled = np.random.Generator(np.random.PCG64([seed, number])).permutation(len(groups))
        order[start : start + len(places)] = groups[shuffled].ravel()
    return order
