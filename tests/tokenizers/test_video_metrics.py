"""Video figures against closed forms, and a tiny CLIP and a TorchScript network in place of the trained ones."""

from pathlib import Path

import pytest
import torch

from kinetok.tokenizers.video_metrics import I3D, ClipSim, clip_pixels, frechet


def test_the_distance_between_gaussians_is_that_of_their_moments() -> None:
    """Independent features: (m1 - m2)^2 + (s1 - s2)^2, summed."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    one, other = signs * torch.tensor([2.0, 3.0]), signs * torch.tensor([5.0, 3.0]) + torch.tensor([0.0, 4.0])
    assert frechet(one, other) == pytest.approx(3**2 + 4**2)
    assert frechet(other, one) == pytest.approx(frechet(one, other))
    many = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    assert frechet(many, many) == pytest.approx(0, abs=1e-4)


class Network(torch.nn.Module):
    """Called as I3D is."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert not rescale and resize and return_features
        return x.mean(dim=[2, 3, 4])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_features_come_from_the_file(tmp_path: Path) -> None:
    torch.jit.script(Network()).save(str(tmp_path / "i3d.pt"))
    i3d = I3D(tmp_path / "i3d.pt")
    video = torch.rand(2, 3, 10, 4, 4)
    torch.testing.assert_close(i3d(video), video.double().mean((2, 3, 4)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="10 frames or more"):
        i3d(video[:, :, :9])
    with pytest.raises(ValueError, match="no file here"):
        I3D(tmp_path / "none.pt")


def test_pixels_reach_clip_cropped_and_normalised() -> None:
    grey = clip_pixels(torch.zeros(1, 3, 8, 16), 4)
    assert grey.shape == (1, 3, 4, 4)
    torch.testing.assert_close(
        grey[0, :, 0, 0], (0.5 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    )
    sides = torch.cat([-torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8)], dim=3)
    assert (clip_pixels(sides, 8)[0, 0, 0, :3] < 0).all() and (clip_pixels(sides, 8)[0, 0, 0, -3:] > 0).all()


def test_clipsim_is_the_cosine_of_frames_and_caption(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = Words(WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2, "disc": 3, "[EOS]": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]").save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 8, "max_position_embeddings": 8, "eos_token_id": 4, "bos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    clip = ClipSim(str(tmp_path))
    video = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    found = clip(video, ["red disc", "disc"])
    assert found.shape == (2,) and (found.abs() <= 1).all()
    torch.testing.assert_close(clip(video[1:], ["disc"])[0], found[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clip(video[:1, :, :1].expand(-1, -1, 3, -1, -1), ["disc"]), clip(video[:1, :, :1], ["disc"]))
