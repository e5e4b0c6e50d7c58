"""Which position of a sequence sees which: causal, but the queries of one clip all see each other (arXiv 2412.04432, section 3.2).

A sequence is told apart by codes, one a position. The mask is four-dimensional and boolean, which transformers hands to SDPA as it is,
so that any causal language model runs unchanged. (Flash attention knows no such mask, and would run causal.)

Legend: B sequences, L positions.
"""

from typing import Final

import torch
from torch import Tensor

PADDING: Final = 0
TEXT: Final = 1
READ: Final = 2
"""A position that holds a token of a clip that is shown to the model."""
QUERY: Final = -1
"""A position whose output is a token of a clip that the model makes."""


def visible(codes_BL: Tensor, *, block: int, window: int | None = None, last: int | None = None) -> Tensor:
    """True where a position (row) sees another (column): (B, 1, L, L), or the last rows alone, (B, 1, last, L).

    Every `block`-th query of a sequence opens a block: it and the `block` - 1 positions after it see each other, whatever their codes
    are, unless they would reach past the end. All else is causal; nobody sees padding; `window` hides all that lies so far back.
    """
    length = codes_BL.shape[1]
    positions_L = torch.arange(length, device=codes_BL.device)
    query_BL = codes_BL == QUERY
    opens_BL = query_BL & ((query_BL.cumsum(1) - 1) % block == 0)
    start_BL = torch.where(opens_BL, positions_L, -block).cummax(1).values
    start_BL = torch.where((positions_L - start_BL < block) & (start_BL + block <= length), start_BL, -1)
    rows = slice(length - (last or length), length)
    behind_RL = positions_L[rows, None] - positions_L
    together_BRL = (start_BL[:, rows, None] == start_BL[:, None]) & (start_BL >= 0)[:, None]
    seen_BRL = ((behind_RL >= 0) | together_BRL) & (codes_BL != PADDING)[:, None]
    if window is not None:
        seen_BRL &= behind_RL < window
    return seen_BRL[:, None]
