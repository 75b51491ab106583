"""What every tensor of the cut program will look like, read off the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphprune.labels.field import Field, kept_extent
from graphprune.labels.trace import Labels, TensorInfo, tensor_infos

__all__ = ["Shapes"]


class Shapes:
    """Old and new sizes of what each graph node produces."""

    def __init__(self, labels: Labels, keep: NDArray[np.bool_]) -> None:
        """Take the labels of a program and which atoms stay."""
        self.values: Mapping[str, Any] = labels.values
        self.means = labels.means
        self.batch = labels.batch
        self.keep = keep
        self._kept: dict[int, bool] = {}
        self._extents: dict[tuple[int, int], int] = {}

    def info(self, value: Any) -> TensorInfo | None:
        """Return what is known of a node that produced one tensor."""
        found = self.values.get(getattr(value, "name", ""))
        return found if isinstance(found, TensorInfo) else None

    def touched(self, node: fx.Node) -> bool:
        """Whether a tensor that the node takes or produces shrinks."""
        names = (node.name, *(n.name for n in node.all_input_nodes))
        return any(self.changed(i) for i in tensor_infos([self.values.get(n) for n in names]))

    def first(self, node: fx.Node) -> TensorInfo | None:
        """Return what is known of the first tensor that a node produced."""
        return next(iter(tensor_infos(self.values.get(node.name))), None)

    def is_whole(self, field: Field) -> bool:
        """Whether everything that `field` labels stays."""
        key = id(field.atoms)
        if key not in self._kept:
            self._kept[key] = bool(self.keep[field.atoms].all())
        return self._kept[key]

    def changed(self, info: TensorInfo) -> bool:
        """Whether the tensor shrinks."""
        return any(not self.is_whole(f) for f in info.fields)

    def size(self, info: TensorInfo, dim: int) -> int:
        """Return the new size along `dim`."""
        field = info.field_of(dim)
        if field is None or self.is_whole(field):
            return info.shape[dim]
        key = (id(field.atoms), field.dims.index(dim))
        if key not in self._extents:
            self._extents[key] = kept_extent(field, dim, self.keep)
        return self._extents[key]

    def shape(self, info: TensorInfo) -> tuple[int, ...]:
        """Return the new shape."""
        return tuple(self.size(info, d) for d in range(len(info.shape)))

    def kept_in(self, info: TensorInfo, dim: int, start: int, stop: int) -> int:
        """Return how many positions of ``start:stop`` along `dim` stay."""
        field = info.field_of(dim)
        if start >= stop:
            return 0
        if field is None or self.is_whole(field):
            return stop - start
        axis = field.dims.index(dim)
        part = field.atoms[(slice(None),) * axis + (slice(start, stop),)]
        return kept_extent(Field(field.dims, part), dim, self.keep)

    def sizes(self, infos: Sequence[TensorInfo], dim: int) -> list[int]:
        """Return the new size along `dim` of several tensors."""
        return [self.size(info, dim) for info in infos]
