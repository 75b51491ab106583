"""Products of shifted images: the second moments of a convolution's patches, without writing the patches down.

Patches of a convolution of stride 1 overlap. With image x, output places p in a rectangle and kernel offsets a, b, the
block of the sum over all patches that belongs to a and b is

    G[a, b] = sum_p x[p + a] x[p + b]^T = sum_{q in rectangle shifted by a} x[q] x[q + D]^T,      D = b - a

so it depends on a only through the border:

    G[a, b] = whole[D] - rows outside a's rectangle - columns outside it + corners outside in both senses

``whole[D]`` is one product of two matrices ``[pixels, channels]``, the second read from D pixels further on: images lie
one behind the other, with as many zeros between rows and images as a displacement reaches. Of D and -D one is enough
where x meets itself: for a 3x3 kernel 13 products of this kind replace 81, and thin strips.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ShiftedProducts", "pays_off"]

_ROWS = 1 << 16
"""Pixels of one product: what is summed in the precision of the activations; products are added up in float64."""

Pair = tuple[int, int]


def pays_off(
    kernel: Sequence[int], dilation: Sequence[int], size: Sequence[int], places: Sequence[int]
) -> bool:
    """Whether products of shifted images cost clearly less than products of patches.

    Args:
        kernel: Height and width of the kernel.
        dilation: Of the kernel.
        size: Height and width of the image.
        places: Height and width of the output.
    """
    area = kernel[0] * kernel[1]
    extended = [n + d * (k - 1) for n, k, d in zip(size, kernel, dilation, strict=True)]
    return area + 1 < area**2 * places[0] * places[1] / (extended[0] * extended[1]) / 4


@dataclass(frozen=True)
class _Axis:
    """One spatial dimension: its segments that lie outside some offset's rectangle."""

    segments: tuple[Pair, ...]
    """Start and end, in pixels of the image."""
    outside: Tensor
    """``[offsets, segments]``, 1 where the segment is outside the offset's rectangle."""

    @classmethod
    def of(
        cls, size: int, kernel: int, dilation: int, padding: Pair, device: torch.device
    ) -> _Axis:
        starts = [dilation * k - padding[0] for k in range(kernel)]
        extent = size + sum(padding) - dilation * (kernel - 1)
        rectangles = [(max(0, s), max(0, min(size, s + extent))) for s in starts]
        edges = sorted({0, size, *itertools.chain.from_iterable(rectangles)})
        found = []
        for start, end in itertools.pairwise(edges):
            outside = [not (first <= start and end <= last) for first, last in rectangles]
            if any(outside):
                found.append(((start, end), outside))
        columns = [outside for _, outside in found]
        matrix = torch.tensor(columns, dtype=torch.float64, device=device).reshape(-1, kernel)
        return cls(tuple(segment for segment, _ in found), matrix.T)


