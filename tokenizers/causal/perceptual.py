"""LPIPS, the learned perceptual distance of images (arXiv 1801.03924), on VGG16: how far apart two videos look, frame by frame.

    d(x, y) = sum over five layers l of  mean over positions of  w_l . (f_l(x) / |f_l(x)| - f_l(y) / |f_l(y)|)^2

f_l are VGG16's activations after its convolutions 2, 4, 7, 10 and 13, w_l one number a channel. There are no weights here: a job names
those of VGG16 (torchvision's and the `lpips` package's names are understood), and only the 1,472 numbers w_l, which torchmetrics
carries with it, are taken from there where the file has none. Not covered: other backbones, resizing, spatial maps.

Legend: B clips, C channels, T H W frames, rows, columns, N images.
"""

import re
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

LEVELS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(width, convolutions) between two poolings."""
EPSILON = 1e-8
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation for pixels in [-1, 1], rounded as `lpips` rounds them."""
UNUSED = ("classifier.", "scaling_layer.", "pre_logits.", "head.")
"""Beginnings of names that published files carry beside what LPIPS needs."""
HUB_FILE = "model.safetensors"
Weights = dict[str, Tensor]


class Lpips(nn.Module):
    """Distance of two videos (B, 3, T, H, W) in [-1, 1] (a little outside does no harm), the mean over frames: (B,), at least 0.

    H and W at least 16. Convolutions run in the type autocast gives them; normalising and averaging are float32.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: set[int] = set()
        width_in = 3
        for width, depth in LEVELS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(depth):
                layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.ReLU()]
                width_in = width
            self.taps.add(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList(torch.ones(1, width, 1, 1) for width, _ in LEVELS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def forward(self, video_BCTHW: Tensor, target_BCTHW: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.activations(_images(target_BCTHW))
        distance_N = torch.zeros((), device=video_BCTHW.device)
        for w_1C11, x_NCHW, y_NCHW in zip(self.heads, self.activations(_images(video_BCTHW)), target, strict=True):
            distance_N = distance_N + (w_1C11 * (_unit(x_NCHW) - _unit(y_NCHW)).square()).sum(1).mean((1, 2))
        return distance_N.view(len(video_BCTHW), -1).mean(1)

    def activations(self, images_NCHW: Tensor) -> list[Tensor]:
        """f_1 ... f_5 of images in [-1, 1]."""
        x_NCHW, found = (images_NCHW - self.shift) / self.scale, []
        for number, layer in enumerate(self.features):
            x_NCHW = layer(x_NCHW)
            if number in self.taps:
                found.append(x_NCHW)
        return found


def _images(video_BCTHW: Tensor) -> Tensor:
    return video_BCTHW.transpose(1, 2).flatten(0, 1)


def _unit(x_NCHW: Tensor) -> Tensor:
    """Every position's channels at length 1, float32; the small number keeps the gradient finite where all are zero."""
    precise = x_NCHW.float()
    return precise * (precise.square().sum(1, keepdim=True) + EPSILON).rsqrt()


def load_lpips(weights: str) -> Lpips:
    """LPIPS with the weights that `weights` names: a file, or `owner/repository` or `owner/repository/file` on the Hugging Face hub.

    The file is safetensors, or what torch saves (read without unpickling code), and holds VGG16's convolutions as torchvision or as
    `lpips` names them. ValueError lists every weight that is missing, unknown or of another shape, or says that nothing was found.
    """
    found = {_our_name(name): tensor for name, tensor in _read(required(weights)).items() if not name.startswith(UNUSED)}
    if not any(name.startswith("heads.") for name in found):
        found |= {_our_name(name): tensor for name, tensor in published_heads().items()}
    net = Lpips()
    if complaints := _differences(net.state_dict(), found):
        raise ValueError(f"{weights} does not hold the weights of LPIPS on VGG16: {'; '.join(complaints)}")
    net.load_state_dict(found)
    return net.eval().requires_grad_(False)


def published_heads() -> Weights:
    """w_1 ... w_5 for VGG16, version 0.1 of `lpips`, under its names."""
    return _read(Path(str(files("torchmetrics"))) / "functional" / "image" / "lpips_models" / "vgg.pth")


def _our_name(name: str) -> str:
    """`net.slice2.5.bias` is torchvision's `features.5.bias`; `lin0.model.1.weight` and `lins.0.model.1.weight` are `heads.0`."""
    name = re.sub(r"^net\.slice\d\.", "features.", name)
    return re.sub(r"^lins?\.?(\d)\.model\.1\.weight$", r"heads.\1", name)


def _differences(ours: Weights, found: Weights) -> list[str]:
    missing, unknown = sorted(ours.keys() - found.keys()), sorted(found.keys() - ours.keys())
    misshapen = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(ours[name].shape)}"
        for name in sorted(ours.keys() & found.keys())
        if found[name].shape != ours[name].shape
    ]
    lists = (("missing", missing), ("unknown", unknown))
    return [f"{title} {', '.join(names)}" for title, names in lists if names] + misshapen


def _read(file: Path) -> Weights:
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        state: Weights = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise ValueError(f"{file} holds more than tensors, or is damaged: it is not loaded ({str(error).splitlines()[0]})") from error
    return state


def required(weights: str) -> Path:
    """`locate`, with a download where it takes one."""
    file = locate(weights)
    assert file is not None, "only without a download"
    return file


def locate(weights: str, *, download: bool = True) -> Path | None:
    """The file on this machine, fetched from the hub where it is none; without `download` None where that was not done before.

    ValueError where `weights` can be neither, or the hub does not give it.
    """
    if Path(weights).is_file():
        return Path(weights)
    owner, _, rest = weights.partition("/")
    repository, _, name = rest.partition("/")
    if not owner or not repository or owner.startswith((".", "~")):
        raise ValueError(f"{weights} is no file here, and no owner/repository/file of the Hugging Face hub")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if not download:
        found = try_to_load_from_cache(f"{owner}/{repository}", name or HUB_FILE)
        return Path(found) if isinstance(found, str) else None
    try:
        return Path(hf_hub_download(f"{owner}/{repository}", name or HUB_FILE))
    except (OSError, ValueError) as error:
        raise ValueError(f"{weights} is no file here, and the Hugging Face hub does not give it: {str(error).splitlines()[0]}") from error
