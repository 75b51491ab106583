"""Detectors: each cut, proven on one image, and compared, without export; one line per model.

They are built small where their arguments allow (images are resized to 96 pixels), with random weights, and with
thresholds at zero, so that every part runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models as tv
from torch import Tensor, nn

from graphprune.capture import capture
from graphprune.errors import GraphpruneError
from graphprune.groups import DependencyGroups
from graphprune.pipeline import Pipeline
from graphprune.plan import Plan
from graphprune.zoo.models import vary

__all__ = ["Detected", "build_detector", "detector_names", "run_detector"]

_SMALL: dict[str, Any] = {"min_size": 96, "max_size": 128}
_REGIONS: dict[str, Any] = {
    "box_score_thresh": 0.0,
    "rpn_post_nms_top_n_test": 12,
    "box_detections_per_img": 6,
}
_DENSE: dict[str, Any] = {"score_thresh": 0.0, "detections_per_img": 6, "topk_candidates": 20}
_TARGET = 'dependency-groups,magnitude,choose-channels{target="macs=0.5"},remove-channels'


@dataclass(frozen=True, kw_only=True)
class Detected:
    """What became of one detector."""

    model: str
    captured: str = ""
    """How: the dialect."""
    params: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    """Before and after, for one image."""
    fixed: int = 0
    """Places where its code holds a size as a number."""
    error: float | None = None
    """Largest relative difference between masked and cut model."""
    found: int = 0
    """Detections that were compared."""
    seconds: float = 0.0
    result: str = "passed"


def detector_names() -> tuple[str, ...]:
    """Return torchvision's detection and keypoint models."""
    return tuple(tv.list_models(tv.detection))


def build_detector(name: str, *, seed: int = 0) -> nn.Module:
    """Return a small form of a detector, with random weights of which none is constant."""
    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if name.startswith("ssd"):
        options |= _DENSE  # their backbones fix the size of the image
    elif name.startswith(("fcos", "retinanet_resnet50_fpn_v2")):
        # A group norm wants more than one value in its coarsest level.
        options |= {"min_size": 192, "max_size": 256} | _DENSE
    elif name.startswith("retinanet"):
        options |= _SMALL | _DENSE
    else:
        options |= _SMALL | _REGIONS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = tv.get_model(name, **options)
        vary(model)
    return model.eval()


def run_detector(name: str) -> Detected:
    """Cut one detector to half its MACs and prove it; a failure ends the row, not the run."""
    started = time.perf_counter()
    image = torch.rand(3, 96, 112, generator=torch.Generator().manual_seed(1))
    try:
        model = build_detector(name)
        program = capture(model, [image], source=f"torchvision:{name}")
        result = Pipeline.parse(_TARGET).run(program, device="cpu")
        groups, plan = result.facts[DependencyGroups], result.facts[Plan]
        assert isinstance(groups, DependencyGroups)
        assert isinstance(plan, Plan)
        check = result.checks["surgery"]
        after = sum(p.numel() for p in result.program.module.parameters())
        # By the dense run's control flow: another number of boxes would be other work.
        macs = groups.cost.total(plan.keep(program, groups)).macs
        with torch.no_grad():
            outputs = result.program.module(image)
    except GraphpruneError as error:
        seconds = time.perf_counter() - started
        return Detected(model=name, seconds=seconds, result=str(error).splitlines()[0])
    return Detected(
        model=name,
        captured=program.dialect,
        params=(groups.cost.params, after),
        macs=(groups.cost.macs, macs),
        fixed=len(program.fixed),
        error=check.max_abs_err,
        found=_count(outputs),
        seconds=time.perf_counter() - started,
        result="passed" if check.passed else check.detail,
    )


def _count(outputs: Any) -> int:
    boxes: list[Tensor] = [one["boxes"] for one in outputs]
    return sum(len(b) for b in boxes)