class ShiftedProducts:
    """Adds up the products of all patches of one batch of images with those of another, or with its own."""

    def __init__(self, kernel: Pair, dilation: Pair, padding: tuple[Pair, Pair]) -> None:
        """Start at zero; `padding` is with zeros."""
        self.kernel, self.dilation, self.padding = kernel, dilation, padding
        self.blocks: Tensor | None = None

    def add(self, x: Tensor, other: Tensor | None = None) -> None:
        """Add the patches of a batch; rows of the sum belong to `x`, columns to `other`, which is `x` if not given.

        Shapes:
            x, other: ``[batch, channels, height, width]``, without padding; the channels may differ.
        """
        size = (x.shape[2], x.shape[3])
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        left = self._laid_out(x, reach)
        right = left if other is None else self._laid_out(other, reach)
        if self.blocks is None:
            shape = (*self.kernel, *self.kernel, left.shape[1], right.shape[1])
            self.blocks = torch.zeros(shape, dtype=torch.float64, device=x.device)
        axes = [
            _Axis.of(*arguments, x.device)
            for arguments in zip(size, self.kernel, self.dilation, self.padding, strict=True)
        ]
        line = size[1] + reach[1]
        front = reach[0] * line + reach[1]
        pixels = len(x) * (size[0] + reach[0]) * line
        offsets = {
            d: d[0] * self.dilation[0] * line + d[1] * self.dilation[1] for d in self._shifts(other)
        }
        whole = torch.zeros(
            len(offsets), *self.blocks.shape[-2:], dtype=torch.float64, device=x.device
        )
        for first in range(front, front + pixels, _ROWS):
            last = min(first + _ROWS, front + pixels)
            own = left[first:last].mT
            for number, offset in enumerate(offsets.values()):
                whole[number] += own @ right[first + offset : last + offset]
        place = torch.arange(front, front + pixels, device=x.device).view(len(x), -1, line)
        rows, columns = (list(axis.segments) for axis in axes)
        full = [(0, size[0])], [(0, size[1])]
        by_row, by_column, corner = (
            self._strips(left, right, place, lines, across, list(offsets.values()))
            for lines, across in ((rows, full[1]), (full[0], columns), (rows, columns))
        )
        out_rows, out_columns = axes[0].outside, axes[1].outside
        sums = whole - torch.einsum("ar,rndxy->andxy", out_rows, by_row)
        sums = sums - torch.einsum("bc,ncdxy->nbdxy", out_columns, by_column)
        sums = sums + torch.einsum("ar,bc,rcdxy->abdxy", out_rows, out_columns, corner)
        for number, shift in enumerate(offsets):
            self._place(sums[:, :, number], shift, mirror=other is None)

    def total(self) -> Tensor:
        """Return the sum, ``[left features, right features]``; features go by channel and place in the kernel."""
        assert self.blocks is not None
        size = self.kernel[0] * self.kernel[1]
        left, right = self.blocks.shape[-2:]
        return self.blocks.permute(4, 0, 1, 5, 2, 3).reshape(left * size, right * size)

    def _shifts(self, other: Tensor | None) -> list[Pair]:
        """Return displacements in steps of the dilation; one of each pair of opposite ones for an image with itself."""
        height, width = self.kernel
        every = itertools.product(range(1 - height, height), range(1 - width, width))
        return [d for d in every if other is not None or d >= (0, 0)]

    @staticmethod
    def _laid_out(x: Tensor, reach: Sequence[int]) -> Tensor:
        """Return ``[pixels, channels]``, zeros after each row and image, before the first and after the last."""
        batch, channels, height, width = x.shape
        tall, wide = height + reach[0], width + reach[1]
        front = reach[0] * wide + reach[1]
        pixels = x.new_zeros(batch * tall * wide + 2 * front, channels)
        images = pixels[front : front + batch * tall * wide].view(batch, tall, wide, channels)
        images[:, :height, :width] = x.permute(0, 2, 3, 1)
        return pixels

    @staticmethod
    def _strips(
        left: Tensor,
        right: Tensor,
        place: Tensor,
        rows: Sequence[Pair],
        columns: Sequence[Pair],
        offsets: Sequence[int],
    ) -> Tensor:
        """Return the products within strips of the image, ``[rows, columns, offsets, left, right]``."""
        sums = torch.zeros(
            (len(rows), len(columns), len(offsets), left.shape[1], right.shape[1]),
            dtype=torch.float64,
            device=left.device,
        )
        for (i, (top, bottom)), (j, (start, end)) in itertools.product(
            enumerate(rows), enumerate(columns)
        ):
            chosen = place[:, top:bottom, start:end].flatten()
            own = left[chosen].mT
            for number, offset in enumerate(offsets):
                sums[i, j, number] = own @ right[chosen + offset]
        return sums

    def _place(self, sums: Tensor, shift: Pair, *, mirror: bool) -> None:
        """Add what belongs to one displacement to every pair of offsets that are so far apart."""
        assert self.blocks is not None
        height, width = self.kernel
        for i, j in itertools.product(range(height), range(width)):
            k, m = i + shift[0], j + shift[1]
            if 0 <= k < height and 0 <= m < width:
                block = sums[i if len(sums) > 1 else 0, j if sums.shape[1] > 1 else 0]
                self.blocks[i, j, k, m] += block
                if mirror and shift != (0, 0):
                    self.blocks[k, m, i, j] += block.mT
