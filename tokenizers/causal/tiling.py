"""Large frames in tiles: layer by layer, which changes nothing, and of the latent, which does.

Layer-wise tiling is what ProMAG uses for high resolution (project page of arXiv 2501.05442): every convolution is computed tile by
tile, each read with the halo its kernel reaches, while normalisation keeps seeing whole frames. The result is the untiled one to
rounding, at any tile size. What shrinks is the workspace of the convolutions, not the features between them: that of a GPU's library
may exceed all features together, that of the CPU's is small to begin with. Cutting the latent before the decoder, the usual way, is
here to be compared with: tiles do not see their neighbours, and each is normalised by itself.

Legend: B clips, C channels, T H W frames, rows, columns, Z latent channels, t h w latent positions.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kinetok.tokenizers.base import Tokenizer, Tokens
from kinetok.tokenizers.causal.chunks import blend

Numbers: TypeAlias = int | Sequence[int]


class LayerwiseTiling(TorchFunctionMode):
    """`with LayerwiseTiling(128): model.encode(video)`: each 2D and 3D convolution inside yields 128 x 128 cells at a time.

    It works on whatever model runs inside, in this thread, and changes none. For inference; gradients pass, but slowly.
    """

    def __init__(self, tile: int) -> None:
        super().__init__()
        if tile < 1:
            raise ValueError(f"tile: an edge of {tile} cells holds nothing; 64 to 256 are usual")
        self.tile = tile

    def __torch_function__(
        self, func: Callable[..., Tensor], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        named = kwargs or {}
        if func in {F.conv2d, F.conv3d, torch.mkldnn_convolution}:
            return tiled_convolution(func, self.tile, *args, **named)
        return func(*args, **named)


def tiled(tile: int | None) -> AbstractContextManager[object]:
    """`LayerwiseTiling`, or nothing where `tile` is None."""
    return nullcontext() if tile is None else LayerwiseTiling(tile)


class Convolution(NamedTuple):
    """What torch's convolutions take behind input, weight and bias."""

    stride: Numbers = 1
    padding: Numbers = 0
    dilation: Numbers = 1
    groups: int = 1


def tiled_convolution(
    convolve: Callable[..., Tensor], tile: int, x: Tensor, weight: Tensor, bias: Tensor | None = None, *numbers: Any, **named: Any
) -> Tensor:
    """`convolve(x, weight, bias, ...)`, at most `tile` x `tile` output positions at a time, each with the input that it reaches."""
    convolution = Convolution(*numbers, **named)
    axes = weight.dim() - 2
    stride, padding, dilation = (_each(value, axes) for value in convolution[:3])
    reach = [spread * (kernel - 1) + 1 for spread, kernel in zip(dilation, weight.shape[2:], strict=True)]
    shape = [(x.shape[2 + axis] + 2 * padding[axis] - reach[axis]) // stride[axis] + 1 for axis in range(axes)]
    if max(shape[-2:]) <= tile:
        return convolve(x, weight, bias, **convolution._asdict())
    output: Tensor | None = None
    for spans in product(_overlapping(shape[-2], tile), _overlapping(shape[-1], tile)):
        piece = x
        for dim, span in zip((-2, -1), spans, strict=True):
            first = span.start * stride[dim] - padding[dim]
            piece = _with_halo(piece, dim, first, first + (span.stop - span.start - 1) * stride[dim] + reach[dim])
        part = convolve(piece, weight, bias, stride=stride, padding=[*padding[:-2], 0, 0], dilation=dilation, groups=convolution.groups)
        if output is None:
            output = _room_for(part, shape)
        output[..., spans[0], spans[1]] = part
    assert output is not None
    return output


def decode_latent_tiles(tokenizer: Tokenizer, tokens: Tokens, *, tile: int, overlap: int) -> Tensor:
    """The video decoded from `tile` x `tile` pieces of the latent that share `overlap` cells, blended linearly: not the untiled one."""
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: {overlap} cells leave nothing new in a tile of {tile}")
    rows, columns = (_overlapping(size, tile, overlap) for size in tokens.values.shape[-2:])
    bands = []
    for row in rows:
        pieces = [tokenizer.decode(Tokens(tokens.values[..., row, column], tokens.frames)) for column in columns]
        pixels = overlap * pieces[0].shape[-1] // (columns[0].stop - columns[0].start)
        bands.append(torch.cat(list(blend(pieces, pixels, dim=-1)), dim=-1))
    return torch.cat(list(blend(bands, pixels, dim=-2)), dim=-2)


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    if isinstance(value, str):
        raise ValueError(f"padding={value!r} is not tiled: give it as numbers")
    return [value] * axes if isinstance(value, int) else list(value)


def _overlapping(size: int, tile: int, overlap: int = 0) -> list[slice]:
    starts = range(0, max(size - overlap, 1), tile - overlap)
    return [slice(start, min(start + tile, size)) for start in starts]


def _with_halo(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """Positions start to stop of one of the last two dimensions, zeros where they lie outside."""
    size = x.shape[dim]
    inside = x.narrow(dim, max(start, 0), min(stop, size) - max(start, 0))
    missing = (max(-start, 0), max(stop - size, 0))
    if not any(missing):
        return inside
    return F.pad(inside, missing if dim == -1 else (0, 0, *missing))


def _room_for(part: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty result in the memory format of its first tile."""
    last = torch.channels_last_3d if part.dim() == 5 else torch.channels_last
    layout = last if part.is_contiguous(memory_format=last) else torch.contiguous_format
    return torch.empty((*part.shape[:2], *shape), dtype=part.dtype, device=part.device, memory_format=layout)
