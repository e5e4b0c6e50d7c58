"""Windows, scores and filters of one video."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.pipelines.data.videos import encode, moving

from kinetok.pipelines.data.clip_index import Row
from kinetok.pipelines.data.cut import cut_video
from kinetok.pipelines.data.decode import decode_clips
from kinetok.pipelines.data.reasons import BadVideo, Reason
from kinetok.pipelines.data.recipe import CutRecipe, Filters


def _rows(pictures: Sequence[NDArray[np.uint8]], **fields: object) -> list[Row]:
    recipe = CutRecipe.model_validate({"fps": 8, "frames": 5, "height": 32, "width": 32, **fields})
    return list(cut_video(encode(pictures, rate=8), "v", recipe))


@pytest.mark.parametrize(
    ("frames", "stride", "most", "starts"),
    [
        (5, None, None, [0]),
        (14, None, None, [0, 5]),
        (15, None, None, [0, 5, 10]),
        (15, 2, None, [0, 2, 4, 6, 8, 10]),
        (15, 2, 3, [0, 2, 4]),
    ],
)
def test_windows(frames: int, stride: int | None, most: int | None, starts: list[int]) -> None:
    rows = _rows(moving(frames), stride=stride, max_clips_per_video=most)
    assert [row["start"] for row in rows] == [start / 8 for start in starts]
    assert [row["end"] for row in rows] == [(start + 5) / 8 for start in starts]
    assert [row["id"] for row in rows] == [f"v/{start * 125}" for start in starts]
    assert {row["decision"] for row in rows} == {"kept"}
    assert (rows[0]["width"], rows[0]["height"], rows[0]["source_fps"]) == (64, 48, 8)


def test_every_window_of_the_index_decodes() -> None:
    data = encode(moving(100), rate=Fraction(30000, 1001))
    recipe = CutRecipe(fps=7, frames=6, stride=5, height=16, width=16)
    starts = [float(row["start"] or 0) for row in cut_video(data, "v", recipe)]
    assert len(list(decode_clips(data, starts=starts, fps=7, frames=6, height=16, width=16))) == len(starts) == 4


def test_scores_are_those_of_the_decoded_window() -> None:
    data = encode(moving(20), rate=8)
    recipe = CutRecipe(fps=8, frames=5, height=32, width=32)
    rows = list(cut_video(data, "v", recipe))
    clips = decode_clips(data, starts=[float(row["start"] or 0) for row in rows], fps=8, frames=5, height=32, width=32)
    for row, clip in zip(rows, clips, strict=True):
        luma = clip @ np.array([0.299, 0.587, 0.114])
        assert row["motion"] == pytest.approx(np.abs(np.diff(luma, axis=0)).mean(), rel=1e-3)
        assert row["luma_mean"] == pytest.approx(luma.mean(), rel=1e-3)
        assert row["luma_std"] == pytest.approx(luma.std((1, 2)).mean(), rel=1e-3)


def _static() -> list[NDArray[np.uint8]]:
    return moving(1) * 12


@pytest.mark.parametrize(
    ("pictures", "fields", "reason"),
    [
        (moving(4), {}, Reason.TOO_SHORT),
        (moving(12), {"filters": {"min_seconds": 2}}, Reason.TOO_SHORT),
        (moving(12), {"filters": {"max_seconds": 1}}, Reason.DURATION),
        (moving(12), {"filters": {"min_side": 50}}, Reason.SMALL),
        (moving(12, height=16, width=96), {"filters": {"min_side": 16}}, Reason.ASPECT),
        (_static(), {}, Reason.STATIC),
        ([picture // 100 for picture in moving(12)], {}, Reason.DARK),
        ([np.full((48, 64, 3), 90 + 4 * i, np.uint8) for i in range(12)], {}, Reason.FLAT),
    ],
    ids=lambda value: str(value) if isinstance(value, Reason) else "",
)
def test_filters(pictures: list[NDArray[np.uint8]], fields: dict[str, object], reason: Reason) -> None:
    rows = _rows(pictures, **fields)
    assert {(row["decision"], row["reason"]) for row in rows} == {("filtered", reason.value)}
    assert all(row["message"] for row in rows)
    whole_video = reason not in (Reason.STATIC, Reason.DARK, Reason.FLAT)
    assert [row.get("start") is None for row in rows] == ([True] if whole_video else [False, False])


def test_each_window_is_judged_by_itself() -> None:
    rows = _rows([*moving(5), *_static()[:10], *moving(5)])
    assert [row["decision"] for row in rows] == ["kept", "filtered", "filtered", "kept"]


def test_frames_held_for_long_are_static() -> None:
    times = [Fraction(i, 8) for i in range(5)] + [Fraction(3), Fraction(4)]
    data = encode(moving(7), times=times)
    rows = list(cut_video(data, "v", CutRecipe(fps=8, frames=5, height=32, width=32)))
    assert [row.get("reason") for row in rows[:3]] == [None, "static", "static"]


def test_filters_can_be_opened_wide() -> None:
    wide = Filters(min_side=1, max_aspect=16, min_motion=0, min_luma=0, min_contrast=0)
    assert {row["decision"] for row in _rows(_static(), filters=wide.model_dump())} == {"kept"}


def test_a_bad_video_gives_no_rows_at_all() -> None:
    data = encode([picture for _ in range(4) for picture in moving(24)], rate=24)
    with pytest.raises(BadVideo):
        cut_video(data[: len(data) * 2 // 3], "v", CutRecipe(fps=8, frames=5, height=32, width=32))
