"""The mask against the official one, and what it is for."""

import torch
from tests import golden_files

from kinetok.llm.divot.mask import PADDING, QUERY, READ, TEXT, visible


def test_official_masks() -> None:
    golden = golden_files.read("09_attention_mask")
    codes = golden.tensors["in.codes"]
    assert torch.equal(visible(codes, block=64), golden.tensors["out.visible"])
    assert torch.equal(visible(codes[:4], block=64, window=48), golden.tensors["out.visible_window48"])


def test_the_official_mask_for_sdpa_differs_before_the_first_text_alone() -> None:
    """There its rows see everything, so that no softmax is over nothing."""
    golden = golden_files.read("09_attention_mask", whole=True)
    codes = golden.tensors["in.codes"]
    before_BL = (codes > 0).cumsum(1) == 0
    assert torch.equal(visible(codes, block=64) | before_BL[:, None, :, None], golden.tensors["out.visible_sdpa"])


def test_queries_of_a_clip_see_each_other_and_no_later_clip() -> None:
    codes = torch.tensor([[TEXT, READ, QUERY, QUERY, TEXT, QUERY, QUERY, PADDING]])
    seen = visible(codes, block=2)[0, 0]
    assert seen[2].tolist() == [True, True, True, True, False, False, False, False]
    assert seen[4].tolist() == [True] * 5 + [False] * 3
    assert seen[5].tolist() == [True] * 7 + [False]
    assert not seen[:, 7].any()


def test_last_rows_are_those_of_the_whole_mask() -> None:
    codes = torch.tensor([[PADDING, TEXT, TEXT, QUERY, QUERY], [TEXT, TEXT, TEXT, QUERY, QUERY]])
    assert torch.equal(visible(codes, block=2, last=3), visible(codes, block=2)[:, :, 2:])
