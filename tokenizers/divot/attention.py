"""`attend`: multi-head attention of projected queries, keys and values, which every network of Divot is made of.

Legend: B samples, N queries, M keys, D width of all heads together, A heads, K width of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(q_BND: Tensor, k_BMD: Tensor, v_BMD: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(K)) v of each head, heads side by side again, (B, N, D)."""
    q_BANK, k_BAMK, v_BAMK = (torch.unflatten(x_BND, -1, (heads, -1)).transpose(1, 2) for x_BND in (q_BND, k_BMD, v_BMD))
    return F.scaled_dot_product_attention(q_BANK, k_BAMK, v_BAMK).transpose(1, 2).flatten(2)
