"""Which frames are looked at."""

import pytest
import torch

from kinetok.tokenizers.divot.frames import comprehension_windows, dense_indices, sparse_indices


@pytest.mark.parametrize(
    ("frames", "seen"), [(16, [0, 4, 8, 12, 15]), (17, [0, 4, 8, 12, 16]), (5, [0, 1, 2, 3, 4]), (1, [0] * 5), (3, [0, 1, 2, 2, 2])]
)
def test_the_tokenizer_sees_equal_steps_and_the_last_frame(frames: int, seen: list[int]) -> None:
    assert sparse_indices(frames) == seen


@pytest.mark.parametrize("fps", [8, 24, 25, 29.97, 30, 60])
def test_a_window_is_two_seconds_at_eight_frames_a_second(fps: float) -> None:
    indices = dense_indices(1000, fps, start=100)
    assert indices == [int(100 + place * fps / 8) for place in range(16)]


def test_a_short_video_is_sampled_more_densely() -> None:
    assert dense_indices(32, 24) == list(range(0, 32, 2))
    assert dense_indices(8, 24) == [place // 2 for place in range(16)]
    assert dense_indices(100, 24, start=84) == list(range(84, 100))
    with pytest.raises(ValueError, match="not one of the 8 frames"):
        dense_indices(8, 24, start=8)


def test_a_long_video_gives_a_window_of_every_segment() -> None:
    windows = comprehension_windows(2000, 24)
    assert [window[0] for window in windows.indices] == list(range(0, 2000, 100)) and all(windows.mask)
    assert windows.indices[0] == tuple(range(0, 48, 3))
    drawn = comprehension_windows(2000, 24, generator=torch.Generator().manual_seed(0))
    assert drawn.indices != windows.indices
    for place, window in enumerate(drawn.indices):
        assert 100 * place <= window[0] and window[-1] < 100 * (place + 1)


def test_a_short_video_gives_fewer_windows_unless_all_are_asked_for() -> None:
    windows = comprehension_windows(150, 24)
    assert [window[0] for window in windows.indices] == [0, 48, 96]
    assert windows.mask == (True,) * 3 + (False,) * 17
    assert len(comprehension_windows(20, 24).indices) == 1
    exact = comprehension_windows(150, 24, clips=5, exact=True)
    assert [window[0] for window in exact.indices] == [0, 30, 60, 90, 120] and exact.mask == (True,) * 5
    assert exact.indices[-1][-1] < 150
