"""torchvision's own operators: regions of a feature map, resampled; their coordinates cannot change."""

from __future__ import annotations

from typing import Any

from graphprune.labels.field import Field
from graphprune.labels.rules import rule
from graphprune.labels.trace import Call, Trace

__all__: list[str] = []


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(trace: Trace, call: Call) -> Any:
    """Resample regions ``(number of the image, x1, y1, x2, y2)``: channels (dim 1) keep their label."""
    x, boxes = call.args[:2]
    trace.freeze(boxes, "coordinates of regions")
    height, width = call.args[3], call.args[4]
    fields = []
    for field in trace.fields(x):
        lost = [d for d in field.dims if d != 1]
        left = trace.settle(field, lost, "resampled") if lost else field
        if left is not None:
            fields.append(Field((1,), left.atoms))
    out = trace.new((boxes.shape[0], x.shape[1], height, width), x, tuple(fields))
    if call.name == "torchvision::roi_align":
        return out
    return out, trace.new(out.shape, x)
