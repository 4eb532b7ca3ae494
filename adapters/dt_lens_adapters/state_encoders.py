"""State encoders that are more than one linear map: a stack of them, or convolutions over images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from dt_lens.decision_transformer.model import activation

__all__ = ["ConvStack", "LinearStack", "image_side"]


def _behind(x: Tensor, names: Sequence[str]) -> Tensor:
    for name in names:
        x = activation(name, x)
    return x


class LinearStack(nn.Module):
    """Linear maps, each followed by its activations.

    Args:
        widths: features before, between and after the maps.
        behind: for each map the names of its activations, in order; none for a linear one.
    """

    def __init__(self, widths: Sequence[int], behind: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.behind = tuple(tuple(names) for names in behind)
        self.state_shape = (widths[0],)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, step, widths[0]]`` to ``[batch, step, widths[-1]]``."""
        for layer, names in zip(self.layers, self.behind, strict=True):
            x = _behind(layer(x), names)
        return x


class ConvStack(nn.Module):
    """Convolutions over square images without padding, then one linear map over the flattened result.

    Args:
        channels: of the image and after each convolution.
        kernels, strides: of each convolution.
        side: pixels of the image's edge.
        d_model: the linear map's output size.
        inner: the activations after each convolution, in order.
        last: the activations after the linear map, in order.
        pixels: 255 where it reads pixels from 0 to 1, which an environment gives as whole numbers.
    """

    def __init__(
        self,
        channels: Sequence[int],
        kernels: Sequence[int],
        strides: Sequence[int],
        side: int,
        d_model: int,
        inner: Sequence[str],
        last: Sequence[str],
        pixels: float = 1.0,
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel, stride)
            for (a, b), kernel, stride in zip(pairwise(channels), kernels, strides, strict=True)
        )
        left = side
        for kernel, stride in zip(kernels, strides, strict=True):
            left = (left - kernel) // stride + 1
        self.linear = nn.Linear(channels[-1] * left * left, d_model)
        self.inner, self.last = tuple(inner), tuple(last)
        self.image, self.pixels = (channels[0], side, side), pixels
        self.state_shape = (channels[0] * side * side,)

    def forward(self, states: Tensor) -> Tensor:
        """``[batch, step, channel * row * column]``, or with these three as axes, to ``[batch, step, d_model]``."""
        x = torch.unflatten(states.flatten(2), 2, self.image).flatten(0, 1)
        for conv in self.convs:
            x = _behind(conv(x), self.inner)
        x = _behind(self.linear(x.flatten(1)), self.last)
        return torch.unflatten(x, 0, states.shape[:2])


def image_side(left: int, kernels: Sequence[int], strides: Sequence[int]) -> int:
    """The smallest square image of which these convolutions leave ``left`` rows.

    >>> image_side(7, (8, 4, 3), (4, 2, 1))
    84
    """
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        left = (left - 1) * stride + kernel
    return left
