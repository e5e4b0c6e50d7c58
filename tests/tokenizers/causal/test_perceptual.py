"""LPIPS against torchmetrics' own network, which is given a VGG16 because torchvision is not installed; and loading of weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.tokenizers.toy_networks import random_vgg
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as reference

from kinetok.tokenizers.causal.perceptual import Lpips, load_lpips, published_heads

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def vgg() -> Weights:
    return random_vgg()


@pytest.fixture(scope="module")
def file(vgg: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    save_file(vgg | {"classifier.0.weight": torch.zeros(1)}, path)
    return path


@pytest.fixture(scope="module")
def net(file: Path) -> Lpips:
    return load_lpips(str(file))


def videos(size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.rand((2, 2, 3, 3, size, size), generator=generator) * 2 - 1
    return x, y


def torchvision_features(vgg: Weights) -> nn.Sequential:
    """`torchvision.models.vgg16().features`, from its configuration D (M is a pooling)."""
    layers: list[nn.Module] = []
    width = 3
    for entry in (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"):
        if isinstance(entry, int):
            layers += [nn.Conv2d(width, entry, 3, padding=1), nn.ReLU()]
            width = entry
        else:
            layers.append(nn.MaxPool2d(2, 2))
    features = nn.Sequential(*layers)
    features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in vgg.items()})
    return features


def test_it_is_torchmetrics_lpips_averaged_over_frames(vgg: Weights, net: Lpips, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_: torchvision_features(vgg))
    theirs = reference._LPIPS(pretrained=True, net="vgg")
    x, y = videos()
    expected = [[theirs(a[:, t][None], b[:, t][None]).item() for t in range(3)] for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(net(x, y), torch.tensor(expected).mean(1), rtol=1e-5, atol=1e-7)


def test_it_is_zero_between_equals_and_has_a_finite_gradient_everywhere(net: Lpips) -> None:
    x, y = videos()
    assert net(x, x).tolist() == [0, 0]
    flat = torch.zeros_like(y).requires_grad_()
    net(flat, y).sum().backward()
    assert flat.grad is not None and flat.grad.isfinite().all() and flat.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in net.parameters())


def test_autocast_leaves_a_float32_figure_near_the_exact_one(net: Lpips) -> None:
    x, y = videos()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(x, y)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, net(x, y), rtol=0.02, atol=0)


def test_names_of_torchvision_and_of_lpips_lead_to_one_network(vgg: Weights, net: Lpips, tmp_path: Path) -> None:
    starts = (0, 4, 9, 16, 23)  # where `lpips` cuts the convolutions into five slices
    official: Weights = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    for name, tensor in vgg.items():
        _, number, kind = name.split(".")
        piece = sum(int(number) >= start for start in starts)
        official[f"net.slice{piece}.{number}.{kind}"] = tensor
    for name, tensor in published_heads().items():
        official |= {name: 2 * tensor, name.replace("lin", "lins."): 2 * tensor}
    torch.save(official, tmp_path / "lpips.pth")
    x, y = videos()
    torch.testing.assert_close(load_lpips(str(tmp_path / "lpips.pth"))(x, y), 2 * net(x, y))


def test_what_a_file_lacks_is_listed(vgg: Weights, tmp_path: Path) -> None:
    broken = {name: tensor for name, tensor in vgg.items() if name != "features.28.bias"}
    broken |= {"features.0.bias": torch.zeros(3), "net.other": torch.zeros(1)}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"missing features\.28\.bias; unknown net\.other; features\.0\.bias is \(3,\) instead of \(64,\)"):
        load_lpips(str(tmp_path / "broken.safetensors"))


def test_a_name_that_leads_nowhere_is_told_apart_from_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is no file here, and no owner/repository/file"):
        load_lpips(str(tmp_path / "nothing.pth"))

    def refuse(repository: str, name: str) -> str:
        raise FileNotFoundError(f"no {name} in {repository}")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ValueError, match=r"does not give it: no model\.safetensors in owner/vgg16"):
        load_lpips("owner/vgg16")


def test_a_hub_name_is_fetched(file: Path, net: Lpips, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    load_lpips("owner/repository/folder/vgg.safetensors")
    assert asked == [("owner/repository", "folder/vgg.safetensors")]
