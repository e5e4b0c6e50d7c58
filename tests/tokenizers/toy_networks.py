"""Networks in place of the trained ones that figures need, as files: a TorchScript I3D of three features, a tiny CLIP, a random VGG16."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from kinetok.tokenizers.causal.perceptual import Lpips


class Network(torch.nn.Module):
    """Called as I3D is: the mean of each colour."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert not rescale and resize and return_features
        return x.mean(dim=[2, 3, 4])


def toy_i3d(file: Path) -> str:
    """The network as TorchScript; its tests ignore torch's warning that this is deprecated."""
    torch.jit.script(Network()).save(str(file))
    return str(file)


def toy_clip(folder: Path) -> str:
    """A CLIP of 8 x 8 pixels that knows two words."""
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    words = Words(WordLevel({"[PAD]": 0, "[UNK]": 1, "red": 2, "disc": 3, "[EOS]": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]").save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 8, "max_position_embeddings": 8, "eos_token_id": 4, "bos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return str(folder)


def random_vgg() -> dict[str, Tensor]:
    """VGG16's convolutions under torchvision's names, with random weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, weight in Lpips().features.state_dict().items():
        deviation = (2 / weight[0].numel()) ** 0.5 if weight.ndim == 4 else 0.1
        state[f"features.{name}"] = deviation * torch.randn(weight.shape, generator=generator)
    return state


def toy_vgg(file: Path) -> str:
    """The same as a file."""
    save_file(random_vgg(), file)
    return str(file)
