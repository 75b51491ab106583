"""A small detector, and small models that branch in Python on what they compute."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

__all__ = ["Backbone", "images", "tiny_detector"]


class Backbone(nn.Module):
    """Two levels of features."""

    out_channels = 12

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 10, 3, stride=4, padding=1), nn.BatchNorm2d(10), nn.ReLU()
        )
        self.low = nn.Conv2d(10, 12, 3, stride=2, padding=1)
        self.high = nn.Conv2d(12, 12, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = torch.relu(self.low(self.stem(x)))
        return {"0": low, "1": self.high(low)}


def tiny_detector() -> nn.Module:
    """Return a Faster R-CNN that always finds something."""
    torch.manual_seed(0)
    anchors = AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2)
    model: nn.Module = FasterRCNN(
        Backbone(),
        num_classes=5,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_test=20,
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2),
        box_score_thresh=0.0,
        box_detections_per_img=7,
    )
    return model.eval()


def images() -> list[Tensor]:
    """Return two images of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.rand(3, 64, 80, generator=generator),
        torch.rand(3, 72, 64, generator=generator),
    ]
