"""Which frames are looked at."""

import pytest

from kinetok.tokenizers.divot.frames import sparse_indices, window_starts


@pytest.mark.parametrize(
    ("frames", "seen"), [(16, [0, 4, 8, 12, 15]), (17, [0, 4, 8, 12, 16]), (5, [0, 1, 2, 3, 4]), (1, [0] * 5), (3, [0, 1, 2, 2, 2])]
)
def test_the_tokenizer_sees_equal_steps_and_the_last_frame(frames: int, seen: list[int]) -> None:
    assert sparse_indices(frames) == seen


@pytest.mark.parametrize("source", [8, 24])
@pytest.mark.parametrize(("seconds", "windows"), [(1, 1), (3.875, 1), (7, 3), (38, 19), (39.875, 19), (40, 20), (60, 20), (1000, 20)])
def test_windows_begin_where_the_reference_has_them(seconds: float, windows: int, source: int) -> None:
    """The reference counts frames of the source: a long video in equal segments, else one window after the other (arXiv 2412.04432)."""
    total, window = int(seconds * source), 16 * source / 8
    segment = total / 20 if total >= 20 * window else window
    starts = window_starts(int(seconds * 8))
    assert len(starts) == windows == min(20, max(1, int(total // window)))
    assert [start * source / 8 for start in starts] == pytest.approx([place * segment for place in range(windows)])


def test_windows_end_with_the_video() -> None:
    for total in range(5, 200):
        starts = window_starts(total, 5, most=20)
        assert starts == sorted(starts) and int(starts[-1]) + 5 <= total
