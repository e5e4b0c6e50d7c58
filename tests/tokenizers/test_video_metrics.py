"""Video figures against closed forms, and a tiny CLIP and a TorchScript network in place of the trained ones."""

from pathlib import Path

import pytest
import torch
from tests.tokenizers.toy_networks import toy_clip, toy_i3d

from kinetok.tokenizers.video_metrics import I3D, ClipSim, caveat, clip_pixels, frechet


def test_the_distance_between_gaussians_is_that_of_their_moments() -> None:
    """Independent features: (m1 - m2)^2 + (s1 - s2)^2, summed."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    one, other = signs * torch.tensor([2.0, 3.0]), signs * torch.tensor([5.0, 3.0]) + torch.tensor([0.0, 4.0])
    assert frechet(one, other) == pytest.approx(3**2 + 4**2)
    assert frechet(other, one) == pytest.approx(frechet(one, other))
    many = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    assert frechet(many, many) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("samples", "enough"), [(3, False), (4, False), (5, True)])
def test_too_few_samples_are_told_where_their_covariance_is_singular(samples: int, enough: bool) -> None:
    few, many = (torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) for count in (samples, 9))
    centred = few - few.mean(0)
    assert (int(torch.linalg.matrix_rank(centred)) == 4) is enough
    assert (caveat(few, many) is None) is enough and caveat(few, many) == caveat(many, few)
    assert enough or str(caveat(few, many)).startswith(f"{samples} samples are too few for 4 features")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_features_come_from_the_file(tmp_path: Path) -> None:
    i3d = I3D(toy_i3d(tmp_path / "i3d.pt"))
    video = torch.rand(2, 3, 10, 4, 4)
    torch.testing.assert_close(i3d(video), video.double().mean((2, 3, 4)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="10 frames or more"):
        i3d(video[:, :, :9])
    with pytest.raises(ValueError, match="no file here"):
        I3D(tmp_path / "none.pt")
    (tmp_path / "odd.pt").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"no TorchScript file: name what torch\.jit\.save wrote"):
        I3D(tmp_path / "odd.pt")


def test_pixels_reach_clip_cropped_and_normalised() -> None:
    grey = clip_pixels(torch.zeros(1, 3, 8, 16), 4)
    assert grey.shape == (1, 3, 4, 4)
    torch.testing.assert_close(
        grey[0, :, 0, 0], (0.5 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    )
    sides = torch.cat([-torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)], dim=3)
    assert (clip_pixels(sides, 8)[0, 0, 0, :3] < 0).all() and (clip_pixels(sides, 8)[0, 0, 0, -3:] > 0).all()


def test_clipsim_is_the_cosine_of_frames_and_caption(tmp_path: Path) -> None:
    clip = ClipSim(toy_clip(tmp_path))
    video = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    found = clip(video, ["red disc", "disc"])
    assert found.shape == (2,) and (found.abs() <= 1).all()
    torch.testing.assert_close(clip(video[1:], ["disc"])[0], found[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip(video[:1, :, :1].expand(-1, -1, 3, -1, -1), ["disc"]), clip(video[:1, :, :1], ["disc"]))
